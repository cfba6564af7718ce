"""The Experts page in a browser: a click on the grid, from contexts to texts, edits for the recipe, tables as files."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
from browser import download, finished, screenshot, serving, settled

from workbench import expert_profile
from workbench.tracefile import Trace


@pytest.fixture(scope="module")
def server(demo_trace):
    with serving(demo_trace, "--model", "demo") as one:
        yield one


def click(page, row: int, column: int) -> None:
    """Click a cell of the grid."""
    cells = json.loads(page.locator(".cells").get_attribute("data-geometry"))
    place = {"x": cells["left"] + (column + 0.5) * cells["width"], "y": (row + 0.5) * cells["height"]}
    page.locator(".cells canvas").click(position=place)


def heading(page, layer: int, expert: int):
    return page.get_by_role("heading", name=f"Layer {layer} · expert {expert}", exact=True)


def test_from_the_grid_to_an_expert_and_on(browse, server, demo_trace, tmp_path):
    page = browse(server, "/experts")
    finished(page)
    click(page, 3, 9)
    heading(page, 3, 9).wait_for()
    settled(page)
    assert "experts_layer=3" in page.url and "experts_expert=9" in page.url
    fired = expert_profile.firings(Trace(demo_trace), 3, 9)
    assert f"{len(fired):,}" in page.get_by_test_id("stMetric").first.inner_text()

    page.locator(".cells .pane").press("ArrowRight")
    heading(page, 3, 10).wait_for()
    settled(page)

    button = page.locator(".st-key-table-experts-tokens-3-10 .stDownloadButton button", has_text="CSV").first
    table = pd.read_csv(download(page, button.click, tmp_path))
    index = expert_profile.token_index(Trace(demo_trace))
    expected = expert_profile.token_table(index, expert_profile.firings(Trace(demo_trace), 3, 10))
    assert table["token_id"].tolist() == expected["token_id"].tolist()
    assert table["lift"].tolist() == pytest.approx(expected["lift"].tolist())
    picture = download(page, page.get_by_role("button", name="SVG").first.click, tmp_path)
    assert picture.read_text(encoding="utf-8").startswith("<svg")

    page.get_by_role("button", name="Ablate", exact=False).first.click()
    page.get_by_text("Ablate(layer=3, experts=[10])").wait_for()
    settled(page)
    screenshot(page, "experts", tmp_path)

    link = page.url
    other = browse(server, link.removeprefix(server.url))
    heading(other, 3, 10).wait_for()

    line = page.locator(".contexts button").first
    seq, pos = re.findall(r"\d+", line.get_attribute("title"))
    line.click()
    page.wait_for_url("**/tokens*")
    settled(page)
    assert f"tokens_seq={seq}" in page.url and f"tokens_pin={pos}" in page.url and "tokens_layer=3" in page.url


def test_partners_lead_to_their_pages(browse, server):
    page = browse(server, "/experts?experts_layer=1&experts_expert=2")
    finished(page)
    rows = page.locator('[class*="st-key-table-experts-partners-of-1-2"] [data-testid="stDataFrame"]')
    rows.scroll_into_view_if_needed()
    box = rows.bounding_box()
    page.mouse.click(box["x"] + 18, box["y"] + 52)  # the box that chooses the first row
    page.wait_for_function("() => !location.search.includes('experts_expert=2')")
    settled(page)
    assert "experts_layer=1" in page.url
    expert = re.search(r"experts_expert=(\d+)", page.url)
    heading(page, 1, int(expert[1]) if expert else 0).wait_for()


@pytest.mark.parametrize("width", [1280, pytest.param(1920, marks=pytest.mark.slow)])
def test_dark_from_a_link(browse, server, tmp_path, width):
    query = "experts_layer=4&experts_expert=11&experts_metric=Divergence&experts_sorted=true&experts_more=Importance"
    page = browse(server, f"/experts?{query}", scheme="dark", width=width)
    finished(page)
    heading(page, 4, 11).wait_for()
    assert page.locator(".cells .unit").inner_text() == "nats"
    assert page.locator(".contexts button").count() > 3
    screenshot(page, f"experts-dark-{width}", tmp_path, whole=True)
