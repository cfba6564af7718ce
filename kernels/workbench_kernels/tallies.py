"""Which experts tokens choose, counted where the model runs: load, co-activation and transitions from ids.

With S(t) the experts that token t chose in a layer, S'(t) those in another (or the same) layer, and g(t) its group:

    load           n[g, i]    = |{t : g(t) = g, i ∈ S(t)}|
    co-activation  n[g, i, j] = |{t : g(t) = g, i ∈ S(t), j ∈ S(t)}|
    transitions    n[g, i, j] = |{t : g(t) = g, i ∈ S(t), j ∈ S'(t)}|, S' of the next layer

(Muennighoff et al. 2024, OLMoE, §5.2 for pairs in a layer; Yao et al. 2024, ExFlow, for pairs across layers.) All three
are one count: each side gets one more "expert", number E, that stands for *any* expert. So row E and column E' are the
sums that lifts and probabilities need: n[g, i, E'] tokens that chose i, n[g, E, j] tokens that chose j, n[g, E, E'] all
tokens. Pairs count a token only if it has an expert on both sides: one that was dropped by one of the routers doesn't
count in the sums either. Load is the case of an empty other side.

Counts are exact 64-bit integers; adding integers in any order gives the same sum, so atomic additions are
deterministic here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from workbench_kernels.jit import jit, tl, triton


@dataclass(frozen=True)
class Config:
    """tokens of a program, ids of the other side that it holds at a time, warps."""

    tokens: int
    chunk: int
    warps: int


CONFIGS = (Config(32, 16, 4), Config(64, 16, 4), Config(128, 16, 8), Config(256, 8, 8))
"""What is worth trying on a device; the first is the default. Not measured on a GPU yet."""

INTEGERS = (torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64)


def tally(
    ids: Tensor,
    n_experts: int,
    *,
    other: Tensor | None = None,
    n_other: int = 0,
    group: Tensor | None = None,
    n_groups: int = 1,
    out: Tensor | None = None,
    backend: Literal["auto", "torch", "triton"] = "auto",
    config: Config = CONFIGS[0],
) -> Tensor:
    """Add the tokens' choices to `out`, and return it.

    ids    integers (T, k): the experts of each token, different from each other; what isn't in 0 … E − 1 (such as −1)
           is no expert
    other  integers (T, k'): those in the other layer, in 0 … n_other − 1, or `ids` itself for co-activation
    group  integers (T,): where each token counts; a token whose group isn't in 0 … n_groups − 1 (such as padding, −1)
           counts nowhere. None is 0 for every token
    out    int64, contiguous: (n_groups, E + 1) or, with `other`, (n_groups, E + 1, n_other + 1), whose last row and
           column count any expert, as above; None begins with zeros
    backend  "auto": Triton for tensors on a GPU, torch for all others
    n_experts, n_other, n_groups   E and the sizes of `out`; config: of the kernel

    ValueError or TypeError where shapes, dtypes or devices don't fit each other.
    """
    out = _checked(ids, n_experts, other, n_other, group, n_groups, out)
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'torch' or 'triton'.")
    if backend == "triton" or (backend == "auto" and ids.is_cuda):
        _launch(ids, n_experts, other, n_other, group, n_groups, out, config)
    else:
        reference(ids, n_experts, other, n_other, group, n_groups, out)
    return out


def reference(
    ids: Tensor, n_experts: int, other: Tensor | None, n_other: int, group: Tensor | None, n_groups: int, out: Tensor
) -> None:
    """`tally` in torch, with one index per pair; arguments as there."""
    left = _with_any(ids, n_experts)
    right = left.new_zeros(len(left), 1) if other is None else left if other is ids else _with_any(other, n_other)
    width = 1 if other is None else n_other + 1
    place = torch.zeros_like(left[:, 0]) if group is None else group.long()
    there = (left[:, -1] >= 0) & (right[:, -1] >= 0) & (place >= 0) & (place < n_groups)
    rows = torch.where(there[:, None] & (left >= 0), place[:, None] * (n_experts + 1) + left, -1)
    index = (rows * width)[:, :, None] + right[:, None, :]
    index = index[(rows >= 0)[:, :, None] & (right >= 0)[:, None, :]]
    if len(index) < out.numel():
        out.view(-1).scatter_add_(0, index, torch.ones_like(index))
    else:
        out.view(-1).add_(torch.bincount(index, minlength=out.numel()))


def _with_any(ids: Tensor, n_experts: int) -> Tensor:
    """int64 (T, k + 1): −1 where there is no expert, E in the last column where there is any."""
    ids = ids.long()
    ids = torch.where((ids >= 0) & (ids < n_experts), ids, -1)
    some = (ids >= 0).any(dim=1, keepdim=True)
    return torch.cat([ids, torch.where(some, n_experts, -1)], dim=1)


@jit
def place(group, left, right, n_left, n_right):
    """Index of a count in `out`, in 64 bits: groups × experts × experts pass 2^31."""
    return (group.to(tl.int64) * (n_left + 1) + left) * (n_right + 1) + right


@jit
def _some(ids, row, there, stride, k, n_experts, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    """Whether each token of the program has any expert: int1 (TOKENS,)."""
    found = tl.zeros((TOKENS,), tl.int32)
    for start in range(0, k, CHUNK):
        rank = start + tl.arange(0, CHUNK)
        at = row[:, None] * stride + rank[None, :]
        chosen = tl.load(ids + at, mask=there[:, None] & (rank < k)[None, :], other=-1).to(tl.int64)
        found = tl.maximum(found, tl.max(((chosen >= 0) & (chosen < n_experts)).to(tl.int32), axis=1))
    return there & (found > 0)


@jit
def tally_kernel(
    ids, other, group, out, n_tokens, stride, other_stride, k, other_k, n_experts, n_other, n_groups,
    PAIRED: tl.constexpr, GROUPED: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program counts every pair of TOKENS tokens; rank k of a side is the expert "any"."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = row < n_tokens
    of = tl.zeros((TOKENS,), tl.int64)
    if GROUPED:
        of = tl.load(group + row, mask=there, other=-1).to(tl.int64)
        there = there & (of >= 0) & (of < n_groups)
    there = _some(ids, row, there, stride, k, n_experts, TOKENS, CHUNK)
    if PAIRED:
        there = _some(other, row, there, other_stride, other_k, n_other, TOKENS, CHUNK)
    for rank in range(k + 1):
        left = tl.load(ids + row * stride + rank, mask=there & (rank < k), other=-1).to(tl.int64)
        left = tl.where(rank < k, left, n_experts)
        counts = there & (left >= 0) & ((left < n_experts) | (rank == k))
        if PAIRED:
            for start in range(0, other_k + 1, CHUNK):
                beside = start + tl.arange(0, CHUNK)[None, :]
                at = row[:, None] * other_stride + beside
                right = tl.load(other + at, mask=counts[:, None] & (beside < other_k), other=-1).to(tl.int64)
                right = tl.where(beside < other_k, right, n_other)
                both = counts[:, None] & (right >= 0)
                both = both & (((right < n_other) & (beside < other_k)) | (beside == other_k))
                into = out + place(of[:, None], left[:, None], right, n_experts, n_other)
                tl.atomic_add(into, tl.full((TOKENS, CHUNK), 1, tl.int64), mask=both, sem="relaxed")
        else:
            into = out + place(of, left, 0, n_experts, 0)
            tl.atomic_add(into, tl.full((TOKENS,), 1, tl.int64), mask=counts, sem="relaxed")


def _launch(
    ids: Tensor, n_experts: int, other: Tensor | None, n_other: int, group: Tensor | None, n_groups: int, out: Tensor,
    config: Config,
) -> None:  # fmt: skip
    if triton is None:
        raise ValueError("there is no Triton here: count with backend='torch'.")
    if not len(ids):
        return
    ids = _rows(ids)
    other = None if other is None else _rows(other)
    kernel: Any = tally_kernel
    kernel[(triton.cdiv(len(ids), config.tokens),)](
        ids, ids if other is None else other, ids if group is None else group.contiguous(), out,
        len(ids), ids.stride(0), 0 if other is None else other.stride(0), ids.shape[1],
        0 if other is None else other.shape[1], n_experts, n_other, n_groups,
        PAIRED=other is not None, GROUPED=group is not None, TOKENS=config.tokens, CHUNK=config.chunk,
        num_warps=config.warps,
    )  # fmt: skip


def _rows(ids: Tensor) -> Tensor:
    """The same ids, those of a token beside each other, of at least 32 bits.

    Of narrower ones a thread would load 8 or 16 at once, and have as many 64-bit addresses to hold: it would spill.
    """
    if ids.dtype.itemsize < 4:
        ids = ids.to(torch.int32)
    return ids if ids.shape[1] < 2 or ids.stride(1) == 1 else ids.contiguous()


def _checked(
    ids: Tensor, n_experts: int, other: Tensor | None, n_other: int, group: Tensor | None, n_groups: int,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    """`out`, made if there is none, after checking that everything fits."""
    for name, tensor, rank in (("ids", ids, 2), ("other", other, 2), ("group", group, 1)):
        if tensor is None:
            continue
        if tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} is {tensor.dtype}; expected integers: {', '.join(map(str, INTEGERS))}.")
        if tensor.ndim != rank or len(tensor) != len(ids):
            shape = f"({len(ids)},)" if rank == 1 else f"({len(ids) if ids.ndim else 'T'}, k)"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}, a row a token.")
        if tensor.device != ids.device:
            raise ValueError(f"{name} is on {tensor.device}, ids on {ids.device}: move them to one device.")
    if n_experts < 1 or n_groups < 1 or (other is not None and n_other < 1):
        raise ValueError(f"n_experts {n_experts}, n_other {n_other}, n_groups {n_groups}: expected at least 1 of each.")
    shape = (n_groups, n_experts + 1) if other is None else (n_groups, n_experts + 1, n_other + 1)
    if out is None:
        return torch.zeros(shape, dtype=torch.int64, device=ids.device)
    if out.dtype != torch.int64:
        raise TypeError(f"out is {out.dtype}; expected torch.int64: counts are exact.")
    if tuple(out.shape) != shape or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {shape}, contiguous.")
    if out.device != ids.device:
        raise ValueError(f"out is on {out.device}, ids on {ids.device}: move them to one device.")
    return out
