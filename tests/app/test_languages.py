"""The Languages page as a script: the reference language, its tabs, and a trace of one language."""

from pages import answered, headings, opened, said
from routed import random_trace


def shown(page, column):
    return next(one.value for one in page.dataframe if column in one.value.columns)


def test_reference(monkeypatch, demo_trace):
    page = opened(monkeypatch, demo_trace, "languages")
    assert headings(page) == ["Divergence, layer by layer", "Is the middle of the model more alike than its ends?"]
    assert set(shown(page, "shuffled")["reference"]) == {"en"}
    page.selectbox("languages_reference").select("de")
    answered(page)
    assert set(shown(page, "shuffled")["reference"]) == {"de"}


def test_map_and_loss(monkeypatch, demo_trace):
    assert headings(opened(monkeypatch, demo_trace, "languages", languages_tab="Map")) == ["Every two languages"]
    page = opened(monkeypatch, demo_trace, "languages", languages_tab="Loss")
    assert "a correlation takes at least 4" in said(page)  # three languages beside the reference


def test_one_language(monkeypatch, tmp_path):
    path = tmp_path / "t.duckdb"
    random_trace(path, languages=("en", None))
    page = opened(monkeypatch, path, "languages")
    assert "no texts in two languages" in said(page) and not page.dataframe


def test_without_a_trace(monkeypatch):
    assert "No trace is open" in said(opened(monkeypatch, None, "languages"))
