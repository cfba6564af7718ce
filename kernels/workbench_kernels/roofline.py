"""What the kernels have to move and to compute, counted; and how near a measured time comes to what a device allows.

    work = gate_up(4096, 8, hit=64, width=2048, n_neurons=1024) + down(4096, 8, hit=64, width=2048, n_neurons=1024)
    work.moved, work.operations, work.intensity
    Roof(bandwidth=3e12, peak=8e14).fraction(work, seconds=1e-3)

A kernel can't take less than the time to move its bytes, nor less than the time of its matrix products:

    least seconds = max(bytes / bandwidth, products / peak)        fraction of the roof = least seconds / seconds

(Williams, Waterman and Patterson 2009, "Roofline", CACM 52(4), doi:10.1145/1498765.1498785.) Counted is what is needed:
every element that a kernel uses is read once and every element of a result written once, however often it is touched,
and a multiply-add is two operations. Padding, elements that are read again because they left a cache, and what torch
does around a kernel (sorting, filling with zeros, casts) are not needed, so they lower the fraction. Of the matrices
only those of experts that were *hit*, chosen by some token, are read.

Operations outside of matrix products (comparisons, exponentials, …) count one each, a reduction of n numbers as n. They
run on other units than products do, so they are in `operations` and in the intensity, but not under the roof.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench_kernels.route import Gating

DISTRIBUTION = 8
"""Operations a logit for p and the entropy: maximum, −, exp, sum, ÷; ln p, p · ln p, sum."""
LOG_SCORE = {"softmax": 0, "sigmoid": 7, "sqrt-softplus": 5}
SCORE = {"softmax": 0, "sigmoid": 4, "sqrt-softplus": 4}
"""Operations of one logit. Those of a softmax are in DISTRIBUTION."""
SILU = 4
"""Operations of x / (1 + exp(−x)), which other activations are counted like."""


@dataclass(frozen=True)
class Work:
    """read, written: bytes. products: operations of matrix products; others: all other operations."""

    read: int
    written: int
    products: int
    others: int

    @property
    def moved(self) -> int:
        """Bytes."""
        return self.read + self.written

    @property
    def operations(self) -> int:
        return self.products + self.others

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.moved

    def __add__(self, other: Work) -> Work:
        return Work(
            self.read + other.read,
            self.written + other.written,
            self.products + other.products,
            self.others + other.others,
        )


@dataclass(frozen=True)
class Roof:
    """What a device can do: bytes a second, operations of matrix products a second."""

    bandwidth: float
    peak: float

    def seconds(self, work: Work) -> float:
        """The least that the work can take."""
        return max(work.moved / self.bandwidth, work.products / self.peak)

    def fraction(self, work: Work, seconds: float) -> float:
        """Achieved: 1 on the roof."""
        return self.seconds(work) / seconds


def route(
    tokens: int,
    n_experts: int,
    top_k: int,
    gating: Gating,
    dtype: torch.dtype = torch.bfloat16,
    *,
    corrected: bool = False,
    recorded: bool = False,
) -> Work:
    """`route` on logits of a dtype, without edits; with a correction bias of float32, with a record."""
    weight = dtype.itemsize if gating.weights == "logits" else 4
    read = tokens * n_experts * dtype.itemsize + corrected * n_experts * 4
    written = tokens * (top_k * (8 + weight) + 3 * 4)
    by_logits = gating.select == "logits"
    a_token = (DISTRIBUTION + LOG_SCORE[gating.scoring]) * n_experts + 2  # ln of the sum, log-partition
    a_token += 0 if by_logits else SCORE[gating.scoring] * n_experts
    a_token += corrected * n_experts
    if gating.groups > 1:
        a_token += gating.group_best * n_experts + (gating.group_best - 1) * gating.groups
        a_token += gating.kept_groups * gating.groups
    a_token += top_k * n_experts  # k maxima
    a_token += (n_experts + 1) * (top_k < n_experts)  # one more, and its distance
    if by_logits:
        a_token += top_k * (5 if gating.scoring == "softmax" else SCORE[gating.scoring])
    a_token += gating.renormalise * (2 * top_k + 2)  # sum, ÷; at_least, epsilon
    a_token += top_k  # scale
    if recorded:
        written += tokens * (top_k * ((1 if n_experts <= 256 else 2) + 2) + 4)
        a_token += 4 * top_k + 1  # maximum, ÷, ·, rounding; the power of two
    return Work(read, written, 0, tokens * a_token)


def gate_up(
    tokens: int,
    top_k: int,
    hit: int,
    width: int,
    n_neurons: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gated: bool = True,
    biased: bool = False,
) -> Work:
    """The kernel from hidden states to what the down matrices take, which it stores; hit: experts that are chosen."""
    pairs, outputs = tokens * top_k, n_neurons * (2 if gated else 1)
    elements = tokens * width + hit * outputs * (width + biased)
    return Work(
        read=elements * dtype.itemsize + 8 * pairs,  # the order of the pairs
        written=pairs * n_neurons * dtype.itemsize,
        products=2 * pairs * outputs * width,
        others=pairs * (n_neurons * (SILU + gated) + outputs * biased),
    )


def down(
    tokens: int,
    top_k: int,
    hit: int,
    width: int,
    n_neurons: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    biased: bool = False,
    parts: int = 0,
    stored: bool = False,
) -> Work:
    """The kernel from these to the tokens' sums in float32.

    parts   programs that share a row, each of which writes a sum of squares: how many, or 0 without norms
    stored  each weighted output is written; else they are added to the rows of the tokens, which are read and written
    """
    pairs = tokens * top_k
    elements = pairs * n_neurons + hit * width * (n_neurons + biased)
    return Work(
        read=elements * dtype.itemsize + (8 + 4) * pairs + (0 if stored else 4 * tokens * width),
        written=4 * width * (pairs if stored else tokens) + 4 * parts * pairs,
        products=2 * pairs * width * n_neurons,
        others=pairs * width * (1 + (not stored) + biased + 2 * (parts > 0)),
    )


def tally(tokens: int, top_k: int, cells: int, other_k: int = 0, *, same: bool = False) -> Work:
    """`tally` of int64 ids in one group; with as many ids of the other side, or `same`: these.

    cells  counts that change, each of which is read and written. Every pair is an atomic addition, which neither of the
           roofs is about
    """
    a_token = 8 * (top_k + (0 if same else other_k))
    pairs = (top_k + 1) * (other_k + 1 if other_k else 1)
    return Work(tokens * a_token + 8 * cells, 8 * cells, 0, tokens * pairs)
