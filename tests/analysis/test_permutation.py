"""Matching experts of two checkpoints: shuffled copies are recovered, and compute the same."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from workbench.analysis.permutation import aligned, chance_in_place, figure, findings, likeness, orders, permutation
from workbench.errors import InputError
from workbench.experts import neurons, numbers, read, reorder_neurons
from workbench.neurons import best_order
from workbench.subset import subset

SMALL = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 4, "hidden_size": 16, "head_dim": 4}


def outputs(model: Any, inputs: Any) -> torch.Tensor:
    torch.set_num_threads(1)
    with torch.inference_mode():
        return model.module(**inputs)[0]


def shuffled(model: Any, seed: int = 0, with_neurons: bool = True) -> tuple[Any, list[np.ndarray]]:
    """A copy with experts, and neurons within them, in random orders."""
    random = np.random.default_rng(seed)
    chosen = [random.permutation(model.layers[0].n_experts) for _ in model.layers]
    copy = subset(model, chosen)
    for layer in copy.layers if with_neurons else ():
        weights = read(layer)
        for expert in range(weights.n_experts):
            reorder_neurons(weights, expert, random.permutation(weights.n_neurons))
    return copy, chosen


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "dbrx", "qwen2_moe", "gemma4"])
def test_shuffled_copies_are_recovered(family: str):
    model = tiny.model(family)
    copy, chosen = shuffled(model)
    inputs = tiny.inputs(model.module)
    expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(copy, inputs), expected, rtol=1e-4, atol=1e-5)
    frame = permutation(model, other=copy)
    for mine, theirs in zip(orders(frame), chosen, strict=True):
        assert np.array_equal(mine, np.argsort(theirs))
    assert (frame["likeness"] > 0.99999).all() and (frame["aligned_cosine"] > 0.99999).all()
    assert (frame["other_likeness"] < 0.7).all() and (frame["moved_neurons"] > 0.5).all()
    assert (frame["is_same"] == (frame["matched"] == frame["expert"])).all()
    back = aligned(model, copy, frame)
    torch.testing.assert_close(outputs(back, inputs), expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(model.layers, back.layers, strict=True):
        a, b = read(mine), read(theirs)
        assert torch.equal(a.up, b.up) and torch.equal(a.down, b.down) and torch.equal(a.router, b.router)


@pytest.mark.parametrize("by", ["weights", "router"])
def test_faster_ways_find_experts_whose_neurons_stayed(by: str):
    model = tiny.model("olmoe", num_experts=12)
    copy, chosen = shuffled(model, with_neurons=False)
    frame = permutation(copy, other=model, by=by)
    assert all(np.array_equal(a, b) for a, b in zip(orders(frame), chosen, strict=True))
    assert (frame["moved_neurons"] == 0).all() and set(frame["by"]) == {by}


def test_reordered_neurons_hide_experts_from_plain_cosines():
    model = tiny.model("olmoe")
    copy, chosen = shuffled(model)
    plain = permutation(model, other=copy, by="weights")
    assert (plain["likeness"] < 0.5).all()
    assert not all(np.array_equal(a, np.argsort(b)) for a, b in zip(orders(plain), chosen, strict=True))


@pytest.mark.parametrize("by", ["neurons", "weights", "router"])
def test_likeness_and_matching_against_loops(by: str):
    """4 experts of 4 neurons in each of two models: all 24 orders of neurons, all 24 of experts."""
    first, second = tiny.model("olmoe", **SMALL), tiny.model("olmoe", seed=1, **SMALL)
    frame = permutation(first, other=second, by=by)
    for a_layer, b_layer in zip(first.layers, second.layers, strict=True):
        a, b = read(a_layer), read(b_layer)

        def alike(i: int, j: int, a: Any = a, b: Any = b) -> float:
            if by == "router":
                return cosine(numbers(a.router)[i], numbers(b.router)[j])
            one, two = neurons(a, i), neurons(b, j)
            if by == "weights":
                return cosine(one, two)
            tried = itertools.permutations(range(4))
            best = max(tried, key=lambda o: sum(cosine(one[n], two[m]) for n, m in enumerate(o)))
            return cosine(one, two[list(best)])

        expected = np.array([[alike(i, j) for j in range(4)] for i in range(4)])
        np.testing.assert_allclose(likeness(a, b, by), expected, atol=1e-5)
        best = max(itertools.permutations(range(4)), key=lambda o: sum(expected[i, j] for i, j in enumerate(o)))
        part = frame[frame["layer"] == a_layer.index]
        assert part["matched"].tolist() == list(best)
        for expert in range(4):
            row = part[part["expert"] == expert].iloc[0]
            others = [expected[expert, j] for j in range(4) if j != best[expert]]
            assert row["likeness"] == pytest.approx(expected[expert, best[expert]], abs=1e-5)
            assert row["same_likeness"] == pytest.approx(expected[expert, expert], abs=1e-5)
            assert row["other_likeness"] == pytest.approx(sum(others) / 3, abs=1e-5)
        in_place = sum(i == j for i, j in enumerate(best))
        assert (part["layer_share"] == in_place / 4).all()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def test_a_model_and_itself():
    model = tiny.model("olmoe")
    frame = permutation(model, other=model, by="neurons")
    assert frame["is_same"].all() and (frame["layer_share"] == 1).all() and (frame["moved_neurons"] == 0).all()
    assert frame["p"].iloc[0] == pytest.approx(1 / math.factorial(8))
    assert "24 of 24 experts" in findings(frame)[0]
    figure(frame)


def test_chance_in_place_against_all_permutations():
    for n in range(1, 7):
        fixed = [sum(i == j for i, j in enumerate(o)) for o in itertools.permutations(range(n))]
        for at_least in range(n + 1):
            expected = sum(count >= at_least for count in fixed) / len(fixed)
            assert chance_in_place(n, at_least) == pytest.approx(expected)
    assert chance_in_place(512, 0) == pytest.approx(1) and 0 <= chance_in_place(512, 400) < 1e-100


def test_unrelated_models_are_matched_by_chance():
    frames = [permutation(tiny.model("olmoe"), other=tiny.model("olmoe", seed=s), by="weights") for s in range(1, 8)]
    shares = np.mean([frame["layer_share"].mean() for frame in frames])
    assert shares < 0.3  # 1/8 expected
    assert np.mean([(frame.groupby("layer")["p"].first() < 0.05).mean() for frame in frames]) < 0.2


def test_one_expert_and_experts_of_zeros():
    model = tiny.model("olmoe", **(SMALL | {"num_experts": 1, "num_experts_per_tok": 1}))
    frame = permutation(model, other=model)
    assert frame["is_same"].all() and frame["other_likeness"].isna().all() and (frame["p"] == 1).all()
    figure(frame)
    assert findings(frame)
    zero = tiny.model("olmoe", **SMALL)
    weights = read(zero.layers[0])
    for part in [*weights.neuron_parts, weights.router]:
        part[1] = 0
    for by in ("neurons", "weights", "router"):
        frame = permutation(zero, other=tiny.model("olmoe", **SMALL), by=by, layers=(0,))
        assert np.isnan(frame.loc[1, "likeness"]) and frame["matched"].tolist() == [0, 1, 2, 3]


def test_the_largest_sum_wins_over_the_nearest():
    """Two experts nearest to the same one: the best matching gives it to the one with more to lose."""
    assert best_order(np.array([[0.9, 0.8], [0.85, 0.1]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "compares two checkpoints: name the other one"),
        ({"other": "same", "by": "biases"}, "by is 'biases'; expected one of neurons, weights, router"),
        ({"other": "same", "layers": (3,)}, "layer 3 doesn't exist"),
        ({"other": "shorter"}, "3 layers with experts, .* 2"),
        ({"other": "narrower"}, "8 experts of 48 neurons .* 8 of 16"),
        ({"other": "fewer"}, "8 experts of 48 neurons .* 4 of 48"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str):
    model = tiny.model("olmoe")
    changes = {
        "same": {},
        "shorter": {"num_hidden_layers": 2},
        "narrower": {"intermediate_size": 16},
        "fewer": {"num_experts": 4},
    }
    if "other" in options:
        options = options | {"other": tiny.model("olmoe", **changes[options["other"]])}
    with pytest.raises(InputError, match=message):
        permutation(model, **options)


def test_names_of_models():
    frame = permutation("demo", other="demo-early", by="weights", layers=(0,))
    assert frame["is_same"].all() and frame["n_experts"].iloc[0] == 32
