"""What the kernels are compared with: routing in a few plain operations of torch, and transformers' `grouped_mm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench_kernels.route import Gating


def plain_route(logits: Tensor, k: int, gating: Gating, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """ids and weights (T, k) as OLMoE, Qwen3-MoE and DeepSeek-V3 get them of logits (T, E): scores, then top-k."""
    scores, ranks = ranked(logits, gating, correction)
    ids = ranks.topk(k, dim=-1).indices
    return ids, weighted(scores, ids, gating, logits.dtype)


def plain_statistics(logits: Tensor, k: int, gating: Gating, correction: Tensor | None) -> tuple[Tensor, ...]:
    """ids, weights, entropy, log-partition and margin: `plain_route`, and what a record needs besides. k < E."""
    scores, ranks = ranked(logits, gating, correction)
    best = ranks.topk(k + 1, dim=-1)
    ids = best.indices[:, :k]
    log_scores = logits.float()
    if gating.scoring == "sigmoid":
        log_scores = torch.nn.functional.logsigmoid(log_scores)
    log_partition = log_scores.logsumexp(-1)
    log_p = log_scores - log_partition[:, None]
    entropy = -(log_p.exp() * log_p).sum(-1)
    margin = best.values[:, k - 1] - best.values[:, k]
    return ids, weighted(scores, ids, gating, logits.dtype), entropy, log_partition, margin


def ranked(logits: Tensor, gating: Gating, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores (T, E), and by what they are ranked."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(wide).sigmoid() if gating.scoring == "sigmoid" else logits.softmax(-1, dtype=wide)
    ranks = scores if correction is None else scores + correction
    if gating.groups > 1:
        by_group = ranks.unflatten(-1, (gating.groups, -1))
        best = by_group.topk(gating.group_best, dim=-1).values.sum(-1).topk(gating.kept_groups, dim=-1).indices
        kept = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter_(1, best, True)
        ranks = by_group.masked_fill(~kept[..., None], gating.outside).flatten(1)
    return scores, ranks


def weighted(scores: Tensor, ids: Tensor, gating: Gating, logits: torch.dtype) -> Tensor:
    """Weights (T, k) of what was chosen."""
    weights = scores.gather(1, ids)
    if gating.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + gating.epsilon)
    weights = weights * gating.scale if gating.scale != 1 else weights
    return weights.to(logits) if gating.weights == "logits" else weights


def grouped_mm(module: nn.Module, hidden: Tensor, ids: Tensor, gate: Tensor) -> Tensor:
    """The experts as transformers runs them by default on a GPU."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward(module, hidden, ids, gate)
