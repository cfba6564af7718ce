"""Gatings of the families, and inputs for them: what the tests of `route` share."""

from __future__ import annotations

import torch

from workbench_kernels.route import Gating

GATINGS = {
    "olmoe": Gating(),
    "mixtral": Gating(renormalise=True, weights="float32"),
    "gpt_oss": Gating(select="logits"),
    "cohere2_moe": Gating("sigmoid", select="logits", renormalise=True),
    "ernie4_5_moe": Gating(renormalise=True, at_least=1e-12),
    "minimax_m2": Gating("sigmoid", renormalise=True, weights="float32"),
    "deepseek_v4": Gating("sqrt-softplus", renormalise=True, epsilon=1e-20, scale=1.5, weights="float32"),
    "deepseek_v3": Gating(
        "sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, groups=4, kept_groups=2, weights="float32"
    ),
    "deepseek_v2": Gating(groups=4, kept_groups=3, group_best=1, outside=0.0, scale=16.0, weights="float32"),
    "mistral4": Gating(renormalise=True, epsilon=1e-20, groups=4, kept_groups=2, outside=0.0, rounded=True),
}
BIASED = {"ernie4_5_moe", "minimax_m2", "deepseek_v4", "deepseek_v3"}


def logits(tokens: int, n_experts: int, seed: int = 0, size: float = 2.0) -> torch.Tensor:
    return size * torch.randn(tokens, n_experts, generator=torch.Generator().manual_seed(seed))


def correction(name: str, n_experts: int) -> torch.Tensor | None:
    return 0.1 * logits(1, n_experts, seed=7)[0] if name in BIASED else None


def some(n: int, *chosen: int) -> torch.Tensor:
    """bool (n): true at the chosen places."""
    flags = torch.zeros(n, dtype=torch.bool)
    flags[list(chosen)] = True
    return flags
