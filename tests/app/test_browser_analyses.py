"""The pages of analyses in a browser: figures linked to tables, the what-if, links that restore a view, downloads."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from browser import download, finished, screenshot, serving, settled
from routed import full_trace


@pytest.fixture(scope="module")
def server(demo_trace):
    with serving(demo_trace, "--model", "demo") as one:
        yield one


def middle(page, panel: str):
    """The middle of the first panel of a figure."""
    box = page.locator(f".st-key-figure-{panel} .nsewdrag").first.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def click(page, x: float, y: float) -> None:
    """As a hand does: Plotly clicks what it has hovered."""
    page.mouse.move(x - 8, y)
    page.mouse.move(x, y, steps=4)
    page.wait_for_timeout(250)
    page.mouse.down()
    page.mouse.up()
    settled(page)


def test_a_click_on_a_cell_shows_its_row(browse, server, tmp_path):
    page = browse(server, "/specialisation")
    finished(page)
    page.locator(".st-key-figure-specialization-lang").scroll_into_view_if_needed()
    assert page.locator(".st-key-clicked-specialization-lang").count() == 0
    click(page, *middle(page, "specialization-lang"))
    hovered = page.locator(".hoverlayer text tspan").all_text_contents()  # a line each
    clicked = page.locator(".st-key-clicked-specialization-lang")
    assert "1 row of the table" in clicked.inner_text()
    found = pd.read_csv(download(page, lambda: clicked.locator("button", has_text="CSV").first.click(), tmp_path))
    (row,) = found.to_dict("records")
    assert row["layer"] == 0
    if hovered:
        said = re.match(r"(\S+) · expert (\d+)$", hovered[0])
        assert said and (row["group"], row["expert"]) == (said[1], int(said[2]))
    screenshot(page, "specialisation", tmp_path)


def test_a_click_on_a_line_shows_its_row(browse, server, tmp_path):
    page = browse(server, "/languages", scheme="dark", width=1920)
    finished(page)
    screenshot(page, "languages-dark", tmp_path)
    points = page.locator(".st-key-figure-alignment-en .scatterlayer .trace .points path")
    box = points.last.bounding_box()
    click(page, box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert "of the table" in page.locator(".st-key-clicked-alignment-en").inner_text()


def test_the_what_if_answers_and_its_link_restores_it(browse, server, tmp_path):
    page = browse(server, "/consistency")
    finished(page)
    before = page.get_by_test_id("stMetricValue").all_inner_texts()
    assert len(before) == 4
    page.get_by_role("slider", name="Experts in the cache").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => location.search.includes('consistency_capacity=21')")
    finished(page)
    after = page.get_by_test_id("stMetricValue").all_inner_texts()
    assert float(after[0].rstrip("%")) > float(before[0].rstrip("%"))
    screenshot(page, "consistency", tmp_path)
    other = browse(server, page.url.removeprefix(server.url), scheme="dark", width=1920)
    finished(other)
    assert other.get_by_test_id("stMetricValue").all_inner_texts() == after
    screenshot(other, "consistency-dark", tmp_path)


def test_only_the_open_tab_is_computed_and_is_in_the_link(browse, server, tmp_path):
    page = browse(server, "/structure")
    finished(page)
    assert page.locator('[class*="st-key-panel-affinity"]').count() == 0
    page.get_by_role("tab", name="Layer to layer").click()
    settled(page)
    finished(page)
    assert "structure_tab=Layer" in page.url
    assert page.locator('[class*="st-key-panel-coactivation"]').count() == 0
    other = browse(server, page.url.removeprefix(server.url), scheme="dark")
    finished(other)
    assert other.locator(".st-key-panel-affinity .js-plotly-plot").count() == 1
    screenshot(other, "structure-dark", tmp_path)
    svg = download(
        other, lambda: other.locator(".st-key-figure-affinity button", has_text="SVG").first.click(), tmp_path
    )
    assert svg.read_text(encoding="utf-8").startswith("<svg")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs with names and texts that no page should believe."""
    path = tmp_path_factory.mktemp("two") / "two.duckdb"
    for run, seed in (("plain", 1), ("<img src=x onerror=alert(1)>", 2)):
        random = np.random.default_rng(seed)
        rows = pd.DataFrame({"lang": ["<b>en</b>", "عربي"] * 4, "domain": ["[a](b)", "😀\u200b"] * 4})
        seq = np.repeat(np.arange(8), 15)
        full_trace(
            path, np.argsort(random.random((len(seq), 3, 8)), axis=-1)[..., :2], n_experts=8, seq=seq, sequences=rows,
            token_ids=np.arange(len(seq)) % 4, run=run, mode="append" if path.exists() else "new",
            vocabulary={0: "<script>alert(1)</script>", 1: "مرحبا", 2: "\u202e", 3: " "},
        )  # fmt: skip
    with serving(path) as one:
        yield one


@pytest.mark.parametrize(
    "tab",
    [
        "Layers",
        "Texts",
        *(pytest.param(tab, marks=pytest.mark.slow) for tab in ("Languages and domains", "Experts", "Token ids")),
    ],
)
def test_two_runs(browse, two, tmp_path, tab):
    page = browse(two, f"/compare?run=plain&compare_tab={tab.replace(' ', '+')}")
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    finished(page)
    assert page.locator(".js-plotly-plot").count() == 1
    assert page.locator('[class*="st-key-table-"]').count() >= 1
    screenshot(page, f"compare-{tab.split()[0].lower()}", tmp_path)


def test_one_run_says_how_to_record_another(browse, server, tmp_path):
    page = browse(server, "/compare")
    assert "--append" in page.get_by_test_id("stCode").inner_text()
    screenshot(page, "compare-empty", tmp_path)
