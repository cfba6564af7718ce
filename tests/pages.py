"""Pages run as scripts (Streamlit's AppTest): opened with a trace and a query, and waited for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from streamlit.testing.v1 import AppTest

MAIN = Path(__file__).parent.parent / "app" / "workbench_app" / "main.py"
PATIENCE = 120


def opened(monkeypatch: Any, path: Path | None, page: str, **query: str) -> AppTest:
    """A page of a trace, with the answers that it asks for; InputErrors are messages and nothing else is raised."""
    if path is None:
        monkeypatch.delenv("WORKBENCH_TRACE", raising=False)
    else:
        monkeypatch.setenv("WORKBENCH_TRACE", str(path))
    monkeypatch.setenv("WORKBENCH_MODEL", "demo")
    return answered(begun(page, **query))


def begun(page: str, **query: str) -> AppTest:
    """A page with a query, not run yet."""
    found = AppTest.from_file(str(MAIN), default_timeout=PATIENCE)
    found.query_params.update(query)
    found.switch_page(f"{page}.py")
    return found


def healthy(page: AppTest) -> AppTest:
    """The page, which has raised nothing."""
    assert not page.exception, page.exception[0].value
    return page


def answered(page: AppTest) -> AppTest:
    """Run the page until nothing on it waits for an answer."""
    begun = time.monotonic()
    while True:
        healthy(page.run())
        if not page.get("progress"):
            return page
        assert time.monotonic() - begun < PATIENCE, said(page)
        time.sleep(0.2)


def said(page: AppTest) -> str:
    """All text of a page but its figures and tables."""
    shown = (page.title, page.subheader, page.warning, page.info, page.error, page.caption, page.markdown, page.code)
    return "\n".join(str(one.value) for kind in shown for one in kind)


def headings(page: AppTest) -> list[str]:
    """Of the panels that are shown."""
    return [one.value for one in page.subheader]
