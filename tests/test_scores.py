"""Logits, probabilities, entropy and margin against float64 computations from the router's input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from recorded import model, run

from workbench.layers import Layer
from workbench.recorder import FIELDS


def log_scores(layer: Layer, z: np.ndarray) -> np.ndarray:
    if layer.scoring == "softmax":
        return z
    if layer.scoring == "sigmoid":
        return -np.logaddexp(0, -z)
    return 0.5 * np.log(np.logaddexp(0, z))


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> np.ndarray:
    z = x.detach().double().reshape(-1, x.shape[-1]).numpy() @ weight.detach().double().numpy().T
    return z if bias is None else z + bias.detach().double().numpy()


def gemma_input(router: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    x = x / (x.pow(2).mean(-1, keepdim=True) + router.eps).sqrt()
    return x * router.scale.double() * router.scalar_root_size


# family -> logits in float64 from the router's input
LOGITS: dict[str, Any] = {
    "olmoe": lambda r, x: linear(x, r.weight),
    "gpt_oss": lambda r, x: linear(x, r.weight, r.bias),
    "deepseek_v3": lambda r, x: linear(x, r.weight),
    "deepseek_v2": lambda r, x: linear(x, r.weight),
    "gemma4": lambda r, x: linear(gemma_input(r, x), r.proj.weight),
    "dbrx": lambda r, x: linear(x, r.layer.weight),
    "llama4": lambda r, x: linear(x, r.weight),
    "ernie4_5_moe": lambda r, x: linear(x, r.weight),
    "kolibri1": lambda r, x: linear(x, r.weight),
    "longcat_flash": lambda r, x: linear(x, r.classifier.weight),
    "muse_spark": lambda r, x: linear(x, r.weight) * r.output_multiplier,
    "laguna": lambda r, x: linear(x, r.weight),
    "inkling": lambda r, x: linear(x, r.weight)[:, : r.num_experts],
    "jetmoe": lambda r, x: linear(x, r.layer.weight),
    "phimoe": lambda r, x: linear(x, r.weight),
    "switch_transformers": lambda r, x: linear(x, r.classifier.weight),
    "afmoe": lambda r, x: linear(x, r.gate.weight),
    "hunyuan_v1_moe": lambda r, x: linear(x, r.wg.weight),
    "inkling2": lambda r, x: linear(x, r.weight),
    "mistral4": lambda r, x: linear(x, r.weight),
}


def grouped(scores: np.ndarray, router: Any, fill: float) -> np.ndarray:
    """Mask all but the best groups, a group's score being the sum of its two best."""
    groups = scores.reshape(len(scores), router.num_group, -1)
    rank = np.sort(groups, -1)[:, :, -2:].sum(-1)
    best = np.argsort(-rank, -1)[:, : router.topk_group]
    keep = np.zeros_like(rank, bool)
    np.put_along_axis(keep, best, True, -1)
    return np.where(keep[:, :, None], groups, fill).reshape(scores.shape)


def choice_scores(family: str, layer: Layer, z: np.ndarray, extra: tuple[Any, ...]) -> np.ndarray:
    """What the family's own top-k sees."""
    r: Any = layer.router
    s = np.exp(log_scores(layer, z))
    if family in ("olmoe", "dbrx", "deepseek_v2", "gemma4", "hunyuan_v1_moe", "switch_transformers"):
        return softmax(z)
    if family in ("gpt_oss", "llama4", "jetmoe", "phimoe"):
        return z
    if family == "deepseek_v3":
        return grouped(s + r.e_score_correction_bias.double().numpy(), r, -np.inf)
    if family == "mistral4":
        return grouped(softmax(z), r, 0.0)
    if family == "ernie4_5_moe":
        return softmax(z) + r.moe_statics.e_score_correction_bias.detach().double().numpy().reshape(1, -1)
    if family == "longcat_flash":
        return softmax(z) + r.e_score_correction_bias.double().numpy()
    if family == "kolibri1":
        return z + r.e_score_correction_bias.double().numpy()
    if family == "afmoe":
        return s + extra[0].detach().double().numpy()
    return s + r.e_score_correction_bias.detach().double().numpy()


@pytest.mark.parametrize("family", list(LOGITS))
def test_logits_entropy_and_margin_in_float64(family: str) -> None:
    made = model(family)
    given: list[tuple[Any, ...]] = []
    handles = [layer.router.register_forward_pre_hook(lambda _m, args: given.append(args)) for layer in made.layers]
    _, observed = run(made, FIELDS)
    for handle in handles:
        handle.remove()
    for layer, seen, (x, *extra) in zip(made.layers, observed, given, strict=True):
        z = LOGITS[family](layer.router, x)
        np.testing.assert_allclose(seen.logits.flatten(0, 1).numpy(), z, rtol=2e-4, atol=2e-4)
        p = softmax(log_scores(layer, z))
        np.testing.assert_allclose(seen.probabilities.flatten(0, 1).numpy(), p, atol=2e-4)
        np.testing.assert_allclose(seen.entropy.flatten().numpy(), -(p * np.log(p)).sum(-1), atol=1e-3)
        ranked = -np.sort(-choice_scores(family, layer, z, tuple(extra)), -1)
        gap = ranked[:, layer.top_k - 1] - ranked[:, layer.top_k]
        np.testing.assert_allclose(seen.margin.flatten().numpy(), gap, atol=1e-3)


def test_entropy_survives_scores_that_underflow() -> None:
    made = tiny.model("deepseek_v3")
    for layer in made.layers:
        layer.router.weight.data *= 1e4
    _, observed = run(made, ["entropy", "probabilities"])
    assert all(seen.entropy.isfinite().all() and seen.probabilities.isfinite().all() for seen in observed)


def test_deepseek_v4_scores_and_hash_layers() -> None:
    made = model("deepseek_v4")
    assert [layer.scoring for layer in made.layers] == ["hash", "sqrt-softplus", "sqrt-softplus"]
    inputs = tiny.inputs(made.module)
    _, observed = run(made, FIELDS, **inputs)
    for layer, seen in zip(made.layers, observed, strict=True):
        if layer.scoring == "hash":
            assert torch.equal(seen.experts, layer.router.tid2eid[inputs["input_ids"]])
            continue
        z = seen.logits.double().numpy()
        s = np.sqrt(np.logaddexp(0, z))
        p = s / s.sum(-1, keepdims=True)
        np.testing.assert_allclose(seen.probabilities.numpy(), p, atol=1e-5)
        np.testing.assert_allclose(seen.entropy.numpy(), -(p * np.log(p)).sum(-1), atol=1e-4)
        ranked = -np.sort(-(s + layer.router.e_score_correction_bias.numpy()), -1)
        np.testing.assert_allclose(seen.margin.numpy(), ranked[..., 2] - ranked[..., 3], atol=1e-4)
