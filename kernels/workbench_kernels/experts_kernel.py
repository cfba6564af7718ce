"""The Triton kernels of `experts`, which has the formula and the reference.

Pairs of a token and a rank are sorted by expert and cut into blocks of rows of one expert (see `blocks`). Two kernels
go over them: gate-up projection with the activation, whose (T · k, I) result is stored, and down projection, which adds
gate weight × output to the token's row in float32 and sums the squares of each output's row. The outputs (T · k, H)
themselves are never stored.

Additions to a token's row are atomic: with k > 2 their order, and so the last bits of a sum of float32, may change from
run to run. After `torch.use_deterministic_algorithms(True)`, each weighted output is stored and they are added in order
of rank; so it is for one or a few tokens (decoding), which also skip the sorting. Norms are the same on every run.

Not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from workbench_kernels.blocks import Blocks, single_blocks, sorted_blocks
from workbench_kernels.expert_weights import ExpertWeights
from workbench_kernels.jit import jit, tl, triton


@dataclass(frozen=True)
class Config:
    """A program's part of a product: rows (of one expert), columns, and how deep it goes at a time; warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


CONFIGS = {
    16: Config(16, 64, 64, 4, 3),
    64: Config(32, 64, 64, 4, 3),
    256: Config(64, 64, 64, 4, 3),
    inf: Config(128, 64, 64, 8, 3),
}
"""Defaults: for up to so many rows an expert on average. Guesses that compile without spills, to begin tuning from."""
FLOAT32 = Config(16, 32, 32, 4, 2)
"""Default for float32 at any number of rows: products of float32 have no tensor cores, and take more registers."""


@jit
def offset(index, stride):
    """In 64 bits: experts × rows × columns, and rows × columns of a long batch, pass 2^31."""
    return index.to(tl.int64) * stride


@jit
def _tanh(x):
    """By its series near 0, where the sigmoid's form loses digits."""
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.25, near, 2 * tl.sigmoid(2 * x) - 1)


@jit
def _act(x, NAME: tl.constexpr, ALPHA: tl.constexpr):
    if NAME == "silu":
        return x * tl.sigmoid(ALPHA * x)
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh z) / 2 is sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        positive = tl.where(x < 0, 0.0, x)  # keeps NaN
        return positive * positive if NAME == "relu2" else positive


@jit
def _activate(
    gate, up, NAME: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, LIMIT_AFTER: tl.constexpr,
    SHIFT: tl.constexpr, GATE_CAP: tl.constexpr, UP_CAP: tl.constexpr,
):  # fmt: skip
    """`expert_weights.activate`; LIMIT and the caps are None where there are none. Comparisons keep NaN."""
    if GATE_CAP is not None:
        return _tanh(gate / GATE_CAP) * GATE_CAP * tl.sigmoid(gate) * _tanh(up / UP_CAP) * UP_CAP
    else:
        if LIMIT is not None:
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
            if not LIMIT_AFTER:
                gate = tl.where(gate > LIMIT, LIMIT, gate)
        acted = _act(gate, NAME, ALPHA)
        if LIMIT_AFTER:
            acted = tl.where(acted > LIMIT, LIMIT, acted)
        return acted * (up + SHIFT)


@jit
def gate_up_kernel(
    hidden, gate_up, bias, inner, order, block_expert, block_first, block_end,
    top_k, width, n_neurons, up_at, hidden_stride, expert_stride, neuron_stride, width_stride, bias_stride,
    GATED: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr, NAME: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, LIMIT_AFTER: tl.constexpr, SHIFT: tl.constexpr, GATE_CAP: tl.constexpr, UP_CAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS neurons of a block's rows of `inner` (T · k, I); i's gate is output STEP · i, its up STEP · i + up_at."""
    block = tl.program_id(0)
    row = tl.load(block_first + block) + tl.arange(0, ROWS)
    there = row < tl.load(block_end + block)
    if tl.load(block_first + block) >= tl.load(block_end + block):
        return
    expert = tl.load(block_expert + block)
    token = tl.load(order + row, mask=there, other=0) // top_k
    neuron = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = neuron < n_neurons
    x_at = hidden + offset(token, hidden_stride)
    gate_w_at = gate_up + offset(expert, expert_stride) + offset(neuron * STEP, neuron_stride)
    up_w_at = gate_w_at + offset(up_at + tl.zeros_like(neuron), neuron_stride)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        along = offset(depth, width_stride)[:, None]
        real = (depth < width)[:, None] & inside[None, :]
        x = tl.load(x_at[:, None] + depth[None, :], mask=there[:, None] & (depth < width)[None, :], other=0.0).to(DOT)
        w = tl.load(up_w_at[None, :] + along, mask=real, other=0.0).to(DOT)
        up = tl.dot(x, w, up, input_precision=PRECISION)
        if GATED:
            w = tl.load(gate_w_at[None, :] + along, mask=real, other=0.0).to(DOT)
            gate = tl.dot(x, w, gate, input_precision=PRECISION)
    if BIASED:
        bias_at = bias + offset(expert, bias_stride) + neuron * STEP
        up += tl.load(bias_at + up_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATED:
            gate += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        out = _activate(gate, up, NAME, ALPHA, LIMIT, LIMIT_AFTER, SHIFT, GATE_CAP, UP_CAP)
    else:
        out = _act(up, NAME, ALPHA)
    to = inner + offset(row, n_neurons)[:, None] + neuron[None, :]
    tl.store(to, out.to(inner.dtype.element_ty), mask=there[:, None] & inside[None, :])


@jit
def down_kernel(
    inner, down, bias, scale, gate, out, squares, order, block_expert, block_first, block_end,
    top_k, width, n_neurons, expert_stride, width_stride, neuron_stride, bias_stride,
    BIASED: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, STORE: tl.constexpr, SQUARES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of a block's outputs: ADD them to `out` (T, H), or STORE them in `out` (T · k, H), weighted.

    SQUARES: the sum of squares of each row's part in `squares` (T · k, parts). SCALED: column h times 1 + scale[h].
    """
    block = tl.program_id(0)
    row = tl.load(block_first + block) + tl.arange(0, ROWS)
    there = row < tl.load(block_end + block)
    if tl.load(block_first + block) >= tl.load(block_end + block):
        return
    expert = tl.load(block_expert + block)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    x_at = inner + offset(row, n_neurons)
    w_at = down + offset(expert, expert_stride) + offset(column, width_stride)
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_neurons, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        real = depth < n_neurons
        x = tl.load(x_at[:, None] + depth[None, :], mask=there[:, None] & real[None, :], other=0.0).to(DOT)
        along = offset(depth, neuron_stride)[:, None]
        w = tl.load(w_at[None, :] + along, mask=real[:, None] & inside[None, :], other=0.0).to(DOT)
        y = tl.dot(x, w, y, input_precision=PRECISION)
    if BIASED:
        y += tl.load(bias + offset(expert, bias_stride) + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        y *= 1 + tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    pair = tl.load(order + row, mask=there, other=0)
    if SQUARES:
        tl.store(squares + offset(pair, tl.num_programs(1)) + tl.program_id(1), tl.sum(y * y, axis=1), mask=there)
    weight = tl.load(gate + pair, mask=there, other=0.0).to(tl.float32)[:, None]
    y = tl.where(weight == 0, 0.0, weight * y)  # not NaN, whatever y is
    if STORE:
        tl.store(out + offset(pair, width)[:, None] + column[None, :], y, mask=there[:, None] & inside[None, :])
    if ADD:
        to = out + offset(pair // top_k, width)[:, None] + column[None, :]
        tl.atomic_add(to, y, mask=there[:, None] & inside[None, :] & (weight != 0), sem="relaxed")


def launch(
    weights: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor, chosen: Tensor, norms: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`experts` by the two kernels; `chosen` int64 (T, k) are the experts to compute, E for none."""
    n_pairs, width, norm = ids.numel(), weights.width, weights.post_norm
    if not n_pairs:
        return torch.zeros_like(hidden), torch.zeros(ids.shape, device=hidden.device) if norms else None
    few = few_tokens(len(ids), ids.shape[1], weights.n_experts)
    config = config or default_config(1 if few else n_pairs / weights.n_experts, weights)
    blocks = single_blocks(chosen, weights.n_experts) if few else sorted_blocks(chosen, weights.n_experts, config.rows)
    gate = gate.flatten().float()
    inner = _gate_up(weights, hidden if hidden.stride(1) == 1 else hidden.contiguous(), ids.shape[1], blocks, config)
    store = few or torch.are_deterministic_algorithms_enabled()
    out = torch.zeros(n_pairs if store else len(hidden), width, device=hidden.device)
    squares = torch.zeros(n_pairs, parts_across(width, config), device=hidden.device)
    down = (weights, inner, ids.shape[1], blocks, config, out, squares)
    if norm is None:
        _down(*down, gate, add=not store, store=store, square=norms)
        size = squares.sum(1).sqrt()
    else:  # what a row is divided by is known only when all of it is: the product is made twice
        _down(*down, gate, add=False, store=False, square=True)
        inverse = torch.rsqrt(squares.sum(1) / width + norm.eps)
        _down(*down, gate * inverse, add=not store, store=store, square=False)
        size = squares.sum(1).sqrt() * inverse
    summed = out.view(*ids.shape, width).sum(1) if store else out
    return summed.to(hidden.dtype), size.view(ids.shape) if norms else None


def _gate_up(weights: ExpertWeights, hidden: Tensor, top_k: int, blocks: Blocks, config: Config) -> Tensor:
    """What the down matrices take: (T · k, I) in the order of the blocks' rows."""
    n_neurons, activation = weights.n_neurons, weights.activation
    inner = torch.empty(len(blocks.order), n_neurons, dtype=weights.down_proj.dtype, device=hidden.device)
    bias = None if weights.gate_up_proj_bias is None else weights.gate_up_proj_bias.contiguous()
    up_at = 1 if weights.interleaved else n_neurons if weights.gated else 0
    limit = activation.limit if activation.limit < inf else None
    gate_cap, up_cap = activation.softcaps or (None, None)
    kernel: Any = gate_up_kernel
    kernel[(len(blocks.expert), parts_across(n_neurons, config))](
        hidden, weights.gate_up, bias, inner, blocks.order, blocks.expert, blocks.first, blocks.end,
        top_k, weights.width, n_neurons, up_at, hidden.stride(0),
        *weights.gate_up.stride(), 0 if bias is None else bias.stride(0),
        GATED=weights.gated, STEP=2 if weights.interleaved else 1, BIASED=bias is not None,
        NAME=activation.name, ALPHA=activation.alpha, LIMIT=limit,
        LIMIT_AFTER=activation.limit_after and limit is not None, SHIFT=activation.shift,
        GATE_CAP=gate_cap, UP_CAP=up_cap, **_tile(weights, config),
    )  # fmt: skip
    return inner


def _down(
    weights: ExpertWeights, inner: Tensor, top_k: int, blocks: Blocks, config: Config, out: Tensor, squares: Tensor,
    gate: Tensor, *, add: bool, store: bool, square: bool,
) -> None:  # fmt: skip
    bias = None if weights.down_proj_bias is None else weights.down_proj_bias.contiguous()
    scale = None if weights.post_norm is None else weights.post_norm.weight.contiguous()
    kernel: Any = down_kernel
    kernel[(len(blocks.expert), parts_across(weights.width, config))](
        inner, weights.down, bias, scale, gate, out, squares, blocks.order, blocks.expert, blocks.first, blocks.end,
        top_k, weights.width, weights.n_neurons, *weights.down.stride(), 0 if bias is None else bias.stride(0),
        BIASED=bias is not None, SCALED=scale is not None, ADD=add, STORE=store, SQUARES=square,
        **_tile(weights, config),
    )  # fmt: skip


def _tile(weights: ExpertWeights, config: Config) -> dict[str, Any]:
    """What both kernels are compiled for. Products of float32 are as exact as torch's own: see torch.backends."""
    rounded = torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None
    return {
        "ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth,
        "DOT": _dot_type(weights.down_proj.dtype), "PRECISION": "tf32" if rounded else "ieee",
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def parts_across(columns: int, config: Config) -> int:
    """Programs for so many columns."""
    return -(-columns // config.columns)


def few_tokens(n_tokens: int, top_k: int, n_experts: int) -> bool:
    """Whether each pair is a block of its own, unsorted: it reads its expert's matrices, so few may share an expert."""
    return n_tokens == 1 or n_tokens * top_k <= n_experts // 4


def default_config(rows: float, weights: ExpertWeights) -> Config:
    """The default for so many rows an expert."""
    if weights.down_proj.dtype == torch.float32:
        return FLOAT32
    return next(config for most, config in CONFIGS.items() if rows <= most)


def _dot_type(dtype: torch.dtype) -> Any:
    """Of the operands of products. The interpreter can't multiply bfloat16."""
    if triton.knobs.runtime.interpret:  # type: ignore[attr-defined]
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
