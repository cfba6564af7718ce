"""Experts in torch, and their grouping into blocks: against the formula on every expert."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from fused.expert_cases import LAYOUTS, choices, oracle, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench_kernels.blocks import single_blocks, sorted_blocks
from workbench_kernels.experts import _chosen
from workbench_kernels.experts import experts as by_any_backend

experts = partial(by_any_backend, backend="torch")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str):
    made = weights(7, 24, 10, **LAYOUTS[layout])
    hidden, ids, gate = choices(31, 3, 7, 24)
    out, norms = experts(made, hidden, ids, gate, norms=True)
    expected, expected_norms = oracle(made, hidden, ids, gate)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_dtypes(dtype: torch.dtype, error: float):
    made = weights(7, 24, 10, dtype, biased=True)
    hidden, ids, gate = choices(31, 3, 7, 24, dtype)
    out, norms = experts(made, hidden, ids, gate.float(), norms=True)
    expected, expected_norms = oracle(made, hidden, ids, gate)
    assert out.dtype == dtype and norms is not None and norms.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error * float(expected.abs().max()))
    torch.testing.assert_close(norms.double(), expected_norms, rtol=error, atol=error)


def test_hidden_wider_than_the_weights():
    made = weights(4, 8, 6, torch.bfloat16)
    hidden, ids, gate = choices(5, 2, 4, 8, torch.float32)
    out, _ = experts(made, hidden, ids, gate)
    rounded, _ = experts(made, hidden.bfloat16(), ids, gate)
    assert out.dtype == torch.float32 and torch.equal(out.bfloat16(), rounded)


@pytest.mark.parametrize("integers", [torch.int16, torch.int32, torch.int64])
def test_what_is_no_expert_adds_nothing(integers: torch.dtype):
    made = weights(5, 8, 6)
    hidden, ids, gate = choices(9, 3, 5, 8)
    gone = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    expected, expected_norms = oracle(made, hidden, ids, gate * ~gone)
    for sentinel in (-1, 5, 999):
        marked = ids.masked_fill(gone, sentinel).to(integers)
        out, norms = experts(made, hidden, marked, gate, norms=True)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norms, expected_norms * ~gone, rtol=1e-12, atol=1e-12)


def test_weight_zero_adds_nothing_and_has_its_norm():
    made = weights(5, 8, 6)
    hidden, ids, gate = choices(9, 3, 5, 8)
    gate[:, 1] = 0
    _, expected = oracle(made, hidden, ids, gate)
    broken = replace(made, down_proj=made.down_proj.clone())
    broken.down_proj[4] = torch.inf
    gate = gate.masked_fill(ids == 4, 0)
    for norms in (False, True):
        out, found = experts(broken, hidden, ids, gate, norms=norms)
        torch.testing.assert_close(out, oracle(made, hidden, ids, gate)[0], rtol=1e-12, atol=1e-12)
    assert found is not None
    torch.testing.assert_close(found[ids != 4], expected[ids != 4], rtol=1e-12, atol=1e-12)


def test_weight_zero_is_computed_for_its_norm_alone():
    ids, gate = torch.tensor([[0, 3], [2, -1]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    made = weights(3, 4, 3)
    assert _chosen(made, ids, gate, norms=False).tolist() == [[3, 3], [2, 3]]
    assert _chosen(made, ids, gate, norms=True).tolist() == [[0, 3], [2, 3]]


def test_gradients():
    made = weights(3, 4, 3, biased=True, normed=True)
    hidden, ids, gate = choices(4, 2, 3, 4)
    inputs = [tensor.clone().requires_grad_() for tensor in (hidden, gate, made.gate_up_proj, made.down_proj)]

    def computed(hidden: Any, gate: Any, gate_up: Any, down: Any) -> Any:
        return experts(replace(made, gate_up_proj=gate_up, down_proj=down), hidden, ids, gate, norms=True)

    assert torch.autograd.gradcheck(computed, inputs)


def test_weight_zero_has_a_gradient():
    made = weights(3, 4, 3)
    hidden, ids, gate = choices(4, 2, 3, 4)
    gate[:, 1] = 0
    gate.requires_grad_()
    gradient = torch.autograd.grad(experts(made, hidden, ids, gate)[0].sum(), gate)[0]
    raised = gate.detach() + torch.tensor([0.0, 1.0])
    expected = experts(made, hidden, ids, raised)[0] - experts(made, hidden, ids, gate.detach())[0]
    torch.testing.assert_close(gradient[:, 1], expected.sum(1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(5, 9), st.integers(0, 1000))
def test_laws(n_tokens: int, k: int, n_experts: int, seed: int):
    """Ranks have no order, tokens don't see each other, and gate weights scale."""
    made = weights(n_experts, 6, 5, seed=seed)
    hidden, ids, gate = choices(n_tokens, k, n_experts, 6, seed=seed)
    out, norms = experts(made, hidden, ids, gate, norms=True)
    assert norms is not None
    turned, turned_norms = experts(made, hidden, ids.flip(1), 2 * gate.flip(1), norms=True)
    torch.testing.assert_close(turned, 2 * out)
    torch.testing.assert_close(turned_norms, norms.flip(1))
    torch.testing.assert_close(experts(made, hidden.flip(0), ids.flip(0), gate.flip(0))[0], out.flip(0))
    bound = (gate * norms).sum(1)
    assert bool((out.norm(dim=1) <= bound * (1 + 1e-9)).all())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 70), st.integers(1, 4), st.sampled_from([1, 2, 16, 64]), st.randoms())
def test_sorted_blocks(n_experts: int, n_tokens: int, k: int, rows: int, random: Any):
    """Every pair that has an expert is in one block of that expert; nothing else is in any."""
    few = random.sample(range(n_experts + 1), random.randint(1, n_experts + 1))
    chosen = torch.tensor([[random.choice(few) for _ in range(k)] for _ in range(n_tokens)])
    blocks = sorted_blocks(chosen, n_experts, rows)
    seen = []
    for expert, first, end in zip(blocks.expert, blocks.first, blocks.end, strict=True):
        mine = blocks.order[int(first) : min(int(first) + rows, int(end))]
        assert (chosen.flatten()[mine] == expert).all()
        seen += mine.tolist()
    assert sorted(seen) == (chosen.flatten() < n_experts).nonzero().flatten().tolist()
    assert blocks.expert.min() >= 0 and blocks.expert.max() < n_experts


def test_blocks_are_as_many_for_all_choices():
    sizes = {len(sorted_blocks(torch.randint(0, 9, (50, 2)), 8, 16).order) for _ in range(5)}
    assert len(sizes) == 1


def test_single_blocks():
    blocks = single_blocks(torch.tensor([[2, 3], [0, 3]]), 3)
    assert blocks.order.tolist() == [0, 1, 2, 3] and blocks.expert.tolist() == [2, 2, 0, 2]
    assert (blocks.end - blocks.first).tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"hidden": torch.zeros(5, 9)}, ValueError, r"hidden has shape \(5, 9\); expected \(T, 8\)"),
        ({"ids": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, r"ids have shape \(4, 2\); expected \(5, k\)"),
        ({"gate": torch.zeros(5, 3)}, ValueError, r"gate has shape \(5, 3\); expected that of ids, \(5, 2\)"),
        ({"ids": torch.zeros(5, 2)}, TypeError, "ids are torch.float32; expected integers"),
        ({"hidden": torch.zeros(5, 8, dtype=torch.int64)}, TypeError, "hidden is torch.int64; expected floats"),
        ({"gate": torch.zeros(5, 2, device="meta")}, ValueError, "gate are on meta, hidden on cpu"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'; expected 'auto', 'torch', 'cpu' or 'triton'"),
        ({"backend": "triton"}, ValueError, "backend 'triton': it takes .* not float64. Take backend='torch'"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], says: str):
    hidden, ids, gate = choices(5, 2, 4, 8)
    arguments = {"hidden": hidden, "ids": ids, "gate": gate} | changes
    with pytest.raises(error, match=says):
        experts(weights(4, 8, 6), **arguments)


def test_auto_takes_what_can_do_it():
    """Gradients and float64 are left to the reference, which alone has them."""
    made = weights(4, 8, 6, torch.float32)
    hidden, ids, gate = choices(5, 2, 4, 8, torch.float32)
    hidden.requires_grad_()
    assert by_any_backend(made, hidden, ids, gate)[0].requires_grad
    assert by_any_backend(weights(4, 8, 6), *choices(5, 2, 4, 8))[0].dtype == torch.float64
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"backend '{backend}': it has no gradients.*Take backend='torch'"):
            by_any_backend(made, hidden, ids, gate, backend=backend)


def test_no_tokens():
    out, norms = experts(weights(4, 8, 6), *choices(0, 2, 4, 8), norms=True)
    assert out.shape == (0, 8) and norms is not None and norms.shape == (0, 2)
