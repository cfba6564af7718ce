"""Routed experts on the CPU: experts spread over threads, those with few tokens by a kernel of its own.

    out[t] = sum over ranks j of gate[t, j] · expert[ids[t, j]](x[t])        norm[t, j] = ‖expert[ids[t, j]](x[t])‖

What an expert computes is said in `workbench_kernels.expert_weights`; `workbench_kernels.experts` has the reference.

Time goes where the shape puts it, so there are two ways through an expert, and every expert of a layer takes its own:

- **Many rows** (prefill): torch's matrix products. One for 256 tokens is small, and two threads inside it lose 15%
  against two products side by side; so threads take experts, the largest first, and each computes alone.
- **Few rows** (decode, short prompts): a matrix is read once for a handful of rows, and memory is the limit. BLAS
  reaches half of it there; `_products` streams a matrix past four rows at a time.

Outputs land in the order of the experts, where their norms are taken while they are in cache, and one `embedding_bag`
gathers, weights and sums them. There are no gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Barrier

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from workbench_kernels.expert_weights import ExpertWeights, activate, normalise

FEW = {torch.float32: 16, torch.bfloat16: 16, torch.float16: 1 << 62}
"""Most rows of an expert for which `_products` is faster than torch, which has no fast product of float16 on CPUs."""
BITS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""As what NumPy, which has no bfloat16, gets at the matrices."""
ROUND = {torch.float32: 1, torch.bfloat16: 32, torch.float16: 32}
"""Rows are filled up to a multiple: oneDNN, which multiplies half precisions, compiles code for each number of rows."""
ALONE = 1 << 20
"""Elements of matrices below which one thread is done before a second has woken up."""


@torch.no_grad()
def experts_on_cpu(
    weights: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor, *, norms: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Outputs of the selected experts, weighted and summed, and the norms of each before weighting.

    hidden  (T, H) in the dtype of the weights: float32, bfloat16 or float16
    ids     int64 (T, k); an id outside 0 … E - 1 stands for no expert: it contributes nothing, and its norm is 0
    gate    (T, k): gate weights; an expert of weight 0 adds nothing, whatever it computes, and has its norm anyway

    Returns (T, H) in the dtype of hidden, and float32 (T, k) or None. Products of few rows accumulate in float32.
    """
    if not norms:  # then an expert that adds nothing doesn't matter
        ids = ids.masked_fill(gate == 0, -1)
    order, starts = _by_expert(ids.contiguous().view(-1).numpy(), weights.n_experts)
    rows = order[: starts[-1]] // ids.shape[1]
    outputs = torch.empty(len(rows) + 1, weights.width, dtype=hidden.dtype)
    outputs[-1] = 0
    sizes = torch.zeros(len(rows) if norms else 0)
    parts = _parts(weights, np.diff(starts), hidden.dtype)
    compute = partial(_compute, weights, hidden.contiguous(), rows, starts, outputs, sizes)
    n_threads = min(torch.get_num_threads(), len(parts))
    if n_threads < 2:
        for part in parts:
            compute(part)
    else:
        todo = deque(parts)
        for task in [_threads(torch.get_num_threads()).submit(_work, compute, todo) for _ in range(n_threads)]:
            task.result()
    return _combined(outputs, order, gate), _unsorted(sizes, order, ids.shape) if norms else None


def _parts(weights: ExpertWeights, sizes: np.ndarray, dtype: torch.dtype) -> list[np.ndarray | tuple[int, int, int]]:
    """What a thread does in one go: some experts of few rows, or up to so many rows of one expert.

    sizes  int (E): rows of each expert
    """
    n_threads = torch.get_num_threads()
    small = np.flatnonzero((sizes > 0) & (sizes <= FEW[dtype]))
    work = len(small) * (weights.gate_up_proj[0].numel() + weights.down_proj[0].numel())
    most = max(256, -(-int(sizes.sum()) // (2 * n_threads)))
    large = [
        (int(expert), first, min(first + most, int(sizes[expert])))
        for expert in np.flatnonzero(sizes > FEW[dtype])
        for first in range(0, int(sizes[expert]), most)
    ]
    large.sort(key=lambda part: part[1] - part[2])
    return [*large, *(part for part in np.array_split(small, n_threads if work > ALONE else 1) if len(part))]


def _work(compute: Callable[..., None], todo: deque) -> None:
    with torch.inference_mode():
        while todo:
            try:
                part = todo.popleft()
            except IndexError:  # another thread took the last
                return
            compute(part)


def _compute(
    weights: ExpertWeights,
    hidden: Tensor,
    rows: np.ndarray,
    starts: np.ndarray,
    outputs: Tensor,
    norms: Tensor,
    part: np.ndarray | tuple[int, int, int],
) -> None:
    """One part's outputs and norms, written where they belong; rows int64 (N): the token of each output."""
    if isinstance(part, tuple):
        expert, first, last = part
        places = torch.arange(starts[expert] + first, starts[expert] + last)
        found = _many(weights, hidden, torch.from_numpy(rows)[places], expert)
    else:
        positions = np.concatenate([np.arange(starts[expert], starts[expert + 1]) for expert in part])
        places = torch.from_numpy(positions)
        found = _few(weights, hidden, rows[positions], part, np.diff(starts)[part])
    outputs[places] = found.to(outputs.dtype)
    if len(norms):
        norms[places] = torch.linalg.vector_norm(found, dim=-1, dtype=torch.float32)


def _many(weights: ExpertWeights, hidden: Tensor, rows: Tensor, expert: int) -> Tensor:
    """Outputs (n, H) of one expert for the tokens of `rows` (n), in the dtype of hidden."""
    n = len(rows)
    x = hidden[F.pad(rows, (0, -n % ROUND[hidden.dtype]))]
    first, second = weights.gate_up_proj_bias, weights.down_proj_bias
    inner = F.linear(x, weights.gate_up[expert], None if first is None else first[expert])
    inner = activate(weights.activation, *weights.halves(inner))
    found = F.linear(inner, weights.down[expert], None if second is None else second[expert])[:n]
    return found if weights.post_norm is None else normalise(weights.post_norm, found)


def _few(weights: ExpertWeights, hidden: Tensor, rows: np.ndarray, experts: np.ndarray, sizes: np.ndarray) -> Tensor:
    """Outputs float32 (n, H) of several experts, each for its next `sizes` of the tokens of `rows` (n)."""
    own = torch.from_numpy(np.repeat(experts, sizes))
    ends = np.cumsum(sizes)

    def layer(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty(len(x), matrices.shape[2 if weights.transposed else 1])
        multiply = _transposed_products if weights.transposed else _products
        multiply(x.numpy(), experts, ends, matrices.view(BITS[matrices.dtype]).numpy(), out.numpy())
        return out if bias is None else out.add_(bias[own])

    inner = layer(hidden[torch.from_numpy(rows)].float(), weights.gate_up_proj.detach(), weights.gate_up_proj_bias)
    inner = activate(weights.activation, *weights.halves(inner)).contiguous()
    found = layer(inner, weights.down_proj.detach(), weights.down_proj_bias)
    return found if weights.post_norm is None else normalise(weights.post_norm, found)


def _combined(outputs: Tensor, order: np.ndarray, gate: Tensor) -> Tensor:
    """(T, H): the outputs (N + 1, H) of each token, weighted and summed; the last one is 0, that of no expert."""
    none = len(outputs) - 1
    places = np.full(len(order), none)
    places[order[:none]] = np.arange(none)
    gate = gate.to(outputs.dtype)
    where = torch.from_numpy(places).view(gate.shape).masked_fill(gate == 0, none)
    return F.embedding_bag(where, outputs, mode="sum", per_sample_weights=gate)


def _unsorted(norms: Tensor, order: np.ndarray, shape: torch.Size) -> Tensor:
    """float32 (T, k): 0 where there is no expert."""
    found = torch.zeros(len(order))
    found[torch.from_numpy(order[: len(norms)])] = norms
    return found.view(shape)


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    """n threads in each of which torch computes with one."""
    pool, ready = ThreadPoolExecutor(n, thread_name_prefix="experts"), Barrier(n)
    own = torch.get_num_threads()

    def alone() -> None:
        torch.set_num_threads(1)
        ready.wait()  # so that each of the threads does this once

    for task in [pool.submit(alone) for _ in range(n)]:
        task.result()
    torch.set_num_threads(own)  # what threads that begin later take as theirs
    return pool


@njit(nogil=True, cache=True)
def _by_expert(ids: np.ndarray, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Places sorted by expert, order int64 (S) with those of no expert last, and where each expert starts, (E + 1)."""
    starts = np.zeros(n_experts + 1, dtype=np.int64)
    for expert in ids:
        if 0 <= expert < n_experts:
            starts[expert + 1] += 1
    for expert in range(n_experts):
        starts[expert + 1] += starts[expert]
    following, none = starts[:-1].copy(), starts[-1]
    order = np.empty(len(ids), dtype=np.int64)
    for place, expert in enumerate(ids):
        if 0 <= expert < n_experts:
            order[following[expert]] = place
            following[expert] += 1
        else:
            order[none] = place
            none += 1
    return order, starts


@intrinsic
def _wide(_context, value):  # type: ignore[no-untyped-def]
    """float32 from float32, from the bits of a bfloat16 (uint16) or from those of a float16 (int16)."""

    def generate(_codegen, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        (bits,) = arguments
        if value == types.uint16:
            wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        return bits

    return types.float32(value), generate


@njit(nogil=True, cache=True, fastmath=True)
def _products(x: np.ndarray, experts: np.ndarray, ends: np.ndarray, matrices: np.ndarray, out: np.ndarray) -> None:
    """out[n] = matrices[e] · x[n] for the rows n of each expert, those up to its end; matrices (E, out, in).

    Four rows share what is read of a matrix; three or two are filled up to four, since arithmetic is free here.
    """
    first = 0
    for expert, end in zip(experts, ends):  # noqa: B905 - numba has no strict
        while first < end:
            last = end - 1
            if first == last:
                x0 = x[first]
                for j in range(out.shape[1]):
                    row, s0 = matrices[expert, j], np.float32(0)
                    for i in range(x.shape[1]):
                        s0 += _wide(row[i]) * x0[i]
                    out[first, j] = s0
            else:
                n1, n2, n3 = first + 1, min(first + 2, last), min(first + 3, last)
                x0, x1, x2, x3 = x[first], x[n1], x[n2], x[n3]
                for j in range(out.shape[1]):
                    row = matrices[expert, j]
                    s0 = s1 = s2 = s3 = np.float32(0)
                    for i in range(x.shape[1]):
                        w = _wide(row[i])
                        s0 += w * x0[i]
                        s1 += w * x1[i]
                        s2 += w * x2[i]
                        s3 += w * x3[i]
                    out[first, j], out[n1, j], out[n2, j], out[n3, j] = s0, s1, s2, s3
            first += 4
        first = end


@njit(nogil=True, cache=True, fastmath=True)
def _transposed_products(
    x: np.ndarray, experts: np.ndarray, ends: np.ndarray, matrices: np.ndarray, out: np.ndarray
) -> None:
    """The same for matrices (E, in, out): each row of a matrix is added to the outputs of all the expert's rows."""
    out[:] = 0
    first = 0
    for expert, end in zip(experts, ends):  # noqa: B905 - numba has no strict
        for i in range(x.shape[1]):
            row = matrices[expert, i]
            for n in range(first, end):
                factor, sums = x[n, i], out[n]
                for j in range(out.shape[1]):
                    sums[j] += factor * _wide(row[j])
        first = end
