"""The page Overview in a browser: what it says of a trace, and what one does with it."""

import pandas as pd
import pytest
from browser import download, finished, screenshot, serving, settled
from routed import full_trace, random_trace

from workbench.contents import contents
from workbench.tracefile import Trace
from workbench.validate import CHECKS


@pytest.fixture(scope="module")
def server(demo_trace):
    with serving(demo_trace, "--model", "demo") as one:
        yield one


def test_says_what_the_trace_holds(browse, server, demo_trace, tmp_path):
    page = browse(server)
    finished(page)
    page.get_by_text("9,577,152").wait_for()  # parameters of the model, counted in the background
    main = page.get_by_test_id("stMain").inner_text()
    trace = Trace(demo_trace)
    for said in (f"{trace.n_tokens:,}", f"{trace.n_sequences:,}", "olmoe", "softmax, top-k", "demo.texts", "texts"):
        assert said in main, said
    assert f"all {len(CHECKS)} checks passed" in main
    assert page.locator(".js-plotly-plot").count() == 3
    screenshot(page, "overview", tmp_path, whole=True)
    button = page.locator(".st-key-table-texts-by-lang button", has_text="CSV").first
    found = download(page, button.click, tmp_path)
    assert found.name == "texts-by-lang.csv"
    expected = contents(demo_trace, trace.run, "lang")
    pd.testing.assert_frame_equal(pd.read_csv(found), expected, check_dtype=False)
    page.get_by_role("radio", name="domain").click()
    settled(page)
    assert "overview_by=domain" in page.url
    button = page.locator(".st-key-figure-texts-domain button", has_text="SVG").first
    found = download(page, button.click, tmp_path)
    assert found.read_text().startswith("<svg") and "fiction" in found.read_text()


def test_dark_and_wide_from_a_link(browse, server, tmp_path):
    page = browse(server, "/?overview_by=source", scheme="dark", width=1920)
    assert page.get_by_role("radio", name="source").get_attribute("aria-checked") == "true"
    finished(page)
    screenshot(page, "overview-dark", tmp_path, whole=True)
    page.get_by_text("How to cite this run").click()
    assert "Run demo.texts of demo.duckdb" in page.get_by_test_id("stCode").first.inner_text()


def test_several_runs_one_of_them_broken(browse, tmp_path):
    """A click on a row opens that run; what is wrong with it is told; names from data stay text."""
    path = tmp_path / "runs.duckdb"
    bad = "<script>alert(1)</script> **bold**"
    one = random_trace(path, languages=("<img src=x onerror=alert(1)>", "عربي", None))
    full_trace(
        path, one.experts, n_experts=6, seq=one.seq, sequences=one.sequences, run=bad, mode="append", model="a/*b*",
        entropy=[[9.0] * len(one.seq)] * 2,
    )  # fmt: skip
    with serving(path) as server:
        page = browse(server)
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        finished(page)
        assert "a/*b*" in page.get_by_test_id("stMain").inner_text()
        page.get_by_text("invariants are broken").wait_for()
        page.get_by_text("isn't on this machine").wait_for()
        assert bad in page.get_by_test_id("stTable").last.inner_text()
        cells = page.get_by_test_id("stDataFrame").first
        box = cells.bounding_box()
        cells.click(position={"x": 12, "y": box["height"] * 0.5})  # the first row's mark
        page.wait_for_url("**run=arrays**")
        finished(page)
        assert "arrays" in page.get_by_test_id("stTable").last.inner_text()
