"""Ids and weights against oracles of their own: every family, many counts, padding, generation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch
from recorded import TRACED, model, run

from workbench.layers import Layer
from workbench.recorder import FIELDS, Recorder

# Another token of the batch can change where a token goes, so nothing that compares batches holds.
BATCH_DEPENDENT = {"doge"}


def oracle(layer: Layer, out: Any, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights (T, k) from what the router returned, by a way of its own for each layout."""
    if layer.family.layout == "standard" and isinstance(out, tuple):
        return out[2].reshape(-1, layer.top_k), out[1].reshape(-1, layer.top_k)
    if layer.family.layout == "standard":  # dbrx returns logits only
        weights, ids = out.softmax(-1).topk(layer.top_k, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)
    if layer.family.layout == "dense":
        weights, ids = out[1].topk(layer.top_k, dim=-1)
        return ids, weights.sigmoid()
    if layer.family.layout == "sorted":
        z, ids = out[4].topk(layer.top_k, dim=-1)
        return ids, z.softmax(-1)
    if layer.family.layout == "one-hot":
        p = out[2].softmax(-1).reshape(-1, layer.n_experts)
        return p.argmax(-1, keepdim=True), p.max(-1, keepdim=True).values
    keys = out.view(2, -1, out.shape[-1] // 2)
    z = (keys[0][:, :, None] + keys[1][:, None, :]).flatten(1)
    best, ids = z.topk(layer.top_k, dim=-1)
    return ids, best.softmax(-1)


@pytest.mark.parametrize("family", TRACED)
def test_ids_and_weights_are_the_models_own(family: str) -> None:
    made = model(family)
    returned: list[Any] = []
    handles = [
        layer.router.register_forward_hook(lambda _m, args, out: returned.append((out, args))) for layer in made.layers
    ]
    try:
        _, observed = run(made)
    finally:
        for handle in handles:
            handle.remove()
    for layer, seen, (out, args) in zip(made.layers, observed, returned, strict=True):
        ids, weights = oracle(layer, out, args)
        if layer.family.skips:
            ids = ids.masked_fill(weights == 0, -1)
        assert torch.equal(seen.experts.flatten(0, 1), ids)
        torch.testing.assert_close(seen.weights.flatten(0, 1), weights.float())


@pytest.mark.parametrize("experts", [2, 64, 300])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "llama4"])
@pytest.mark.parametrize("k", ["one", "two", "all"])
def test_expert_counts(family: str, experts: int, k: str) -> None:
    top_k = {"one": 1, "two": 2, "all": experts}[k]
    changes: dict[str, Any] = {"num_experts": experts, "num_experts_per_tok": top_k, "num_hidden_layers": 2}
    if family == "deepseek_v3":  # its groups' scores are sums of two experts' at least
        changes |= {"n_group": 1, "topk_group": 1}
    made = tiny.model(family, **changes)
    _, observed = run(made, FIELDS, **tiny.inputs(made.module, 1, 5))
    for layer, seen in zip(made.layers, observed, strict=True):
        assert (layer.n_experts, layer.top_k) == (experts, top_k)
        assert seen.experts.shape == (1, 5, top_k)
        assert seen.margin.isnan().all() == (top_k == experts)
        if top_k == experts:
            assert torch.equal(seen.experts.sort(-1).values, torch.arange(experts).expand(1, 5, experts))


@pytest.mark.parametrize("k", [1, tiny.EXPERTS])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "ernie4_5_moe", "lfm2_moe", "minimax_m2", "granitemoe", "beam", "jetmoe"]
)
def test_one_expert_and_all_experts(family: str, k: int) -> None:
    changes = {"n_group": 1, "topk_group": 1} if family == "beam" else {}
    made = tiny.model(family, num_experts_per_tok=k, **changes)
    _, observed = run(made, FIELDS)
    for layer, seen in zip(made.layers, observed, strict=True):
        assert layer.top_k == k == seen.experts.shape[-1]
        assert seen.margin.isnan().all() == (k == tiny.EXPERTS)


def test_switch_drops_beyond_capacity() -> None:
    made = tiny.model("switch_transformers", expert_capacity=1)
    _, observed = run(made, FIELDS)
    assert any((seen.experts < 0).any() for seen in observed)
    for seen in observed:
        for row in seen.experts.squeeze(-1).tolist():
            kept = [expert for expert in row if expert >= 0]
            assert len(kept) == len(set(kept)) > 0
        dropped = seen.experts < 0
        assert (seen.weights[dropped] == 0).all() and (seen.norms[dropped] == 0).all()


def test_zaya_skips() -> None:
    made = tiny.model("zaya")
    for layer in made.layers:
        layer.router.balancing_biases[-1] = 0.2
    _, observed = run(made, FIELDS)
    skipped = torch.stack([seen.experts < 0 for seen in observed])
    assert 0 < skipped.sum() < skipped.numel()


def test_longcat_zero_computation_experts_return_their_input() -> None:
    made = model("longcat_flash")
    given: list[torch.Tensor] = []
    handles = [layer.experts.register_forward_pre_hook(lambda _m, args: given.append(args[0])) for layer in made.layers]
    _, observed = run(made, FIELDS)
    for handle in handles:
        handle.remove()
    seen_some = False
    for seen, hidden in zip(observed, given, strict=True):
        zero = seen.experts >= tiny.EXPERTS
        seen_some |= bool(zero.any())
        expected = hidden.norm(dim=-1).view(*zero.shape[:2], 1).expand_as(seen.norms)
        torch.testing.assert_close(seen.norms[zero], expected[zero])
    assert seen_some


# -- padding, generation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [name for name in TRACED if name not in BATCH_DEPENDENT])
def test_padding_leaves_real_tokens_routing(family: str, side: str) -> None:
    made = model(family)
    if made.module.config.is_encoder_decoder and side == "left":
        pytest.skip("encoders with relative positions are padded on the right")
    if family == "deepseek_v4" and side == "left":
        pytest.skip("it compresses its cache in windows that are counted from the padded start")
    full = tiny.inputs(made.module, 2, 12)["input_ids"]
    short = 8
    real = slice(12 - short, None) if side == "left" else slice(0, short)
    padded, mask = full.clone(), torch.ones_like(full)
    padded[1] = 0
    padded[1, real] = full[1, :short]
    mask[1] = 0
    mask[1, real] = 1
    inputs: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
    if "position_ids" in inspect.signature(made.module.forward).parameters and family not in ("glm4v_moe", "nllb_moe"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if made.module.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = full[:, :5]
    alone: dict[str, Any] = {"input_ids": full[1:, :short]}
    if made.module.config.is_encoder_decoder:
        alone["decoder_input_ids"] = full[1:, :5]
    _, together = run(made, **inputs)
    _, single = run(made, **alone)
    for layer, batch, one in zip(made.layers, together, single, strict=True):
        where = slice(None) if layer.stack == "decoder" and made.module.config.is_encoder_decoder else real
        got, got_weights = batch.experts[1, where], batch.weights[1, where]
        same = (got.sort(-1).values == one.experts[0].sort(-1).values).all(-1)
        assert same.all(), f"{layer.name}: {int((~same).sum())} of {len(same)} tokens differ"
        torch.testing.assert_close(got_weights.sort(-1).values, one.weights[0].sort(-1).values, rtol=1e-3, atol=1e-4)


GENERATING = [
    name for name in TRACED if name not in BATCH_DEPENDENT and "generate" in dir(tiny._class_of(tiny.config(name)))
]


@pytest.mark.parametrize("family", GENERATING)
def test_generation_step_by_step_equals_one_forward(family: str) -> None:
    made = model(family)
    ids = tiny.inputs(made.module, 2, 7)["input_ids"]
    with torch.inference_mode(), Recorder(made) as recorder:
        out = made.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        steps: Any = recorder.take()
        inputs = {"input_ids": out[:, :-1]}
        if made.module.config.is_encoder_decoder:
            inputs = {"input_ids": ids, "decoder_input_ids": out[:, :-1]}
        made.module(**inputs)
        (full,) = recorder.take()
    assert len(steps) == 4
    decoders = [layer for layer in made.layers if layer.stack == "decoder"]
    for layer in decoders:
        parts = [step[layer.index if len(step) == len(made.layers) else decoders.index(layer)] for step in steps]
        assert [part.experts.shape[1] for part in parts][1:] == [1, 1, 1]
        assert torch.equal(
            torch.cat([part.experts for part in parts], 1).sort(-1).values, full[layer.index].experts.sort(-1).values
        )
        torch.testing.assert_close(
            torch.cat([part.weights for part in parts], 1).sort(-1).values,
            full[layer.index].weights.sort(-1).values,
            rtol=1e-3,
            atol=1e-4,
        )
