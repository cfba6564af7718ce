"""From a router's logits to what is said about its choice: probabilities, entropy, margin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOG_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z,
    "sigmoid": nn.functional.logsigmoid,
    # ln sqrt(softplus(z)); for very negative z softplus(z) is exp(z), whose logarithm is z
    "sqrt-softplus": lambda z: 0.5 * torch.where(z < -20, z, nn.functional.softplus(z).log()),
}
"""Logarithms of the scores, so that p = softmax of them even where every score underflows."""


def log_probabilities(logits: Tensor, scoring: str) -> Tensor:
    """ln p over the last dimension, p being the scores normalised to sum 1; NaN where the token id selects ("hash").

    logits: float32, any shape. scoring: a key of LOG_SCORES, or "hash".
    """
    if scoring == "hash":
        return torch.full_like(logits, torch.nan)
    return LOG_SCORES[scoring](logits).log_softmax(-1)


def entropy(log_p: Tensor) -> Tensor:
    """-sum(p ln p) in nats over the last dimension, with 0 ln 0 = 0.

    >>> entropy(torch.tensor([[0.0, -torch.inf], [0.5, 0.5]]).log_softmax(-1))
    tensor([0.0000, 0.6931])
    """
    p = log_p.exp()
    return 0.0 - torch.where(p == 0, 0.0, p * log_p).sum(-1)


class Selection(TorchFunctionMode):
    """Keeps the scores that the last selecting call saw, its k, and the last softmax's result."""

    def __init__(self, selects: str) -> None:
        super().__init__()
        self._selects = selects
        self.scores: Tensor | None = None
        self.weights: Tensor | None = None
        self.k = 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == self._selects:
            self.scores = args[0] if args else kwargs["input"]
            if name == "topk":
                self.k = kwargs["k"] if "k" in kwargs else args[1]
        elif name == "softmax":
            self.weights = out
        return out


def margin(scores: Tensor, k: int) -> Tensor:
    """k-th minus (k+1)-th largest of the last dimension, float32, flattened; NaN where either isn't finite.

    A difference as large as floats go comes from scores that were masked: NaN, too.
    """
    if k >= scores.shape[-1]:
        return torch.full(scores.shape[:-1], torch.nan, device=scores.device).flatten()
    best = scores.float().topk(k + 1, dim=-1).values
    gap = best[..., k - 1] - best[..., k]
    masked = ~gap.isfinite() | (gap > torch.finfo(scores.dtype).max / 64)
    return gap.masked_fill(masked, torch.nan).flatten()
