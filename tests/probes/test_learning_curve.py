"""Learning curves: nested parts of whole texts, rising where there is something to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import KNOWS, planted

from workbench.errors import InputError
from workbench_probes import learning_curve, probe
from workbench_probes.learning_curve import figure, findings, part_of


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 5))
def test_parts_are_nested_and_of_whole_texts(texts: list[int], seed: int):
    group = np.array(texts)
    rows = np.arange(len(group))
    before: set[int] = set()
    for fraction in (0.01, 0.3, 0.6, 1.0):
        part, n_texts = part_of(rows, group, fraction, (seed, 0))
        assert before <= set(part.tolist()) and len(np.unique(group[part])) == n_texts >= 1
        assert set(rows[np.isin(group, group[part])]) == set(part.tolist())
        before = set(part.tolist())
    assert before == set(rows.tolist())


def test_the_whole_curve(tmp_path: Path):
    trace = planted(tmp_path / "t.duckdb", strength=3.0)
    found = learning_curve(trace, "lang", fractions=(0.02, 0.25, 1.0))
    curve = found[(found["features"] == "choices") & (found["score"] == "balanced_accuracy")]
    assert curve["n_train_groups"].tolist() == [1, 6, 24] and curve["n_train"].tolist() == [2, 12, 48]
    assert curve["value"].iloc[-1] > 0.9 and curve["value"].iloc[-1] >= curve["value"].iloc[0]
    assert curve["layer"].isna().all()
    end = probe(trace, "lang", controls=0)
    whole = end[end["layer"].isna()].sort_values(["features", "score"])
    last = found[found["fraction"] == 1].sort_values(["features", "score"])
    for name in ("value", "low", "high", "chance"):  # with all texts, a probe
        np.testing.assert_allclose(last[name], whole[name])
    assert [line.name for line in figure(found).data if line.showlegend is not False] == ["choices", "tokens", "chance"]
    assert "after 1 texts" in findings(found)[0] and len(findings(found)) == 2
    single = learning_curve(trace, "loss", layers=[KNOWS], features=["choices"], fractions=[1])
    assert single["layer"].tolist() == [KNOWS, KNOWS] and set(single["score"]) == {"r2", "correlation"}
    assert len(figure(single).data)


def test_wrong_parts(tmp_path: Path):
    trace = planted(tmp_path / "t.duckdb", n_texts=6)
    for options, said in [
        ({"fractions": ()}, "fractions are"),
        ({"fractions": (0.5, 2)}, "up to 1"),
        ({"strength": ()}, "strength is"),
    ]:
        with pytest.raises(InputError, match=said):
            learning_curve(trace, "lang", **options)
