"""MoE layers like those of known models, and inputs for them: what the kernels are compared and counted on.

    shape = SHAPES["OLMoE"]
    given = inputs(shape, 4096)                                   # random logits, and what their router chose
    module = experts_module(shape, "cuda", torch.bfloat16)

Sizes are those of allenai/OLMoE-1B-7B-0924, Qwen/Qwen3-30B-A3B and deepseek-ai/DeepSeek-V3 (their config.json). Random
numbers are drawn on the CPU, so that on every device the same experts are hit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench_kernels.baselines import plain_route
from workbench_kernels.route import Gating

_SIGMOID = Gating("sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, weights="float32")


@dataclass(frozen=True)
class Shape:
    """A layer: E experts of I neurons, k of them a token, hidden states of H; corrected: with a correction bias."""

    n_experts: int
    top_k: int
    width: int
    n_neurons: int
    gating: Gating
    corrected: bool = False
    logits: torch.dtype = torch.bfloat16

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Of all the experts' matrices."""
        return 3 * self.n_experts * self.width * self.n_neurons * dtype.itemsize


SHAPES = {
    "OLMoE": Shape(64, 8, 2048, 1024, Gating()),
    "Qwen3-MoE": Shape(128, 8, 2048, 768, Gating(renormalise=True)),
    "DeepSeek-V3": Shape(256, 8, 7168, 2048, replace(_SIGMOID, groups=8, kept_groups=4), True, torch.float32),
}
TOKENS = (4096, 64, 1)
"""A prefill, and one step of decoding 64 texts and one text."""
SMALL_SHAPES = {
    "softmax": Shape(12, 3, 64, 32, Gating()),
    "groups": Shape(16, 4, 64, 32, replace(_SIGMOID, groups=4, kept_groups=2), True, torch.float32),
}
SMALL_TOKENS = (40, 1)
"""To see that everything runs."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """logits (T, E), correction (E) or None, hidden (T, H); ids (T, k) and gate (T, k): what the router chose."""

    logits: Tensor
    correction: Tensor | None
    hidden: Tensor
    ids: Tensor
    gate: Tensor


def inputs(
    shape: Shape, tokens: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Inputs:
    """Of standard normal numbers."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, shape.n_experts, generator=generator).to(shape.logits)
    correction = 0.01 * torch.randn(shape.n_experts, generator=generator) if shape.corrected else None
    ids, gate = plain_route(logits, shape.top_k, shape.gating, correction)
    hidden = torch.randn(tokens, shape.width, generator=generator).to(dtype)
    given = (None if x is None else x.to(device) for x in (logits, correction, hidden, ids, gate))
    return Inputs(*given)  # type: ignore[arg-type]


def experts_module(shape: Shape, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' own module of such experts, with random weights that keep the size of what goes through."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config: Any = OlmoeConfig(
        hidden_size=shape.width, intermediate_size=shape.n_neurons, num_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    with torch.device("meta"):
        module = OlmoeExperts(config).to(dtype)
    module.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for weight in module.parameters():
        for expert in weight:  # one at a time: a normal_ of all would hold as much again
            expert.normal_(0, 2 / weight.shape[2] ** 0.5, generator=generator)
    return module
