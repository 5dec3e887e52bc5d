"""A private JupyterLab and a headless Chromium for the tests in this folder.

One server and one browser for the whole pytest run; every test gets a page (and kernels) of its own::

    def test_dashboard(lab_page):
        lab_page.notebook(["%load_ext gptoss_workbench", "%gptoss explore"])   # write, open
        lab_page.run_all()
        view = lab_page.page.locator("[data-seq]").first       # .page is Playwright's own Page
        view.wait_for()                                        # wait for what was painted, never for time
        lab_page.theme("dark")
        lab_page.screenshot("dashboard-dark")                  # a PNG, its path is returned
        assert lab_page.value("model.name") == "nano"          # a Python expression, through JSON
        assert lab_page.errors == []                           # what the browser's console complained about

Fixtures:
    lab_page      a LabPage; its kernels are shut down after the test, a failing test leaves a screenshot
    lab_url       the address of the server
    lab_root      the folder it serves, empty at the start
    chromium      Playwright's Browser, for pages that need no lab (exported HTML, opened from file://)
    screenshots   the folder for pictures: $GPTOSS_SCREENSHOTS, else one of pytest's temporary folders

Needs jupyterlab, playwright and a Chromium: ``CHROMIUM`` names the browser, else the first of chromium,
chromium-browser, google-chrome on the PATH. What is missing skips these tests and says so; with CI set it
fails them. The server and its kernels get an empty HOME and the real cache folder. Playwright's sync API
holds an event loop in this thread, so a test that needs ``asyncio.run`` belongs in a process of its own.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
KERNEL = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
# The news toast covers the bottom right corner; the server's own flags alone do not stop it.
SETTINGS = {"@jupyterlab/apputils-extension/notification": {"fetchNews": "false"}}
# Said by JupyterLab or Chromium themselves, whatever the notebook does. The last is React's, on a machine that is very
# busy; our views never call removeChild.
HARMLESS = ("favicon", "GPU stall", "Failed to load resource", "MathJax", "source map", "'removeChild' on 'Node'")


class LabPage:
    """One browser page on the lab. ``page`` is Playwright's; the methods know JupyterLab."""

    def __init__(self, page: Page, url: str, root: Path, screenshots: Path) -> None:
        self.page, self.url, self.root, self.screenshots = page, url, root, screenshots
        self.console: list[tuple[str, str]] = []
        page.on("console", lambda message: self.console.append((message.type, message.text[:500])))
        page.on("pageerror", lambda error: self.console.append(("exception", str(error)[:500])))

    @property
    def errors(self) -> list[tuple[str, str]]:
        """Errors and uncaught exceptions of the browser so far, without those that are always there."""
        return [
            (kind, text) for kind, text in self.console
            if kind in ("error", "exception") and not any(part in text for part in HARMLESS)
        ]

    def notebook(self, cells: Sequence[str], name: str = "test.ipynb", timeout: float = 60) -> None:
        """Write a notebook of code cells into the served folder and open it."""
        import nbformat

        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, self.root / name)
        self.open(name, timeout)

    def open(self, name: str, timeout: float = 60) -> None:
        """Open a notebook of the served folder and wait for its kernel."""
        self.page.goto(f"{self.url}/lab/tree/{name}?reset")  # without reset, a stale workspace comes back
        shown = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell"
        self.page.wait_for_selector(shown, timeout=timeout * 1000)
        self.wait_idle(timeout)

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until the kernel says idle. For views, wait for what they paint instead."""
        self.page.wait_for_function(f"() => {KERNEL}?.status === 'idle'", timeout=timeout * 1000)

    def command(self, name: str, args: dict[str, Any] | None = None) -> None:
        """Run a JupyterLab command to its end, e.g. ``"docmanager:save"``."""
        self.page.evaluate(
            "([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)",
            [name, args or {}],
        )

    def run_all(self, timeout: float = 120) -> None:
        """Run every cell of the notebook and wait for the last reply."""
        self.page.evaluate("""() => {
            window.__ran = false;
            window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => window.__ran = true);
        }""")
        self.page.wait_for_function("() => window.__ran", timeout=timeout * 1000)
        self.wait_idle(timeout)

    def execute(self, code: str, timeout: float = 120) -> str:
        """Run code on the notebook's kernel, beside its cells. Returns the reply's status: ok or error."""
        return self._request({"code": code}, timeout)["status"]

    def value(self, expression: str, timeout: float = 120) -> Any:
        """The value of a Python expression in the notebook's kernel; it must be JSON."""
        expressions = {"value": f"__import__('json').dumps({expression})"}
        reply = self._request({"code": "", "silent": True, "user_expressions": expressions}, timeout)
        found = reply["user_expressions"]["value"]
        if found["status"] != "ok":
            raise RuntimeError(f"{expression}: {found['ename']}: {found['evalue']}")
        return json.loads(ast.literal_eval(found["data"]["text/plain"]))

    def _request(self, content: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.page.evaluate(
            f"""(content) => {{ window.__reply = null;
            {KERNEL}.requestExecute(content).done.then(reply => window.__reply = reply.content); }}""",
            content,
        )
        self.page.wait_for_function("() => window.__reply", timeout=timeout * 1000)
        return self.page.evaluate("() => window.__reply")

    def interrupt(self) -> None:
        """What the toolbar's stop button does."""
        self.page.evaluate(f"() => {KERNEL}.interrupt()")

    def theme(self, name: str) -> None:
        """Switch the lab to ``"light"`` or ``"dark"``."""
        self.command("apputils:change-theme", {"theme": f"JupyterLab {name.capitalize()}"})
        light = "true" if name == "light" else "false"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")

    def outputs(self) -> list[str]:
        """The text of every output on the page, in order."""
        return self.page.locator(".jp-OutputArea-output").all_inner_texts()

    def screenshot(self, name: str, selector: str | None = None) -> Path:
        """A PNG of the page, or of the first element that the selector finds."""
        path = self.screenshots / f"{name}.png"
        target = self.page.locator(selector).first if selector else self.page
        target.screenshot(path=path)
        return path

    def close(self) -> None:
        """Shut the page's kernels down and close it."""
        with contextlib.suppress(Exception):  # a page that never opened a notebook has nothing to shut down
            self.page.evaluate("() => window.jupyterapp?.serviceManager.sessions.shutdownAll()")
        self.page.context.close()


def missing(what: str) -> NoReturn:
    """A browser test without what it needs is skipped; in CI that would hide it, so there it fails."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{what}; CI is set, so the browser tests must run", pytrace=False)
    pytest.skip(what)


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(root: Path, home: Path, start_timeout: float = 60.0) -> Iterator[str]:
    """JupyterLab on a free port, all of its folders under ``home``; yields its address."""
    for plugin, values in SETTINGS.items():
        path = home / "settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    port = free_port()
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
        "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=",
        "--ServerApp.port_retries=0", "--expose-app-in-browser", f"--ServerApp.root_dir={root}",
        "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    environment = dict(
        os.environ, HOME=str(home), IPYTHONDIR=str(home / "ipython"),
        XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
        JUPYTER_CONFIG_DIR=str(home / "config"), JUPYTER_RUNTIME_DIR=str(home / "runtime"),
        JUPYTERLAB_SETTINGS_DIR=str(home / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(home / "workspaces"),
    )
    log, url = home / "lab.log", f"http://127.0.0.1:{port}"
    with log.open("w") as sink:
        server = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
    try:
        give_up = time.monotonic() + start_timeout
        while True:
            if server.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{url}/api/status", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if not importlib.util.find_spec("playwright"):
        missing("playwright is not installed (pip install -c constraints.txt -e '.[dev]')")
    path = find_chromium()
    if path is None:
        missing("no Chromium found on PATH (apt install chromium, or set CHROMIUM to one)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("GPTOSS_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def lab_url(lab_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not importlib.util.find_spec("jupyterlab"):
        missing("jupyterlab is not installed (pip install -c constraints.txt -e '.[dev]')")
    with serve(lab_root, tmp_path_factory.mktemp("home")) as url:
        yield url


@pytest.fixture
def lab_page(
    chromium: Browser, lab_url: str, lab_root: Path, screenshots: Path, request: pytest.FixtureRequest
) -> Iterator[LabPage]:
    page = chromium.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    lab = LabPage(page, lab_url, lab_root, screenshots)
    yield lab
    if request.node.stash.get(FAILED, False):
        print("screenshot:", lab.screenshot(f"failed-{request.node.name}"))
        print("console:", *lab.console, sep="\n  ")
    lab.close()


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")
