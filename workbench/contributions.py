"""What each selected expert adds to its token: gate weight × the expert's own output, as it enters the sum.

Experts are fused into one module that returns the sum alone. Single terms are got by running the family's own code
again with one expert a row. The terms of a token add up to what the module returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.layers import Layer


def contributions(
    forward: Callable[..., Any], hidden: Tensor, ids: Tensor, weights: Tensor, filler: int | None = None
) -> Tensor:
    """The terms (T, k, H) of tokens whose experts are given: no gradients, in the dtype of the experts.

    forward  of the experts, not the module itself, so that hooks don't see this second run
    hidden   (T, H), what the experts are given; ids int (T, k), weights (T, k)
    filler   of `filler`
    """
    rows = hidden.reshape(-1, hidden.shape[-1]).repeat_interleave(ids.shape[-1], dim=0)
    chosen, factors = ids.reshape(-1, 1), weights.reshape(-1, 1)
    if filler is not None:
        chosen = torch.cat([chosen, torch.full_like(chosen, filler)], -1)
        factors = torch.cat([factors, torch.zeros_like(factors)], -1)
    with torch.no_grad():
        out = forward(rows, chosen, factors)
    return out.reshape(-1, ids.shape[-1], out.shape[-1])


def filler(layer: Layer) -> int | None:
    """A second expert, of weight 0, for families whose experts can't be called with one a token; None for others."""
    return layer.n_experts - 1 if layer.family.two_ranks else None
