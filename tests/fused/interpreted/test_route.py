"""The kernel of `route` in Triton's interpreter, against the reference in float64 and against laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused.gatings import GATINGS, correction, logits, some
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.transaction import to_fixed
from workbench_kernels.jit import jit, tl
from workbench_kernels.route import FULL_SCALE, Gating, Record, Routed, route
from workbench_kernels.route_kernel import TILES, Tile, row_start

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the rows of a tile beyond the last token
NUMBERS = ("entropy", "log_partition", "margin")


def agree(made: Routed, wanted: Routed, weights: float = 2e-6, numbers: float = 4e-6) -> None:
    assert torch.equal(made.experts, wanted.experts)
    torch.testing.assert_close(made.weights.double(), wanted.weights.double(), atol=1e-7, rtol=weights)
    for name in NUMBERS:
        torch.testing.assert_close(
            getattr(made, name).double(), getattr(wanted, name), atol=numbers, rtol=numbers, equal_nan=True
        )


def both(z: torch.Tensor, k: int, gating: Gating, **options: Any) -> tuple[Routed, Routed]:
    """By the kernel, with the largest tile, which the interpreter is fastest with; and by the reference in float64."""
    exact = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    return route(z, k, gating, backend="triton", tile=TILES[-1], **options), route(
        z.double(), k, gating, backend="torch", **exact
    )


@pytest.mark.parametrize("tokens, n_experts, k", [(1, 60, 4), (63, 8, 1), (7, 384, 8), (1000, 60, 6)])
@pytest.mark.parametrize("name", GATINGS)
def test_the_kernel_is_the_reference(name: str, tokens: int, n_experts: int, k: int) -> None:
    agree(*both(logits(tokens, n_experts), k, GATINGS[name], correction=correction(name, n_experts)))


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "minimax_m2"])
def test_all_experts(name: str) -> None:
    for n_experts in (1, 7, 60):
        made, wanted = both(logits(9, n_experts), n_experts, GATINGS[name], correction=correction(name, n_experts))
        agree(made, wanted)
        assert made.margin.isnan().all()


@pytest.mark.parametrize("name", GATINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(name: str, dtype: torch.dtype) -> None:
    gating = GATINGS[name]
    if gating.rounded:
        pytest.skip("has a test of its own")
    # Different logits in every row, though there are few numbers in half precision.
    z = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i)) for i in range(63)]).to(dtype) / 8
    made, wanted = both(z, 6, gating, correction=correction(name, 60))
    assert made.weights.dtype == (dtype if gating.weights == "logits" else torch.float32)
    # The interpreter cuts bits off where a GPU rounds to bfloat16.
    step = torch.finfo(dtype).eps if gating.weights == "logits" else 0
    agree(made, wanted, weights=2e-6 + step)


def test_scores_in_half_precision_are_ranked_as_they_are_rounded() -> None:
    z = logits(63, 60).half()
    gating = GATINGS["mistral4"]
    made, wanted = (route(z, 6, gating, backend=backend) for backend in ("triton", "torch"))
    ranks = z.softmax(-1)
    # Rounding makes equals of some, and torch breaks their ties as it likes.
    assert torch.equal(ranks.gather(1, made.experts), ranks.gather(1, wanted.experts).sort(descending=True).values)
    torch.testing.assert_close(made.margin, wanted.margin, atol=1e-7, rtol=0, equal_nan=True)


@pytest.mark.parametrize("select", ["scores", "logits"])
def test_of_equals_the_lowest_ids_come_first(select: Any) -> None:
    z = torch.randint(0, 3, (100, 60), generator=torch.Generator().manual_seed(0)).float()
    made = route(z, 7, Gating(select=select), backend="triton")
    assert torch.equal(made.experts, z.sort(dim=-1, descending=True, stable=True).indices[:, :7])
    # torch has the same logits in the same order, whichever experts it takes them from
    assert torch.equal(z.gather(1, made.experts), z.topk(7).values)
    zeros = torch.zeros(3, 8)
    zeros[:, ::2] = -0.0
    assert torch.equal(route(zeros, 5, Gating(select=select), backend="triton").experts, torch.arange(5).expand(3, 5))


def test_infinities() -> None:
    z = logits(9, 60)
    z[:, 10:] = -torch.inf
    z[0, 1:10] = -torch.inf  # one expert takes all
    for name in ("olmoe", "gpt_oss", "minimax_m2", "deepseek_v4"):
        made, wanted = both(z, 4, GATINGS[name], correction=correction(name, 60))
        torch.testing.assert_close(made.experts[1:], wanted.experts[1:])
        torch.testing.assert_close(made.weights.double(), wanted.weights, atol=1e-6, rtol=1e-5, equal_nan=True)
        assert made.entropy[0] == 0
        torch.testing.assert_close(made.entropy.double(), wanted.entropy, atol=1e-5, rtol=1e-5)
    extreme = torch.tensor([[1e4, -1e4, 0.0, 3e38], [-1e4, -2e4, -1.5e4, -3e4]])
    for scoring in ("softmax", "sigmoid", "sqrt-softplus"):
        made, wanted = both(extreme, 2, Gating(scoring))
        torch.testing.assert_close(made.entropy.double(), wanted.entropy, atol=1e-5, rtol=1e-5)
        assert not made.weights.isnan().any()


def test_logits_that_are_not_numbers_give_valid_ids() -> None:
    z = logits(5, 60)
    z[2] = torch.nan
    z[3, 7] = torch.nan
    made = route(z, 6, GATINGS["deepseek_v3"], backend="triton")
    assert made.experts.min() >= 0 and made.experts.max() < 60
    assert all(len(set(row)) == 6 for row in made.experts.tolist())
    assert not made.weights[[0, 1, 4]].isnan().any()


# -- edits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATINGS)
def test_edits(name: str) -> None:
    z, rows = logits(63, 60, size=1.0), torch.arange(63) % 3 != 0
    add = torch.zeros(60)
    add[:5], add[7] = torch.tensor([3.0, -1.0, 0.5, -torch.inf, 2.0]), -torch.inf
    given = {"correction": correction(name, 60), "add": add, "forced": some(60, 20), "masked": some(60, 0, 8, 9)}
    made, wanted = both(z, 6, GATINGS[name], rows=rows, **given)
    agree(made, wanted)
    plain = route(z, 6, GATINGS[name], correction=given["correction"], backend="triton", tile=TILES[-1])
    for field in ("experts", "weights", "entropy", "margin"):
        assert torch.equal(getattr(made, field)[~rows], getattr(plain, field)[~rows])
    edited = made.experts[rows]
    assert (edited[:, 0] == 20).all()
    assert not torch.isin(edited, torch.tensor([0, 3, 7, 8, 9])).any()


def test_a_masked_logit_is_masked_under_a_bias_too() -> None:
    add, bias = torch.zeros(8), torch.zeros(8)
    add[2], bias[2] = -torch.inf, 10
    made = route(logits(30, 8), 3, Gating("sigmoid"), correction=bias, add=add, backend="triton")
    assert not (made.experts == 2).any()


@pytest.mark.parametrize("name", ["deepseek_v3", "mistral4"])
def test_groups_with_too_few_experts_are_filled_with_the_best_of_the_others(name: str) -> None:
    masked = ~some(16, 1, 2, 6, 12, 13)  # four in the two best groups, one in another
    made, wanted = both(logits(63, 16), 5, GATINGS[name], masked=masked)
    agree(made, wanted)
    assert not masked[made.experts].any()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_laws(data: Any) -> None:
    n_experts = data.draw(st.integers(2, 19))
    k = data.draw(st.integers(1, n_experts))
    tokens = data.draw(st.integers(0, 3))
    spare = st.sets(st.integers(0, n_experts - 1), max_size=n_experts - k)
    masked = some(n_experts, *data.draw(spare))
    forced = some(n_experts, *sorted(data.draw(spare))[:k]) & ~masked
    scoring = data.draw(st.sampled_from(["softmax", "sigmoid", "sqrt-softplus"]))
    select = data.draw(st.sampled_from(["scores", "logits"]))
    z = torch.randint(-3, 4, (tokens, n_experts), generator=torch.Generator().manual_seed(k)).float()
    made = route(z, k, Gating(scoring, select, renormalise=True), forced=forced, masked=masked, backend="triton")
    for token in range(tokens):
        chosen = made.experts[token].tolist()
        order = sorted(
            range(n_experts), key=lambda e: (bool(masked[e]), not forced[e], -float(z[token, e]) * (not forced[e]), e)
        )
        assert chosen == order[:k]
        assert abs(float(made.weights[token].sum()) - 1) < 1e-5
    assert ((made.entropy >= 0) & (made.entropy <= torch.tensor(n_experts).log() + 1e-5)).all()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, k", [(1, 1), (63, 5), (1000, 3)])
def test_everything_is_written_and_nothing_else(tokens: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are poisoned, and lie between guards."""
    guard, buffers, empty = 64, [], torch.empty

    def poison(dtype: torch.dtype) -> float:
        return float("nan") if dtype.is_floating_point else 199

    def guarded(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> torch.Tensor:
        size = torch.Size(shape).numel()
        whole = empty(size + 2 * guard, dtype=dtype).fill_(poison(dtype))
        buffers.append((whole, size))
        return whole[guard : guard + size].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    record = Record.empty(tokens, k, 60)
    tile = TILES[-1 if tokens > 100 else 0]
    made = route(logits(tokens, 60), k, Gating(), record=record, backend="triton", tile=tile)
    monkeypatch.undo()
    assert len(buffers) == 6
    for whole, size in buffers:
        wide = whole.to(torch.float64)
        outside = torch.cat([wide[:guard], wide[guard + size :]])
        assert (outside.isnan() if whole.is_floating_point() else outside == 199).all()
    assert (made.experts < 60).all() and not made.weights.isnan().any() and not made.margin.isnan().any()
    assert (record.experts < 60).all() and not made.entropy.isnan().any() and not record.scale.isnan().any()


@pytest.mark.parametrize("tokens, n_experts", [(63, 60), (20, 256), (9, 384)])
@pytest.mark.parametrize("scale", [1.0, 2.5, 1e-9, 300.0])
def test_the_compact_record_is_what_a_trace_stores(tokens: int, n_experts: int, scale: float) -> None:
    for gating in (Gating(renormalise=True, scale=scale), Gating("sigmoid", scale=scale)):
        record = Record.empty(tokens, 4, n_experts)
        made = route(logits(tokens, n_experts), 4, gating, record=record, backend="triton", tile=TILES[-1])
        fixed, scales = to_fixed(made.weights.numpy())
        assert torch.equal(record.experts.long(), made.experts)
        assert record.experts.dtype == (torch.uint8 if n_experts <= 256 else torch.uint16)
        assert record.weights.numpy().tolist() == fixed.tolist()
        assert record.scale.numpy().tolist() == scales.tolist()
        assert made.entropy is record.entropy and made.margin is record.margin


def test_halves_are_counted_to_even() -> None:
    """The count of a weight that lies exactly between two: through top-1 of one expert, whose weight is the scale."""
    for numerator in (1, 3, 5, 65533 * 2 + 1):
        record = Record.empty(1, 1, 1)
        weight = numerator / 2 / FULL_SCALE
        made = route(torch.zeros(1, 1), 1, Gating(scale=weight), record=record, backend="triton")
        assert record.weights.tolist() == to_fixed(made.weights.numpy())[0].tolist()


def test_rows_of_a_wider_matrix() -> None:
    wide = logits(63, 70)
    agree(*both(wide[:, 3:63], 4, Gating()))
    agree(*both(wide.T[:60, :].contiguous().T[:, :60], 4, Gating()))


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_gives_the_same(tile: Tile) -> None:
    z = logits(63, 60)
    made = route(z, 4, Gating(), backend="triton", tile=tile)
    assert torch.equal(made.experts, route(z, 4, Gating(), backend="triton").experts)


@jit
def _starts(rows, stride, out, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, row_start(tl.load(rows + place), stride))


def test_rows_begin_beyond_two_to_the_31() -> None:
    rows = torch.tensor([0, 1, 2**21 + 1, 2**31 - 1], dtype=torch.int32)
    out = torch.empty(4, dtype=torch.int64)
    launch: Any = _starts
    launch[(1,)](rows, 4096, out, N=4)
    assert out.tolist() == [row * 4096 for row in rows.tolist()]
