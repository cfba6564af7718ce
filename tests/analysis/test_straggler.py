"""Batches, stragglers, capacity limits and touched experts against loops; the bandwidth model against its formulas."""

import math
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import Routed, random_trace, write

from workbench.analysis import arguments
from workbench.analysis.bandwidth import bandwidth
from workbench.analysis.batches import batches, block_weights, mean_of, percentile_of, stream
from workbench.analysis.straggler import limit, straggler
from workbench.errors import InputError
from workbench.placements import export_placement

file = import_module("workbench.analysis.straggler")
bandwidth_file = import_module("workbench.analysis.bandwidth")


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("straggler") / "t.duckdb", n_texts=40, n_experts=6, k=2)


def texts_of(routed: Routed) -> np.ndarray:
    return np.unique(routed.sequences["segment_id"], return_inverse=True)[1][routed.seq]


@pytest.mark.parametrize("batching", ["prefill", "decode"])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_batches_are_made_of_the_stream(routed, batching, size):
    text = texts_of(routed)
    tokens = stream(routed.trace, 3)
    assert sorted(tokens.order.tolist()) == list(range(len(routed.seq)))
    in_stream = text[tokens.order]
    assert (np.diff(in_stream) != 0).sum() == len(np.unique(text)) - 1  # every text in one piece
    made = batches(tokens, size, batching, 10**6)
    assert made.tokens.shape[1] == size and len(np.unique(made.tokens)) == made.tokens.size  # no token twice
    assert made.n_blocks > 1 and (np.diff(made.block) >= 0).all()
    owner = {}
    for row, block in zip(made.tokens, made.block, strict=True):
        for token in row:
            assert owner.setdefault(text[token], block) == block  # a text is in one block
    if batching == "prefill":
        place = np.argsort(tokens.order)
        assert (np.diff(place[made.tokens], axis=1) == 1).all()
    left_out = len(routed.seq) - made.tokens.size
    assert 0 <= left_out < made.n_blocks * size
    fewer = batches(tokens, size, batching, 5)
    assert len(fewer.tokens) == 5 and fewer.block[0] == 0 and fewer.block[-1] == made.block[-1]


def test_lockstep_takes_different_texts(tmp_path):
    lengths = [12] * 64
    seq = np.repeat(np.arange(64), lengths)
    experts = np.zeros((len(seq), 1, 1), int)
    trace = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame({"lang": ["en"] * 64}), 2).trace
    made = batches(stream(trace, 0), 8, "decode", 1000)
    assert made.n_blocks == 8 and all(len(np.unique(seq[row])) == 8 for row in made.tokens)


def test_stragglers_against_loop(routed):
    frame = straggler(routed.trace, devices=3, batch_tokens=(4, 16), capacity_factors=(1.0, 2.0), n_resamples=30)
    tokens = stream(routed.trace, 0)
    for size in (4, 16):
        made = batches(tokens, size, "prefill", 1000)
        for layer in range(2):
            part = frame[(frame["batch_tokens"] == size) & (frame["layer"] == layer)]
            slowest, of_expert, assignments = [], [], 0
            for row in made.tokens:
                load = [0] * 6
                for token in row:
                    for expert in routed.experts[token, layer]:
                        if expert >= 0:
                            load[expert] += 1
                assignments += sum(load)
                of_device = [load[0] + load[1], load[2] + load[3], load[4] + load[5]]
                if sum(load):
                    slowest.append(max(of_device) * 3 / sum(load))
                    of_expert.append(max(load) * 6 / sum(load))
            values = part.set_index(["measure", part["capacity_factor"].fillna(0)])["value"]
            assert values["straggler", 0] == pytest.approx(np.mean(slowest))
            assert values["straggler_p95", 0] == pytest.approx(sorted(slowest)[math.ceil(0.95 * len(slowest)) - 1])
            assert values["expert_straggler", 0] == pytest.approx(np.mean(of_expert))
            for factor in (1.0, 2.0):
                dropped, rerouted, hit = 0, 0, 0
                for row in made.tokens:
                    found = looped_limit(
                        routed.experts[row, layer].tolist(), [0, 0, 1, 1, 2, 2], math.ceil(factor * size / 3)
                    )
                    dropped, rerouted, hit = dropped + found[0], rerouted + found[1], hit + found[2]
                assert values["dropped", factor] == pytest.approx(dropped / assignments)
                assert values["rerouted", factor] == pytest.approx(rerouted / assignments)
                assert values["lost", factor] == pytest.approx((dropped - rerouted) / assignments)
                assert values["tokens_hit", factor] == pytest.approx(hit / made.tokens.size)
            assert part["n_batches"].eq(len(made.tokens)).all() and part["n_tokens"].eq(made.tokens.size).all()
    known = frame[frame["low"].notna()]
    assert (
        len(known) and (known["low"] <= known["value"] + 1e-9).all() and (known["value"] <= known["high"] + 1e-9).all()
    )
    again = straggler(routed.trace, devices=3, batch_tokens=(4, 16), capacity_factors=(1.0, 2.0), n_resamples=30)
    pd.testing.assert_frame_equal(frame, again)


def looped_limit(chosen: list[list[int]], devices: list[int], capacity: int) -> tuple[int, int, int]:
    """Dropped, rerouted, tokens hit of one batch."""
    load = [0] * len(devices)
    over, hit = [], set()
    used = [[expert for expert in row if expert >= 0] for row in chosen]
    for token, row in enumerate(used):
        for place, expert in enumerate(row):
            if load[expert] < capacity:
                load[expert] += 1
            else:
                over.append((token, place))
                hit.add(token)
    rerouted = 0
    for token, place in over:
        home = devices[used[token][place]]
        free = [e for e in range(len(devices)) if devices[e] == home and load[e] < capacity and e not in used[token]]
        if free:
            best = min(free, key=lambda e: (load[e], e))
            load[best] += 1
            used[token][place] = best
            rerouted += 1
    return len(over), rerouted, len(hit)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_limit_against_loop(seed, capacity):
    random = np.random.default_rng(seed)
    chosen = np.argsort(random.random((3, 10, 6)), axis=2)[..., :3].astype(np.uint16)
    chosen[random.random(chosen.shape) < 0.1] = 65535
    devices = random.permutation([0, 0, 0, 1, 1, 1])
    counts = np.zeros((3, 3), np.int64)
    limit(chosen, devices, capacity, counts)
    for batch in range(3):
        rows = [[-1 if expert == 65535 else expert for expert in row] for row in chosen[batch].tolist()]
        assert tuple(counts[batch]) == looped_limit(rows, devices.tolist(), capacity)
    assert (counts[:, 1] <= counts[:, 0]).all() and (counts[:, 2] <= 10).all()


def test_stragglers_of_a_placement(routed, tmp_path):
    rows = [(layer, expert, expert % 2) for layer in range(2) for expert in range(6)]
    table = pd.DataFrame(rows, columns=["layer", "expert", "device"])
    export_placement(table, tmp_path / "p.json")
    options = {"batch_tokens": (8,), "capacity_factors": (), "n_resamples": 0}
    of_table = straggler(routed.trace, placement=table, **options)
    of_file = straggler(routed.trace, placement=str(tmp_path / "p.json"), **options)
    assert np.allclose(of_table["value"], of_file["value"]) and (of_file["n_devices"] == 2).all()
    assert of_table["placement"].unique().tolist() == ["table"] and set(of_table["measure"]) == {
        "straggler", "straggler_p95", "expert_straggler"
    }  # fmt: skip
    default = straggler(routed.trace, devices=2, **options)
    assert not np.allclose(default["value"], of_table["value"])
    file.figure(of_table)
    with pytest.raises(InputError, match="devices is 3, but the placement has 2"):
        straggler(routed.trace, devices=3, placement=table)
    with pytest.raises(InputError, match="aren't of the same model"):
        straggler(routed.trace, placement=table[table["layer"] == 0])


def test_even_loads_have_no_straggler_and_drop_nothing(tmp_path):
    experts = (np.arange(320) % 4)[:, None, None]
    trace = write(tmp_path / "t.duckdb", experts, np.arange(320) // 8, pd.DataFrame({"lang": ["en"] * 40}), 4).trace
    frame = straggler(trace, devices=2, batch_tokens=(4, 8), capacity_factors=(1.0,), n_resamples=20)
    values = frame.groupby("measure")["value"].first()
    assert values["straggler"] == values["straggler_p95"] == values["expert_straggler"] == 1
    assert values["dropped"] == values["lost"] == values["tokens_hit"] == 0
    one = write(
        tmp_path / "u.duckdb", np.zeros((64, 1, 1), int), np.arange(64) // 4, pd.DataFrame({"lang": ["en"] * 16}), 4
    )
    frame = straggler(one.trace, devices=2, batch_tokens=(8,), capacity_factors=(1.0,), n_resamples=0)
    values = frame.set_index("measure")["value"]
    assert values["straggler"] == 2 and values["expert_straggler"] == 4
    assert values["dropped"] == pytest.approx(0.75) and values["rerouted"] == pytest.approx(0.25)


def test_intervals_of_batches():
    random = np.random.default_rng(0)
    values = random.normal(size=64)
    values[3] = np.nan
    weights = random.integers(0, 3, size=(200, 64)).astype(float)
    mean, low, high = mean_of(values, weights)
    assert mean == pytest.approx(np.nanmean(values)) and low < mean < high
    middle, low, high = percentile_of(values, 50, weights)
    expanded = [np.repeat(values, row.astype(int)) for row in weights]
    middles = [np.sort(row[~np.isnan(row)])[math.ceil((~np.isnan(row)).sum() / 2) - 1] for row in expanded]
    assert middle == np.sort(values[~np.isnan(values)])[31]
    assert (low, high) == pytest.approx(tuple(np.percentile(middles, [2.5, 97.5])))
    assert all(np.isnan(percentile_of(np.full(3, np.nan), 95, None)))


@pytest.mark.parametrize("batching", ["decode", "prefill"])
def test_touched_experts_against_loop(routed, batching):
    frame = bandwidth(routed.trace, batch_tokens=(1, 4, 8), batching=batching, n_resamples=30)
    tokens = stream(routed.trace, 0)
    assert len(frame) == 3 * 3
    for size in (1, 4, 8):
        made = batches(tokens, size, batching, 1000)
        means = []
        for layer in range(2):
            distinct = [
                len({int(e) for token in row for e in routed.experts[token, layer] if e >= 0}) for row in made.tokens
            ]
            row = frame[(frame["batch_tokens"] == size) & (frame["layer"] == layer)].iloc[0]
            means.append(np.mean(distinct))
            assert row["activated"] == pytest.approx(means[-1]) and row["share"] == pytest.approx(means[-1] / 6)
            rates = [(routed.experts[:, layer] == expert).any(axis=1).mean() for expert in range(6)]
            assert row["independent"] == pytest.approx(sum(1 - (1 - rate) ** size for rate in rates))
            assert row["uniform"] == pytest.approx(6 * (1 - (1 - np.mean(rates)) ** size))
            assert row["uniform"] >= row["independent"] - 1e-9
        whole = frame[(frame["batch_tokens"] == size) & frame["layer"].isna()].iloc[0]
        assert whole["activated"] == pytest.approx(np.mean(means)) and np.isnan(whole["step_bytes"])
    known = frame[frame["low"].notna()]
    assert len(known) and (known["low"] <= known["activated"] + 1e-9).all()
    bandwidth_file.figure(frame)
    assert len(bandwidth_file.findings(frame)) == 1


def test_bandwidth_model(routed):
    options = {"batch_tokens": (2, 8), "hidden": 10, "intermediate": 4, "n_resamples": 0}
    frame = bandwidth(
        routed.trace, **options, attention_parameters=100, other_parameters=50, kv_bytes=1000, attention_flops=7,
        n_devices=2, peak_bandwidth=1e-3, peak_flops=1e-6, tpot=(9.0, 20.0),
    )  # fmt: skip
    whole = frame[frame["layer"].isna()].set_index("batch_tokens")
    each = frame[frame["layer"].notna()]
    for size, tpot in ((2, 9.0), (8, 20.0)):
        activated = each[each["batch_tokens"] == size]["activated"]
        step = (activated.sum() * 120 + 2 * 100 + 50) * 2 + size * 1000
        row = whole.loc[size]
        assert row["step_bytes"] == pytest.approx(step) and row["expert_bytes"] == pytest.approx(activated.sum() * 240)
        assert row["tpot_bound"] == pytest.approx(step / (2 * 1e6) * 1e3) and row["tpot"] == tpot
        assert row["s_mbu"] == pytest.approx(step / (tpot / 1e3) / (2 * 1e6))
        flops = 2 * (2 * (100 + 2 * 120) + 50) + 7
        assert row["s_mfu"] == pytest.approx(size / (tpot / 1e3) * flops / (2 * 1e6))
    assert each["step_bytes"].isna().all()
    bare = bandwidth(routed.trace, **options, peak_bandwidth=1e-3)
    assert bare["tpot_bound"].notna().sum() == 2 and bare["s_mbu"].isna().all() and bare["s_mfu"].isna().all()
    assert "at least" in bandwidth_file.findings(bare)[1] and "S-MBU" in bandwidth_file.findings(frame)[1]


def test_too_small_and_empty(tmp_path):
    one = write(tmp_path / "one.duckdb", np.zeros((1, 1, 1), int), [0], pd.DataFrame({"lang": ["en"]}), 1).trace
    frame = straggler(one, devices=1, batch_tokens=(1, 64), n_resamples=5)
    assert frame[frame["batch_tokens"] == 64]["value"].isna().all() and (frame["low"].isna()).all()
    assert frame[frame["measure"] == "straggler"]["value"].iloc[0] == 1
    table = bandwidth(one, batch_tokens=(1, 64), n_resamples=5)
    assert table[table["batch_tokens"] == 64]["activated"].isna().all()
    for module, found in ((file, frame), (bandwidth_file, table)):
        module.figure(found)
        assert module.findings(found)
    small = straggler(one, devices=1, batch_tokens=(64,), n_resamples=5)
    assert "too few tokens" in file.findings(small)[0]
    assert "too few tokens" in bandwidth_file.findings(bandwidth(one, batch_tokens=(64,)))[0]
    none = write(tmp_path / "none.duckdb", np.full((8, 1, 1), -1), np.arange(8), pd.DataFrame({"lang": ["en"] * 8}), 2)
    frame = straggler(none.trace, devices=2, batch_tokens=(2,), capacity_factors=(1.0,), n_resamples=5)
    assert frame[frame["measure"] == "straggler"]["value"].isna().all()
    file.figure(frame)
    assert (bandwidth(none.trace, batch_tokens=(2,))["activated"] == 0).all()


def test_figure_and_findings(routed):
    frame = straggler(routed.trace, devices=2, batch_tokens=(4, 8), n_resamples=10)
    assert len(file.figure(frame).data) >= 6 and len(file.findings(frame)) == 2
    assert (
        "tokens of as many texts"
        in file.findings(straggler(routed.trace, devices=2, batch_tokens=(4,), batching="decode", n_resamples=0))[0]
    )


def test_few_blocks_have_no_interval(routed):
    made = batches(stream(routed.trace, 0), 64, "decode", 100)
    assert made.n_blocks < 8 and block_weights(made, 100, 0) is None


@pytest.mark.parametrize(
    "ask, options, message",
    [
        (straggler, {"batching": "both"}, "batching is 'both'; expected one of prefill, decode"),
        (straggler, {"batch_tokens": (0,)}, "batch_tokens is .0,."),
        (straggler, {"n_batches": 0}, "n_batches is 0"),
        (straggler, {"capacity_factors": (0.0,)}, "capacity_factors is .0.0,."),
        (straggler, {"devices": 4}, "layer 0 has 6 experts, which 4 devices can't share"),
        (bandwidth, {"hidden": 8}, "intermediate is missing"),
        (bandwidth, {"peak_bandwidth": 1.0}, "peak_bandwidth says nothing without hidden"),
        (bandwidth, {"hidden": 0, "intermediate": 1}, "hidden is 0; expected a number above 0"),
        (
            bandwidth,
            {"hidden": 8, "intermediate": 8, "peak_flops": 1.0, "tpot": (1.0,)},
            "tpot is .*expected 8 numbers",
        ),
        (bandwidth, {"hidden": 8, "intermediate": 8, "tpot": (1.0,) * 8}, "give one of them"),
    ],
)
def test_errors(routed, ask, options, message):
    with pytest.raises(InputError, match=message):
        ask(routed.trace, **options)


def test_options_can_be_given_as_text():
    text = {"placement": "p.json", "batch_tokens": "4,16", "capacity_factors": "1,1.5", "devices": "2"}
    assert arguments(straggler, text) == {
        "placement": "p.json", "batch_tokens": (4, 16), "capacity_factors": (1.0, 1.5), "devices": 2
    }  # fmt: skip
    assert arguments(bandwidth, {"hidden": "8", "tpot": "1.5,2"}) == {"hidden": 8, "tpot": (1.5, 2.0)}
