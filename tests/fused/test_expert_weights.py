"""Experts modules of every family, read and computed: the same as the family's own code gives."""

from __future__ import annotations

from functools import cache
from math import inf
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from workbench.contributions import contributions
from workbench_kernels.expert_weights import Activation, activate, read
from workbench_kernels.experts import experts

NOT_FUSED = ("dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "switch_transformers")
FAMILIES = [family for family in tiny.FAMILIES if family not in NOT_FUSED]

SILU = Activation()
CLAMPED = Activation(limit=10.0)
SHIFTED = Activation(alpha=1.702, limit=7.0, shift=1.0)
ACTIVATIONS = {
    "deepseek_v4": CLAMPED,
    "diffusion_gemma": Activation("gelu_tanh"),
    "gemma4": Activation("gelu_tanh"),
    "glm5_next": CLAMPED,
    "gpt_oss": SHIFTED,
    "hy_v4": CLAMPED,
    "inkling2": Activation(softcaps=(4.0, 25.0)),
    "minimax_m3_vl": SHIFTED,
    "nemotron_h": Activation("relu2"),
    "openai_privacy_filter": SHIFTED,
}
TRANSPOSED = {"aria", "gpt_oss", "openai_privacy_filter"}


@cache
def module(family: str) -> nn.Module:
    """The first experts module of a tiny model, with values that reach an activation's limits."""
    model = tiny.module(family)
    model.set_experts_implementation("eager")
    found = next(child for _, child in model.named_modules() if hasattr(child, "_apply_gate"))
    generator = torch.Generator().manual_seed(3)
    for parameter in found.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return found


def chosen(n_experts: int, tokens: int = 11, k: int = 3, width: int = 64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, width, generator=generator)
    ids = torch.rand(tokens, n_experts, generator=generator).topk(k).indices
    return hidden, ids, torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same(family: str, backend: Any):
    own = module(family)
    weights = read(own)
    hidden, ids, gate = chosen(weights.n_experts, width=weights.width)
    with torch.inference_mode():
        out, norms = experts(weights, hidden, ids, gate, norms=True, backend=backend)
        expected = own.forward(hidden, ids, gate)
        terms = contributions(own.forward, hidden, ids, torch.ones_like(gate))
    assert norms is not None and expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(norms, terms.norm(dim=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_form(family: str):
    weights = read(module(family))
    assert weights.activation == ACTIVATIONS.get(family, SILU)
    assert weights.transposed == (family in TRANSPOSED)
    assert weights.interleaved == (family == "gpt_oss")
    assert weights.gated == (family != "nemotron_h")
    assert (weights.post_norm is not None) == (family == "muse_spark")
    assert (weights.down_proj_bias is not None) == (family in ("gpt_oss", "openai_privacy_filter"))
    assert weights.down.shape == (weights.n_experts, weights.width, weights.n_neurons)
    assert weights.gate_up.shape[1:] == (weights.n_neurons * (1 + weights.gated), weights.width)


def test_limit_after_the_activation():
    own: Any = next(m for m in tiny.module("step3p7").modules() if hasattr(m, "_apply_gate"))
    own.limit = 7.0
    assert read(own).activation == Activation(limit=7.0, limit_after=True)


@pytest.mark.parametrize("name", ["silu", "quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2"])
def test_activation_is_recognised_by_what_it_computes(name: str):
    from transformers.activations import ACT2FN

    own: Any = next(m for m in tiny.module("olmoe").modules() if hasattr(m, "_apply_gate"))
    own.act_fn = ACT2FN[name]
    form = read(own).activation
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(activate(form, x, torch.ones_like(x)), own.act_fn(x), rtol=1e-5, atol=1e-6)


def test_nothing_is_copied():
    """A later change of the model is seen, and gradients reach it."""
    own: Any = module("gpt_oss")
    weights = read(own)
    assert weights.gate_up_proj is own.gate_up_proj and weights.down_proj_bias is own.down_proj_bias
    hidden, ids, gate = chosen(weights.n_experts)
    out, _ = experts(weights, hidden, ids, gate)
    expected = torch.autograd.grad(own.forward(hidden, ids, gate).square().sum(), list(own.parameters()))
    found = torch.autograd.grad(out.square().sum(), list(own.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_halves_of_any_dimension():
    weights = read(module("gpt_oss"))
    gate, up = weights.halves(weights.gate_up, 1)
    assert gate is not None
    assert torch.equal(gate, weights.gate_up[:, 0::2]) and torch.equal(up, weights.gate_up[:, 1::2])
    assert torch.equal(weights.halves(weights.gate_up.transpose(1, 2))[1], up.transpose(1, 2))


@pytest.mark.parametrize("family", NOT_FUSED)
def test_other_experts_are_refused(family: str):
    with pytest.raises(ValueError, match="isn't an experts module in the form"):
        for child in tiny.module(family).modules():
            if type(child).__name__.endswith(("Experts", "MoA", "MoE", "CDMoE", "ExpertsModel")):
                read(child)


def altered(**changes: Any) -> nn.Module:
    own: Any = next(m for m in tiny.module("olmoe").modules() if hasattr(m, "_apply_gate"))
    for name, value in changes.items():
        setattr(own, name, value)
    return own


def whole(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"down_proj": whole((8, 64, 48), torch.uint8)}, r"down_proj of OlmoeExperts is Tensor torch\.uint8"),
        ({"down_proj": whole((8, 64), torch.float32)}, r"3 dimensions was expected"),
        (
            {"down_proj": whole((8, 64, 40), torch.float32)},
            r"\(8, 96, 64\), where its down_proj asks for \(8, 80, 64\)",
        ),
        ({"has_bias": True}, "gate_up_proj_bias of OlmoeExperts is missing"),
        ({"act_fn": nn.Softsign()}, "none of the known forms"),
        ({"has_post_expert_norm": True, "post_expert_norm": nn.LayerNorm(64)}, "isn't an RMS norm of the scaled"),
    ],
)
def test_what_is_not_covered_is_refused(changes: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        read(altered(**changes))


def test_parametrised_matrices_are_refused():
    own = altered()
    torch.nn.utils.parametrize.register_parametrization(own, "down_proj", nn.Identity())
    with pytest.raises(ValueError, match="down_proj of .* is missing"):
        read(own)


def test_unknown_name():
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        activate(Activation("tanh", limit=inf), torch.ones(1), torch.ones(1))
