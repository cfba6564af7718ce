"""The speed model against its formula in plain Python."""

import numpy as np
import pandas as pd
import pytest
from routed import Routed, full_trace, random_trace, write

from workbench.analysis.cache import cache
from workbench.analysis.cache_speed import cache_speed, figure, findings, speeds, what_if
from workbench.errors import InputError

SIZE = {"hidden": 100, "intermediate": 50, "bytes_per_parameter": 2.0}  # 30,000 bytes


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("speed") / "t.duckdb", n_experts=6)


@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("compute_ms", [0.02, None])
def test_against_formula(routed, overlap, compute_ms):
    frame = cache_speed(
        routed.trace, bandwidth=2.0, latency_us=3.0, compute_ms=compute_ms, memory_bandwidth=50.0, overlap=overlap,
        n_resamples=20, **SIZE,
    )  # fmt: skip
    rates = cache(routed.trace, policies=("static-held-out", "lru", "window", "belady"), n_resamples=20)
    rates = rates[rates["layer"].isna()].set_index(["policy", "capacity"])
    n_tokens = len(routed.seq)

    def tokens_per_second(loads: float, accesses: float) -> float:
        compute = compute_ms if compute_ms is not None else accesses * 30_000 / 50e9 * 1e3
        transfer = loads * (30_000 / 2e9 * 1e3 + 0.003)
        return 1e3 / (compute + transfer - min(transfer, overlap * compute))

    for row in frame.to_dict("records"):
        rate = rates.loc[(row["policy"], row["capacity"])]
        accesses = rate["accesses"] / n_tokens
        for name, column in (("hit_rate", "tokens_per_second"), ("low", "speed_low"), ("high", "speed_high")):
            expected = tokens_per_second(accesses * (1 - rate[name]), accesses)
            assert row[column] == pytest.approx(expected, nan_ok=True)
        assert row["speedup"] == pytest.approx(
            row["tokens_per_second"] / tokens_per_second(accesses, accesses), nan_ok=True
        )
        assert row["of_resident"] == pytest.approx(
            row["tokens_per_second"] / tokens_per_second(0, accesses), nan_ok=True
        )
        assert row["memory_gb"] == pytest.approx(2 * row["capacity"] * 30_000 / 1e9)
        assert row["loads"] == pytest.approx(accesses * (1 - rate["hit_rate"]), nan_ok=True)
    for _, part in frame.groupby("policy"):
        enough = part[(part["of_resident"] >= 0.5) & (part["capacity"] < 6)]["capacity"]
        assert part[part["worth"]]["capacity"].tolist() == enough.tolist()[:1]
    assert frame["fits"].all()
    figure(frame)


def test_memory_and_target(routed):
    frame = cache_speed(routed.trace, memory_gb=2 * 4 * 30_000 / 1e9, target=1.0, n_resamples=0, **SIZE)
    assert set(frame.loc[frame["fits"], "capacity"]) == {1, 2, 3, 4} and not frame["worth"].any()
    said = findings(frame)
    assert "No cache smaller than the model reaches 100%" in said[0] and "In the memory given" in said[1]
    assert "A model, not a measurement: 0.03 MB an expert, 25 GB/s and 10 µs" in said[-1]
    nothing = cache_speed(routed.trace, policies=("lru",), memory_gb=1e-9, target=0.01, n_resamples=0, **SIZE)
    said = findings(nothing)
    assert said[0].startswith("The smallest cache with at least 1%") and "Nothing that holds" in said[1]


def test_free_transfers_make_every_cache_as_fast(routed):
    frame = cache_speed(routed.trace, bandwidth=1e9, latency_us=0.0, compute_ms=1.0, n_resamples=0, **SIZE)
    known = frame[frame["hit_rate"].notna()]
    assert np.allclose(known["of_resident"], 1) and np.allclose(known["tokens_per_second"], 1000)
    instant = cache_speed(routed.trace, compute_ms=0.0, n_resamples=0, **SIZE)
    assert instant["of_resident"].isna().all() and not instant["worth"].any()
    figure(instant)
    assert findings(instant)


def test_scope_batch_and_layers_of_different_size(tmp_path):
    random = np.random.default_rng(2)
    ids = [np.argsort(random.random((40, 5)), axis=1)[:, :2], np.argsort(random.random((40, 3)), axis=1)[:, :1]]
    sequences = pd.DataFrame({"lang": ["en", "de"]})
    seq = np.repeat([0, 1], 20)
    trace = full_trace(tmp_path / "t.duckdb", ids, n_experts=[5, 3], seq=seq, sequences=sequences)
    layered = cache_speed(trace, policies=("lru",), bytes_per_expert=1e6, n_resamples=0)
    assert np.allclose(layered["memory_gb"], np.array([2, 4, 6, 7, 8]) / 1e3)
    joint = cache_speed(trace, policies=("lru",), bytes_per_expert=1e6, scope="global", n_resamples=0)
    assert np.allclose(joint["memory_gb"], np.arange(1, 9) / 1e3)
    assert "experts of all layers" in findings(joint)[0]
    shared = cache_speed(trace, policies=("lru",), bytes_per_expert=1e6, batch=2, n_resamples=0)
    assert shared["accesses"].max() < layered["accesses"].max()


def test_size_of_the_traced_model(tmp_path):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((10, 6, 32)), axis=2)[..., :4]
    sequences = pd.DataFrame({"lang": ["en", "de"]})
    given = {"n_experts": 32, "seq": np.repeat([0, 1], 5), "sequences": sequences}
    trace = full_trace(tmp_path / "demo.duckdb", experts, model="demo", **given)
    frame = cache_speed(trace, policies=("lru",), n_resamples=0)
    assert (frame["bytes_per_expert"] == 3 * 192 * 64 * 2).all()
    assert (frame["compute_ms"] > 24 * 3 * 192 * 64 * 2 / 1e12 * 1e3).all()  # attention and embeddings come on top
    unknown = full_trace(tmp_path / "other.duckdb", experts, model="/nowhere/model", **given)
    with pytest.raises(InputError, match="size of an expert of '/nowhere/model' isn't known.*give hidden= and"):
        cache_speed(unknown)


def test_nothing_chosen(tmp_path):
    routed = write(tmp_path / "t.duckdb", np.full((3, 1, 2), -1), [0, 0, 1], pd.DataFrame({"lang": ["en", "de"]}), 4)
    frame = cache_speed(routed.trace, **SIZE)
    assert "there is no speed to tell" in findings(frame)[0]
    figure(frame)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"hidden": 5}, "isn't known: give hidden= and intermediate="),
        ({"hidden": 0, "intermediate": 5}, "hidden is 0; expected a number above 0"),
        ({"bytes_per_expert": -1.0}, "bytes_per_expert is -1.0"),
        ({"bandwidth": 0.0, **SIZE}, "bandwidth is 0.0; expected a number above 0"),
        ({"compute_ms": -1.0, **SIZE}, "compute_ms is -1.0; expected a number of at least 0"),
        ({"overlap": 1.5, **SIZE}, "overlap is 1.5; expected at most 1"),
        ({"target": 2.0, **SIZE}, "target is 2.0; expected at most 1"),
        ({"policies": ("x",), **SIZE}, "policy is 'x'"),
    ],
)
def test_refused(routed, options, said):
    with pytest.raises(InputError, match=said):
        cache_speed(routed.trace, **options)


def test_speeds_of_a_table(routed):
    """The arithmetic alone, over a table of `cache`, gives what the analysis gives."""
    found = cache(routed.trace, policies=("static-held-out", "lru", "window", "belady"), n_resamples=20)
    options = {"bandwidth": 3.0, "latency_us": 2.0, "overlap": 0.5, "memory_gb": 1e-4, "target": 0.3}
    frame = speeds(found, [6, 6], bytes_per_expert=30_000, **options)
    pd.testing.assert_frame_equal(frame, cache_speed(routed.trace, n_resamples=20, **options, **SIZE))


def test_speeds_of_one_cache_for_all_layers(routed):
    found = cache(routed.trace, policies=("lru", "window"), scope="global", n_resamples=0)
    frame = speeds(found, [6, 6], bytes_per_expert=30_000)
    assert set(frame["scope"]) == {"global"}
    assert frame["memory_gb"].to_numpy() == pytest.approx(frame["capacity"].to_numpy() * 30_000 / 1e9)


def test_what_if(routed):
    frame = cache_speed(routed.trace, n_resamples=20, **SIZE)
    found = what_if(frame, "lru", 4)
    row = frame[(frame["policy"] == "lru") & (frame["capacity"] == 4)].iloc[0]
    for name in ("hit_rate", "low", "high", "tokens_per_second", "loads", "memory_gb"):
        assert found[name] == row[name]
    accesses = row["accesses"]
    each = 30_000 / 25e9 + 10e-6
    compute = accesses * 30_000 / 1000e9
    assert found["resident"] == pytest.approx(1 / compute)
    assert found["without"] == pytest.approx(1 / (compute + accesses * each))
    assert found["without"] <= found["tokens_per_second"] <= found["resident"]
    unknown = what_if(frame, "lru", 1)  # a token needs two experts at once
    assert np.isnan(unknown["hit_rate"]) and np.isnan(unknown["tokens_per_second"])
    with pytest.raises(InputError, match="policy is 'fifo'; the table has static-held-out, lru"):
        what_if(frame, "fifo", 4)
    with pytest.raises(InputError, match="capacity is 99; the table has 1 to 6"):
        what_if(frame, "lru", 99)
    with pytest.raises(InputError, match="bytes_per_expert is 0; expected a number above 0"):
        speeds(frame, [6, 6], bytes_per_expert=0)
    with pytest.raises(InputError, match="other_bytes is -1; expected a number of at least 0"):
        speeds(frame, [6, 6], bytes_per_expert=1, other_bytes=-1)
