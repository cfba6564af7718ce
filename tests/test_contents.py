"""What a run is made of, and how runs are told in words."""

from datetime import datetime

import pandas as pd
import pytest
from routed import random_trace

from workbench import contents as made_of
from workbench import figures, runs
from workbench.errors import InputError
from workbench.interventions import Ablate
from workbench.recipe import Recipe, to_json
from workbench.tracefile import Trace, info


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return random_trace(tmp_path_factory.mktemp("contents") / "t.duckdb", languages=("xx", "de", None, "en")).trace


@pytest.mark.parametrize("by", list(made_of.COLUMNS))
def test_counts(trace, by):
    found = made_of.contents(trace.path, trace.run, by)
    sequences = trace.sequences()
    labels = sequences[by].where(sequences[by].notna(), "–")
    for row in found.to_dict("records"):
        mine = sequences[labels == row[by]]
        assert row["texts"] == len(mine) and row["tokens"] == mine["n_tokens"].sum()
        assert row["share"] == pytest.approx(mine["n_tokens"].sum() / trace.n_tokens)
    assert found["texts"].sum() == trace.n_sequences


def test_order_and_colours_are_those_of_all_figures(trace):
    found = made_of.contents(trace.path, trace.run, "lang")
    assert found["lang"].tolist() == ["en", "de", "xx", "–"]
    bars = made_of.figure(found).data[0]
    assert list(bars.x) == found["tokens"].tolist()
    assert list(bars.marker.color)[:2] == [figures.style("en").colour, figures.style("de").colour]
    many = pd.DataFrame({"domain": [f"<d{n}>" for n in range(30)], "texts": 1, "tokens": 2, "share": 0.1})
    upright = made_of.figure(many).data[0]
    assert upright.x[0] == "&lt;d0&gt;" and list(upright.y) == [2] * 30


def test_other_columns_and_files(trace, tmp_path):
    with pytest.raises(InputError, match="lang, domain, source, not by 'seq'"):
        made_of.contents(trace.path, trace.run, "seq")
    with pytest.raises(InputError, match="no such file"):
        made_of.contents(tmp_path / "none.duckdb", "x", "lang")
    assert not len(made_of.contents(trace.path, "no such run", "lang"))


def test_runs_in_words(trace):
    known = info(trace.path)["runs"]
    table = runs.table(known)
    assert table["run"].tolist() == [trace.run] and table["tokens"].tolist() == [trace.n_tokens]
    assert table["recipe"].tolist() == ["–"] and table["experts"].tolist() == ["6"]
    assert not len(runs.table([]))


def test_recipes_in_words():
    recipe = to_json(Recipe((Ablate(layer=3, experts=[5]),)))
    assert runs.in_words(recipe) == "Ablate(layer=3, experts=[5])"
    assert runs.in_words(None) == "–"
    assert "doesn't know" in runs.in_words({"format": "other"})


def test_citation_names_what_is_known():
    facts = {
        "run": "r", "model": "m/x", "revision": "abc", "dtype": "bfloat16", "tokens": 1200, "sequences": 3,
        "corpus": {"names": ["udhr"], "fingerprint": "f00"}, "versions": {"torch": "2.1"},
        "started": datetime(2026, 3, 4), "recipe": to_json(Recipe((Ablate(layer=0, experts=[1]),))),
    }  # fmt: skip
    said = runs.citation("t.duckdb", facts)
    for part in (
        "m/x at revision abc",
        "bfloat16",
        "Ablate",
        "udhr (fingerprint f00)",
        "1,200",
        "r of t.duckdb",
        "torch 2.1",
    ):
        assert part in said
    assert "2026-03-04" in said
    nothing = dict.fromkeys(facts) | {"run": "r", "tokens": 0, "sequences": 0}
    assert "None" not in runs.citation("t.duckdb", nothing)


@pytest.mark.parametrize("odd", [5, [1], "text", {"names": 5}])
def test_other_json_than_ours_says_nothing(trace, odd):
    known = [
        one | {"corpus": odd, "versions": odd if odd != {"names": 5} else None} for one in info(trace.path)["runs"]
    ]
    assert runs.table(known)["corpora"].tolist() == [""]
    assert "texts that the trace doesn't name" in runs.citation("t.duckdb", known[0])
