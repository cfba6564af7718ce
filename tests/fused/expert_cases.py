"""Random experts in every layout, and what they give by the formula, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench_kernels.expert_weights import Activation, ExpertWeights, PostNorm, activate, normalise

SHIFTED = Activation(alpha=1.702, limit=1.5, shift=1.0)
LAYOUTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "biased": {"biased": True},
    "transposed": {"transposed": True},
    "gpt_oss": {"transposed": True, "interleaved": True, "biased": True, "activation": SHIFTED},
    "interleaved": {"interleaved": True, "activation": Activation("gelu_tanh")},
    "not gated": {"gated": False, "activation": Activation("relu2")},
    "not gated, transposed, biased": {"gated": False, "transposed": True, "biased": True},
    "limited": {"activation": Activation(limit=0.5)},
    "limited after": {"activation": Activation("gelu", limit=0.5, limit_after=True)},
    "softcapped": {"activation": Activation(softcaps=(0.7, 2.0))},
    "normed": {"normed": True},
    "normed, biased": {"normed": True, "biased": True, "activation": Activation("relu")},
}


def weights(
    n_experts: int, width: int, n_neurons: int, dtype: torch.dtype = torch.float64, seed: int = 0,
    *, biased: bool = False, normed: bool = False, transposed: bool = False, gated: bool = True, **form: Any,
) -> ExpertWeights:  # fmt: skip
    """Experts whose outputs are about 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outputs = n_neurons * (2 if gated else 1)
    gate_up = normal(n_experts, outputs, width) * 2 / width**0.5
    down = normal(n_experts, width, n_neurons) * 2 / n_neurons**0.5
    if transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    return ExpertWeights(
        gate_up.to(dtype),
        down.to(dtype),
        normal(n_experts, outputs).to(dtype) if biased else None,
        normal(n_experts, width).to(dtype) if biased else None,
        gated=gated,
        transposed=transposed,
        post_norm=PostNorm(0.3 * normal(width).to(dtype), 1e-3) if normed else None,
        **form,
    )


def choices(
    n_tokens: int, k: int, n_experts: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (T, H), ids (T, k) without repeats in a row, gate (T, k)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, width, generator=generator, dtype=torch.float64)
    ids = torch.rand(n_tokens, n_experts, generator=generator).topk(k).indices
    return hidden.to(dtype), ids, torch.rand(n_tokens, k, generator=generator).to(dtype)


def double(given: ExpertWeights) -> ExpertWeights:
    """The same numbers in float64."""
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    tensors = {name: getattr(given, name) for name in names}
    norm = given.post_norm and PostNorm(given.post_norm.weight.double(), given.post_norm.eps)
    return replace(given, **{name: t if t is None else t.double() for name, t in tensors.items()}, post_norm=norm)


def oracle(given: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (T, H) and norms (T, k) from every expert on every token, in float64. Ids are those of experts."""
    exact = double(given)
    projected = torch.einsum("eoh,th->teo", exact.gate_up, hidden.double())
    projected = projected if exact.gate_up_proj_bias is None else projected + exact.gate_up_proj_bias
    inner = activate(exact.activation, *exact.halves(projected))
    outputs = torch.einsum("ehi,tei->teh", exact.down, inner)
    outputs = outputs if exact.down_proj_bias is None else outputs + exact.down_proj_bias
    outputs = outputs if exact.post_norm is None else normalise(exact.post_norm, outputs)
    mine = outputs.gather(1, ids.unsqueeze(-1).expand(-1, -1, given.width))
    return (mine * gate.double().unsqueeze(-1)).sum(1), mine.norm(dim=-1)
