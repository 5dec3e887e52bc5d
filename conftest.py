"""What every pytest run needs, wherever it starts: notebooks that are checked to the end.

nbval 0.11 lets two things pass or fail wrongly; both are mended here, on its kernel's messages.

- A magic that raises ``UsageError`` prints to stderr and ends in a reply of status "error", which nbval
  never looks at: the cell passes. Here such a cell fails, unless it is tagged ``raises-exception``.
- ``update_display_data`` is not understood: an output that a cell rewrote in place would be compared in
  its first form. Here it is compared in its last one, which is what a saved notebook holds.
"""

from __future__ import annotations

import functools
import importlib.util
import os

if "PYTHONPATH" in os.environ:  # kernels start in other folders, where a relative path leads nowhere
    folders = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders))


def _complete_nbval() -> None:
    from nbformat import NotebookNode, from_dict
    from nbval.kernel import RunningKernel
    from nbval.plugin import IPyNbCell

    original_get_message, original_runtest = RunningKernel.get_message, IPyNbCell.runtest

    @functools.wraps(original_get_message)
    def get_message(self, stream, timeout=None):
        message = original_get_message(self, stream, timeout=timeout)
        kind, content = message["msg_type"], message["content"]
        if stream == "shell" and kind == "execute_reply":
            self.last_reply = content
        elif kind in ("display_data", "update_display_data"):
            shown = self.__dict__.setdefault("shown_data", {})
            name = content.get("transient", {}).get("display_id")
            if kind == "display_data":  # a NotebookNode is kept as it is by nbval, a plain dict is copied
                content["data"] = shown[name] = from_dict(content["data"])
            elif name in shown:
                data: NotebookNode = shown[name]
                data.clear()
                data.update(content["data"])
        return message

    @functools.wraps(original_runtest)
    def runtest(self):
        kernel = self.parent.kernel
        kernel.last_reply = {}
        original_runtest(self)
        reply = kernel.last_reply
        if reply.get("status") == "error" and not self.options["check_exception"]:
            what = f"{reply.get('ename')}: {reply.get('evalue')}"
            self.raise_cell_error("Cell ended in error without a traceback", what)

    RunningKernel.get_message = get_message
    IPyNbCell.runtest = runtest


if importlib.util.find_spec("nbval"):
    _complete_nbval()
