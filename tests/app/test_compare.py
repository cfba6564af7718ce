"""The Compare page as a script: two runs of a file, a run of another file, and nothing to compare with."""

import numpy as np
import pandas as pd
import pytest
from pages import answered, headings, opened, said
from routed import full_trace, random_trace

from workbench.analysis import agreement
from workbench.slicing import sample
from workbench.tracefile import Trace

HOSTILE = "<script>alert(1)</script> *b*"


def add(path, run, seed):
    random = np.random.default_rng(seed)
    rows = pd.DataFrame({"lang": ["en", "de", "fr"] * 3, "domain": ["law", "code", "law"] * 3})
    seq = np.repeat(np.arange(9), 12)
    return full_trace(
        path, np.argsort(random.random((len(seq), 2, 6)), axis=-1)[..., :2], n_experts=6, seq=seq, sequences=rows,
        token_ids=np.arange(len(seq)) % 4, run=run, mode="append" if path.exists() else "new",
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "two.duckdb"
    add(path, "plain", 1)
    add(path, HOSTILE, 2)
    return path


def test_layers(monkeypatch, two):
    page = opened(monkeypatch, two, "compare", run="plain")
    assert headings(page) == ["Layer by layer"]
    shown = next(one.value for one in page.dataframe if "measure" in one.value.columns)
    expected = agreement(sample(Trace(two, "plain"), 50_000), other=HOSTILE)
    pd.testing.assert_frame_equal(shown.reset_index(drop=True), expected, check_dtype=False)
    assert any(one.value["run"].tolist() == ["plain", HOSTILE] for one in page.dataframe if "model" in one.value)


@pytest.mark.parametrize(
    ("tab", "heading", "column"),
    [
        ("Languages and domains", "Agreement by lang", "kappa"),
        ("Experts", "Every expert", "kept"),
        ("Token ids", "Token ids that changed most", "worst_layer"),
        ("Texts", "Texts that changed most", "worst_layer"),
    ],
)
def test_what_changed(monkeypatch, two, tab, heading, column):
    page = opened(monkeypatch, two, "compare", run="plain", compare_tab=tab)
    assert headings(page) == [heading]
    assert any(column in one.value.columns for one in page.dataframe)
    if tab == "Languages and domains":
        page.selectbox("compare_by").select("domain")
        answered(page)
        assert headings(page) == ["Agreement by domain"]


def test_nothing_to_compare_with(monkeypatch, tmp_path):
    path = tmp_path / "one.duckdb"
    random_trace(path)
    page = opened(monkeypatch, path, "compare")
    assert "there is no other yet" in said(page) and "--append" in said(page) and not headings(page)
    page.text_input("compare_file").set_value("x" * 5000)
    answered(page)
    page.text_input("compare_file").set_value("/nowhere.duckdb")
    answered(page)
    assert "neither a run of this file" in said(page).replace("\\", "")


def test_a_run_of_another_file(monkeypatch, two, tmp_path):
    other = tmp_path / "other.duckdb"
    add(other, "elsewhere", 3)
    page = opened(monkeypatch, two, "compare", run="plain", compare_other="a run of another file …",
                  compare_file=f"{other}#elsewhere")  # fmt: skip
    assert headings(page) == ["Layer by layer"]
    shown = next(one.value for one in page.dataframe if "measure" in one.value.columns)
    assert set(shown["other"]) == {"other.duckdb#elsewhere"}
    random_trace(tmp_path / "unlike.duckdb", n_experts=9)
    page.text_input("compare_file").set_value(str(tmp_path / "unlike.duckdb"))
    answered(page)
    assert "only runs of one architecture can be compared" in said(page).replace("\\", "")
    (tmp_path / "text.duckdb").write_text("not a trace")
    page.text_input("compare_file").set_value(str(tmp_path / "text.duckdb"))
    answered(page)
    assert "text.duckdb" in said(page).replace("\\", "")


def test_without_a_trace(monkeypatch):
    assert "No trace is open" in said(opened(monkeypatch, None, "compare"))
