"""Probabilities from recorded logits are those that the recorder uses."""

import numpy as np
import pandas as pd
import pytest
from routed import write

from workbench.analysis.router_probabilities import chunks, log_probabilities, scoring


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt-softplus", "hash"])
def test_as_the_recorder_has_them(score):
    torch = pytest.importorskip("torch")
    from workbench import scores

    z = np.concatenate([np.random.default_rng(0).normal(size=(20, 7)) * 5, [[-200, -90, 0, 30, 80, 1, -20.5]]])
    expected = scores.log_probabilities(torch.tensor(z, dtype=torch.float64), score).numpy()
    np.testing.assert_allclose(log_probabilities(z, score), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "gating, expected",
    [
        ("softmax, top-k, renormalised", "softmax"),
        ("top-k, softmax", "softmax"),
        ("sigmoid + bias, groups, top-k, renormalised, scaled", "sigmoid"),
        ("sqrt-softplus + bias, top-k, renormalised, scaled", "sqrt-softplus"),
        ("logits + bias, top-k, sigmoid, renormalised", "sigmoid"),
        ("hash, sqrt-softplus, renormalised, scaled", "hash"),
        ("sparsemixer", "softmax"),
        (None, "softmax"),
    ],
)
def test_scoring(tmp_path, gating, expected):
    trace = write(tmp_path / "t.duckdb", np.zeros((1, 1, 1), int), [0], pd.DataFrame({"lang": ["en"]}), 2).trace
    trace.layers["gating"] = gating
    assert scoring(trace, 0) == expected


def test_every_family_is_understood(tmp_path):
    from workbench.families import FAMILIES

    trace = write(tmp_path / "t.duckdb", np.zeros((1, 1, 1), int), [0], pd.DataFrame({"lang": ["en"]}), 2).trace
    for name, family in FAMILIES.items():
        for score in ("softmax", "sigmoid") if family.scoring.startswith("config:") else (family.scoring,):
            trace.layers["gating"] = family.gating.format(scoring=score).replace("?", "")
            assert scoring(trace, 0) == score, name


def test_chunks():
    assert [part.indices(10) for part in chunks(10, 1 << 20)] == [(0, 4, 1), (4, 8, 1), (8, 10, 1)]
    assert list(chunks(0, 5)) == [] and len(list(chunks(3, 1 << 30))) == 3
