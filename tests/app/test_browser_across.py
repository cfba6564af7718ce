"""Ways across pages, and traces that are growing, missing, or something else, in a browser."""

import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from browser import finished, no_errors, screenshot, serving, settled, visit

from workbench import transaction
from workbench.bench.generated import Generated
from workbench.bench.made_up_trace import block, word
from workbench.schema import create
from workbench.store import Writer
from workbench.tracefile import Trace
from workbench.validate import CHECKS

PAGES = {
    "overview": "Overview", "tokens": "Tokens", "experts": "Experts", "specialisation": "Specialisation",
    "languages": "Languages", "consistency": "Consistency and cache", "structure": "Structure", "compare": "Compare",
    "query": "Query", "steer": "Steer",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(demo_trace):
    with serving(demo_trace, "--model", "demo") as one:
        yield one


def test_the_check_can_fail(browse, server, chrome):
    """An error on the page, one in the console, and a request to another machine are all seen."""
    from browser import open_page

    page, complaints = open_page(chrome, server, "/query")
    page.evaluate(
        "console.error('told'); fetch('http://example.org/').catch(() => 1); setTimeout(() => {throw Error('thrown')})"
    )
    page.wait_for_function("() => performance.getEntriesByType('resource').some((one) => one.name.includes('example'))")
    settled(page)
    page.context.close()
    for part in ("console: told", "error on the page: thrown", "another machine: http://example.org/"):
        assert any(part in complaint for complaint in complaints), complaints


@pytest.mark.parametrize("scheme, width", [("light", 1280), pytest.param("dark", 1920, marks=pytest.mark.slow)])
def test_every_page_opens(browse, server, tmp_path, scheme, width):
    """By its link in the sidebar; the fixture fails on any error of page or console."""
    page = browse(server, scheme=scheme, width=width)
    for name, title in PAGES.items():
        if name != "overview":
            visit(page, title)
        page.wait_for_function("() => document.querySelector('[data-testid=stMain]')?.innerText.length > 40")
        no_errors(page)
        screenshot(page, f"{name}-{scheme}", tmp_path)


def test_a_copied_link_restores_the_view(browse, server):
    """Run, filter and sample of the sidebar, and the page's own choices."""
    page = browse(server, "/?overview_by=domain")
    page.get_by_role("textbox", name="Texts").fill("lang=de")
    page.get_by_role("textbox", name="Texts").press("Enter")
    finished(page)
    page.get_by_text("Copy link").click()
    page.get_by_text("Copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    other = browse(server, link.removeprefix(server.url))
    assert other.get_by_role("textbox", name="Texts").input_value() == "lang=de"
    assert other.get_by_role("radio", name="domain").get_attribute("aria-checked") == "true"
    assert re.search(r"Shown: [\d,]+ of", other.get_by_test_id("stSidebar").inner_text())


def test_one_timer(browse, server):
    """However often it is drawn anew, a page asks in one timer: an older one would not know that an answer is there."""
    page = browse(server)
    page.add_init_script(f"({TIMERS})()")
    page.goto(f"{server.url}/specialisation?where=lang%3Dde,ar")
    assert finished(page) and page.evaluate("window.begun") > 2
    assert page.evaluate("window.running.size") == 1


TIMERS = """() => {
    const [begin, end] = [window.setInterval, window.clearInterval];
    Object.assign(window, { running: new Set(), begun: 0 });
    window.setInterval = (call, wait, ...rest) => {
        const one = begin(call, wait, ...rest);
        if (String(call).includes("st-key-waiting-")) { window.running.add(one); window.begun += 1; }
        return one;
    };
    window.clearInterval = (one) => { window.running.delete(one); end(one); };
}"""


def test_a_growing_trace(browse, tmp_path, monkeypatch):
    """It opens while it is written, says how far it is, and its numbers grow until it is finished."""
    monkeypatch.setattr(transaction, "COMMIT_TOKEN_LAYERS", 0)  # every block at once
    path, source = tmp_path / "growing.duckdb", Generated(4_000, n_layers=2, length=100)
    ids, random = [source.experts(layer) for layer in range(2)], np.random.default_rng(0)
    token_ids = source.token_ids()
    run = {"run": "growing", "recorded": ["ids", "weights", "entropy", "margin", "profiles"], "model": "made up"}
    sizes = {"n_experts": 64, "top_k": 8, "n_shared": 0, "gating": "softmax", "stack": "decoder"}
    layers = [{"name": str(layer), **sizes} for layer in range(2)]

    def write(first: int, last: int) -> None:
        part = slice(first * 100, last * 100)
        writer.append(block(source, first, last, token_ids[part], [each[part] for each in ids], random))
        patience = time.monotonic() + 60
        while Trace(path).n_tokens < last * 100 and time.monotonic() < patience:
            time.sleep(0.05)

    with ExitStack() as stack:
        with Writer(path, run | {"corpus": {"names": ["made up"], "tokens": 4_000}}, layers) as writer:
            writer.add_vocabulary({int(one): word(int(one)) for one in np.unique(token_ids)})
            write(0, 10)
            page = browse(stack.enter_context(serving(path)))
            page.get_by_text("Being written: 1,000 of 4,000 tokens").wait_for()
            counted = page.get_by_test_id("stMetricValue").first
            assert counted.inner_text() == "1,000"
            screenshot(page, "growing", tmp_path)
            write(10, 30)
            page.get_by_text("Being written: 3,000 of 4,000 tokens").wait_for()
            counted.filter(has_text="3,000").wait_for()
            write(30, 40)
        page.get_by_text(f"all {len(CHECKS)} checks passed").wait_for()
        assert page.get_by_text("of 4,000 tokens").count() == 0
        assert counted.inner_text() == "4,000"


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "is empty"),
        (b"PAR1 or something else, long enough to be read", "not a DuckDB file"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_at_once(tmp_path, content, why):
    path = tmp_path / "other.duckdb"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "workbench", "app", str(path), "--no-browser"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr


def test_no_trace_and_no_model(browse):
    """Every page says what to do."""
    with serving("--model", "no/such-model") as server:
        page = browse(server)
        for name, title in PAGES.items():
            if name != "overview":
                visit(page, title)
            no_errors(page)
            told = page.get_by_test_id("stMain").inner_text()
            assert "No trace is open" in told or name in ("steer", "tokens"), name
            assert "Traceback" not in told


def test_a_trace_without_runs(browse, tmp_path):
    path = tmp_path / "empty.duckdb"
    create(path)
    with serving(path) as server:
        page = browse(server)
        assert "holds no run yet" in page.get_by_test_id("stMain").inner_text()


def test_a_file_that_is_damaged_while_it_is_looked_at(browse, tmp_path, demo_trace):
    path = tmp_path / "t.duckdb"
    path.write_bytes(Path(demo_trace).read_bytes())
    with serving(path) as server:
        page = browse(server, "/query")
        path.write_bytes(b"no longer a trace, and long enough to be read as one")
        visit(page, "Overview")
        assert "not a trace" in page.get_by_test_id("stApp").inner_text()
