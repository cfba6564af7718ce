"""The Structure page as a script: its tabs, of the trace and of the model."""

import pytest
import streamlit as st
from pages import answered, begun, headings, opened, said
from streamlit.testing.v1 import AppTest

from workbench import background
from workbench_app import view


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


@pytest.fixture
def left(monkeypatch, demo_trace) -> list[background.Asked]:
    """The questions that are taken back, while none is ever answered."""
    found: list[background.Asked] = []
    monkeypatch.setattr(background.Answer, "done", False)
    monkeypatch.setattr(background.Workers, "leave", lambda _, asked: found.append(asked))
    monkeypatch.setenv("WORKBENCH_TRACE", str(demo_trace))
    return found


def waited(page: AppTest) -> set[background.Asked]:
    return {wait.asked for wait in page.session_state["waiting"].values()}


def test_questions_that_nobody_waits_for_are_taken_back(left):
    page = begun("structure", structure_tab="Within a layer").run()
    first = waited(page)
    assert len(first) == 2 and not page.run().exception and not left
    page.text_input("where").set_value("lang=de").run()
    assert set(left) == first and not page.exception
    german = waited(page)
    other = begun("structure", structure_tab="Within a layer", where="lang=de").run()
    assert waited(other) == german
    page.switch_page("languages.py").run()
    assert set(left) == first and {one.where for one in german} == {"lang=de"}  # another session still waits
    other.switch_page("languages.py").run()
    assert set(left) == first | german


def test_questions_are_taken_back_after_drawings_that_were_broken_off(left, monkeypatch):
    page = begun("structure", structure_tab="Within a layer").run()
    first = waited(page)
    page.switch_page("compare.py").run()  # of one run: st.stop
    original, times = view.sidebar, []

    def sidebar() -> None:
        original()
        times.append(1)
        if len(times) == 1:
            st.rerun()

    monkeypatch.setattr(view, "sidebar", sidebar)
    page.switch_page("languages.py").run()
    assert len(times) == 2 and first <= set(left)


def test_the_simulation_is_taken_back_though_the_size_is_waited_for_too(left):
    page = begun("consistency").run()
    assert {one.name for one in waited(page)} == {"cache", "describe"}
    page.switch_page("languages.py").run()
    assert {one.name for one in left} == {"cache", "describe"}


def test_without_a_trace(monkeypatch):
    assert "No trace is open" in said(opened(monkeypatch, None, "structure"))
