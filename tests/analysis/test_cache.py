"""Hit rates of caches against a cache that is filled and emptied step by step."""

import inspect

import numpy as np
import pandas as pd
import pytest
from one_cache import brute
from routed import WHOLE, Routed, full_trace, numbered, random_trace, write

from workbench.analysis.cache import POLICIES, cache, figure, findings
from workbench.analysis.hit_rates import divide, halves, knee
from workbench.errors import InputError


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("cache") / "t.duckdb", n_experts=6, dropped=0.2)


def runs_of(routed: Routed, layer: int) -> list[list[list[int]]]:
    """Texts, tokens, experts."""
    split = [routed.experts[routed.seq == number, layer] for number in range(len(routed.sequences))]
    return [[[int(expert) for expert in row if expert >= 0] for row in text] for text in split]


RULES = [
    {},
    {"keep": False, "cold": "free"},
    {"access": "single", "cold": "excluded"},
    {"access": "snapshot", "cold": "free", "keep": False},
    {"admission": "bypass"},
]


@pytest.mark.parametrize("options", RULES)
def test_cache_against_loop(routed, options):
    frame = cache(routed.trace, policies=POLICIES, window=3, lookahead=4, half_life=0.5, n_resamples=20, **options)
    cold, options = options.get("cold", "miss"), {name: value for name, value in options.items() if name != "cold"}
    pooled = {}
    for layer in range(2):
        runs = runs_of(routed, layer)
        n_accesses = sum(len(event) for run in runs for event in run)
        for policy in POLICIES[2:]:
            rule = dict(options)
            if policy.startswith("belady"):
                rule["admission"] = "bypass" if policy == "belady-bypass" else "forced"
            span = {"window": 3, "lookahead": 4}.get(policy, 1)
            part = frame[(frame["layer"] == layer) & (frame["policy"] == policy)].set_index("capacity")
            for capacity in range(1, 7):
                if capacity < 2 and rule.get("access", "token") == "token" and rule.get("admission") != "bypass":
                    assert np.isnan(part["hit_rate"][capacity]) and np.isnan(part["hits"][capacity])
                    continue
                hits, free, first = brute(runs, capacity, policy.removesuffix("-bypass"), span=span, **rule)
                hits += free if cold == "free" else 0
                accesses = n_accesses - (first if cold == "excluded" else 0)
                assert part["hits"][capacity] == hits and part["accesses"][capacity] == accesses
                assert part["hit_rate"][capacity] == pytest.approx(hits / accesses)
                assert part["first_touches"][capacity] == first
                total = pooled.setdefault((policy, capacity), [0, 0])
                total[0], total[1] = total[0] + hits, total[1] + accesses
    whole = frame[frame["scope"] == "model"].set_index(["policy", "capacity"])
    assert whole["layer"].isna().all()
    for place, (hits, accesses) in pooled.items():
        assert whole.loc[place, "hit_rate"] == pytest.approx(hits / accesses)
    known = frame[frame["hit_rate"].notna()]
    assert (known["low"] <= known["hit_rate"] + 1e-9).all() and (known["hit_rate"] <= known["high"] + 1e-9).all()
    best = "belady-bypass" if options.get("admission") == "bypass" else "belady"
    known = numbered(known)
    reference = known[known["policy"] == best].set_index(["layer", "capacity"])["hits"]
    shares = known.join(reference.rename("best"), on=["layer", "capacity"])
    shares = shares[shares["best"] > 0]
    assert np.allclose(shares["share_of_belady"], shares["hits"] / shares["best"])


def test_static_caches_against_loop(routed):
    frame = cache(routed.trace, policies=("static", "static-held-out"), n_resamples=0, seed=5)
    runs = runs_of(routed, 1)
    owner = [number // 3 for number in range(24)]
    half = halves(8, 5)[owner]
    flat = [[expert for event in run for expert in event] for run in runs]

    def ranked(chosen) -> list[int]:
        counts = [sum(run.count(expert) for run in chosen) for expert in range(6)]
        return sorted(range(6), key=lambda expert: -counts[expert])

    for capacity in range(1, 7):
        hot = ranked(flat)[:capacity]
        others = [ranked([run for run, side in zip(flat, half, strict=True) if side != own]) for own in (0, 1)]
        expected = {
            "static": sum(expert in hot for run in flat for expert in run),
            "static-held-out": sum(
                expert in others[side][:capacity] for run, side in zip(flat, half, strict=True) for expert in run
            ),
        }
        part = frame[(frame["layer"] == 1) & (frame["capacity"] == capacity)].set_index("policy")["hits"]
        assert part.to_dict() == expected
    assert frame["low"].isna().all() and frame["share_of_belady"].isna().all() and (frame["first_touches"] == 0).all()


def test_one_cache_for_all_layers(routed):
    frame = cache(routed.trace, policies=("lru", "window"), scope="global", window=2, n_resamples=0)
    assert set(frame["scope"]) == {"global"} and (frame["n_experts"] == 12).all()
    joint = []
    for first, second in zip(runs_of(routed, 0), runs_of(routed, 1), strict=True):
        joint.append([event for a, b in zip(first, second, strict=True) for event in (a, [e + 6 for e in b])])
    for policy, span in (("lru", 1), ("window", 4)):  # two tokens are four events
        for capacity in (2, 5, 11):
            hits, _, _ = brute(joint, capacity, policy, span=span)
            row = frame[(frame["policy"] == policy) & (frame["capacity"] == capacity)].iloc[0]
            assert row["hits"] == hits
    assert "of 12 experts of all layers" in findings(frame)[0]
    figure(frame)


def test_chosen_capacities_and_determinism(routed):
    every = cache(routed.trace, policies=("lru",), n_resamples=30)
    some = cache(routed.trace, policies=("lru",), capacities=(3, 5), n_resamples=30)
    assert set(some["capacity"]) == {3, 5}
    expected = every[every["capacity"].isin([3, 5])].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected)  # the knee too is that of the whole curve
    assert every.groupby("layer")["knee"].sum().le(1).all()


def test_batches_and_chunks(routed):
    alone = cache(routed.trace, policies=("lru",), n_resamples=0)
    shared = cache(routed.trace, policies=("lru",), batch=4, n_resamples=0)
    assert shared["accesses"].max() < alone["accesses"].max() and (shared["n_texts"] == 6).all()
    chunks = cache(routed.trace, policies=("lru", "belady-bypass"), phase="prefill", chunk=4, n_resamples=0)
    assert chunks.loc[(chunks["policy"] == "lru") & (chunks["capacity"] < 3), "hit_rate"].isna().all()
    assert chunks.loc[chunks["policy"] == "belady-bypass", "hit_rate"].notna().all()
    assert "phase=prefill" in findings(chunks)[-1]


def test_layers_of_different_size(tmp_path):
    random = np.random.default_rng(2)
    ids = [np.argsort(random.random((40, 5)), axis=1)[:, :2], np.argsort(random.random((40, 3)), axis=1)[:, :1]]
    sequences = pd.DataFrame({"lang": ["en", "de"]})
    seq = np.repeat([0, 1], 20)
    trace = full_trace(tmp_path / "t.duckdb", ids, n_experts=[5, 3], seq=seq, sequences=sequences)
    frame = cache(trace, policies=("lru", "belady"), n_resamples=10)
    counts = numbered(frame[frame["policy"] == "lru"]).set_index(["layer", "capacity"])["hits"]
    assert counts[WHOLE, 5] == counts[0, 5] + counts[1, 3]  # the smaller layer is all in its cache
    assert counts[WHOLE, 2] == counts[0, 2] + counts[1, 2]
    assert np.isnan(counts[WHOLE, 1]) and counts[1, 1] >= 0
    figure(frame)
    assert findings(frame)


@pytest.mark.parametrize("n_experts, k, n_tokens", [(1, 1, 5), (4, 4, 3), (300, 2, 40), (3, 1, 1)])
def test_extremes(tmp_path, n_experts, k, n_tokens):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((n_tokens, 1, n_experts)), axis=2)[..., :k]
    routed = write(tmp_path / "t.duckdb", experts, np.zeros(n_tokens, int), pd.DataFrame({"lang": ["en"]}), n_experts)
    frame = cache(routed.trace, policies=POLICIES, n_resamples=20)
    assert frame["low"].isna().all()  # one text has no interval
    assert frame.loc[frame["policy"] == "static-held-out", "hit_rate"].isna().all()  # and no other to learn from
    lru = frame[(frame["policy"] == "lru") & (frame["capacity"] == n_experts)].iloc[0]
    assert lru["hits"] == n_tokens * k - len(np.unique(experts))
    figure(frame)
    assert findings(frame)


def test_nothing_chosen(tmp_path):
    routed = write(tmp_path / "t.duckdb", np.full((3, 1, 2), -1), [0, 0, 1], pd.DataFrame({"lang": ["en", "de"]}), 4)
    frame = cache(routed.trace)
    assert frame["hit_rate"].isna().all() and not frame["knee"].any()
    assert findings(frame) == ["No token used any expert."]
    figure(frame)


def test_findings_tell_what_was_planted(tmp_path):
    """Texts that each keep to 3 of 12 experts: a cache of 3 finds nearly all, unlike even routing."""
    random = np.random.default_rng(0)
    own = np.repeat(random.permuted(np.tile(np.arange(12), (20, 1)), axis=1)[:, :3], 50, axis=0)
    experts = random.permuted(own, axis=1)[:, None, :2]
    sequences = pd.DataFrame({"lang": ["en"] * 20})
    routed = write(tmp_path / "t.duckdb", experts, np.repeat(np.arange(20), 50), sequences, 12)
    frame = cache(routed.trace, n_resamples=50)
    whole = frame[frame["layer"].isna()].set_index(["policy", "capacity"])
    assert float(whole.loc[("lru", 4), "hit_rate"]) > 0.9 > 0.5 > float(whole.loc[("static", 4), "hit_rate"])
    assert whole.loc["lru"].index[whole.loc["lru", "knee"]].tolist() == [3]
    said = findings(frame)
    assert (
        said[0].startswith("A cache of 3 of 12 experts a layer finds 9") and "even routing would give 25.0%" in said[0]
    )
    assert "of the hits of the best possible policy" in said[1] and "access=token, cold=miss" in said[2]
    small = cache(routed.trace, policies=("lru",), capacities=(1,), n_resamples=0)
    assert "needs more experts than any capacity" in findings(small)[0]
    figure(small)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"policies": ("fifo",)}, "policy is 'fifo'; expected one of static"),
        ({"policies": ()}, "at least one policy"),
        ({"capacities": ()}, "at least one policy and one capacity"),
        ({"capacities": (0,)}, "capacity 0"),
        ({"capacities": (99,)}, r"no capacity of \[99\] is at most the 6 experts"),
        ({"access": "x"}, "access is 'x'"),
        ({"cold": "x"}, "cold is 'x'; expected one of miss, free, excluded"),
        ({"admission": "x"}, "admission is 'x'"),
        ({"scope": "x"}, "scope is 'x'; expected one of layer, global"),
        ({"phase": "x"}, "phase is 'x'"),
        ({"window": 0}, "window is 0"),
        ({"lookahead": 0}, "lookahead 0"),
        ({"half_life": 0.0}, "half_life 0.0"),
    ],
)
def test_refused(routed, options, said):
    with pytest.raises(InputError, match=said):
        cache(routed.trace, **options)


def test_knee():
    assert knee([1, 2, 3, 4, 5], [0, 0.8, 0.9, 0.95, 1]) == 2
    assert np.isnan(knee([1, 2, 3], [0, 0.5, 1])) and np.isnan(knee([1, 2, 3], [1, 1, 1]))
    assert np.isnan(knee([1, 2], [0, 1])) and np.isnan(knee([], []))
    assert knee([1, 2, 3, 4], [np.nan, 0.2, 0.9, 1]) == 3
    assert np.isnan(divide(np.array([1.0]), np.array([0.0]))).all()


def test_options_can_be_told_from_their_types():
    kinds = {"int", "float", "str", "bool", "tuple[int, ...] | None", "tuple[str, ...]", "int | None"}
    hints = {
        str(inspect.formatannotation(p.annotation)) for p in list(inspect.signature(cache).parameters.values())[1:]
    }
    assert hints <= kinds
