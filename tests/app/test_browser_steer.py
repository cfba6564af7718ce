"""The Steer page in a browser: a recipe built by clicking, texts that stream, Stop, the link, files, hostile text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from browser import Server, download, screenshot, serving, settled

if TYPE_CHECKING:
    from playwright.sync_api import Page

LOADING = 180_000
"""Milliseconds: the first generation of a server loads the model."""
Browse = Callable[..., "Page"]


@pytest.fixture(scope="module")
def server(demo_trace: Path) -> Iterator[Server]:
    with serving(demo_trace) as found:
        yield found


def choose(page: Page, label: str, *values: object) -> None:
    """Options of a multiselect."""
    box = page.get_by_role("combobox", name=label)
    for value in values:
        box.click()
        box.fill(str(value))
        page.get_by_role("option", name=str(value), exact=True).click()
    page.keyboard.press("Escape")
    settled(page)


def tokens(page: Page, name: str) -> Any:
    return page.locator(f".panel[data-name={name}] .t")


def text(page: Page, name: str) -> str:
    return "".join(tokens(page, name).all_text_contents())


def wait(page: Page, name: str, state: str) -> None:
    """Until the note of a continuation says this."""
    page.locator(f".panel[data-name={name}] .note", has_text=re.compile(state)).wait_for(timeout=LOADING)


def add_ablation(page: Page) -> None:
    choose(page, "Layers", 1, 2)
    choose(page, "Experts", 1, 2, 3, 4, 5)
    page.get_by_role("button", name="Add to the recipe").click()
    page.get_by_text("Ablate(layer=[1, 2], experts=[1, 2, 3, 4, 5])").wait_for()
    settled(page)


def test_a_recipe_is_built_and_both_texts_stream(
    server: Server, browse: Browse, tmp_path: Path, workbench: Callable[..., Any]
):
    page = browse(server, "/steer?steer_max=24")
    add_ablation(page)
    page.locator(".st-key-steer_control label").click()
    settled(page)
    page.get_by_role("button", name="Generate").click()
    wait(page, "control", "writing")
    lengths: set[int] = set()  # the text grows before one's eyes
    while len(lengths) < 3:
        lengths.add(tokens(page, "steered").count())
    for name in ("plain", "steered", "control"):
        wait(page, name, "24 tokens · as long as asked for")
    page.get_by_text("Routing of the generated text").wait_for()
    settled(page)
    first = page.locator(".panel[data-name=steered] .t.first")
    assert first.count() == 1 and page.locator(".panel[data-name=plain] .t.first").count() == 1
    assert page.locator(".panel[data-name=steered] .t.differs").count() > 1
    screenshot(page, "steer-light", tmp_path, whole=True)
    tokens(page, "steered").nth(5).click()
    page.get_by_text("Next-token probabilities at token 5").wait_for()
    settled(page)
    page.keyboard.press("ArrowRight")
    settled(page)

    recipe = download(page, page.get_by_role("button", name="Save", exact=True).click, tmp_path)
    saved = download(page, page.get_by_role("button", name="Save the result").click, tmp_path)
    result = json.loads(saved.read_text())
    options = ("--compare", "--control", "random", "--max-tokens", "24", "--json")
    ran = workbench("generate", "demo", result["prompt"], "--recipe", recipe, *options)
    assert ran.code == 0, ran.err
    again = json.loads(ran.out)
    for name in ("plain", "steered", "control"):
        assert again[name] == result[name]
        shown = text(page, name).replace("↵", "").replace("⇥", "")
        assert shown == result[name]["text"]
    assert json.loads(recipe.read_text())["interventions"] == result["recipe"]["interventions"]

    other = browse(server, page.url.replace(server.url, ""), scheme="dark", width=1920)
    wait(other, "steered", "as long as asked for")
    other.get_by_text("Routing of the generated text").wait_for()
    settled(other)
    assert [text(other, name) for name in ("plain", "steered", "control")] == [
        text(page, name) for name in ("plain", "steered", "control")
    ]
    assert other.get_by_text(re.compile("Next-token probabilities at token 6")).count() == 1
    screenshot(other, "steer-dark", tmp_path, whole=True)


def test_stop(server: Server, browse: Browse):
    page = browse(server, "/steer?steer_max=900")
    add_ablation(page)
    page.get_by_role("button", name="Generate").click()
    wait(page, "steered", "writing")
    page.get_by_role("button", name="Stop").click()
    wait(page, "steered", "stopped")
    settled(page)
    n = tokens(page, "steered").count()
    assert 0 < n < 900 and text(page, "steered")
    page.wait_for_timeout(500)
    assert tokens(page, "steered").count() == n
    page.get_by_role("button", name="Generate").click()  # and once more
    wait(page, "plain", "writing")
    page.get_by_role("button", name="Stop").click()
    wait(page, "plain", "stopped")
    settled(page)
    page.get_by_role("combobox", name="Generation").wait_for()


def test_two_sessions_at_once(server: Server, browse: Browse):
    pages = []
    for half in (range(16), range(16, 32)):
        edit = quote(json.dumps([{"kind": "Ablate", "experts": [*half]}]))
        pages.append(browse(server, f"/steer?steer_max=10&steer_temperature=0.8&steer_seed=5&steer_recipe={edit}"))
    for page in pages:
        page.get_by_role("button", name="Generate").click()
    for page in pages:
        wait(page, "steered", "as long as asked for")
        settled(page)
    assert text(pages[0], "plain") == text(pages[1], "plain") != text(pages[0], "steered")
    assert text(pages[0], "steered") != text(pages[1], "steered")


def test_hostile_text_and_errors(server: Server, browse: Browse):
    hostile = "<img src=x onerror=alert(1)> **b** \u202e\u200b😀"
    page = browse(server, f"/steer?steer_max=3&steer_prompt={quote(hostile)}")
    page.get_by_role("button", name="Generate").click()
    wait(page, "plain", "3 tokens")
    settled(page)
    assert page.locator("img[src=x]").count() == 0
    page = browse(server, f"/steer?steer_recipe={quote('<script>')}&steer_model=/no/such/folder")
    assert page.get_by_text("no such folder").count() == 1
    assert page.get_by_text("expected a list of interventions").count() == 1
