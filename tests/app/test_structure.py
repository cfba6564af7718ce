"""The Structure page as a script: its tabs, of the trace and of the model."""

import pytest
from pages import answered, begun, headings, opened, said

from workbench import background


@pytest.mark.parametrize(
    ("tab", "shown"),
    [
        ("Within a layer", ["Pairs within a layer", "Partners by depth"]),
        ("Layer to layer", ["From layer to layer", "What any layer tells about any other"]),
        ("Routers", ["How sure the routers are, and whether it goes with the loss"]),
        ("Importance", ["What each expert contributes"]),
    ],
)
def test_of_the_trace(monkeypatch, demo_trace, tab, shown):
    page = opened(monkeypatch, demo_trace, "structure", structure_tab=tab)
    assert headings(page) == shown and len(page.dataframe) >= len(shown)


def test_of_the_model(monkeypatch, demo_trace):
    page = opened(monkeypatch, demo_trace, "structure", structure_tab="Weights")
    assert len(headings(page)) == 3 and len(page.dataframe) == 3


def test_another_checkpoint(monkeypatch, demo_trace):
    page = opened(monkeypatch, demo_trace, "structure", structure_tab="Another checkpoint")
    assert "Name another checkpoint" in said(page) and not page.dataframe
    page.text_input("structure_other").set_value("/nowhere/at all")
    answered(page)
    assert "nowhere" in said(page) and not page.dataframe


def test_what_takes_minutes_waits_to_be_told(monkeypatch, demo_trace):
    page = opened(monkeypatch, demo_trace, "structure", structure_tab="Without an expert")
    assert "isn't begun unasked" in said(page) and not page.dataframe


def test_questions_of_a_page_that_was_left(monkeypatch, demo_trace):
    """They are taken back when another page, or another part of the texts, is looked at: not those that go on."""
    left: list[background.Asked] = []
    monkeypatch.setattr(background.Answer, "done", False)
    monkeypatch.setattr(background.Workers, "leave", lambda _, asked: left.append(asked))
    monkeypatch.setenv("WORKBENCH_TRACE", str(demo_trace))
    page = begun("structure", structure_tab="Within a layer").run()
    waited = {wait.asked for wait in page.session_state["waiting"].values()}
    assert len(waited) == 2 and not page.run().exception and not left
    page.text_input("where").set_value("lang=de").run()
    assert set(left) == waited and not page.exception
    german = {wait.asked for wait in page.session_state["waiting"].values()}
    page.switch_page("languages.py").run()
    assert set(left) == waited | german and {one.where for one in german} == {"lang=de"}


def test_without_a_trace(monkeypatch):
    assert "No trace is open" in said(opened(monkeypatch, None, "structure"))
