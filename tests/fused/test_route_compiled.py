"""The kernel of `route` compiled for every target: registers, spills, address arithmetic."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from workbench_kernels.compiled import SHARED, TARGETS, Compiled, compiled
from workbench_kernels.route import Gating, constants
from workbench_kernels.route_kernel import TILES, WIDEST, Tile, route_kernel

OPTIONAL = {
    "correction": "*fp32", "add": "*fp32", "forced": "*i1", "masked": "*i1", "rows": "*i1",
    "compact_ids": "*u16", "compact_weights": "*u16", "compact_scale": "*fp32",
}  # fmt: skip
NUMBERS = {"T": "i32", "stride": "i32", "scale": "fp32", "epsilon": "fp32", "at_least": "fp32"}
OUT = {"ids": "*i64", "entropy": "*fp32", "log_partition": "*fp32", "margin": "*fp32"}
NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
GROUPED = Gating("sigmoid", renormalise=True, epsilon=1e-20, scale=2.5, groups=8, kept_groups=4, weights="float32")
CASES: dict[str, tuple[int, int, Gating, bool]] = {
    "softmax, 64 experts": (64, 8, Gating(), False),
    "top-k first, 32 experts": (32, 4, Gating(select="logits"), False),
    "sigmoid with groups, 256 experts": (256, 8, GROUPED, True),
    "sigmoid, 384 experts": (384, 8, Gating("sigmoid", renormalise=True, scale=2.8), True),
    "square root of softplus, 256 experts": (256, 6, Gating("sqrt-softplus", renormalise=True), True),
    "softmax, 512 experts": (512, 10, Gating(renormalise=True), True),
}
REGISTERS = {"sm_80": 128, "sm_90": 128, "sm_100": 128, "gfx942": 128}
"""A thread's, at most: four programs of 128 threads fit into the 65,536 registers of a multiprocessor."""


def built(
    target: str,
    n_experts: int,
    k: int,
    gating: Gating,
    full: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    tile: Tile = TILES[0],
    **numbers: str,
) -> Compiled:
    """full: with a correction bias, every edit and a record."""
    types = OUT | NUMBERS | {"logits": NAMES[dtype], "weights": NAMES[dtype]} | (OPTIONAL if full else {}) | numbers
    fixed: dict[str, Any] = dict.fromkeys(OPTIONAL, None) if not full else {}
    fixed |= constants(n_experts, k, gating, dtype, None) | {"TOKENS": tile.tokens(n_experts)}
    return compiled(route_kernel, types, fixed, target, num_warps=tile.warps(n_experts))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(target: str, case: str) -> None:
    made = built(target, *CASES[case])
    print(f"{target}, {case}: {made.registers} registers, {made.shared} bytes shared")
    assert made.spills == 0
    assert made.registers <= REGISTERS[target]
    assert made.shared <= SHARED[target] // 4


@pytest.mark.parametrize("target", TARGETS)
def test_the_widest_row_and_all_of_the_experts_fit(target: str) -> None:
    assert built(target, WIDEST, 8, Gating()).spills == 0
    assert built(target, 512, 512, Gating()).spills == 0


@pytest.mark.parametrize("tile", TILES[1:])
def test_every_tile_compiles_without_spills(tile: Tile) -> None:
    for case in CASES.values():
        assert built("sm_90", *case, tile=tile).spills == 0


@pytest.mark.parametrize("dtype", NAMES)
def test_every_dtype_compiles_with_every_edit(dtype: torch.dtype) -> None:
    assert built("sm_90", 60, 4, Gating(rounded=True), full=True, dtype=dtype).spills == 0


def test_addresses_are_computed_in_64_bits() -> None:
    """With strides that fit 32 bits, and with those that don't: rows are multiplied in int64 either way."""
    for numbers in ({}, {"stride": "i64", "T": "i64"}):
        made = built("sm_90", 60, 8, Gating(), full=True, **numbers)
        products = re.findall(r"arith\.muli .*?: \S*?(i\d+)>? loc", made.asm["ttir"])
        assert len(products) >= 3 and set(products) == {"i64"}
