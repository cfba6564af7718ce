"""The kernel of `tallies` in Triton's interpreter against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench_kernels.jit import jit, tl, triton
from workbench_kernels.tallies import CONFIGS, INTEGERS, Config, place, tally

SMALL = Config(tokens=16, chunk=4, warps=1)


def by_hand(ids, n_experts, other=None, n_other=0, group=None, n_groups=1) -> np.ndarray:
    """Loops over sets."""
    out = np.zeros((n_groups, n_experts + 1, n_other + 1 if other is not None else 1), np.int64)
    for token in range(len(ids)):
        at = 0 if group is None else int(group[token])
        left = {int(i) for i in ids[token] if 0 <= i < n_experts}
        right = {0} if other is None else {int(j) for j in other[token] if 0 <= j < n_other}
        if not (0 <= at < n_groups and left and right):
            continue
        for i in left | {n_experts}:
            for j in right if other is None else right | {n_other}:
                out[at, i, j] += 1
    return out[:, :, 0] if other is None else out


def choices(n_tokens: int, k: int, n_experts: int, seed: int = 0, dropped: float = 0.1) -> torch.Tensor:
    """int64 (T, k): different experts, some of them missing, some tokens without any."""
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((n_tokens, n_experts)), axis=1)[:, :k]
    ids[random.random(ids.shape) < dropped] = -1
    ids[random.random(n_tokens) < dropped] = -1
    return torch.from_numpy(ids)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("n_tokens", "k", "n_experts"), [(0, 2, 4), (1, 1, 1), (1, 2, 3), (63, 3, 60), (63, 8, 8), (130, 1, 384)]
)
def test_the_counts_of_odd_sizes_are_exact(backend, n_tokens: int, k: int, n_experts: int):
    ids, after = choices(n_tokens, k, n_experts, 1), choices(n_tokens, k, n_experts, 2)
    group = torch.from_numpy(np.random.default_rng(3).integers(-1, 4, n_tokens))  # −1 and 3 count nowhere
    options = {"group": group, "n_groups": 3}
    load = tally(ids, n_experts, **options, backend=backend, config=SMALL)
    assert np.array_equal(load.numpy(), by_hand(ids, n_experts, **options))
    for other in (ids, after):
        pairs = tally(ids, n_experts, other=other, n_other=n_experts, **options, backend=backend, config=SMALL)
        assert np.array_equal(pairs.numpy(), by_hand(ids, n_experts, other, n_experts, **options))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_counts_the_same(config: Config):
    ids, other = choices(1000, 4, 60, 1), choices(1000, 2, 7, 2)
    for given_other in ({}, {"other": other, "n_other": 7}):
        found = tally(ids, 60, **given_other, backend="triton", config=config)
        assert np.array_equal(found.numpy(), by_hand(ids, 60, **given_other))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_expert_taking_all_and_empty_ones(backend):
    ids = torch.full((1000, 1), 5)
    load = tally(ids, 60, backend=backend)
    assert load[0, 5] == load[0, 60] == 1000 and load.sum() == 2000
    pairs = tally(ids, 60, other=ids, n_other=60, backend=backend)
    assert pairs[0, 5, 5] == pairs[0, 5, 60] == pairs[0, 60, 5] == pairs[0, 60, 60] == 1000 and pairs.sum() == 4000


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_expert_of_every_token(backend):
    ids = torch.arange(12).repeat(63, 1)
    assert (tally(ids, 12, other=ids, n_other=12, backend=backend) == 63).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", list(INTEGERS))
def test_every_integer_and_any_stride(backend, dtype: torch.dtype):
    ids = choices(63, 3, 60, dropped=0)
    wanted = by_hand(ids, 60)
    wide = torch.zeros(63, 8, dtype=dtype)
    wide[:, 2:5] = ids.to(dtype)
    for laid_out in (ids.to(dtype), wide[:, 2:5], ids.to(dtype).t().contiguous().t()):
        assert np.array_equal(tally(laid_out, 60, backend=backend).numpy(), wanted)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_unsigned_ids_that_are_not_experts(backend):
    ids = torch.tensor([[65535, 65535], [3, 65535]], dtype=torch.uint16)
    assert tally(ids, 400, backend=backend).nonzero().tolist() == [[0, 3], [0, 400]]
    narrow = torch.zeros(2, 0, dtype=torch.uint8)
    assert not tally(narrow, 400, backend=backend).any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_counts_are_added_beyond_32_bits_and_nothing_beside_them_is_touched(backend):
    ids, large = choices(63, 2, 5), 1 << 40
    memory = torch.full((3, 2, 6), large, dtype=torch.int64)
    out = tally(ids, 5, group=torch.ones(63, dtype=torch.int64), n_groups=2, out=memory[1], backend=backend)
    assert out.data_ptr() == memory[1].data_ptr()
    assert (memory[0] == large).all() and (memory[2] == large).all() and (memory[1, 0] == large).all()
    assert np.array_equal(memory[1, 1].numpy() - large, by_hand(ids, 5)[0])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_both_backends_agree_and_parts_add_up(data):
    n_experts, n_other = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    n_tokens, k = data.draw(st.integers(0, 40)), data.draw(st.integers(1, n_experts))
    ids = choices(n_tokens, k, n_experts, data.draw(st.integers(0, 99)), dropped=0.3)
    other = choices(n_tokens, min(2, n_other), n_other, data.draw(st.integers(0, 99)), dropped=0.3)
    options = {"other": other, "n_other": n_other}
    whole = tally(ids, n_experts, **options, backend="torch")
    cut = data.draw(st.integers(0, n_tokens))
    parts = tally(ids[:cut], n_experts, other=other[:cut], n_other=n_other, backend="triton", config=SMALL)
    tally(ids[cut:], n_experts, other=other[cut:], n_other=n_other, out=parts, backend="triton", config=SMALL)
    assert torch.equal(whole, parts)


@jit
def places(out, group, left, right, n_left, n_right):
    at = tl.arange(0, 4)
    tl.store(out + at, place(tl.load(group + at), tl.load(left + at), tl.load(right + at), n_left, n_right))


def test_places_beyond_32_bits():
    group = torch.tensor([0, 1, 70_000, 2**31 - 1], dtype=torch.int32)
    left, right = torch.tensor([0, 256, 255, 256]), torch.tensor([7, 256, 3, 256])
    out = torch.zeros(4, dtype=torch.int64)
    places[(1,)](out, group, left, right, 256, 256)
    wanted = [(g * 257 + i) * 257 + j for g, i, j in zip(group.tolist(), left.tolist(), right.tolist(), strict=True)]
    assert out.tolist() == wanted and wanted[-1] > 2**31
    assert triton is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3, 2)}, "ids is torch.float32; expected integers"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, r"ids has shape \(3,\)"),
        ({"other": torch.zeros(2, 2, dtype=torch.int64), "n_other": 4}, r"other has shape \(2, 2\); expected \(3, k\)"),
        ({"other": torch.zeros(3, 2, dtype=torch.int64)}, "n_other 0"),
        ({"group": torch.zeros(2, dtype=torch.int64)}, r"group has shape \(2,\); expected \(3,\)"),
        ({"n_groups": 0}, "n_groups 0"),
        ({"out": torch.zeros(1, 5)}, "out is torch.float32"),
        ({"out": torch.zeros(1, 4, dtype=torch.int64)}, r"expected \(1, 5\)"),
        ({"out": torch.zeros(1, 10, dtype=torch.int64)[:, ::2]}, "contiguous"),
        ({"backend": "numpy"}, "backend is 'numpy'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str):
    given_ids = change.pop("ids", torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises((TypeError, ValueError), match=message):
        tally(given_ids, 4, **change)
