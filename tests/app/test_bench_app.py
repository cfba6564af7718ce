"""The benchmark of the page: its trace, its table, and that it runs on a small trace."""

import json

import numpy as np
import pytest

from workbench.bench import app as bench
from workbench.bench.made_up_trace import OTHERS, made_up_trace, word
from workbench.errors import InputError
from workbench.validate import validate


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return made_up_trace(tmp_path_factory.mktemp("bench") / "t.duckdb", 2_000, n_layers=2, length=100)


def test_the_trace_has_what_pages_look_at(trace):
    assert not len(validate(trace.path))
    assert trace.n_tokens == 2_000 and trace.recorded >= {"weights", "entropy", "margin", "profiles"}
    sequences = trace.sequences()
    assert set(sequences["lang"]) == {"en", "de"} and sequences["topic"].nunique() > 1
    assert (sequences.groupby("segment_id")["lang"].nunique() == 2).all()
    assert trace.tokens()["nll"].isna().sum() == trace.n_sequences
    profile = np.bincount(trace.experts(1)[:100].ravel(), minlength=64) / 800
    assert np.allclose(trace.profiles(1)[0], profile, atol=1e-6)


def test_words_are_told_apart():
    texts = [word(token_id) for token_id in range(50_000)]
    assert texts[: len(OTHERS)] == list(OTHERS) and len(texts[len(OTHERS)]) < len(texts[-1])
    assert len(set(texts)) > 0.99 * len(texts)


@pytest.mark.slow
def test_runs_in_a_browser(trace, tmp_path, capsys):
    result = bench.measure(trace.path, "demo", tmp_path / "loads", repeats=1, pages=("overview",))
    found = result["pages"]["overview"]
    assert found["first"] > 0 and found["again"]["worst"] >= found["again"]["median"] > 0
    assert found["interactions"]["count the texts by"]["median"] > 0
    assert result["processes_peak_bytes"] >= result["server_peak_bytes"] > 50_000_000
    assert json.loads(json.dumps(result)) == result
    assert "count the texts by" in capsys.readouterr().err


def test_what_misses_its_target_is_marked():
    assert bench.marked(2.5, "first view") == "2.50 !" and bench.marked(0.4, "interaction") == "0.40"
    assert bench.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "worst": 3.0} and bench.summary([]) == {}


def test_a_trace_that_is_not_there(tmp_path, workbench):
    with pytest.raises(InputError, match="no such file"):
        bench.run(trace=tmp_path / "none.duckdb")
    refused = workbench("bench", "store", "--quick", "--trace", tmp_path / "none.duckdb")
    assert refused.code == 2 and "--trace is about `bench app`" in refused.err
