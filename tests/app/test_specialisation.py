"""The Specialisation page as a script: any column, filters, what is fixed by the page, and what can't be asked."""

import numpy as np
import pandas as pd
from pages import answered, headings, opened, said
from routed import full_trace, random_trace

from workbench.analysis import specialization
from workbench.slicing import sample
from workbench.tracefile import Trace


def table(page, columns):
    (found,) = [one.value for one in page.dataframe if set(columns) <= set(one.value.columns)]
    return found


def test_by_language_and_by_any_other_column(monkeypatch, tmp_path):
    path = tmp_path / "t.duckdb"
    random_trace(path, languages=("en", "de", "fr"), n_texts=6)
    page = opened(monkeypatch, path, "specialisation")
    assert headings(page) == ["Which experts", "How much, layer by layer"]
    shown = table(page, ["relative", "group"])
    assert set(shown["by"]) == {"lang"} or shown.empty  # only significant rows
    page.toggle("picked-specialization-lang").set_value(False)
    answered(page)
    expected = specialization(sample(Trace(path), 50_000), "lang", within="source")
    assert table(page, ["relative", "group"]).reset_index(drop=True).equals(expected)
    page.selectbox("specialisation_by").select("domain")
    answered(page)
    page.toggle("picked-specialization-domain").set_value(False)
    answered(page)
    assert set(table(page, ["relative", "group"])["by"]) == {"domain"}


def test_the_null_is_shuffled_as_chosen(monkeypatch, tmp_path):
    path = tmp_path / "t.duckdb"
    random_trace(path, languages=("en", "de"))
    page = opened(monkeypatch, path, "specialisation")
    assert set(table(page, ["mutual_information"])["within"]) == {"source"}
    page.selectbox("specialisation_within_lang").select("domain")
    answered(page)
    assert set(table(page, ["mutual_information"])["within"]) == {"domain"}


def test_two_filters(monkeypatch, tmp_path):
    path = tmp_path / "t.duckdb"
    random_trace(path, languages=("en", "de", "fr"))
    page = opened(monkeypatch, path, "specialisation", specialisation_tab="Two filters")
    assert set(table(page, ["npmi"])["group"]) == {"lang=en"}
    page.text_input("specialisation_group_lang").set_value("lang=fr")
    page.text_input("specialisation_versus_lang").set_value("lang=de")
    answered(page)
    shown = table(page, ["npmi"])
    assert (shown["group"].iloc[0], shown["versus"].iloc[0]) == ("lang=fr", "lang=de")
    page.text_input("specialisation_group_lang").set_value("colour=blue")
    answered(page)
    assert "colour" in said(page) and not [one for one in page.dataframe if "npmi" in one.value]
    page.text_input("specialisation_group_lang").set_value(" ")
    answered(page)
    assert "Say which texts to contrast" in said(page)


def test_groups_load_and_token_ids(monkeypatch, tmp_path):
    path = tmp_path / "t.duckdb"
    random_trace(path, languages=("en", "de"))
    assert headings(opened(monkeypatch, path, "specialisation", specialisation_tab="Groups")) == [
        "Which languages are routed alike"
    ]
    page = opened(monkeypatch, path, "specialisation", specialisation_tab="Load", specialisation_by="position")
    assert headings(page) == ["Balance by position", "Every expert by position"]
    page = opened(monkeypatch, path, "specialisation", specialisation_tab="Token ids")
    assert "token id" in said(page)  # ids aren't known here: a message


def test_tasks_take_domains_in_several_languages(monkeypatch, tmp_path, demo_trace):
    path = tmp_path / "t.duckdb"
    random_trace(path, languages=("en",))
    page = opened(monkeypatch, path, "specialisation", specialisation_tab="Tasks")
    assert "Task experts take texts of one task in several languages" in said(page)
    page = opened(monkeypatch, demo_trace, "specialisation", specialisation_tab="Tasks")
    assert page.text_input("specialisation_task").value == "domain=legal-rights"
    assert headings(page) == ["Experts of a task, in each language"]


def test_without_a_trace(monkeypatch):
    assert "No trace is open" in said(opened(monkeypatch, None, "specialisation"))


def test_metadata_of_any_type(monkeypatch, tmp_path):
    path = tmp_path / "t.duckdb"
    rows = pd.DataFrame({"tags": [["a"], ["b"], ["b"], None], "more": [{"x": 1}, {"x": 2}] * 2, "phase": list("pqpq")})
    full_trace(path, np.arange(8).reshape(8, 1, 1) % 3, n_experts=3, seq=np.repeat(np.arange(4), 2), sequences=rows)
    page = opened(monkeypatch, path, "specialisation")
    assert page.selectbox("specialisation_by").options.count("phase") == 1
    page.selectbox("specialisation_by").select("tags")
    answered(page)
    page.selectbox("specialisation_within_tags").select("more")
    answered(page)
    assert headings(page) == ["Which experts", "How much, layer by layer"] and not page.warning
