"""The page in a real browser: a server of `workbench app`, headless Chromium, and when a page has settled.

What the benchmark of the page and its tests share. Takes the packages playwright and psutil, and a Chromium.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from workbench.errors import InputError, RunError
from workbench.figures import find_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
)  # fmt: skip
PATIENCE = 120.0
"""Seconds that anything may take before it is given up."""
COMMAND = (sys.executable, "-m", "workbench", "app")

# Since when, in milliseconds of the page's clock, nothing has moved: the script has run, what it sent is drawn, and no
# spinner or skeleton is left. A click shows in the script's state within a turn of the browser's event loop, so that a
# short silence is enough to know that nothing is under way. A page that waits for a job is drawn anew all the time:
# there a shorter silence has to do.
_QUIET = """
(silence) => {
    const app = document.querySelector('[data-testid="stApp"]');
    const waits = ["stSpinner", "stSkeleton", "stAppSkeleton", "stStatusWidget"].map((id) => `[data-testid="${id}"]`);
    const busy = !app || app.dataset.testScriptState !== "notRunning"
        || app.dataset.testConnectionState !== "CONNECTED"
        || document.querySelector([...waits, '[data-stale="true"]'].join(", ")) !== null;
    const now = performance.now();
    if (busy || window.__quiet === undefined) window.__quiet = busy ? undefined : now;
    const polled = document.querySelector('[class*="st-key-waiting-"]') !== null;
    return !busy && now - window.__quiet >= (polled ? Math.min(silence, 60) : silence) && {since: window.__quiet};
}
"""
_DRAWN = """() => document.querySelector('[data-testid="stMain"]')?.innerText.trim()"""
_IDLE = """() => !document.querySelector('[data-testid="stMain"] [data-testid="stProgress"]')"""
_BUSY = """
() => {
    const ids = [...document.querySelectorAll('[data-testid="stApp"] [data-testid], [data-stale="true"]')]
        .filter((one) => /Spinner|Skeleton|StatusWidget/.test(one.dataset.testid) || one.dataset.stale === "true")
        .map((one) => `${one.dataset.testid} in ${one.closest('[class*="st-key-"]')?.className}`);
    const app = document.querySelector('[data-testid="stApp"]')?.dataset;
    return `${app?.testScriptState}, ${app?.testConnectionState}, ${ids.slice(0, 5).join("; ")}`;
}
"""
SILENCE = 250
"""Milliseconds; sliders and number fields wait for up to 200 before they tell the server."""


@dataclass
class Server:
    """A running `workbench app`."""

    url: str
    process: Any
    """psutil.Popen"""
    log: Path

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serving(
    *arguments: object, command: Sequence[str] = COMMAND, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """`workbench app ARGUMENTS` on a free port until the end of the block; nothing that it started is left after it.

    RunError if the server ends, or doesn't answer within PATIENCE.
    """
    psutil = _imported("psutil")
    port = free_port()
    given = [*command, *map(str, arguments), "--port", str(port), "--no-browser"]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = psutil.Popen(
                given,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
                preexec_fn=_ends_with_us if sys.platform == "linux" else None,
            )
        server = Server(f"http://localhost:{port}", process, log)
        try:
            _wait(server)
            yield server
        finally:
            end(process)


def _ends_with_us() -> None:
    """Ask the kernel to end the new process when the one that started it ends, even if that is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(server: Server) -> None:
    """Until the server answers."""
    patience = time.monotonic() + PATIENCE
    while True:
        if (code := server.process.poll()) is not None:
            raise RunError(f"the server ended with exit code {code}:\n{server.output()}")
        with suppress(OSError), urllib.request.urlopen(f"{server.url}/_stcore/health", timeout=5) as answer:
            if answer.status == 200:
                return
        if time.monotonic() > patience:
            raise RunError(f"the server did not answer for {PATIENCE:.0f} s:\n{server.output()}")
        time.sleep(0.05)


def end(process: Any) -> None:
    """End a psutil.Process and all that it has started."""
    psutil = _imported("psutil")
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.terminate()
    _, left = psutil.wait_procs(family, timeout=5)
    for one in left:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=5)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser. InputError if playwright or a Chromium is missing."""
    playwright = _imported("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def settled(page: Page) -> float:
    """Wait until the script has run and everything is drawn; since when, in milliseconds of the page's clock.

    RunError if that takes longer than PATIENCE.
    """
    page.evaluate("window.__quiet = undefined")  # what was quiet before the last click doesn't count
    return _until(page, _QUIET, SILENCE)["since"]


def finished(page: Page) -> float:
    """Wait until no background job of the page is left, and the page has settled; since when. RunError as above."""
    jobs = page.locator('[data-testid="stMain"] [data-testid="stProgress"]')
    while True:
        since = settled(page)
        if not jobs.count():
            return since
        _until(page, _IDLE)


def _until(page: Page, condition: str, argument: Any = None) -> Any:
    from playwright.sync_api import TimeoutError

    try:
        return page.wait_for_function(condition, arg=argument, timeout=PATIENCE * 1000).json_value()
    except TimeoutError:
        jobs = page.get_by_test_id("stProgress").all_inner_texts()
        state = f"{page.evaluate(_BUSY)}; {jobs}; {page.evaluate(_DRAWN)!r:.1000}"
        raise RunError(f"{page.url} did not settle in {PATIENCE:.0f} s: {state}") from None


def visit(page: Page, title: str) -> float:
    """Go to another page by its link in the sidebar; since when it is there."""
    link = page.get_by_test_id("stSidebarNavLink").filter(has_text=title)
    path = link.evaluate("(link) => new URL(link.href).pathname")
    link.click()
    # the address changes when the server has begun with the new page
    page.wait_for_function("(path) => location.pathname === path", arg=path, timeout=PATIENCE * 1000)
    page.wait_for_function(_DRAWN, timeout=PATIENCE * 1000)  # the old page is gone before there is any of the new one
    return settled(page)


def _imported(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise InputError(f"driving the page takes the package {package}: pip install {package}") from None
