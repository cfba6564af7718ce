"""Bytes that `roofline` counts against the addresses that the kernels themselves touch in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from fused.expert_cases import choices, weights
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from workbench_kernels import roofline
from workbench_kernels.blocks import sorted_blocks
from workbench_kernels.experts import experts
from workbench_kernels.experts_kernel import Config
from workbench_kernels.route import Gating, Record, route
from workbench_kernels.tallies import tally

DEEPSEEK = Gating("sigmoid", renormalise=True, scale=2.5, groups=4, kept_groups=2, weights="float32")
SMALL = Config(rows=16, columns=16, depth=16, warps=1, stages=1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Touched:
    """Of one launch: address → bytes of the element."""

    read: dict[int, int] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)

    @property
    def moved(self) -> tuple[int, int]:
        return sum(self.read.values()), sum(self.written.values())


@pytest.fixture
def launches(monkeypatch) -> list[Touched]:
    """What every launch touches."""
    made: list[Touched] = []
    launch, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    store, atomic = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_atomic_rmw

    def note(kinds: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        data, there = np.broadcast_arrays(pointers.data, mask.data.astype(bool))
        for kind in kinds.split():
            getattr(made[-1], kind).update(dict.fromkeys(data[there].tolist(), size))

    def noting(kinds: str, own: Callable[..., Any], pointers_at: int, mask_at: int) -> Callable[..., Any]:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(kinds, args[pointers_at], args[mask_at])
            return own(self, *args, **kwargs)

        return run

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(Touched())
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noting("read", load, 0, 1))
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noting("written", store, 0, 2))
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", noting("read written", atomic, 1, 3))
    return made


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("gating", [Gating(), DEEPSEEK], ids=["softmax", "groups"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n_experts", "k"), [(1, 60, 4), (63, 8, 2), (5, 384, 8)])
def test_route(launches, tokens: int, n_experts: int, k: int, dtype: torch.dtype, gating: Gating, recorded: bool):
    logits = torch.randn(tokens, n_experts).to(dtype)
    bias = torch.rand(n_experts) if gating is DEEPSEEK else None
    record = Record.empty(tokens, k, n_experts) if recorded else None
    route(logits, k, gating, correction=bias, record=record, backend="triton")
    counted = roofline.route(tokens, n_experts, k, gating, dtype, corrected=bias is not None, recorded=recorded)
    [found] = launches
    assert found.moved == (counted.read, counted.written)


@pytest.mark.parametrize("options", [{}, {"biased": True}, {"gated": False}, {"transposed": True}], ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n_experts"), [(33, 2, 6), (1, 2, 6), (2, 1, 12)])
def test_experts(launches, tokens: int, k: int, n_experts: int, norms: bool, options: dict[str, bool]):
    """Sorted (33 tokens) and, for a few pairs, a block a pair. Tables of blocks aren't counted."""
    width, neurons, dtype = 40, 24, torch.float16
    given = weights(n_experts, width, neurons, dtype, **options)
    hidden, ids, gate = choices(tokens, k, n_experts, width, dtype)
    experts(given, hidden, ids, gate, norms=norms, backend="triton", config=SMALL)
    few = tokens < 33
    if few:  # experts and ends: the pairs' order is where their blocks begin
        tables = 2 * 8 * ids.numel()
    else:
        blocks = sorted_blocks(ids, n_experts, SMALL.rows)
        tables = 8 * (2 * len(blocks.expert) + int((blocks.first < blocks.end).sum()))
    sizes = (tokens, k, len(ids.unique()), width, neurons, dtype)
    biased = options.get("biased", False)
    parts = -(-width // SMALL.columns) if norms else 0
    counted = [
        roofline.gate_up(*sizes, gated=options.get("gated", True), biased=biased),
        roofline.down(*sizes, biased=biased, parts=parts, stored=few),
    ]
    assert [(read - tables, written) for read, written in (found.moved for found in launches)] == [
        (work.read, work.written) for work in counted
    ]


@pytest.mark.parametrize("side", ["load", "same", "other"])
def test_tally(launches, side: str):
    _, ids, _ = choices(63, 3, 10, 1)
    _, other, _ = choices(63, 2, 7, 1, seed=3)
    beside, n_other = {"load": (None, 0), "same": (ids, 10), "other": (other, 7)}[side]
    counts = tally(ids, 10, other=beside, n_other=n_other, backend="triton")
    counted = roofline.tally(
        63, 3, int((counts > 0).sum()), 0 if beside is None else beside.shape[1], same=side == "same"
    )
    [found] = launches
    assert found.moved == (counted.read, counted.written)
