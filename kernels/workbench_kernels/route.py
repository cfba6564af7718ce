r"""From a router's logits to its choice and what is said about it, in one pass over the logits.

A token has logits z (E). With σ the scoring function and b an optional correction bias,

    s = softmax(z), sigmoid(z) or sqrt(softplus(z))            scores
    r = (s or z) + b                                            what is ranked: `Gating.select`
    r_e = outside where e is in none of the best groups         group-limited routing, DeepSeek-V3, section 2.1.2
    ids = the k largest of r
    g = s_ids, or σ(z_ids) where logits are ranked              the weights never see b
    g = g / (max(sum g, at_least) + epsilon)                    where renormalised
    g = scale · g

and of the distribution p = s / sum(s) over all experts, without b,

    log_partition = ln sum exp(l), l the logarithm of s before it is normalised (l = z for softmax)
    entropy       = -sum p ln p, in nats
    margin        = k-th minus (k + 1)-th largest r, as they were ranked; NaN where that isn't finite or k = E

Sources: Shazeer et al. 2017 (arXiv 1701.06538); DeepSeek-V3 (arXiv 2412.19437) for sigmoid scores with a bias and
groups; gpt-oss (arXiv 2508.10925) for the softmax over the selected logits.

**Ties.** The kernel takes the lowest id first. torch.topk on CPU promises nothing and keeps nothing (2.13: of 8 equal
logits, top-3 is 6, 5, 4; of 512 it is 0, 1, 2; between, it depends on k), and the reference, being torch.topk with the
family's own arguments, breaks ties as the model itself does on that device. Only ids of exactly equal ranks differ.

**Edits** act on the tokens in `rows` only. `add` moves the logits; where it is -inf the expert is out of scores and
selection. `masked` experts can't be selected, but the scores of the others are as if they could. `forced` ones come
first. Where groups are left with fewer than k experts, the best of the other groups fill up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from workbench_kernels.jit import triton
from workbench_kernels.route_kernel import TILES, WIDEST, Tile, padded, route_kernel

FULL_SCALE = 65535
"""Compact weights count in 1/FULL_SCALE of a token's scale."""


@dataclass(frozen=True)
class Gating:
    """How a family's router makes weights of logits; the symbols are those of the module.

    scoring      σ
    select       what is ranked: "scores" or "logits"
    renormalise  divide the weights by their sum; a softmax over selected logits sums to 1 anyway
    epsilon      added to that sum; at_least: the sum counts as no less than this
    scale        factor of the weights
    groups       equal runs of experts, of which only the kept_groups best can be selected
    group_best   a group's score is the sum of its best so many ranks: 1 or 2
    outside      the rank of experts of other groups: -inf, or 0.0 as some families have it
    rounded      scores are in the logits' dtype; else in float32
    weights      dtype of the weights: "float32" or "logits" for that of the logits
    ordered      ids are in order of rank; False: as torch.topk(sorted=False) leaves them (the kernel always orders)
    """

    scoring: Literal["softmax", "sigmoid", "sqrt-softplus"] = "softmax"
    select: Literal["scores", "logits"] = "scores"
    renormalise: bool = False
    epsilon: float = 0.0
    at_least: float = 0.0
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    group_best: Literal[1, 2] = 2
    outside: float = -torch.inf
    rounded: bool = False
    weights: Literal["float32", "logits"] = "logits"
    ordered: bool = True


@dataclass(frozen=True, eq=False)
class Record:
    """Buffers of a trace that `route` writes into, of T tokens.

    experts  uint8 (T, k), or uint16 from 257 experts on
    weights  uint16 (T, k) in 1/65535 of scale
    scale    float32 (T): 1, or the smallest power of two that no weight of the token exceeds
    entropy, margin  float32 (T)
    """

    experts: Tensor
    weights: Tensor
    scale: Tensor
    entropy: Tensor
    margin: Tensor

    @staticmethod
    def empty(tokens: int, k: int, n_experts: int, device: Any = None) -> Record:
        """Buffers of the shapes and dtypes above, for T = `tokens`, `k` choices of `n_experts` on a `device`."""
        ids = torch.empty(tokens, k, dtype=_id_dtype(n_experts), device=device)
        weights = torch.empty(tokens, k, dtype=torch.uint16, device=device)
        return Record(ids, weights, *torch.empty(3, tokens, device=device).unbind())


@dataclass(frozen=True, eq=False)
class Routed:
    """What a router did with T tokens.

    experts  int64 (T, k), best rank first
    weights  (T, k) in the dtype that the gating says
    entropy, log_partition, margin  float32 (T)
    """

    experts: Tensor
    weights: Tensor
    entropy: Tensor
    log_partition: Tensor
    margin: Tensor


@dataclass(frozen=True, eq=False)
class _Given:
    """The arguments of `route`."""

    logits: Tensor
    k: int
    gating: Gating
    correction: Tensor | None
    add: Tensor | None
    forced: Tensor | None
    masked: Tensor | None
    rows: Tensor | None
    record: Record | None
    statistics: bool


def route(
    logits: Tensor,
    k: int,
    gating: Gating,
    *,
    correction: Tensor | None = None,
    add: Tensor | None = None,
    forced: Tensor | None = None,
    masked: Tensor | None = None,
    rows: Tensor | None = None,
    record: Record | None = None,
    statistics: bool = True,
    backend: Literal["auto", "torch", "triton"] = "auto",
    tile: Tile = TILES[0],
) -> Routed:
    """Select k of E experts for each of T tokens.

    logits      (T, E) float32, float16 or bfloat16; with torch float64 too, and then everything is float64
    gating      how weights are made of logits
    correction  (E) float: moves ranks, not weights
    add         (E) float32, forced, masked  (E) bool, rows  (T) bool: the edits, see the module. An expert that is
                forced and masked is forced; of more than k forced ones the lowest ids come first
    record      is filled besides
    statistics  False: entropy, log_partition and margin aren't needed; torch, where they cost much, leaves them NaN
    backend     "auto" is triton for tensors on a GPU, where there is Triton and no gradients are wanted, else torch
    tile        of the kernel

    Logits that are NaN give a token meaningless ids, though valid ones. ValueError or TypeError for what doesn't fit.
    """
    given = _Given(logits, k, gating, correction, add, forced, masked, rows, record, statistics)
    _check(given)
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'torch' or 'triton'.")
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (logits, correction, add))
    if backend == "auto":
        backend = "triton" if triton is not None and logits.is_cuda and not learning and _fits(logits) else "torch"
    if backend == "torch":
        return _with_torch(given)
    if learning:
        raise ValueError("the kernel has no gradients: pass backend='torch', or use torch.no_grad().")
    if not _fits(logits):
        raise ValueError(
            f"the kernel takes float32, float16 or bfloat16 logits of at most {WIDEST} experts, not {logits.dtype} "
            f"of {logits.shape[1]}: pass backend='torch'."
        )
    return _with_triton(given, tile)


def _fits(logits: Tensor) -> bool:
    return logits.dtype != torch.float64 and logits.shape[1] <= WIDEST


def _id_dtype(n_experts: int) -> torch.dtype:
    return torch.uint8 if n_experts <= 256 else torch.uint16


# -- bad input ---------------------------------------------------------------------------------------------------------


def _check(given: _Given) -> None:
    logits, k, gating, record = given.logits, given.k, given.gating, given.record
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected (tokens, experts).")
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; expected float32, float16 or bfloat16.")
    n_tokens, n_experts = logits.shape
    groups, kept = gating.groups, gating.kept_groups
    if not 1 <= kept <= groups or n_experts % groups or (groups > 1 and n_experts // groups < gating.group_best):
        raise ValueError(
            f"{kept} of {groups} groups with {n_experts} experts, by the best {gating.group_best} of each; expected "
            "equal groups that large, and between 1 and all of them kept."
        )
    if not 1 <= k <= n_experts // groups * kept:
        raise ValueError(f"k is {k}; expected 1 to {n_experts // groups * kept}, the experts that can be selected.")
    for name in ("correction", "add", "forced", "masked", "rows"):
        x = getattr(given, name)
        if x is None:
            continue
        expected, flags = n_tokens if name == "rows" else n_experts, name not in ("correction", "add")
        if x.shape != (expected,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({expected},).")
        if (x.dtype != torch.bool) if flags else not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}; expected {'bool' if flags else 'floating point'}.")
        if x.device != logits.device:
            raise ValueError(f"{name} is on {x.device}; expected {logits.device}, where the logits are.")
    if record is None:
        return
    shapes = {"experts": (n_tokens, k), "weights": (n_tokens, k)}
    dtypes = {"experts": _id_dtype(n_experts), "weights": torch.uint16}
    for name, buffer in vars(record).items():
        shape, dtype = shapes.get(name, (n_tokens,)), dtypes.get(name, torch.float32)
        if buffer.shape != shape or buffer.dtype != dtype or not buffer.is_contiguous():
            raise ValueError(
                f"record.{name} is {buffer.dtype} {tuple(buffer.shape)}; expected contiguous {dtype} {shape}."
            )
        if buffer.device != logits.device:
            raise ValueError(f"record.{name} is on {buffer.device}; expected {logits.device}, where the logits are.")


# -- torch -------------------------------------------------------------------------------------------------------------


def _with_torch(given: _Given) -> Routed:
    """The reference: the families' own operations in their order."""
    logits, k, gating, add, forced, masked = (
        given.logits, given.k, given.gating, given.add, given.forced, given.masked
    )  # fmt: skip
    whole = torch.promote_types(logits.dtype, torch.float32)  # the dtype to compute in
    inside = torch.ones(1, dtype=torch.bool, device=logits.device) if given.rows is None else given.rows[:, None]
    if add is not None:
        logits = torch.where(inside, (logits.to(whole) + add).to(logits.dtype), logits)
        gone = add == -torch.inf
        masked = gone if masked is None else masked | gone
    z = logits.to(whole)
    scores = _scored(z, gating.scoring)
    scores = scores.to(logits.dtype) if gating.rounded else scores
    base = logits if gating.select == "logits" else scores
    ranks = base if given.correction is None else base + given.correction
    if forced is not None or masked is not None:
        forced = torch.zeros_like(masked) if forced is None else forced  # type: ignore[arg-type]
        masked = torch.zeros_like(forced) if masked is None else masked & ~forced
        forced, masked = forced & inside, masked & inside
    if gating.groups > 1:
        ranks = _limited(ranks, k, gating, forced, masked)
    if forced is not None and masked is not None:
        ranks = ranks.clamp_min(torch.finfo(ranks.dtype).min / 8)  # other groups come before what is masked
        ranks = ranks.masked_fill(forced, torch.inf).masked_fill(masked, -torch.inf)
    ids = ranks.topk(k, dim=-1, sorted=gating.ordered).indices
    weights = base.gather(-1, ids).to(whole)
    if gating.select == "logits":
        weights = _scored(weights, gating.scoring)
    if gating.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True).clamp_min(gating.at_least) + gating.epsilon)
    weights = (weights * gating.scale).to(logits.dtype if gating.weights == "logits" else whole)
    numbers = z.new_full((3, len(z)), torch.nan)
    if given.statistics:
        numbers = _statistics(z, ranks.to(whole), k, gating)
    routed = Routed(ids, weights, *numbers)
    if given.record is not None:
        _fill(given.record, routed)
    return routed


def _statistics(z: Tensor, ranks: Tensor, k: int, gating: Gating) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, log-partition and margin."""
    log_scores = _log_scores(z, gating.scoring)
    log_partition = log_scores.logsumexp(-1)
    log_p = log_scores.log_softmax(-1)
    p = log_p.exp()
    entropy = 0.0 - torch.where(p == 0, 0.0, p * log_p).sum(-1)
    return entropy, log_partition, _margin(ranks, k)


def _scored(z: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return z.softmax(-1)
    return z.sigmoid() if scoring == "sigmoid" else torch.nn.functional.softplus(z).sqrt()


def _log_scores(z: Tensor, scoring: str) -> Tensor:
    """Logarithms of the scores before they are normalised, finite also where a score underflows."""
    if scoring == "softmax":
        return z
    if scoring == "sigmoid":
        return torch.nn.functional.logsigmoid(z)
    return 0.5 * torch.where(z < -20, z, torch.nn.functional.softplus(z).log())


def _limited(ranks: Tensor, k: int, gating: Gating, forced: Tensor | None, masked: Tensor | None) -> Tensor:
    """Ranks (T, E) with those outside of the best groups at `gating.outside`."""
    size = ranks.shape[1] // gating.groups
    seen = ranks
    if forced is not None and masked is not None:  # finite, since ranks of a group are summed
        large = torch.finfo(ranks.dtype).max / 16
        seen = ranks.masked_fill(forced, large).masked_fill(masked, -large)
    by_group = seen.unflatten(-1, (gating.groups, size))
    best = by_group.topk(gating.group_best, dim=-1).values.sum(-1).topk(gating.kept_groups, dim=-1, sorted=False)
    kept = torch.zeros(len(ranks), gating.groups, dtype=torch.bool, device=ranks.device).scatter(1, best.indices, True)
    inside = kept.repeat_interleave(size, 1)
    limited = ranks.masked_fill(~inside, gating.outside)
    if forced is None or masked is None:
        return limited
    free = ~inside & ~forced & ~masked
    short = (forced | (inside & ~masked)).sum(-1, keepdim=True) < k
    span = ranks.amax(-1, keepdim=True) - ranks.amin(-1, keepdim=True) + 1
    return torch.where(free & short, ranks - 2 * span, limited)


def _margin(ranks: Tensor, k: int) -> Tensor:
    if k == ranks.shape[1]:
        return torch.full_like(ranks[:, 0], torch.nan)
    best = ranks.topk(k + 1, dim=-1).values
    gap = best[:, k - 1] - best[:, k]
    return gap.masked_fill(~(gap < torch.finfo(ranks.dtype).max / 64), torch.nan)


def _fill(record: Record, routed: Routed) -> None:
    weights = routed.weights.detach().float()
    fraction, exponent = weights.amax(-1).frexp()  # max = fraction · 2^exponent, 1/2 <= fraction < 1
    scale = torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int()).clamp_min(1)
    record.experts.copy_(routed.experts)
    record.weights.copy_((weights / scale[:, None] * FULL_SCALE).round())
    record.scale.copy_(scale)
    record.entropy.copy_(routed.entropy.detach())
    record.margin.copy_(routed.margin.detach())


# -- triton ------------------------------------------------------------------------------------------------------------


def _with_triton(given: _Given, tile: Tile) -> Routed:
    logits, k, gating, record = given.logits, given.k, given.gating, given.record
    (n_tokens, n_experts), device = logits.shape, logits.device
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    dtype = logits.dtype if gating.weights == "logits" else torch.float32
    numbers = torch.empty(3, n_tokens, device=device)
    routed = Routed(
        experts=torch.empty(n_tokens, k, dtype=torch.int64, device=device),
        weights=torch.empty(n_tokens, k, dtype=dtype, device=device),
        entropy=numbers[0] if record is None else record.entropy,
        log_partition=numbers[1],
        margin=numbers[2] if record is None else record.margin,
    )
    if not n_tokens:
        return routed
    tokens, warps = tile.tokens(n_experts), tile.warps(n_experts)
    vectors = (given.correction, given.add, given.forced, given.masked, given.rows)
    vectors = (None if x is None else x.contiguous() for x in vectors)
    compact = (None, None, None) if record is None else (record.experts, record.weights, record.scale)
    kernel: Any = route_kernel
    kernel[(triton.cdiv(n_tokens, tokens),)](
        logits, *vectors, *vars(routed).values(), *compact, n_tokens, logits.stride(0), gating.scale, gating.epsilon,
        gating.at_least, **constants(n_experts, k, gating, logits.dtype, given.correction), TOKENS=tokens,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return routed


def constants(n_experts: int, k: int, gating: Gating, dtype: torch.dtype, correction: Tensor | None) -> dict[str, Any]:
    """What the kernel is compiled for: its constants by name, but for the tile."""
    rounded = gating.rounded and dtype != torch.float32
    return {
        "E": n_experts,
        "K": k,
        "WIDTH": padded(n_experts),
        "PLACES": padded(k),
        "GROUPS": gating.groups,
        "GROUP_PLACES": padded(gating.groups),
        "KEPT": gating.kept_groups,
        "GROUP_BEST": gating.group_best,
        "OUTSIDE": gating.outside,
        "SCORING": gating.scoring,
        "BY_LOGITS": gating.select == "logits",
        "RENORMALISE": gating.renormalise,
        "ROUNDED": rounded,
        "ROUNDED_RANKS": rounded and (correction is None or correction.dtype == dtype),
    }
