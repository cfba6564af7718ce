"""Coefficients point at the experts that were planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import KNOWS, N_EXPERTS, N_LAYERS, planted
from routed import full_trace

from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench_probes import coefficients
from workbench_probes.coefficients import figure, findings
from workbench_probes.features import of_layer


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return planted(tmp_path_factory.mktemp("coefficients") / "t.duckdb")


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_planted_experts_stand_out(trace: Trace, unit: str):
    found = coefficients(trace, "lang", unit=unit)
    assert len(found) == 2 * N_LAYERS * N_EXPERTS
    german = found[found["label"] == "de"].set_index(["layer", "expert"])
    english = found[found["label"] == "en"].set_index(["layer", "expert"])
    np.testing.assert_allclose(german["coefficient"], -english["coefficient"])
    assert set(german["coefficient"].nlargest(2).index) == {(KNOWS, 0), (KNOWS, 1)}
    assert set(german["coefficient"].nsmallest(2).index) == {(KNOWS, 2), (KNOWS, 3)}
    assert (german.loc[(KNOWS, 0), "low"] > 0) and (german.loc[(KNOWS, 2), "high"] < 0)
    assert (found["low"] <= found["coefficient"]).all() and (found["coefficient"] <= found["high"]).all()
    rows = np.arange(trace.n_tokens if unit == "token" else trace.n_sequences)
    rate = of_layer(trace, "choices", KNOWS, rows, unit).mean(axis=0)
    np.testing.assert_allclose(german.loc[KNOWS, "rate"], rate, rtol=1e-5)


def test_three_classes_a_number_and_layers_of_different_width(tmp_path: Path):
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(60), 4)
    wide = (seq % 3 * 100 + random.integers(0, 2, 240))[:, None]
    narrow = random.integers(0, 2, (240, 1))
    rows = pd.DataFrame({"topic": list("xyz") * 20})
    nll = np.append(0, 3.0 * narrow[:-1, 0])
    trace = full_trace(tmp_path / "t.duckdb", [wide, narrow], n_experts=[300, 2], seq=seq, sequences=rows, nll=nll)
    found = coefficients(trace, "topic")
    assert len(found) == 3 * 302
    top = found.loc[found.groupby("label")["coefficient"].idxmax()].set_index("label")
    assert (top["layer"] == 0).all() and (top.loc[["x", "y", "z"], "expert"] // 100).tolist() == [0, 1, 2]
    heat = figure(found).data
    assert len(heat) == 3 and np.shape(heat[0].z) == (2, 300) and np.isnan(heat[0].z[1][2:].astype(float)).all()
    number = coefficients(trace, "loss", layers=[1])
    assert number["label"].unique().tolist() == ["value"]
    assert np.diff(number["coefficient"])[0] == pytest.approx(3, abs=0.2)
    assert len(figure(number).data) == 1 and "Expert 1 of layer 1" in findings(number)[0]


def test_only_experts_have_coefficients(trace: Trace):
    with pytest.raises(InputError, match="'tokens' has no columns of experts"):
        coefficients(trace, "lang", features="tokens")
    with pytest.raises(InputError, match="strength is -1"):
        coefficients(trace, "lang", strength=-1)
    assert len(figure(coefficients(trace, "lang", layers=[1])).data) == 1  # of two mirror images one
