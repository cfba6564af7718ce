"""Tables of analyses brought to one grid."""

import numpy as np
import pandas as pd
import pytest
from routed import full_trace, random_trace

from workbench import analysis
from workbench.errors import InputError
from workbench.expert_grid import METRICS, grid, grid_figure, possible, scaled, values


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return random_trace(tmp_path_factory.mktemp("grid") / "t.duckdb", n_texts=10)


@pytest.fixture(scope="module")
def uneven():
    """Layers of 3 and 5 experts."""
    rows = [(layer, expert) for layer, n in ((0, 3), (1, 5)) for expert in range(n)]
    frame = pd.DataFrame(rows, columns=["layer", "expert"])
    value = [2.0, np.nan, 3.0, 1.0, 5.0, 4.0, 0.0, 5.0]
    return frame.assign(value=value, low=0.0, high=9.0, count=7, n_experts=[3] * 3 + [5] * 5)


def test_values_of_an_analysis(routed):
    frame = analysis.expert_values(routed.trace, by="lang", n_resamples=20)
    for metric in ("load", "information", "divergence"):
        found = values(frame, metric)
        whole = frame[frame["group"] == "all"]
        assert len(found) == 12 and found["value"].tolist() == whole[metric].tolist()
        assert found["high"].tolist() == whole[f"{metric}_high"].tolist()
    german = values(frame, "lift", "de").set_index(["layer", "expert"])["value"]
    rows = frame[frame["group"] == "de"].set_index(["layer", "expert"])["lift"]
    pd.testing.assert_series_equal(german, rows, check_names=False)


def test_values_of_importance(routed):
    frame = analysis.importance(routed.trace, n_resamples=10)
    with pytest.raises(InputError, match="reap needs weights and norms"):
        values(frame, "reap")


def test_values_of_the_vocabulary(tmp_path):
    random = np.random.default_rng(0)
    ids = random.integers(0, 6, 600)
    experts = np.where(random.random(600) < 0.9, ids % 3, random.integers(0, 4, 600))
    trace = full_trace(tmp_path / "t.duckdb", experts[:, None, None], n_experts=4, seq=np.repeat(np.arange(30), 20),
                       token_ids=ids, sequences=pd.DataFrame({"lang": ["en"] * 30}))  # fmt: skip
    frame = analysis.vocabulary(trace)
    count, strength = values(frame, "favourites"), values(frame, "strength")
    assert count["value"].tolist() == [2, 2, 2, 0] and count["count"].tolist() == [2, 2, 2, 0]
    by_hand = [frame.loc[frame["expert"] == expert, "value"].mean() for expert in range(4)]
    assert np.allclose(strength["value"], by_hand, equal_nan=True) and np.isnan(strength["value"][3])
    assert (count["n_experts"] == 4).all()


def test_metrics_exist_in_their_analyses(tmp_path):
    experts = np.array([[[0, 1]], [[1, 2]]])
    some = np.ones((2, 1, 2), np.float32)
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=3, seq=[0, 1], weights=some, norms=some, shift=np.ones((1, 2)),
        token_ids=[1, 1], sequences=pd.DataFrame({"lang": ["a", "b"]}),
    )  # fmt: skip
    tables = {
        "expert_values": analysis.expert_values(trace, by="lang", weights=True, n_resamples=2),
        "importance": analysis.importance(trace, n_resamples=2),
        "vocabulary": analysis.vocabulary(trace, minimum=1),
    }
    assert possible(trace.recorded) == list(METRICS)
    for name, metric in METRICS.items():
        found = values(tables[metric.analysis], name, "a" if metric.grouped else "all")
        assert len(found) == 3 and metric.meaning.endswith(".") and metric.kind in ("ratio", "amount")


def test_possible():
    assert possible({"ids"}, labels=False, ids=False) == ["load"]
    assert possible({"ids", "weights"}, labels=False, ids=False) == ["load", "mean_weight", "weighted_frequency"]
    assert "favourites" in possible({"ids"}) and "lift" in possible({"ids"}) and "reap" not in possible({"ids"})


def test_grid_of_layers_of_different_sizes(uneven):
    shown, experts = grid(uneven)
    assert experts.tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]
    assert np.array_equal(shown, [[2, np.nan, 3, np.nan, np.nan], [1, 5, 4, 0, 5]], equal_nan=True)
    shown, experts = grid(uneven.sample(frac=1, random_state=0), by_value=True)
    assert experts.tolist() == [[2, 0, 1, -1, -1], [1, 4, 2, 0, 3]]
    assert np.array_equal(shown, [[3, 2, np.nan, np.nan, np.nan], [5, 5, 4, 1, 0]], equal_nan=True)
    assert grid(uneven, "count", by_value=True)[0][0].tolist()[:3] == [7, 7, 7]


def test_scaled_ratios():
    places, ticks = scaled(np.array([[0, 1 / 8, 0.5, 1, 2, 8, 100, np.nan]]), "ratio")
    assert np.allclose(places, [[0, 0, 1 / 3, 0.5, 2 / 3, 1, 1, np.nan]], equal_nan=True)
    assert ticks[0] == (0, "≤ 1/8×") and ticks[3] == (0.5, "1×") and ticks[-1] == (1, "≥ 8×")


def test_scaled_amounts():
    shown = np.array([[0.0, 5, 10], [20, 30, np.nan]])
    places, ticks = scaled(shown, "amount")
    assert np.allclose(places, [[0, 1 / 6, 1 / 3], [2 / 3, 1, np.nan]], equal_nan=True)
    assert ticks[0] == (0, "0") and ticks[-1] == (1, "30")
    places, ticks = scaled(shown, "amount", each_layer=True)
    assert np.allclose(places, [[0, 0.5, 1], [0, 1, np.nan]], equal_nan=True)
    assert [text for _, text in ticks] == ["least of the layer", "most of the layer"]
    same, ticks = scaled(np.full((2, 2), 3.0), "amount")
    assert (same == 0.5).all() and ticks == [(0.5, "3")]
    nothing, _ = scaled(np.full((2, 2), np.nan), "amount")
    assert np.isnan(nothing).all()
    giant = np.append(np.linspace(0, 1, 999), 1e6).reshape(1, -1)
    places, _ = scaled(giant, "amount")
    assert places[0, 500] == pytest.approx(0.5, abs=0.02) and places[0, -1] == 1


def test_figure(uneven):
    drawn = grid_figure(uneven, "× even", chosen=(1, 4))
    heatmap = drawn.data[0]
    assert np.asarray(heatmap["z"]).shape == (2, 5) and list(heatmap["y"]) == ["layer 0", "layer 1"]
    assert list(heatmap["customdata"][1][4]) == [4, 5, 0, 9, 7]
    (frame,) = drawn.layout["shapes"]
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (3.5, 4.5, 0.5, 1.5)
    assert not grid_figure(uneven, "nats", "amount", chosen=(1, 9)).layout["shapes"]
    sorted_one = grid_figure(uneven, "nats", "amount", by_value=True, each_layer=True, chosen=(0, 1))
    assert sorted_one.layout["shapes"][0].x0 == 1.5  # the one without a value is the last of its layer


def test_figure_of_very_many_experts():
    layers, n = 60, 512
    frame = pd.DataFrame({
        "layer": np.repeat(np.arange(layers), n), "expert": np.tile(np.arange(n), layers), "value": 1.0, "low": 1.0,
        "high": 1.0, "count": 1, "n_experts": n,
    })  # fmt: skip
    drawn = grid_figure(frame, "× even")
    assert np.asarray(drawn.data[0]["z"]).shape == (60, 512) and drawn.data[0]["xgap"] == 0
    assert drawn.layout["height"] < 1500


def test_errors(routed):
    frame = analysis.expert_values(routed.trace, n_resamples=2)
    with pytest.raises(InputError, match="metric is 'beauty'; expected one of load"):
        values(frame, "beauty")
    with pytest.raises(InputError, match="no group 'xx'; there are all"):
        values(frame, "load", "xx")
