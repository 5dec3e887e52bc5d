"""``%gptoss`` and ``%%gptoss``: the workbench from a cell's first character on.

Mistakes end in one clean ``UsageError``; what the library refuses is said in its own words, without a traceback.
Loading the extension must cost nothing, so a command imports what it needs when it runs.
"""

from __future__ import annotations

import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.display import display

from gptoss_jupyter import commands
from gptoss_workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import DisplayHandle

    from gptoss_workbench.harmony.vocabulary import Vocabulary
    from gptoss_workbench.model.generation import Generation

REFRESH = 0.1
"""Seconds between two updates of a running answer."""

ENDINGS = {
    "max_tokens": "cut off after {} tokens; --max-tokens raises the limit",
    "stopped": "stopped after {} tokens",
    "interrupted": "stopped after {} tokens",
}


@magics_class
class GptossMagics(Magics):
    """The magic, and the model it works on: the user's variable that ``load`` filled, ``model`` at first."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.target = "model"

    @line_cell_magic
    def gptoss(self, line: str, cell: str | None = None) -> Any:
        words = commands.split(line)
        if cell is not None:
            words = ["ask", *(words[1:] if words[:1] == ["ask"] else words)]
        command, *rest = words or ["help"]
        parser = commands.parser_of(command)
        if {"-h", "--help"} & set(rest):
            return print(commands.details(command))
        args = parser.parse_args(rest)
        if cell is not None:
            args.text = self._body(args, cell)
        try:
            return getattr(self, f"_{command}")(args)
        except WorkbenchError as error:
            raise UsageError(str(error)) from error

    gptoss.__doc__ = f"The gpt-oss workbench.\n\n{commands.overview()}\n"

    @staticmethod
    def _body(args: Namespace, cell: str) -> list[str]:
        if args.text:
            raise UsageError(
                f"%%gptoss: the question is the body of the cell, so {args.text[0]!r} cannot stand on its first "
                f"line (options: {', '.join(commands.COMMANDS['ask'].options)})"
            )
        return [cell.strip("\n")]

    # the commands ---------------------------------------------------------------------------------------------

    def _help(self, args: Namespace) -> None:
        print(commands.details(args.name) if args.name else commands.overview())

    def _doctor(self, args: Namespace) -> None:
        from gptoss_jupyter import doctor

        print(doctor.report())

    def _load(self, args: Namespace) -> None:
        import gptoss_workbench as wb

        model = wb.load(args.name, revision=args.revision, dtype=args.dtype, device=args.device)
        self._keep(args.target, model)

    def _ask(self, args: Namespace) -> None:
        import gptoss_workbench as wb

        text = " ".join(args.text)
        if not text.strip():
            raise UsageError('there is no question: %gptoss ask "What is 27 + 58?", or a %%gptoss cell with a body')
        chat = wb.chat(text, system=args.system, developer=args.developer, effort=args.effort)
        model = self.model()
        generation = model.generate(
            chat, capture=args.capture.split(",") if args.capture else (), max_tokens=args.max_tokens,
            temperature=args.temperature, seed=args.seed,
        )
        self._namespace[args.target] = generation  # before it runs, so that an interrupt cannot lose it
        self._watch(generation, model.vocabulary)

    def _explore(self, args: Namespace) -> Any:
        import gptoss_workbench as wb

        options = {"prompt": " ".join(args.text)} if args.text else {}
        return wb.explore(self.model(), **options)

    # what they share ------------------------------------------------------------------------------------------

    @property
    def _namespace(self) -> dict[str, Any]:
        return self.shell.user_ns  # type: ignore[union-attr]

    def model(self) -> Any:
        """The model to work on; the embedded one is loaded, and named, if there is none."""
        import gptoss_workbench as wb

        found = self._namespace.get(self.target)
        if isinstance(found, wb.Model):
            return found
        if self.target in self._namespace:
            raise UsageError(
                f"the variable {self.target} holds no model but a {type(found).__name__}: "
                f"%gptoss load --as NAME puts one elsewhere, del {self.target} makes room"
            )
        print("No model is loaded yet, so the embedded one is taken.")
        self._keep(self.target, wb.load())
        return self._namespace[self.target]

    def _keep(self, target: str, model: Any) -> None:
        self.target = target
        self._namespace[target] = model
        print(f"{target} = {model!r}")

    def _watch(self, generation: Generation, vocabulary: Vocabulary) -> None:
        """Show the answer as it comes. An interrupt ends it, and what there is stays."""
        live = getattr(self.shell, "kernel", None) is not None  # a terminal cannot rewrite what it printed
        handle, shown = None, 0.0
        try:
            for _ in generation:
                if live and time.monotonic() - shown > REFRESH:
                    handle = show(generation, vocabulary, handle)
                    shown = time.monotonic()
        except KeyboardInterrupt:
            generation.stop()
            generation.finish()
        show(generation, vocabulary, handle)


def show(generation: Generation, vocabulary: Vocabulary, handle: DisplayHandle | None) -> Any:
    """Put a generation's answer, as far as it is, into an output: a new one, or the given one anew."""
    from gptoss_jupyter import markup, present

    said = present.messages(vocabulary, generation.spans)
    note = ENDINGS.get(generation.reason or "", "").format(len(generation.steps))
    bundle = {"text/plain": markup.as_text(said, note), "text/html": markup.as_html(said, note)}
    if handle is None:
        return display(bundle, raw=True, display_id=True)
    handle.update(bundle, raw=True)
    return handle


def register(ipython: InteractiveShell) -> None:
    if GptossMagics.__name__ not in ipython.magics_manager.registry:
        ipython.register_magics(GptossMagics)


def unregister(ipython: InteractiveShell) -> None:
    """IPython leaves magics where they are when an extension is unloaded."""
    ipython.magics_manager.registry.pop(GptossMagics.__name__, None)
    for kind in ("line", "cell"):
        ipython.magics_manager.magics[kind].pop("gptoss", None)
