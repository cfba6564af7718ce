"""The kernel of `tallies` compiled for every target."""

from __future__ import annotations

import re

import pytest
import torch

from workbench_kernels.compiled import SHARED, TARGETS, Compiled, compiled
from workbench_kernels.tallies import CONFIGS, Config, tally, tally_kernel

NUMBERS = ("n_tokens", "stride", "other_stride", "k", "other_k", "n_experts", "n_other", "n_groups")
REGISTERS = 96
"""A thread's, at most, at the default configuration: the kernel waits for memory, so many threads have to fit."""


def built(target: str, paired: bool, config: Config = CONFIGS[0], ids: str = "*i64", numbers: str = "i32") -> Compiled:
    types = {"ids": ids, "other": ids, "group": "*i64", "out": "*i64"} | dict.fromkeys(NUMBERS, numbers)
    constants = {"PAIRED": paired, "GROUPED": True, "TOKENS": config.tokens, "CHUNK": config.chunk}
    return compiled(tally_kernel, types, constants, target, num_warps=config.warps)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_the_default_spills_nothing_and_adds_in_64_bits(target: str, paired: bool):
    made = built(target, paired)
    print(f"{target} {'pairs' if paired else 'load'}: {made.registers} registers, {made.shared} bytes shared")
    assert made.spills == 0 and made.registers <= REGISTERS and made.shared <= SHARED[target]
    assert re.search(r"global_atomic_add_x2" if target == "gfx942" else r"(atom|red)\.\S*add\.u64", made.text)


@pytest.mark.parametrize("config", CONFIGS[1:])
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_without_spills(target: str, config: Config):
    made = built(target, True, config)
    assert made.spills == 0 and made.shared <= SHARED[target]


def test_ids_of_32_bits_compile():
    assert built("sm_90", True, ids="*i32").spills == 0


@pytest.mark.parametrize("numbers", ["i32", "i64"])
def test_all_addresses_are_computed_in_64_bits(numbers: str):
    products = re.findall(r"arith\.muli .*: (\S+)", str(built("sm_90", True, numbers=numbers).asm["ttir"]))
    assert len(products) >= 4 and all(kind.rstrip(">").endswith("i64") for kind in products)


def test_auto_counts_cpu_tensors_in_torch():
    ids = torch.tensor([[0, 2], [2, -1], [-1, -1]])
    assert tally(ids, 3).tolist() == [[1, 0, 2, 2]]
    assert tally(ids, 3, other=ids, n_other=3)[0].tolist() == [[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 2, 2], [1, 0, 2, 2]]
