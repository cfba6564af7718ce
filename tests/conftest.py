"""Fixtures of several test files."""

from __future__ import annotations

import itertools
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commandline import Command, Result

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


SHARED = "WORKBENCH_TEST_TRACES"
"""Environment variable: the folder of traces that several runs of pytest share."""

EVERY_FAMILY = ("test_recorder.py", "test_selection.py")
"""That the ids and weights of each family are those that its experts consumed is tested of all of them, always."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what else is tested for each model family, a third of the families; the others are slow.

    Which third depends on the test, so that every family is in some. A test of few families has all of them.
    """
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and "family" in getattr(item, "fixturenames", ()):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, of_one in tests.items():
        if len(of_one) > 20 and not name.split("::")[0].endswith(EVERY_FAMILY):
            for item in of_one:
                if zlib.crc32(item.nodeid.encode()) % 3:
                    item.add_marker(pytest.mark.slow)


@pytest.fixture
def workbench(capsys, monkeypatch) -> Command:
    """`workbench …` in this process, as `python -m workbench` calls it: an exception that it doesn't expect fails."""
    from workbench.__main__ import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["workbench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def demo_trace(tmp_path_factory) -> Path:
    """A trace of the bundled model, of about 6,000 tokens: parallel texts of four languages, and texts of four domains.

    Made once for all processes of the tests, and of all that `make test` starts; not to be changed.
    """
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    folder = Path(os.environ.get(SHARED, folder))
    folder.mkdir(exist_ok=True)
    path = folder / "demo.duckdb"
    with FileLock(folder / "demo.lock"):
        if not path.exists():
            trace_some_texts(path)
    return path


def trace_some_texts(path: Path) -> None:
    """Write the trace of `demo_trace`."""
    from workbench import corpus
    from workbench.capture import trace

    texts = [row for row in corpus.read("udhr") if row.lang in ("en", "de", "ar", "zh-CN")][:32]
    domains = ("fiction", "code-python", "dialogue", "legal")
    for domain in domains:
        texts += list(itertools.islice((row for row in corpus.read("domains") if row.domain == domain), 2))
    rows = [
        {"text": row.text, "lang": row.lang, "domain": row.domain, "source": row.source, "segment_id": row.segment_id}
        for row in texts
    ]
    record = ("ids", "weights", "entropy", "margin", "profiles")
    made = path.with_suffix(".partial")
    made.unlink(missing_ok=True)  # of tests that were killed
    given = corpus.from_rows(rows, "texts")
    trace("demo", given, made, record=record, max_length=256, long_texts="split", progress=False)
    made.rename(path)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """A browser for the tests of a file. It ends with them: its event loop would be in the way of other tests."""
    from browser import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def browse(chrome) -> Iterator[Callable[..., Page]]:
    """`browser.open_page` of this browser; the test fails at its end if one of the pages complained."""
    from browser import no_errors, open_page

    opened: list[tuple[Page, list[str]]] = []

    def open_one(*arguments: Any, **options: Any) -> Page:
        opened.append(open_page(chrome, *arguments, **options))
        return opened[-1][0]

    yield open_one
    try:
        for page, complaints in opened:
            no_errors(page)
            assert complaints == []
    finally:
        for page, _ in opened:
            page.context.close()
