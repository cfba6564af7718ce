"""The Tokens page in a browser: hover, pin, keys, hostile tokens, a long text that is watched and cancelled."""

from __future__ import annotations

from urllib.parse import quote

import pandas as pd
import pytest
from browser import download, finished, screenshot, serving, settled

from workbench import reading
from workbench.tracefile import Trace

HOSTILE = (
    "<script>document.title = 'taken'</script> <img src=x onerror=\"document.title = 'taken'\">\n"
    "مرحبا بالعالم\nשלום 👨‍👩‍👧 zero\u200bwidth \u202eturned\ttab **bold** $x$ `code` ไทย 日本語"
)


@pytest.fixture(scope="module")
def server(demo_trace):
    with serving(demo_trace, "--model", "demo") as one:
        yield one


def of_language(path, lang: str) -> int:
    """The first text in a language that has some lines of tokens."""
    rows = Trace(path).sequences()
    return int(rows[(rows["lang"] == lang) & (rows["n_tokens"] > 60)]["seq"].iloc[0])


def pinned(page) -> int:
    """The place of the pinned token, -1 for none."""
    return int(page.evaluate("() => document.querySelector('.st-key-tokens_pin input').value || -1"))


def tip(page) -> dict:
    """Where the tooltip stands, and how large the window is."""
    box = page.locator(".tip").bounding_box()
    return {**box, "right": box["x"] + box["width"], "bottom": box["y"] + box["height"]}


def test_hover_pin_keys_and_link(browse, server, demo_trace, tmp_path):
    seq = of_language(demo_trace, "en")
    page = browse(server, f"/tokens?tokens_seq={seq}&tokens_layer=2")
    text = reading.read(Trace(demo_trace), seq)
    tokens = page.locator(".t")
    assert tokens.count() == len(text)
    tokens.nth(5).hover()
    shown = page.locator(".tip").inner_text()
    for layer in range(text.n_layers):
        for rank in range(4):
            assert f"{text.experts[layer, 5, rank]}" in shown
    tokens.nth(5).click()
    settled(page)
    assert pinned(page) == 5 and page.locator(".t.pin").count() == 1
    page.locator(".pane").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    page.wait_for_timeout(200)
    settled(page)
    assert pinned(page) == 6 and "tokens_pin=6" in page.url
    page.keyboard.press("End")
    page.wait_for_timeout(200)
    settled(page)
    assert pinned(page) == len(text) - 1
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(200)
    settled(page)
    assert pinned(page) > 0  # the text has more than one line
    at = pinned(page)
    table = page.locator(".st-key-table-token-routing")
    found = pd.read_csv(download(page, table.get_by_role("button", name="CSV", exact=True).click, tmp_path))
    assert found["expert"].tolist() == reading.routing(text, at)["expert"].tolist()
    screenshot(page, "tokens", tmp_path)
    again = browse(server, page.url.removeprefix(server.url), scheme="dark", width=1920)
    assert pinned(again) == at and again.locator(".t.pin").count() == 1
    again.locator(".t").last.hover()
    box = tip(again)
    assert box["x"] >= 0 and box["y"] >= 0 and box["right"] <= 1920 and box["bottom"] <= 1080
    screenshot(again, "tokens-dark", tmp_path)
    again.locator(".pane").focus()
    again.keyboard.press("Escape")
    again.wait_for_timeout(200)
    settled(again)
    assert pinned(again) == -1 and "tokens_pin" not in again.url


def test_arrows_go_where_they_point(browse, server, demo_trace):
    """In a text from right to left, the left arrow goes on."""
    page = browse(server, f"/tokens?tokens_seq={of_language(demo_trace, 'ar')}&tokens_pin=5")
    page.locator(".pane").focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    page.wait_for_timeout(200)
    settled(page)
    assert pinned(page) == 6


def test_the_legend_puts_an_expert_forward(browse, server):
    page = browse(server, "/tokens?tokens_seq=3")
    chip = page.locator(".legend button").first
    count = int(chip.inner_text().split("×")[1])
    chip.click()
    settled(page)
    assert page.locator(".t").count() - page.locator(".t.dim").count() == count
    assert "tokens_only=" in page.url
    page.locator(".legend button").first.click()
    settled(page)
    assert page.locator(".t.dim").count() == 0 and "tokens_only" not in page.url


def test_a_hostile_text_is_shown_and_not_run(browse, server, tmp_path):
    page = browse(server, f"/tokens?tokens_from=typed+in&tokens_text={quote(HOSTILE)}")
    finished(page)
    assert page.title() != "taken"
    shown = "".join(page.locator(".t").all_inner_texts()).replace("↵", "\n").replace("⇥", "").replace("·", "")
    for part in ("<script>", "onerror", "مرحبا", "שלום", "⟨U+200B⟩", "⟨U+202E⟩", "⟨U+200D⟩", "**bold**", "日"):
        assert part in shown
    assert page.locator(".pane script, .pane img").count() == 0
    for at in (0, 12, 30):
        page.locator(".t").nth(at).hover()
        assert page.locator(".tip script, .tip img").count() == 0
    page.locator(".t").nth(3).click()
    settled(page)
    assert page.title() != "taken"
    screenshot(page, "tokens-typed", tmp_path)


def test_a_text_of_200_kb_is_watched_cancelled_and_shown(browse, server):
    page = browse(server, "/tokens?tokens_from=typed+in")
    area = page.get_by_role("textbox", name="Text to trace")
    # as pasting does; typing 200,000 characters takes Chromium half a minute
    put = """(area, text) => {
        Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(area, text);
        area.dispatchEvent(new Event("input", {bubbles: true}));
    }"""
    area.evaluate(put, "Everyone has the right to life. " * 6250)
    area.press("Control+Enter")
    settled(page)
    assert "tokens_text" not in page.url
    assert page.get_by_text("The link doesn't hold this text: it has 200,000 characters").count() == 1
    page.get_by_role("button", name="Trace").click()
    page.get_by_text("tokens", exact=False).first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    settled(page)
    assert page.locator(".t").count() == 0
    area.evaluate(put, "Everyone has the right to life. " * 1000)
    area.press("Control+Enter")
    settled(page)
    page.get_by_role("button", name="Trace").click()
    page.locator(".t").first.wait_for()
    finished(page)
    assert page.locator(".t").count() == 1500
    page.locator(".pane").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    settled(page)
    assert pinned(page) == 1500 and page.locator(".t.pin").count() == 1
    assert page.locator(".st-key-tokens_part input").input_value() == "2"


def test_choosing_a_row_shows_its_text(browse, server, demo_trace):
    page = browse(server, "/tokens?tokens_search=the")
    first = page.locator(".t").count()
    page.get_by_role("button", name="Next").click()
    settled(page)
    seq = int(page.locator(".st-key-tokens_seq input").input_value())
    assert page.locator(".t").count() == len(reading.read(Trace(demo_trace), seq)) and first > 0
