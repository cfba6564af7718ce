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
from typing import Any

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
    counted = ids if norms else ids.masked_fill(gate == 0, -1)  # without norms, what adds nothing doesn't matter
    plan = _plan(counted.contiguous().view(-1).numpy(), weights.n_experts, FEW[hidden.dtype])
    n_used = int(plan[1][-1])
    outputs = torch.empty(n_used + 1, weights.width, dtype=hidden.dtype)
    outputs[-1] = 0
    sizes = torch.zeros(n_used if norms else 0)
    order, starts, experts, n_few = plan
    rows = order[:n_used] // ids.shape[1]
    compute = partial(_compute, weights, hidden.contiguous(), rows, starts, experts, outputs, sizes)
    parts = _parts(weights, starts, n_few)
    n_threads = min(torch.get_num_threads(), len(parts))
    if n_threads < 2:
        for part in parts:
            compute(part)
    else:
        todo = deque(parts)
        for task in [_threads(torch.get_num_threads()).submit(_work, compute, todo) for _ in range(n_threads)]:
            task.result()
    return _combined(outputs, order, gate, norms), _unsorted(sizes, order, ids.shape) if norms else None


Part = tuple[int, int, int, int]
"""Of the experts in order, those from one place to before another; and the first row and the one after the last."""


def _parts(weights: ExpertWeights, starts: np.ndarray, n_few: int) -> list[Part]:
    """What a thread does in one go: some experts of few rows, or so many rows of one expert; the longest first."""
    ends, n_threads = starts.tolist(), torch.get_num_threads()
    alone = n_few * (weights.gate_up_proj[0].numel() + weights.down_proj[0].numel()) <= ALONE
    each = n_few if alone else -(-n_few // n_threads)
    few = [(at, min(at + each, n_few)) for at in range(0, n_few, each)] if n_few else []
    most = max(256, -(-ends[-1] // (2 * n_threads)))
    large = [
        (place, place + 1, first, min(first + most, ends[place + 1]))
        for place in range(n_few, len(ends) - 1)
        for first in range(ends[place], ends[place + 1], most)
    ]
    large.sort(key=lambda part: part[2] - part[3])
    return [*large, *((begin, end, ends[begin], ends[end]) for begin, end in few)]


def _work(compute: Callable[[Part], None], todo: deque[Part]) -> None:
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
    experts: np.ndarray,
    outputs: Tensor,
    norms: Tensor,
    part: Part,
) -> None:
    """One part's outputs and norms, written where they belong; rows int64 (N): the token of each output."""
    begin, end, first, last = part
    x = hidden.index_select(0, torch.from_numpy(rows[first:last]))
    if last - first > (end - begin) * FEW[hidden.dtype]:
        found = _many(weights, x, int(experts[begin]))
    else:
        found = _few(weights, x, experts[begin:end], starts[begin + 1 : end + 1] - first)
    outputs[first:last] = found
    if len(norms):
        norms[first:last] = torch.linalg.vector_norm(found, dim=-1, dtype=torch.float32)


def _many(weights: ExpertWeights, x: Tensor, expert: int) -> Tensor:
    """Outputs (n, H) of one expert for its rows x (n, H), in their dtype."""
    n = len(x)
    if fill := -n % ROUND[x.dtype]:
        x = F.pad(x, (0, 0, 0, fill))
    first, second = weights.gate_up_proj_bias, weights.down_proj_bias
    inner = F.linear(x, weights.gate_up[expert], None if first is None else first[expert])
    inner = activate(weights.activation, *weights.halves(inner))
    found = F.linear(inner, weights.down[expert], None if second is None else second[expert])[:n]
    return found if weights.post_norm is None else normalise(weights.post_norm, found)


def _few(weights: ExpertWeights, x: Tensor, experts: np.ndarray, ends: np.ndarray) -> Tensor:
    """Outputs float32 (n, H) of several experts for their rows x (n, H), each for those up to its end."""
    multiply = _transposed_products if weights.transposed else _products

    def layer(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty(len(x), matrices.shape[2 if weights.transposed else 1])
        multiply(x.numpy(), experts, ends, matrices.detach().view(BITS[matrices.dtype]).numpy(), out.numpy())
        return out if bias is None else out.add_(bias[np.repeat(experts, np.diff(ends, prepend=0))])

    inner = layer(x.float(), weights.gate_up_proj, weights.gate_up_proj_bias)
    inner = activate(weights.activation, *weights.halves(inner)).contiguous()
    found = layer(inner, weights.down_proj, weights.down_proj_bias)
    return found if weights.post_norm is None else normalise(weights.post_norm, found)


def _combined(outputs: Tensor, order: np.ndarray, gate: Tensor, norms: bool) -> Tensor:
    """(T, H): the outputs (N + 1, H) of each token, weighted and summed; the last one is 0, that of no expert."""
    where = torch.from_numpy(_places(order, len(outputs) - 1)).view(gate.shape)
    if norms:
        where = where.masked_fill(gate == 0, len(outputs) - 1)
    return F.embedding_bag(where, outputs, mode="sum", per_sample_weights=gate.to(outputs.dtype).contiguous())


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
def _plan(ids: np.ndarray, n_experts: int, few: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Sort what was selected (S) by expert, those of at most `few` rows first.

    order    int64 (S): places in ids, in each expert as they come; those of no expert last
    starts   int64 (N + 1): where each of the N experts that were selected starts in the order, and where the last ends
    experts  int64 (N), and how many of them have few rows
    """
    sizes = np.zeros(n_experts, dtype=np.int64)
    for expert in ids:
        if 0 <= expert < n_experts:
            sizes[expert] += 1
    n, n_few = 0, 0
    experts, starts = np.empty(n_experts, dtype=np.int64), np.zeros(n_experts + 1, dtype=np.int64)
    following = np.empty(n_experts, dtype=np.int64)
    for large in (False, True):
        for expert in range(n_experts):
            if sizes[expert] and (sizes[expert] > few) == large:
                experts[n], following[expert] = expert, starts[n]
                starts[n + 1] = starts[n] + sizes[expert]
                n += 1
        if not large:
            n_few = n
    order, none = np.empty(len(ids), dtype=np.int64), starts[n]
    for place, expert in enumerate(ids):
        if 0 <= expert < n_experts:
            order[following[expert]] = place
            following[expert] += 1
        else:
            order[none] = place
            none += 1
    return order, starts[: n + 1].copy(), experts[:n].copy(), n_few


@njit(nogil=True, cache=True)
def _places(order: np.ndarray, n_used: int) -> np.ndarray:
    """int64 (S): where in the order each place is; n_used where it is in none of its first n_used."""
    places = np.full(len(order), n_used)
    for at in range(n_used):
        places[order[at]] = at
    return places


@intrinsic
def _wide(_context: Any, value: Any = None) -> Any:  # numba gives the context
    """float32 from float32, from the bits of a bfloat16 (uint16) or from those of a float16 (int16)."""

    def generate(_codegen: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
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
