"""The page in a real browser: a server of `workbench app`, headless Chromium, and checks that nothing went wrong.

    def test_tokens(browse, demo_trace, tmp_path):
        with serving(demo_trace, "--model", "demo") as server:
            page = browse(server, "/tokens?tokens_seq=3", scheme="dark", width=1920)
            page.get_by_role("button", name="Pin").click()
            settled(page)
            screenshot(page, "tokens-dark", tmp_path)

The fixture `browse` (conftest.py) opens pages and fails the test at its end if any of them had an error on the page or
in the console, or asked for anything that isn't on this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from workbench.bench.browsing import PATIENCE, Server, chromium, finished, serving, settled, visit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

__all__ = [
    "Server", "chromium", "download", "finished", "listen", "no_errors", "open_page", "screenshot", "serving",
    "settled", "visit",
]  # fmt: skip

SCREENSHOTS = "WORKBENCH_SCREENSHOTS"
"""Environment variable: the folder that screenshots go to."""
SIZES = {1280: 800, 1920: 1080}
"""Height of the window for each width."""
LOCAL = ("localhost", "127.0.0.1", "::1")


def open_page(
    browser: Browser, server: Server | str, path: str = "", *, scheme: str = "light", width: int = 1280
) -> tuple[Page, list[str]]:
    """A page in a session of its own, settled, and the list that its complaints go to.

    path    what follows the server's address, with the query
    scheme  "light" or "dark"
    width   of the window in pixels, of SIZES
    """
    options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": SIZES[width]}}
    context = browser.new_context(**options, accept_downloads=True, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE * 1000)
    page = context.new_page()
    complaints = listen(page)
    page.goto((server if isinstance(server, str) else server.url) + path)
    settled(page)
    return page, complaints


def listen(page: Page) -> list[str]:
    """The list that errors of the page, errors of its console, and requests to other machines go to."""
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"error on the page: {error}"))
    page.on("console", lambda message: complaints.extend(_wrong(message)))
    page.context.on("request", lambda request: complaints.extend(_leaves(request.url)))
    return complaints


def _wrong(message: ConsoleMessage) -> list[str]:
    # Opened at /tokens, Streamlit's frontend looks for its server below /tokens first and then where it is.
    url = message.location["url"]
    looking = re.fullmatch(r"/\w+/_stcore/(health|host-config)", urlsplit(url).path) and "404" in message.text
    # A page that outlives its server asks for it.
    ended = "ERR_CONNECTION_REFUSED" in message.text or "No response received" in message.text
    if message.type != "error" or looking or ended:
        return []
    return [f"error in the console: {message.text} ({url})"]


def _leaves(url: str) -> list[str]:
    parts = urlsplit(url)
    local = parts.scheme in ("data", "blob", "about") or parts.hostname in LOCAL
    return [] if local else [f"request to another machine: {url}"]


def no_errors(page: Page) -> None:
    """Fail if Streamlit shows an exception."""
    shown = page.get_by_test_id("stException")
    assert shown.count() == 0, shown.first.inner_text()


def download(page: Page, click: Callable[[], object], folder: Path) -> Path:
    """The file that `click` makes the browser download, under the name that the page gave it, in `folder`."""
    with page.expect_download() as found:
        click()
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


def screenshot(page: Page, name: str, folder: Path, *, whole: bool = False) -> Path:
    """Save a picture of the page as `name`.png in the folder of WORKBENCH_SCREENSHOTS, or in `folder`.

    whole  all that can be scrolled to, instead of what fits the window
    """
    path = Path(os.environ.get(SCREENSHOTS) or folder).resolve() / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = page.viewport_size
    assert size is not None
    if whole:
        height = page.evaluate("""() => document.querySelector('[data-testid="stMain"]').scrollHeight""")
        page.set_viewport_size({"width": size["width"], "height": max(size["height"], int(height))})
        settled(page)
    page.screenshot(path=path, animations="disabled")
    if whole:
        page.set_viewport_size(size)
    return path
