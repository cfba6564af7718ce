"""Agreement of two runs against loops over tokens and pairs of tokens; its laws; what can't be compared."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from routed import WHOLE, choose, full_trace, numbered, with_profiles, write

from workbench.analysis.agreement import agreement, figure, findings
from workbench.errors import InputError
from workbench.tracefile import Trace

E, K, LAYERS = 6, 3, 2
LENGTHS = [5, 1, 7, 4, 6]
SEQ = np.repeat(np.arange(5), LENGTHS)
SEQUENCES = pd.DataFrame({"lang": ["en", "de", "en", None, "de"], "segment_id": ["a", "a", "b", "c", "c"]})
TOKENS = np.arange(len(SEQ)) * 3 % 11


def route(seed: int, dropped: float = 0.15) -> dict:
    """Experts, weights, logits and losses of a run; some places, and whole tokens, without an expert."""
    random = np.random.default_rng(seed)
    logits = np.random.default_rng(9).normal(size=(LAYERS, len(SEQ), E)) + 0.7 * random.normal(
        size=(LAYERS, len(SEQ), E)
    )
    experts = np.stack([np.argsort(-z, axis=1)[:, :K] for z in logits], axis=1)
    weights = random.random(experts.shape)
    experts[random.random(experts.shape) < dropped] = -1
    experts[random.random(experts.shape[:2]) < dropped] = -1
    nll = random.random(len(SEQ))
    nll[np.flatnonzero(np.diff(SEQ, prepend=-1))] = np.nan
    return {"experts": experts, "weights": np.where(experts < 0, 0, weights), "logits": list(logits), "nll": nll}


def record(path: Path, run: str, routed: dict, **more) -> Trace:
    options = {"n_experts": E, "seq": SEQ, "sequences": SEQUENCES, "token_ids": TOKENS, "run": run} | routed | more
    return full_trace(path, options.pop("experts"), mode="append" if path.exists() else "new", **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("agreement") / "t.duckdb"
    routed = [route(1), route(2)]
    traces = [record(path, name, one) for name, one in zip(("first", "second"), routed, strict=True)]
    for trace, one in zip(traces, routed, strict=True):  # as the file has them: in fixed point
        one["weights"] = np.stack([trace.weights(layer) for layer in range(LAYERS)], axis=1)
    return traces, routed


def sets(routed: dict, token: int, layer: int) -> set:
    return {int(expert) for expert in routed["experts"][token, layer] if expert >= 0}


def heavy(routed: dict, token: int, layer: int) -> int:
    """Expert of the largest recorded weight, the first of equal ones; -1 for none."""
    experts, weights = list_of(routed, token, layer)
    best = max(((w, -at) for at, w in enumerate(weights)), default=None)
    return -1 if best is None else experts[-best[1]]


def list_of(routed: dict, token: int, layer: int) -> tuple[list[int], list[float]]:
    """Experts and weights of a token; the file closes gaps between experts."""
    experts = [int(expert) for expert in routed["experts"][token, layer] if expert >= 0]
    return experts, [float(weight) for weight in routed["weights"][token, layer][: len(experts)]]


def overlap(a: set, b: set) -> float:
    return len(a & b) / max(len(a), len(b)) if a or b else math.nan


def measures(routed, token: int, layer: int) -> dict:
    """One token's values by plain Python."""
    a, b = (sets(one, token, layer) for one in routed)
    if not a and not b:
        return {}
    weights = [dict(zip(*list_of(one, token, layer), strict=True)) for one in routed]
    difference = sum(abs(weights[0].get(e, 0) - weights[1].get(e, 0)) for e in a | b)
    tops = [heavy(one, token, layer) for one in routed]
    return {
        "overlap": overlap(a, b),
        "exact_match": float(a == b),
        "top1_match": float(tops[0] == tops[1]),
        "weight_difference": difference,
        "weight_shift": difference / (sum(weights[0].values()) + sum(weights[1].values())),
    }


def softmax(z) -> list[float]:
    total = sum(math.exp(x) for x in z)
    return [math.exp(x) / total for x in z]


def kl(routed, token: int, layer: int) -> float:
    p, q = (softmax(np.float32(one["logits"][layer][token])) for one in routed)
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("by", [None, "lang", "position"])
def test_against_loop(runs, by):
    (first, second), routed = runs
    frame = agreement(first, other=second, by=by, n_resamples=20)
    pos = np.concatenate([np.arange(n) for n in LENGTHS])
    label = {
        None: ["all"] * len(SEQ),
        "lang": SEQUENCES["lang"][SEQ].tolist(),
        "position": ["0" if p == 0 else "1–3" if p < 4 else "4–15" for p in pos],
    }[by]
    for group, part in frame.groupby("group"):
        tokens = [token for token in range(len(SEQ)) if label[token] == group]
        table = numbered(part).set_index(["layer", "measure"])
        assert (part["n_tokens"] == len(tokens)).all()
        found = {(layer, token): measures(routed, token, layer) for layer in range(LAYERS) for token in tokens}
        for layer in (*range(LAYERS), WHOLE):
            values = [row for (at, _), row in found.items() if row and layer in (at, WHOLE)]
            for measure in values[0]:
                row = table.loc[layer, measure]
                assert row["value"] == pytest.approx(np.mean([one[measure] for one in values]), abs=1e-6)
                assert row["n_compared"] == len(values)
            where = [(token, at) for at in range(LAYERS) for token in tokens if layer in (at, WHOLE)]
            expected = np.mean([kl(routed, token, at) for token, at in where])
            assert table.loc[(layer, "router_kl"), "value"] == pytest.approx(expected, rel=1e-5)
        differs = [
            any(sets(routed[0], t, layer) != sets(routed[1], t, layer) for layer in range(LAYERS)) for t in tokens
        ]
        assert table.loc[(WHOLE, "differs_anywhere"), "value"] == pytest.approx(np.mean(differs))
        losses = [routed[1]["nll"][t] - routed[0]["nll"][t] for t in tokens]
        if not np.isnan(losses).all():
            assert table.loc[(WHOLE, "nll_difference"), "value"] == pytest.approx(np.nanmean(losses), rel=1e-5)
    known = frame["low"].notna()
    assert (frame["low"][known] <= frame["value"][known] + 1e-9).all()
    assert (frame["value"][known] <= frame["high"][known] + 1e-9).all()


def test_chance_against_all_pairs(runs):
    """The chance level is the mean over all pairs of one token here and another there."""
    (first, second), routed = runs
    frame = numbered(agreement(first, other="second", by="lang", n_resamples=0)).set_index(
        ["group", "layer", "measure"]
    )
    for group in ("en", "de"):
        for layer in range(LAYERS):
            tokens = [t for t in range(len(SEQ)) if SEQUENCES["lang"][SEQ[t]] == group]
            tokens = [t for t in tokens if sets(routed[0], t, layer) or sets(routed[1], t, layer)]
            expected = {"overlap": [], "exact_match": [], "top1_match": []}
            for i in tokens:
                for j in tokens:
                    a, b = sets(routed[0], i, layer), sets(routed[1], j, layer)
                    if i == j or not (a or b):
                        continue
                    expected["overlap"].append(overlap(a, b))
                    expected["exact_match"].append(a == b)
                    expected["top1_match"].append(
                        bool(a and b) and heavy(routed[0], i, layer) == heavy(routed[1], j, layer)
                    )
            for measure, values in expected.items():
                row = frame.loc[group, layer, measure]
                assert row["chance"] == pytest.approx(np.mean(values), abs=1e-9), measure
                assert row["kappa"] == pytest.approx((row["value"] - row["chance"]) / (1 - row["chance"]))
    pooled, layers = frame.loc["en", WHOLE, "overlap"], frame.loc["en"].loc[[0, 1]].xs("overlap", level="measure")
    assert pooled["chance"] == pytest.approx(np.average(layers["chance"], weights=layers["n_compared"]))
    assert frame.xs("router_kl", level="measure")["chance"].isna().all()


def test_a_run_agrees_with_itself(runs):
    (first, _), _ = runs
    frame = agreement(first, other=first, n_resamples=20).set_index("measure")
    assert (frame.loc[["overlap", "exact_match", "top1_match"], ["value", "low", "high", "kappa"]] == 1).all(axis=None)
    zero = ["weight_difference", "weight_shift", "router_kl", "differs_anywhere", "nll_difference"]
    assert (frame.loc[zero, "value"] == 0).all()
    assert findings(frame.reset_index()) == ["first and first choose the same experts for every one of 23 tokens."]


def test_the_order_of_the_runs(runs):
    """What is about choices is symmetric; the difference of the losses changes its sign."""
    (first, second), _ = runs
    there, back = (
        agreement(x, other=y, n_resamples=0).set_index("measure") for x, y in ((first, second), (second, first))
    )
    numbers = ["layer", "value", "chance", "kappa", "n_compared"]
    for name in ("overlap", "exact_match", "top1_match", "weight_difference", "weight_shift", "differs_anywhere"):
        pd.testing.assert_frame_equal(there.loc[[name], numbers], back.loc[[name], numbers])
    losses = [frame["value"].to_dict()["nll_difference"] for frame in (there[-1:], back[-1:])]
    assert losses[0] == -losses[1] != 0
    assert there.loc[["router_kl"], "value"].gt(0).all()


def test_independent_choices_agree_by_chance_only(tmp_path):
    random = np.random.default_rng(0)
    seq, texts = np.repeat(np.arange(100), 20), pd.DataFrame({"sha256": [str(i) for i in range(100)]})
    busy = np.linspace(2, 0, 16)
    a, b = (
        write(tmp_path / f"{i}.duckdb", choose(random, np.tile(busy, (2000, 1)), 4)[:, None], seq, texts, 16).trace
        for i in range(2)
    )
    frame = numbered(agreement(a, other=b, n_resamples=200)).set_index(["layer", "measure"])
    for measure in ("overlap", "exact_match", "top1_match"):
        row = frame.loc[0, measure]
        assert abs(row["kappa"]) < 0.02 and row["low"] < row["chance"] < row["high"]
    assert frame["chance"].to_dict()[0, "overlap"] > 4 / 16  # uneven loads meet more often


def test_profiles(tmp_path):
    random = np.random.default_rng(4)
    profiles = [random.dirichlet(np.ones(5), 4) for _ in range(2)]
    sequences = pd.DataFrame({"lang": ["en", "en", "de", "de"]})
    a, b = (with_profiles(tmp_path / f"{i}", [p], sequences, [3, 0, 2, 4]) for i, p in enumerate(profiles))
    frame = agreement(a, other=str(tmp_path / "1"), by="lang", n_resamples=10)
    table = numbered(frame[frame["measure"] == "profile_kl"]).set_index(["layer", "group"])
    terms = [sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) for p, q in zip(*profiles, strict=True)]
    for layer in (0, WHOLE):  # the empty sequence has no profile to speak of
        assert table.loc[(layer, "en"), "value"] == pytest.approx(terms[0], rel=1e-5)
        assert table.loc[(layer, "de"), "value"] == pytest.approx((terms[2] + terms[3]) / 2, rel=1e-5)
        compared = table["n_compared"].to_dict()
        assert (compared[layer, "en"], compared[layer, "de"]) == (1, 2)
    assert "profile_kl" not in set(agreement(a, other=b, by="position", n_resamples=0)["measure"])


def test_only_what_was_recorded(tmp_path):
    experts = np.array([[0, 1], [2, 3], [1, 0]])[:, None]
    texts = pd.DataFrame({"lang": ["en"]})
    a = write(tmp_path / "a", experts, [0] * 3, texts.assign(sha256="x"), 4).trace
    b = write(tmp_path / "b", experts[:, :, ::-1], [0] * 3, texts.assign(sha256="x"), 4).trace
    frame = agreement(a, other=b, n_resamples=10)
    assert set(frame["measure"]) == {"overlap", "exact_match", "top1_match", "differs_anywhere"}
    table = frame[frame["layer"] == 0].set_index("measure")
    assert table.loc["exact_match", "value"] == 1 and table.loc["top1_match", "value"] == 0
    assert frame["low"].isna().all()  # one text
    assert (frame["other"] == "b#arrays").all()
    figure(frame)


@pytest.mark.parametrize(
    "experts, n_experts", [([[[0]]], 1), ([[[-1]]], 3), ([[[300, 2, -1]]], 400), ([[[0]], [[-1]]], 1)]
)
def test_degenerate(tmp_path, experts, n_experts):
    texts = pd.DataFrame({"sha256": ["x"]})
    traces = [write(tmp_path / name, np.array(experts), [0] * len(experts), texts, n_experts).trace for name in "ab"]
    frame = agreement(traces[0], other=traces[1], n_resamples=5)
    table = frame[frame["layer"] == 0].set_index("measure")
    chosen = (np.array(experts) >= 0).any()
    assert (table["value"] == 1).all() if chosen else table["value"].isna().all()
    assert table["chance"].isna().all() or len(experts) > 1
    figure(frame)
    assert ("chose any expert" in findings(frame)[0]) == (not chosen)


def test_runs_of_different_k(tmp_path):
    """A run that uses fewer experts: the overlap is a part of the larger set."""
    texts = pd.DataFrame({"sha256": ["x"]})
    a = write(tmp_path / "a", np.array([[[0, 1, 2, 3]]]), [0], texts, 6).trace
    b = write(tmp_path / "b", np.array([[[1, 5]]]), [0], texts, 6).trace
    assert agreement(a, other=b, n_resamples=0).loc[0, "value"] == 0.25


def test_different_models_are_refused(tmp_path):
    texts = pd.DataFrame({"sha256": ["x"]})
    a = write(tmp_path / "a", np.zeros((2, 2, 1), int), [0, 0], texts, 4).trace
    b = write(tmp_path / "b", np.zeros((2, 1, 1), int), [0, 0], texts, 4).trace
    c = write(tmp_path / "c", np.zeros((2, 2, 1), int), [0, 0], texts, 8).trace
    with pytest.raises(InputError, match=r"has 2 layers of 4 experts.*has 1 layers of 4.*of one architecture"):
        agreement(a, other=b)
    with pytest.raises(InputError, match="2 layers of 8 experts"):
        agreement(a, other=c)
    with pytest.raises(InputError, match="no 'style'"):
        agreement(a, other=a, by="style")


def test_figures_and_findings(runs, tmp_path):
    (first, second), _ = runs
    frame = agreement(first, other=second, n_resamples=20)
    names = {line.name for line in figure(frame).data}
    assert {"overlap of the choices", "same set of experts", "same first expert"} <= names
    first_sentence, layer, loss = findings(frame)
    assert "of the expert choices of first are those of second too" in first_sentence and "layer" in layer
    assert "nats a token" in loss
    by = agreement(first, other=second, by="lang", n_resamples=20)
    assert {"en", "de", "chance (mean of the groups)"} <= {line.name for line in figure(by).data}
    assert len(findings(by)) == 2
    many = pd.concat([by[by["group"] == "en"].assign(group=f"<b>{number}") for number in range(12)])
    heatmap = figure(many).data[0]
    assert np.shape(heatmap.z) == (12, 2) and heatmap.y[0].startswith("&lt;b&gt;")
    close = frame.assign(value=0.999, low=0.998, high=1.0)
    assert figure(close).to_dict()["layout"]["yaxis"]["range"][0] > 0.99
