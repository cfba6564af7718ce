"""The experts' kernels compiled for every target: what they take of a processor, and that they use its matrix units."""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import cache
from math import inf
from typing import Any

import pytest

from workbench_kernels.compiled import SHARED, TARGETS, TENSOR_CORES, Compiled, compiled
from workbench_kernels.experts_kernel import CONFIGS, FLOAT32, Config, down_kernel, gate_up_kernel
from workbench_kernels.jit import tl

MOST_REGISTERS = {"sm_80": 255, "sm_90": 255, "sm_100": 255, "gfx942": 512}
ROWS = {"order": "*i64", "block_expert": "*i64", "block_first": "*i64", "block_end": "*i64"}
SIZES = {"top_k": "i32", "width": "i32", "n_neurons": "i32"}
DIVISIBLE = ("width", "n_neurons", "up_at", "hidden_stride", "expert_stride", "neuron_stride", "width_stride")
PLAIN = {"NAME": "silu", "ALPHA": 1.0, "LIMIT": None, "LIMIT_AFTER": False, "SHIFT": 0.0}
PLAIN |= {"GATE_CAP": None, "UP_CAP": None}
# What a family with everything asks for: gpt_oss.
GPT_OSS = {
    "transposed": True,
    "interleaved": True,
    "biased": True,
    "form": {"ALPHA": 1.702, "LIMIT": 7.0, "SHIFT": 1.0},
}


def tile(config: Config, dtype: str) -> dict[str, Any]:
    dot = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
    sizes = {name.upper(): asdict(config)[name] for name in ("rows", "columns", "depth")}
    return {**sizes, "DOT": dot, "PRECISION": "ieee"}


@cache
def gate_up(
    target: str, config: Config, dtype: str = "bf16", strides: str = "i64", transposed: bool = False,
    interleaved: bool = False, biased: bool = False, gated: bool = True, form: tuple[tuple[str, Any], ...] = (),
) -> Compiled:  # fmt: skip
    types = {"hidden": f"*{dtype}", "gate_up": f"*{dtype}", "inner": f"*{dtype}", "bias": f"*{dtype}", **ROWS, **SIZES}
    types |= {"up_at": "i32", "bias_stride": "i32"}
    types |= dict.fromkeys(("hidden_stride", "expert_stride", "neuron_stride", "width_stride"), strides)
    constants = {"GATED": gated, "STEP": 2 if interleaved else 1, "BIASED": biased, **PLAIN, **dict(form)}
    return make(
        gate_up_kernel, types, constants, "neuron_stride" if transposed else "width_stride", target, config, dtype
    )


@cache
def down(
    target: str, config: Config, dtype: str = "bf16", strides: str = "i64", transposed: bool = False,
    biased: bool = False, scaled: bool = False, add: bool = True, store: bool = False,
) -> Compiled:  # fmt: skip
    types = {"inner": f"*{dtype}", "down": f"*{dtype}", "bias": f"*{dtype}", "scale": f"*{dtype}", **ROWS, **SIZES}
    types |= {"gate": "*fp32", "out": "*fp32", "squares": "*fp32", "bias_stride": "i32"}
    types |= dict.fromkeys(("expert_stride", "neuron_stride", "width_stride"), strides)
    constants = {"BIASED": biased, "SCALED": scaled, "ADD": add, "STORE": store, "SQUARES": True}
    return make(down_kernel, types, constants, "width_stride" if transposed else "neuron_stride", target, config, dtype)


def make(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], one: str, target: str, config: Config, dtype: str
) -> Compiled:
    """Compiled as a launch compiles it: a stride of 1 and arguments that are None are constants."""
    constants = {**constants, **tile(config, dtype), one: 1}
    constants |= {name: None for name, there in (("bias", "BIASED"), ("scale", "SCALED")) if not constants.get(there)}
    constants = {name: value for name, value in constants.items() if name != "scale" or "scale" in types}
    types = {name: kind for name, kind in types.items() if name not in constants}
    return compiled(kernel, types, constants, target, config.warps, config.stages, DIVISIBLE)


def check(made: Compiled, target: str) -> None:
    assert made.spills == 0
    assert 0 < made.registers <= MOST_REGISTERS[target]
    assert made.shared <= SHARED[target]


def both(target: str, config: Config, **options: Any) -> list[Compiled]:
    form = tuple(options.pop("form", {}).items())
    only = {name: value for name, value in options.items() if name not in ("interleaved", "gated")}
    return [gate_up(target, config, form=form, **options), down(target, config, **only)]


@pytest.mark.parametrize("rows", CONFIGS)
@pytest.mark.parametrize("target", TARGETS)
def test_defaults(target: str, rows: float):
    """No spills, and matrix units: wgmma and tcgen05 take 64 rows and more, fewer are left to mma.sync."""
    config = CONFIGS[rows]
    instructions = TENSOR_CORES["sm_80" if target != "gfx942" and config.rows < 64 else target]
    for made in both(target, config):
        check(made, target)
        assert re.search(instructions, made.text)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [16, inf])
def test_gpt_oss(target: str, rows: float):
    for made in both(target, CONFIGS[rows], **GPT_OSS):
        check(made, target)


@pytest.mark.parametrize("target", TARGETS)
def test_float32(target: str):
    for made in both(target, FLOAT32):
        check(made, target)
        assert "tf32" not in made.text and "xf32" not in made.text  # as exact as torch's default


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp16"},
        {"strides": "i32"},
        {"transposed": True},
        {"gated": False, "form": {"NAME": "relu2"}},
        {"form": {"NAME": "gelu"}},
        {"form": {"NAME": "gelu_tanh", "LIMIT": 10.0, "LIMIT_AFTER": True}},
        {"form": {"GATE_CAP": 4.0, "UP_CAP": 25.0}},
    ],
    ids=str,
)
def test_forms(target: str, options: dict[str, Any]):
    for made in both(target, CONFIGS[256], **options):
        check(made, target)
        assert re.search(TENSOR_CORES[target], made.text)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_sums_and_norms(target: str):
    """Stored outputs take no atomic additions, and what a norm needs before it is known adds nothing at all."""
    atomic = {"sm_90": r"(red|atom)\.\S*add", "gfx942": "atomic_add"}[target]
    added, stored, squared = (
        down(target, CONFIGS[256], scaled=True, add=add, store=store)
        for add, store in ((True, False), (False, True), (False, False))
    )
    for made, expected in ((added, True), (stored, False), (squared, False)):
        check(made, target)
        assert bool(re.search(atomic, made.text)) == expected
