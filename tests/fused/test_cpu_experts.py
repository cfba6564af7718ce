"""Experts on the CPU against the float64 reference: every layout and dtype, both ways through an expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench_kernels import cpu_experts
from workbench_kernels.cpu_experts import experts_on_cpu
from workbench_kernels.expert_weights import Activation, ExpertWeights, PostNorm
from workbench_kernels.experts import reference

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest output; half precisions are rounded between the matrices and at the end."""
SILU = Activation()
LAYOUTS: dict[str, Any] = {
    "plain": {},
    "transposed": {"transposed": True},
    "biased": {"biased": True},
    "not gated": {"gated": False, "activation": Activation("relu2")},
    "interleaved": {"interleaved": True, "transposed": True, "biased": True, "activation": Activation(limit=0.5)},
    "normed": {"normed": True},
}


@pytest.fixture(params=["few", "many", "both"])
def way(request, monkeypatch) -> str:
    """Which way experts are computed: all by `_products`, all by torch, or as their numbers of rows ask."""
    if request.param != "both":
        few = {dtype: 1 << 62 if request.param == "few" else 0 for dtype in cpu_experts.FEW}
        monkeypatch.setattr(cpu_experts, "FEW", few)
        monkeypatch.setattr(cpu_experts, "ALONE", 0)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param  # those of the threads' own are theirs alone
    torch.set_num_threads(before)


def made(
    n_experts: int = 7,
    width: int = 40,
    neurons: int = 24,
    dtype: torch.dtype = torch.float32,
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    biased: bool = False,
    normed: bool = False,
    activation: Activation = SILU,
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    outputs = neurons * (2 if gated else 1)
    first, second = random(n_experts, outputs, width), random(n_experts, width, neurons)
    return ExpertWeights(
        gate_up_proj=first.transpose(1, 2).contiguous() if transposed else first,
        down_proj=second.transpose(1, 2).contiguous() if transposed else second,
        gate_up_proj_bias=random(n_experts, outputs) if biased else None,
        down_proj_bias=random(n_experts, width) if biased else None,
        gated=gated,
        transposed=transposed,
        interleaved=interleaved,
        activation=activation,
        post_norm=PostNorm(random(width), 1e-6) if normed else None,
    )


def wide(weights: ExpertWeights) -> ExpertWeights:
    """The same numbers in float64."""
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    tensors = {name: getattr(weights, name) for name in names}
    norm = weights.post_norm
    return replace(
        weights,
        **{name: None if tensor is None else tensor.double() for name, tensor in tensors.items()},
        post_norm=None if norm is None else PostNorm(norm.weight.double(), norm.eps),
    )


def selected(tokens: int, n_experts: int, k: int, width: int, dtype: torch.dtype, seed: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    ids = torch.rand(tokens, n_experts, generator=generator).topk(k).indices
    return hidden, ids, torch.rand(tokens, k, generator=generator).to(dtype)


def check(weights: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor) -> None:
    """Outputs and norms are those of float64, and asking for norms changes no output."""
    expected, sizes = reference(wide(weights), hidden.double(), ids, gate.double(), norms=True)
    out, norms = experts_on_cpu(weights, hidden, ids, gate, norms=True)
    assert out.dtype == hidden.dtype and norms is not None and norms.dtype == torch.float32 and sizes is not None
    within = TOLERANCE[hidden.dtype]
    largest = float(expected.abs().max()) if expected.any() else 1.0
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=within * largest)
    torch.testing.assert_close(norms.double(), sizes, rtol=within, atol=1e-5)
    alone, none = experts_on_cpu(weights, hidden, ids, gate)
    assert none is None and torch.equal(alone, out)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_in_every_dtype(layout: str, dtype: torch.dtype, way: str, threads: int):
    weights = made(dtype=dtype, **LAYOUTS[layout])
    check(weights, *selected(50, 7, 3, 40, dtype))


@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_every_size(tokens: int, k: int, threads: int):
    check(made(), *selected(tokens, 7, k, 40, torch.float32))


def test_one_expert_takes_all(way: str, threads: int):
    hidden, _, gate = selected(700, 7, 1, 40, torch.float32)
    check(made(), hidden, torch.full((700, 1), 3), gate)


def test_a_single_expert(way: str, threads: int):
    check(made(n_experts=1), *selected(30, 1, 1, 40, torch.float32))


def test_no_expert_adds_nothing(way: str, threads: int):
    """Ids outside the experts, as of dropped tokens and of experts that are elsewhere."""
    hidden, ids, gate = selected(60, 7, 3, 40, torch.float32)
    ids[::2, 0], ids[::3, 1], ids[5] = -1, 7, -1
    check(made(), hidden, ids, gate)
    out, norms = experts_on_cpu(made(), hidden, ids, gate, norms=True)
    assert norms is not None and not out[5].any() and not norms[5].any() and not norms[ids == 7].any()
    out, norms = experts_on_cpu(made(), hidden, torch.full_like(ids, -1), gate, norms=True)
    assert norms is not None and not out.any() and not norms.any()


def test_an_expert_of_weight_0_adds_nothing_whatever_it_computes(way: str, threads: int):
    weights = made()
    weights.down_proj[2] = torch.nan
    hidden, ids, gate = selected(60, 7, 3, 40, torch.float32)
    gate = gate.masked_fill(ids == 2, 0)
    for norms in (True, False):
        assert experts_on_cpu(weights, hidden, ids, gate, norms=norms)[0].isfinite().all()
    spoilt, _ = experts_on_cpu(weights, hidden, ids, gate + 1)
    assert torch.equal(spoilt.isnan().any(-1), (ids == 2).any(-1))


def test_gradients_are_not_kept(way: str):
    weights = made()
    for tensor in weights.tensors:
        tensor.requires_grad_(True)
    out, _ = experts_on_cpu(weights, *selected(30, 7, 3, 40, torch.float32))
    assert not out.requires_grad


def test_rows_that_are_not_contiguous(way: str):
    hidden, ids, gate = selected(50, 7, 3, 40, torch.float32)
    strided = hidden.t().contiguous().t(), ids.t().contiguous().t(), gate.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in strided)
    for found, expected in zip(
        experts_on_cpu(made(), *strided, norms=True), experts_on_cpu(made(), hidden, ids, gate, norms=True), strict=True
    ):
        assert found is not None and expected is not None and torch.equal(found, expected)


@given(st.lists(st.integers(-1, 9), max_size=300), st.integers(1, 9), st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_experts_of_few_rows_come_first(ids: list[int], n_experts: int, few: int):
    given_ids = np.array(ids, dtype=np.int64)
    order, starts, experts, n_few = cpu_experts._plan(given_ids, n_experts, few)
    sizes = [ids.count(expert) for expert in range(n_experts)]
    used = [expert for expert in range(n_experts) if sizes[expert]]
    assert experts.tolist() == sorted(used, key=lambda expert: sizes[expert] > few)
    assert n_few == sum(sizes[expert] <= few for expert in used)
    for expert, start, end in zip(experts, starts, starts[1:], strict=False):
        assert order[start:end].tolist() == np.flatnonzero(given_ids == expert).tolist()
    assert sorted(order.tolist()) == list(range(len(ids)))
    places = cpu_experts._places(order, int(starts[-1]))
    assert all(order[at] == n for n, at in enumerate(places) if at < starts[-1])
    assert [at < starts[-1] for at in places] == [0 <= expert < n_experts for expert in ids]
