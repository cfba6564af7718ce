"""Merged checkpoints: clusters and averages against loops, and copies of one expert that merge back into it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from workbench.errors import InputError
from workbench.experts import neurons, numbers, read, reorder_neurons
from workbench.merge_experts import clusters, merge_experts, merged_copy
from workbench.models import load

SMALL = {"num_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 4, "hidden_size": 16, "head_dim": 4}


def table(scores: np.ndarray) -> pd.DataFrame:
    layers, experts = np.indices(scores.shape)
    return pd.DataFrame({"layer": layers.ravel(), "expert": experts.ravel(), "frequency": scores.ravel()})


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * y for x, y in zip(a.ravel(), b.ravel(), strict=True))) / (
        float((a**2).sum()) ** 0.5 * float((b**2).sum()) ** 0.5
    )


def exhaustive(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    """Of all orders of b's neurons the one whose sum of cosines with a's is the largest."""
    orders = itertools.permutations(range(len(b)))
    return max(orders, key=lambda order: sum(cosine(a[i], b[j]) for i, j in enumerate(order)))


@pytest.mark.parametrize("by", ["neurons", "router"])
def test_merging_against_loops(by: str, tmp_path: Path):
    """4 neurons, 5 experts, 2 stay: every step written out with loops over all 24 orders of neurons."""
    model = tiny.model("olmoe", **SMALL)
    scores = np.random.default_rng(0).random((3, 5)).round(2)
    found = merge_experts(model, table(scores), 2, tmp_path / "out", by=by)
    merged = load(tmp_path / "out")
    for layer in range(3):
        old, new = read(model.layers[layer]), read(merged.layers[layer])
        dominant = sorted(sorted(range(5), key=lambda e: -scores[layer, e])[:2])
        rows = numbers(old.router)
        became, order, likeness = {}, {}, {}
        for expert in range(5):
            if expert in dominant:
                became[expert], order[expert], likeness[expert] = expert, (0, 1, 2, 3), 1.0
                continue
            orders = {d: exhaustive(neurons(old, d), neurons(old, expert)) for d in dominant}
            alike = {d: cosine(neurons(old, d), neurons(old, expert)[list(orders[d])]) for d in dominant}
            nearest = {d: cosine(rows[d], rows[expert]) for d in dominant} if by == "router" else alike
            became[expert] = max(dominant, key=lambda d: nearest[d])
            order[expert], likeness[expert] = orders[became[expert]], alike[became[expert]]
        part = found[found["layer"] == layer].set_index("expert")
        for expert in range(5):
            row = part.loc[expert]
            members = [e for e in became if became[e] == became[expert]]
            assert row["became"] == dominant.index(became[expert]) and row["kept"] == (expert in dominant)
            share = scores[layer, expert] / sum(scores[layer, e] for e in members)
            assert row["weight"] == pytest.approx(share)
            assert row["cosine"] == pytest.approx(likeness[expert], abs=1e-5)
        for place, d in enumerate(dominant):
            members = [e for e in became if became[e] == d]
            total = sum(scores[layer, e] for e in members)
            expected = sum(scores[layer, e] / total * neurons(old, e)[list(order[e])] for e in members)
            np.testing.assert_allclose(neurons(new, place), expected, atol=1e-5)
            assert torch.equal(new.router[place], old.router[d])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "dbrx", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_copies_merge_back_into_one(family: str, tmp_path: Path):
    """Experts that are reordered copies of a dominant one, in weights and router: merging restores that one exactly."""
    model = tiny.model(family)
    random = np.random.default_rng(0)
    copies = {1: 0, 2: 0, 3: 0, 6: 5, 7: 5}  # within groups of four
    scores = np.zeros((len(model.layers), 8))
    scores[:, [0, 4, 5]] = 0.3
    scores[:, 1] = 0.31 if family != "deepseek_v3" else 0.2
    for layer in model.layers:
        weights = read(layer)
        for copied, source in copies.items():
            for part in [*weights.neuron_parts, weights.down_bias]:
                if part is not None:
                    part[copied] = part[source]
            reorder_neurons(weights, copied, random.permutation(weights.n_neurons))
    scores[:, [2, 3, 6, 7]] = 0.05
    found = merge_experts(model, table(scores), 4, tmp_path / "out")
    joined = found[~found["kept"] & found["expert"].isin(list(copies))]
    assert len(joined) and (joined["cosine"] > 0.9999).all()
    merged = load(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for layer, new_layer in zip(model.layers, merged.layers, strict=True):
        part = found[found["layer"] == layer.index]
        for row in part[part["kept"]].itertuples():
            old, new = read(layer), read(new_layer)
            np.testing.assert_allclose(neurons(new, row.became), neurons(old, row.expert), atol=1e-5)
            for a, b in ((old.gate_bias, new.gate_bias), (old.up_bias, new.up_bias), (old.down_bias, new.down_bias)):
                if a is not None and b is not None:
                    torch.testing.assert_close(b[row.became], a[row.expert], atol=1e-5, rtol=1e-5)


def test_all_experts_are_the_model_bit_for_bit(tmp_path: Path):
    model = tiny.model("olmoe")
    found = merge_experts(model, table(np.random.default_rng(0).random((3, 8))), 8, tmp_path / "out", router="mean")
    assert (found["weight"] == 1).all() and (found["became"] == found["expert"]).all()
    original = model.module.state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.items())


def test_one_expert_is_left(tmp_path: Path):
    model = tiny.model("olmoe")
    found = merge_experts(model, table(np.ones((3, 8))), 1, tmp_path / "out")
    assert np.allclose(found["weight"], 1 / 8) and (found["became"] == 0).all()
    assert {(layer.n_experts, layer.top_k) for layer in load(tmp_path / "out").layers} == {(1, 1)}


def test_unused_experts_leave_the_dominant_one_alone():
    model = tiny.model("olmoe")
    scores = np.zeros((3, 8))
    merged, found = merged_copy(model, scores, 3)
    assert set(found["weight"]) == {0, 1} and (found["weight"] == found["kept"]).all()
    for layer, new_layer in zip(model.layers, merged.layers, strict=True):
        assert torch.equal(read(new_layer).up, read(layer).up[:3])


def test_members_without_a_score_have_no_part():
    model = tiny.model("olmoe")
    scores = np.tile([5.0, 3, 0, 0, 0, 0, 0, 0], (3, 1))
    merged, found = merged_copy(model, scores, 2)
    assert torch.equal(read(merged.layers[0]).down, read(model.layers[0]).down[:2])
    assert found.loc[found["expert"] > 1, "weight"].eq(0).all()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "gemma4"])
def test_mean_of_router_rows(family: str):
    """Rows, biases, selection biases and factors of experts, each the weighted mean of its cluster's."""
    model = tiny.model(family)
    scores = np.random.default_rng(3).random((len(model.layers), 8))
    merged, found = merged_copy(model, scores, 4, router="mean")
    for layer, new_layer in zip(model.layers, merged.layers, strict=True):
        part = found[found["layer"] == layer.index]
        old = dict(layer.router.named_parameters()) | dict(layer.router.named_buffers())
        new = dict(new_layer.router.named_parameters()) | dict(new_layer.router.named_buffers())
        checked = 0
        for name, tensor in old.items():
            if tensor.shape[0] != 8:
                continue
            checked += 1
            for place in range(4):
                rows = part[part["became"] == place]
                expected = sum(w * tensor[e] for e, w in zip(rows["expert"], rows["weight"], strict=True))
                torch.testing.assert_close(new[name][place], expected, rtol=1e-4, atol=1e-5, check_dtype=False)
        assert checked == {"olmoe": 1, "gpt_oss": 2, "deepseek_v3": 2, "gemma4": 2}[family]


def test_clusters_find_planted_ones():
    weights = read(tiny.model("olmoe").layers[0])
    noise = torch.Generator().manual_seed(0)
    for expert, source in ((2, 0), (3, 1), (4, 0), (5, 1)):
        for part in weights.neuron_parts:
            part[expert] = part[source] + 0.2 * part.std() * torch.randn(part[source].shape, generator=noise)
        reorder_neurons(weights, expert, np.random.default_rng(expert).permutation(weights.n_neurons))
    became, order, likeness = clusters(weights, np.array([0, 1]), "neurons")
    assert became[:6].tolist() == [0, 1, 0, 1, 0, 1] and (likeness[2:6] > 0.9).all() and (likeness[6:] < 0.6).all()
    assert np.array_equal(order[0], np.arange(weights.n_neurons))
    assert np.array_equal(order[2], np.argsort(np.random.default_rng(2).permutation(weights.n_neurons)))


def test_note(tmp_path: Path):
    model = tiny.model("olmoe")
    found = merge_experts(model, table(np.random.default_rng(0).random((3, 8))), 4, tmp_path / "out", by="router")
    note = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert note["made_by"] == "workbench merge" and (note["by"], note["router"]) == ("router", "dominant")
    assert note["became"] == found["became"].to_numpy().reshape(3, 8).tolist()
    assert [len(ids) for ids in note["experts"]] == [4, 4, 4]


@pytest.mark.parametrize(
    "options, message",
    [({"by": "outputs"}, "by is 'outputs'; expected 'neurons' or 'router'"), ({"router": "none"}, "router is 'none'")],
)
def test_unknown_options(options: Any, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        merge_experts(tiny.model("olmoe"), table(np.ones((3, 8))), 4, tmp_path / "out", **options)


def test_negative_scores_are_no_weights(tmp_path: Path):
    scores = np.ones((3, 8))
    scores[1, 2] = -0.5
    with pytest.raises(InputError, match="lowest frequency is -0.5; .* expected none below 0"):
        merge_experts(tiny.model("olmoe"), table(scores), 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()
