"""The experts' kernels in the interpreter, against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from fused.expert_cases import LAYOUTS, choices, oracle, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench_kernels import experts_kernel as kernels
from workbench_kernels.expert_weights import Activation, ExpertWeights
from workbench_kernels.experts import experts
from workbench_kernels.experts_kernel import Config, gate_up_kernel, offset
from workbench_kernels.jit import jit, tl

SMALL = Config(16, 16, 16, 4, 2)
WIDE = Config(128, 64, 64, 4, 2)
ERRORS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DISPATCH = {"sorted": False, "single": True}


@pytest.fixture(params=DISPATCH)
def dispatch(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways from choices to blocks."""
    monkeypatch.setattr(kernels, "few_tokens", lambda *_: DISPATCH[request.param])
    return request.param


def run(
    made: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor, config: Config = SMALL
) -> tuple[Tensor, Tensor]:
    out, norms = experts(made, hidden, ids, gate, norms=True, backend="triton", config=config)
    assert norms is not None
    return out, norms


def check(made: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor, config: Config = SMALL) -> None:
    """The kernels' sums and norms against the formula."""
    out, norms = run(made, hidden, ids, gate, config)
    expected, expected_norms = oracle(made, hidden, ids, gate)
    error = ERRORS[made.down_proj.dtype]
    assert out.dtype == hidden.dtype and norms.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error * float(expected.abs().max()))
    torch.testing.assert_close(norms.double(), expected_norms, rtol=error, atol=error)


def test_kernels_are_interpreted():
    assert "Interpreted" in type(gate_up_kernel).__name__


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dispatch: str):
    check(weights(3, 20, 18, torch.float32, **LAYOUTS[layout]), *choices(5, 2, 3, 20, torch.float32))


def test_sums_without_norms(dispatch: str):
    made = weights(3, 20, 18, torch.float32)
    chosen = choices(5, 2, 3, 20, torch.float32)
    out, norms = experts(made, *chosen, backend="triton", config=SMALL)
    assert norms is None
    torch.testing.assert_close(out.double(), oracle(made, *chosen)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ERRORS)
def test_dtypes(dtype: torch.dtype, dispatch: str):
    check(weights(3, 20, 18, dtype, biased=True), *choices(5, 2, 3, 20, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["gpt_oss", "not gated", "normed, biased"])
def test_layouts_in_half_precision(layout: str, dtype: torch.dtype):
    check(weights(3, 20, 18, dtype, **LAYOUTS[layout]), *choices(5, 2, 3, 20, dtype))


@pytest.mark.parametrize(
    "n_tokens, k, n_experts, width, n_neurons, config",
    [
        (1, 1, 1, 1, 1, SMALL),
        (1, 5, 5, 63, 7, SMALL),
        (63, 3, 60, 33, 17, WIDE),
        (63, 1, 3, 1, 63, WIDE),
        (1000, 1, 2, 40, 24, WIDE),
        (7, 4, 384, 17, 16, SMALL),
        (33, 6, 6, 16, 16, SMALL),
        (5, 2, 4, 200, 130, WIDE),
    ],
)
def test_sizes(n_tokens: int, k: int, n_experts: int, width: int, n_neurons: int, config: Config):
    made = weights(n_experts, width, n_neurons, torch.float32)
    check(made, *choices(n_tokens, k, n_experts, width, torch.float32), config=config)


@pytest.mark.parametrize("chosen", [0, 4])
def test_one_expert_takes_all(chosen: int, dispatch: str):
    hidden, _, gate = choices(19, 1, 5, 20, torch.float32)
    check(weights(5, 20, 18, torch.float32), hidden, torch.full((19, 1), chosen), gate)


def test_default_configurations():
    for dtype in ERRORS:
        made = weights(2, 70, 66, dtype)
        chosen = choices(40, 2, 2, 70, dtype)
        out, _ = experts(made, *chosen, backend="triton")
        expected, _ = oracle(made, *chosen)
        error = ERRORS[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=error, atol=error * float(expected.abs().max()))


def test_exact_integers(dispatch: str):
    """Small integers are exact in every dtype, and so is their sum, in any order."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    for dtype in ERRORS:
        made = weights(4, 19, 9, dtype, activation=Activation("relu"))
        made = replace(made, gate_up_proj=integers(4, 18, 19).sign().to(dtype), down_proj=integers(4, 19, 9).to(dtype))
        hidden = integers(7, 19).sign() * (torch.arange(19) < 3)  # |gate|, |up| ≤ 3
        ids = choices(7, 3, 4, 19)[1]
        gate = integers(7, 3).float()
        out, norms = run(made, hidden.float(), ids, gate)
        expected, expected_norms = oracle(made, hidden, ids, gate)
        assert torch.equal(out.double(), expected)
        assert torch.equal(norms.square().round().double(), expected_norms.square().round())


def test_what_is_no_expert_is_never_read(dispatch: str):
    """Ids far outside would be read far outside of the matrices."""
    made = weights(5, 20, 18, torch.float32)
    hidden, ids, gate = choices(12, 3, 5, 20, torch.float32)
    gone = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    expected, expected_norms = oracle(made, hidden, ids, gate * ~gone)
    for sentinel in (5, -(1 << 40)):
        marked = ids.masked_fill(gone, sentinel)
        out, norms = run(made, hidden, marked, gate)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norms.double(), expected_norms * ~gone, rtol=1e-5, atol=1e-5)
    nobody = torch.full_like(ids, -1)
    out, norms = run(made, hidden, nobody, gate)
    assert not out.any() and not norms.any()


def test_weight_zero_adds_nothing_and_has_its_norm(dispatch: str):
    made = weights(5, 20, 18, torch.float32, biased=True)
    hidden, ids, gate = choices(12, 3, 5, 20, torch.float32)
    broken = replace(made, down_proj=made.down_proj.clone())
    broken.down_proj[4] = torch.nan
    gate = gate.masked_fill(ids == 4, 0)
    gate[::2, 1] = 0
    expected, expected_norms = oracle(made, hidden, ids, gate)
    for asked in (False, True):
        out, norms = experts(broken, hidden, ids, gate, norms=asked, backend="triton", config=SMALL)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert norms is not None
    torch.testing.assert_close(norms[ids != 4].double(), expected_norms[ids != 4], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_token_stays_alone(value: float, dispatch: str):
    made = weights(2, 20, 18, torch.float32)
    hidden, ids, gate = choices(10, 2, 2, 20, torch.float32)
    expected, _ = oracle(made, hidden, ids, gate)
    hidden[7, 3] = value
    out, norms = run(made, hidden, ids, gate)
    others = torch.arange(10) != 7
    torch.testing.assert_close(out[others].double(), expected[others], rtol=1e-5, atol=1e-5)
    assert not out[7].isfinite().any() and not norms[7].isfinite().any() and norms[others].isfinite().all()


class Guarded:
    """torch whose `empty` and `zeros` lie between NaN, as `empty` itself is."""

    EDGE = 1000

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = math.prod(shape)
        self.buffers.append(torch.full((size + 2 * self.EDGE,), torch.nan, dtype=dtype, device=device))
        return self.buffers[-1][self.EDGE : self.EDGE + size].view(shape)

    def zeros(self, *shape: int, **options: Any) -> Tensor:
        return self.empty(*shape, **options).zero_()


@pytest.mark.parametrize("layout", ["gated", "normed"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_is_left_out_or_written_outside(
    layout: str, deterministic: bool, dispatch: str, monkeypatch: pytest.MonkeyPatch
):
    made = weights(5, 21, 19, torch.float32, **LAYOUTS[layout])
    hidden, ids, gate = choices(11, 3, 5, 21, torch.float32)
    expected, expected_norms = oracle(made, hidden, ids, gate)
    guarded = Guarded()
    monkeypatch.setattr(kernels, "torch", guarded)
    with determinism(deterministic):
        out, norms = run(made, hidden, ids, gate)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms.double(), expected_norms, rtol=1e-5, atol=1e-5)
    assert len(guarded.buffers) == 3
    for buffer in guarded.buffers:
        edge = torch.cat([buffer[: Guarded.EDGE], buffer[-Guarded.EDGE :]])
        assert edge.isnan().all() and not buffer[Guarded.EDGE : -Guarded.EDGE].isnan().any()


@contextmanager
def determinism(asked: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def test_strided_hidden_states():
    made = weights(3, 20, 18, torch.float32)
    hidden, ids, gate = choices(9, 2, 3, 20, torch.float32)
    expected, _ = oracle(made, hidden, ids, gate)
    for strided in (hidden.t().contiguous().t(), torch.cat([hidden, hidden], 1)[:, :20]):
        out, _ = experts(made, strided, ids, gate, backend="triton", config=SMALL)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 25), st.integers(1, 4), st.integers(4, 7), st.sampled_from(sorted(LAYOUTS)), st.integers(0, 99))
def test_any_choices(n_tokens: int, k: int, n_experts: int, layout: str, seed: int):
    """Repeated and missing experts included: the same as in torch."""
    made = weights(n_experts, 11, 9, torch.float32, seed, **LAYOUTS[layout])
    hidden, ids, gate = choices(n_tokens, k, n_experts, 11, torch.float32, seed)
    ids = torch.randint(-1, n_experts + 1, ids.shape, generator=torch.Generator().manual_seed(seed))
    out, norms = run(made, hidden, ids, gate)
    expected, expected_norms = experts(made, hidden, ids, gate, norms=True, backend="torch")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=3e-5)


@jit
def offsets_kernel(index, stride, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, offset(tl.load(index + at), stride))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("stride", [1, 4096, 1 << 20, 1 << 33])
def test_offsets_have_64_bits(integers: torch.dtype, stride: int):
    index = torch.tensor([0, 1, 383, 65537, (1 << 21) + 3, (1 << 29) - 1, 1 << 29, (1 << 29) + 7], dtype=integers)
    out = torch.empty(len(index), dtype=torch.int64)
    launch: Callable[..., Any] = offsets_kernel[(1,)]
    launch(index, stride, out, SIZE=len(index))
    assert out.tolist() == [int(i) * stride for i in index]


def test_no_gradients():
    made = weights(3, 20, 18, torch.float32)
    hidden, ids, gate = choices(9, 2, 3, 20, torch.float32)
    hidden.requires_grad_()
    with pytest.raises(ValueError, match="no gradients, and something here requires them. Take backend='torch'"):
        experts(made, hidden, ids, gate, backend="triton")
    with torch.no_grad():
        assert experts(made, hidden, ids, gate, backend="triton")[0].shape == hidden.shape


def test_no_tokens():
    out, norms = run(weights(4, 8, 6, torch.float32), *choices(0, 2, 4, 8, torch.float32))
    assert out.shape == (0, 8) and norms.shape == (0, 2) and norms.dtype == torch.float32
