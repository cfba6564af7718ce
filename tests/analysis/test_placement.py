"""Placements against enumeration of all, their scores against loops, their files against the engines' readers."""

import itertools
import json
import os
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import full_trace, random_trace, write

from workbench.analysis.assignment import (
    Traffic,
    at_random,
    busiest,
    contiguous,
    cost_of,
    crossing,
    one_layer,
    quiet,
    solve,
    whole,
)
from workbench.analysis.placement import assign, placement
from workbench.errors import InputError
from workbench.placements import export_placement, read_placement

file = import_module("workbench.analysis.placement")


def some_traffic(seed: int, n_experts: int, n_layers: int) -> Traffic:
    random = np.random.default_rng(seed)
    loads = [random.integers(0, 50, n_experts).astype(float) for _ in range(n_layers)]
    return Traffic(loads, [random.integers(0, 50, (n_experts, n_experts)).astype(float) for _ in range(n_layers - 1)])


def cheapest(traffic: Traffic, devices: int, balance: float) -> float:
    """The lowest cost of all placements."""
    every = [sorted(set(itertools.permutations(np.sort(np.arange(n) % devices)))) for n in traffic.n_experts]
    return min(
        cost_of(traffic, [np.array(where) for where in chosen], devices, balance)
        for chosen in itertools.product(*every)
    )


def looped_cost(traffic: Traffic, placed: list[np.ndarray], devices: int, balance: float) -> float:
    crossed = total = 0.0
    for layer, moves in enumerate(traffic.moves):
        for i, j in itertools.product(range(len(moves)), range(moves.shape[1])):
            total += moves[i, j]
            crossed += moves[i, j] * (placed[layer][i] != placed[layer + 1][j])
    uneven = 0.0
    for where, load in zip(placed, traffic.load, strict=True):
        of_device = [sum(load[e] for e in range(len(load)) if where[e] == device) for device in range(devices)]
        uneven += max(of_device) * devices / sum(of_device) - 1 if sum(of_device) else 0
    return crossed / max(total, 1) + balance * uneven / len(placed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3]), st.floats(0, 3))
def test_cost_against_loop(seed, devices, balance):
    traffic = some_traffic(seed, 6, 3)
    placed = at_random([6] * 3, devices, np.random.default_rng(seed))
    assert cost_of(traffic, placed, devices, balance) == pytest.approx(looped_cost(traffic, placed, devices, balance))
    assert ((busiest(traffic, placed, devices) >= 1 - 1e-9) & (busiest(traffic, placed, devices) <= devices)).all()
    assert ((crossing(traffic, placed) >= 0) & (crossing(traffic, placed) <= 1)).all()


@pytest.mark.parametrize("seed, n_experts, n_layers, devices, balance", [
    (0, 4, 3, 2, 0.5), (1, 4, 3, 2, 0.0), (2, 4, 2, 2, 5.0), (3, 6, 2, 3, 1.0), (4, 6, 1, 3, 1.0), (5, 4, 2, 4, 1.0),
])  # fmt: skip
def test_the_best_of_all_placements_is_found_and_proved(seed, n_experts, n_layers, devices, balance):
    traffic = some_traffic(seed, n_experts, n_layers)
    best = cheapest(traffic, devices, balance)
    found = solve(traffic, devices, balance=balance, time_limit=20, seed=0)
    assert found.cost == pytest.approx(best) and found.bound == pytest.approx(best, abs=1e-5) and found.gap < 1e-4
    assert found.cost == pytest.approx(cost_of(traffic, found.devices, devices, balance))
    for where in found.devices:
        assert np.bincount(where, minlength=devices).tolist() == [n_experts // devices] * devices
    placed, bound = whole(traffic, devices, balance, 20)
    assert placed is not None and cost_of(traffic, placed, devices, balance) == pytest.approx(best)
    assert bound <= best + 1e-6


def test_a_layer_is_placed_best_given_its_neighbours():
    traffic = some_traffic(7, 6, 3)
    placed = contiguous([6] * 3, 2)
    every = sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1])))
    for layer in range(3):
        costs = [cost_of(traffic, [*placed[:layer], np.array(where), *placed[layer + 1 :]], 2, 1.0) for where in every]
        found = one_layer(traffic, placed, layer, 2, 1.0, 10)
        assert cost_of(traffic, [*placed[:layer], found, *placed[layer + 1 :]], 2, 1.0) == pytest.approx(min(costs))


def test_the_solver_prints_nothing(capfd):
    with quiet():
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();")
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_layers_of_different_size_and_no_traffic():
    random = np.random.default_rng(0)
    traffic = Traffic([np.ones(4), np.ones(6)], [random.integers(0, 9, (4, 6)).astype(float)])
    found = solve(traffic, 2, balance=1.0, time_limit=10, seed=0)
    assert found.cost == pytest.approx(cheapest(traffic, 2, 1.0)) and [len(where) for where in found.devices] == [4, 6]
    nothing = solve(Traffic([np.zeros(4)] * 2, [np.zeros((4, 4))]), 2, balance=1.0, time_limit=5, seed=0)
    assert nothing.cost == 0 and nothing.gap <= 1e-9
    one = solve(traffic, 1, balance=1.0, time_limit=5, seed=0)
    assert one.cost == 0 and one.gap == 0


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Tokens stay in one of two groups of experts, odd or even, in all layers: no transition has to cross."""
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(40), 15)
    side = random.integers(2, size=len(seq))
    experts = np.stack([2 * random.integers(4, size=len(seq)) + side for _ in range(3)], axis=1)[:, :, None]
    path = tmp_path_factory.mktemp("placement") / "t.duckdb"
    return write(path, experts, seq, pd.DataFrame({"lang": ["en"] * 40}), 8)


@pytest.fixture(scope="module")
def compared(planted):
    return placement(planted.trace, devices=2, time_limit=4, n_random=30, n_resamples=50)


def test_planted_groups_stay_together(planted, compared):
    whole_model = compared[compared["layer"].isna()].set_index(["placement", "texts", "measure"])["value"]
    assert whole_model["optimised", "held out", "crossing"] == 0 and whole_model["optimised", "all", "crossing"] == 0
    assert 0.4 < whole_model["contiguous", "held out", "crossing"] < 0.6
    assert whole_model["random", "held out", "crossing"] == pytest.approx(0.5, abs=0.1)
    table = assign(planted.trace, devices=2, time_limit=4)
    for _, part in table.groupby("layer"):
        assert part.groupby(part["expert"] % 2)["device"].nunique().eq(1).all()
        assert part["device"].value_counts().tolist() == [4, 4]
    assert table["model_layer"].tolist() == table["layer"].tolist() and (table["n_devices"] == 2).all()
    assert table.groupby("layer")["count"].sum().eq(600).all()


def test_scores_against_loops(planted, compared):
    """The contiguous placement over all texts, by loops over tokens."""
    rows = compared[(compared["placement"] == "contiguous") & (compared["texts"] == "all")]
    values = {(row["measure"], row["layer"]): row["value"] for _, row in rows.iterrows() if not pd.isna(row["layer"])}
    experts = planted.experts[:, :, 0]
    for layer in range(3):
        device = experts[:, layer] // 4
        share = max((device == d).sum() for d in (0, 1)) / (len(device) / 2)
        assert values["straggler", layer] == pytest.approx(share)
        if layer < 2:
            crossed = sum(a // 4 != b // 4 for a, b in experts[:, layer : layer + 2].tolist())
            assert values["crossing", layer] == pytest.approx(crossed / len(experts))
    assert np.isnan(values["crossing", 2])
    split = compared.drop_duplicates("texts").set_index("texts")["n_texts"]
    assert split["fitted"] + split["held out"] == split["all"] == 40
    known = compared[compared["low"].notna()]
    assert (known["low"] <= known["high"]).all()
    assert set(compared["placement"]) == {"contiguous", "random", "optimised"}


def test_figure_and_findings(compared):
    assert len(file.figure(compared).data) >= 6
    sentences = file.findings(compared)
    assert "0.0% of the transitions" in sentences[0] and "not made for" in sentences[0] and len(sentences) == 3


def test_degenerate(tmp_path):
    one = write(tmp_path / "one.duckdb", np.array([[[0, 1]], [[1, 0]]]), [0, 0], pd.DataFrame({"lang": ["en"]}), 2)
    frame = placement(one.trace, devices=2, time_limit=1, n_random=3, n_resamples=5)
    assert set(frame["texts"]) == {"all"} and frame[frame["measure"] == "crossing"]["value"].isna().all()
    assert (frame[frame["measure"] == "straggler"]["value"] == 1).all()
    file.figure(frame)
    assert "proved to be the best" in file.findings(frame)[-1]
    none = write(tmp_path / "none.duckdb", np.full((4, 2, 1), -1), [0, 0, 1, 1], pd.DataFrame({"lang": ["en"] * 2}), 2)
    frame = placement(none.trace, devices=2, time_limit=1, n_random=2, n_resamples=5)
    assert frame["value"].isna().all() and file.findings(frame) == ["No token used any expert."]
    file.figure(frame)
    k = random_trace(tmp_path / "k.duckdb", n_layers=2, k=3)
    frame = placement(k.trace, devices=3, time_limit=1, n_random=0, n_resamples=0)
    assert frame[frame["placement"] == "random"]["value"].isna().all() and frame["low"].isna().all()


def test_errors(planted):
    with pytest.raises(InputError, match="layer 0 has 8 experts, which 3 devices can't share.*2, 4, 8 devices"):
        placement(planted.trace, devices=3)
    with pytest.raises(InputError, match="devices is 0"):
        assign(planted.trace, devices=0)
    with pytest.raises(InputError, match="balance is -1"):
        assign(planted.trace, balance=-1)
    with pytest.raises(InputError, match="time_limit is 0"):
        assign(planted.trace, time_limit=0)


# --- files


def table(layers: list[list[int]], **more: list[int]) -> pd.DataFrame:
    rows = [(layer, expert, device) for layer, held in enumerate(layers) for expert, device in enumerate(held)]
    frame = pd.DataFrame(rows, columns=["layer", "expert", "device"])
    return frame.assign(**{name: [values[layer] for layer in frame["layer"]] for name, values in more.items()})


PLACED = [[0, 1, 1, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_table_is_read_back(tmp_path, suffix):
    export_placement(table(PLACED).iloc[::-1], tmp_path / f"p{suffix}")
    pd.testing.assert_frame_equal(read_placement(tmp_path / f"p{suffix}"), table(PLACED))


def test_sglang_reads_it(tmp_path):
    """As ExpertLocationMetadata.init_by_mapping does: one key; device of a physical expert = slot // local experts."""
    export_placement(table(PLACED, model_layer=[1, 3]), tmp_path / "p.json", "sglang")
    data = json.loads((tmp_path / "p.json").read_text())
    assert list(data) == ["physical_to_logical_map"]
    rows = np.array(data["physical_to_logical_map"])
    assert rows.shape == (4, 4) and all(sorted(row) == [0, 1, 2, 3] for row in rows.tolist())
    assert rows[0].tolist() == rows[2].tolist() == [0, 1, 2, 3]  # dense layers
    for held, row in zip(PLACED, (rows[1], rows[3]), strict=True):
        n_local = 4 // 2
        for slot, expert in enumerate(row.tolist()):
            assert held[expert] == slot // n_local


def test_vllm_ascend_reads_it(tmp_path):
    """As expert_file_to_tensor and init_eplb_config of vllm-ascend do: placement[rank] lists the rank's experts."""
    export_placement(table(PLACED), tmp_path / "p.json", "vllm")
    data = json.loads((tmp_path / "p.json").read_text())
    assert data["moe_layer_count"] == 2 and [layer["layer_id"] for layer in data["layer_list"]] == [0, 1]
    for layer, held in enumerate(PLACED):
        listed = [device["device_expert"] for device in data["layer_list"][layer]["device_list"]]
        assert data["layer_list"][layer]["device_count"] == len(listed) == 2
        assert sum(map(len, listed)) - 4 == 0  # redundant experts
        placed = np.array(listed)  # rectangular, or the plugin fails
        for rank in range(2):
            local = np.full(4, -1)
            local[placed[rank]] = np.arange(placed.shape[1])
            assert [where == rank for where in held] == (local >= 0).tolist()


def test_a_placement_made_for_a_trace_can_be_exported(tmp_path):
    random = np.random.default_rng(0)
    experts = [np.argsort(random.random((60, 4)), axis=1)[:, :2] for _ in range(2)]
    trace = full_trace(tmp_path / "t.duckdb", experts, n_experts=4, seq=np.repeat(np.arange(6), 10),
                       sequences=pd.DataFrame({"lang": ["en"] * 6}))  # fmt: skip
    frame = assign(trace, devices=2, time_limit=1)
    for name in ("table", "sglang", "vllm"):
        export_placement(frame, tmp_path / f"{name}.json", name)
    pd.testing.assert_frame_equal(
        read_placement(tmp_path / "table.json"), frame[["layer", "expert", "device"]], check_dtype=False
    )


def test_export_errors(tmp_path):
    good = table(PLACED)
    with pytest.raises(InputError, match="no placement format 'trt'; choose from table, sglang, vllm"):
        export_placement(good, tmp_path / "p.json", "trt")
    with pytest.raises(InputError, match="a placement as sglang is written as .json"):
        export_placement(good, tmp_path / "p.csv", "sglang")
    with pytest.raises(InputError, match="the same number in each"):
        export_placement(table([[0, 1], [0, 1, 0, 1]]), tmp_path / "p.json", "vllm")
    with pytest.raises(InputError, match="routers lie in layers .1, 1. of the model"):
        export_placement(table(PLACED, model_layer=[1, 1]), tmp_path / "p.json", "sglang")
    with pytest.raises(InputError, match="device is missing"):
        export_placement(good.drop(columns="device"), tmp_path / "p.json")
    with pytest.raises(InputError, match=r"puts \[1, 3\] experts on its devices"):
        export_placement(table([[0, 1, 1, 1]]), tmp_path / "p.json")
    with pytest.raises(InputError, match="a device 100000000000000, and 4 rows"):
        export_placement(table([[0, 1, 0, 10**14]]), tmp_path / "p.json")
    with pytest.raises(InputError, match="no layer 0"):
        export_placement(good[good["layer"] == 1], tmp_path / "p.json")
    with pytest.raises(InputError, match="each expert from 0 on exactly once"):
        export_placement(good.replace({"expert": {3: 2}}), tmp_path / "p.json")
    with pytest.raises(InputError, match="whole numbers"):
        export_placement(good.astype({"device": float}), tmp_path / "p.json")
    export_placement(good, tmp_path / "p.json")
    with pytest.raises(InputError, match="exists"):
        export_placement(good, tmp_path / "p.json")
    export_placement(good, tmp_path / "p.json", overwrite=True)
    with pytest.raises(InputError, match="there is no file"):
        read_placement(tmp_path / "none.csv")
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(InputError, match="can't be read as a table"):
        read_placement(tmp_path / "bad.json")
    with pytest.raises(InputError, match="ends in '.txt'"):
        read_placement(tmp_path / "p.txt")
