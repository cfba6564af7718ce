"""The kernels at one shape: what each has to do, how it is checked, what it is compared with, and how long it takes.

found = [case for case in cases(shape, inputs(shape, 64, "cuda"), module) if case.kernel == "route"]
check(found[0])
measure(found[0], roof, do_bench)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench_kernels import agreement, roofline
from workbench_kernels.agreement import Backend
from workbench_kernels.baselines import grouped_mm, plain_route, plain_statistics
from workbench_kernels.expert_weights import read
from workbench_kernels.experts import experts
from workbench_kernels.experts_kernel import CONFIGS, default_config, few_tokens, parts_across
from workbench_kernels.jit import triton
from workbench_kernels.roofline import Roof, Work
from workbench_kernels.route import Record, route
from workbench_kernels.route_kernel import TILES
from workbench_kernels.shapes import Inputs, Shape
from workbench_kernels.tallies import CONFIGS as TALLY_CONFIGS
from workbench_kernels.tallies import tally

Timer = Callable[[Callable[[], Any]], float]
"""Milliseconds of a call."""


@dataclass(frozen=True)
class Case:
    """A kernel on given inputs.

    work     what it has to do
    configs  to try, the default first
    run      it, in a configuration
    check    AssertionError if the results in a configuration are wrong; else by how much they differ
    others   what it is compared with, by name
    """

    kernel: str
    work: Work
    configs: tuple[Any, ...]
    run: Callable[[Any], Any]
    check: Callable[[Any], dict[str, float]]
    others: dict[str, Callable[[], Any]]


def works(shape: Shape, ids: Tensor, dtype: torch.dtype = torch.bfloat16, parts: int = 0) -> dict[str, Work]:
    """The work of each kernel for chosen experts int64 (T, k); parts: as of `roofline.down`."""
    (tokens, k), hit = ids.shape, len(ids.unique())
    sizes = (tokens, k, hit, shape.width, shape.n_neurons, dtype)
    shown = torch.zeros(tokens, shape.n_experts + 1).scatter_(1, ids.cpu(), 1.0)
    shown[:, -1] = 1
    return {
        "route": roofline.route(tokens, shape.n_experts, k, shape.gating, shape.logits, corrected=shape.corrected),
        "gate-up": roofline.gate_up(*sizes),
        "down": roofline.down(*sizes, parts=parts, stored=few_tokens(tokens, k, shape.n_experts)),
        "load": roofline.tally(tokens, k, hit + 1),
        "co-activation": roofline.tally(tokens, k, int((shown.T @ shown).count_nonzero()), k, same=True),
    }


def cases(shape: Shape, given: Inputs, module: nn.Module, backend: Backend = "auto") -> list[Case]:
    """Everything that is measured at a shape."""
    return [*_route(shape, given, backend), *_experts(shape, given, module, backend), *_tallies(shape, given, backend)]


def _route(shape: Shape, given: Inputs, backend: Backend) -> list[Case]:
    logits, k, gating, correction = given.logits, shape.top_k, shape.gating, given.correction
    record = Record.empty(len(logits), k, shape.n_experts, logits.device)
    plain = (logits, k, gating, correction)
    work = works(shape, given.ids)["route"]
    recorded = roofline.route(
        len(logits), shape.n_experts, k, gating, logits.dtype, corrected=shape.corrected, recorded=True
    )
    others = {
        "scores and top-k": lambda: plain_route(*plain),
        "the same with entropy and margin": lambda: plain_statistics(*plain),
    }

    def run(tile: Any, record: Record | None = None) -> Any:
        return route(logits, k, gating, correction=correction, record=record, backend=backend, tile=tile)

    return [
        Case("route", work, TILES, run, lambda tile: agreement.check_route(shape, given, backend, tile), others),
        Case("route, recorded", recorded, TILES[:1], lambda tile: run(tile, record), lambda _: {}, others),
    ]


def _experts(shape: Shape, given: Inputs, module: nn.Module, backend: Backend) -> list[Case]:
    weights, tokens = read(module), len(given.hidden)
    few = few_tokens(tokens, shape.top_k, shape.n_experts)
    default = default_config(1 if few else tokens * shape.top_k / shape.n_experts, weights)
    configs = (default, *(config for config in CONFIGS.values() if config != default))
    parts = parts_across(shape.width, default)
    work = [
        found["gate-up"] + found["down"]
        for found in (works(shape, given.ids, given.hidden.dtype, parts) for parts in (0, parts))
    ]
    others = {"grouped_mm": lambda: grouped_mm(module, given.hidden, given.ids, given.gate)}

    def run(config: Any, norms: bool = False) -> Any:
        given_rows = (given.hidden, given.ids, given.gate)
        return experts(weights, *given_rows, norms=norms, backend=backend, config=config)

    def check(config: Any) -> dict[str, float]:
        return agreement.check_experts(module, given, backend, config)

    return [
        Case("experts", work[0], configs, run, check, others),
        Case("experts, norms", work[1], configs[:1], lambda config: run(config, norms=True), lambda _: {}, others),
    ]


def _tallies(shape: Shape, given: Inputs, backend: Backend) -> list[Case]:
    found = works(shape, given.ids)

    def case(kernel: str, **pairs: Any) -> Case:
        def run(config: Any, backend: Backend = backend) -> Any:
            return tally(given.ids, shape.n_experts, **pairs, out=out, backend=backend, config=config)

        out = tally(given.ids, shape.n_experts, **pairs, backend="torch")
        return Case(
            kernel, found[kernel], TALLY_CONFIGS, run,
            lambda config: agreement.check_tally(shape.n_experts, given.ids, backend, config),
            {"torch": lambda: run(TALLY_CONFIGS[0], backend="torch")},
        )  # fmt: skip

    return [case("load"), case("co-activation", other=given.ids, n_other=shape.n_experts)]


def check(case: Case) -> dict[str, float]:
    """By how much results differ in the default configuration, after a check of all that the device has room for.

    AssertionError with the kernel and the configuration if they are wrong.
    """
    found: dict[str, float] = {}
    for config in case.configs:
        try:
            differ = case.check(config)
        except AssertionError as error:
            raise AssertionError(f"{case.kernel}, {config}: {error}. Nothing was measured.") from error
        except no_room():
            if config is case.configs[0]:
                raise
            continue
        found = found or differ
    return found


def measure(case: Case, roof: Roof, timer: Timer) -> dict[str, Any]:
    """Times in milliseconds, and what they achieve; `over` is the time over that of each of the others.

    roof   fraction of it that is achieved
    sweep  milliseconds by configuration, None where the device has no room for it
    """
    sweep: dict[str, float | None] = {}
    for config in case.configs:
        try:
            sweep[str(config)] = timer(lambda config=config: case.run(config))
        except no_room():
            sweep[str(config)] = None
    ms = sweep[str(case.configs[0])]
    assert ms is not None, "the default configuration was checked"
    fitting = {config: time for config, time in sweep.items() if time is not None}
    others = {name: timer(other) for name, other in case.others.items()}
    return {
        "kernel": case.kernel,
        "ms": _rounded(ms),
        "gb_per_s": _rounded(case.work.moved / ms / 1e6),
        "tflop_per_s": _rounded(case.work.products / ms / 1e9),
        "roof": _rounded(roof.fraction(case.work, ms / 1e3)),
        "others_ms": {name: _rounded(time) for name, time in others.items()},
        "over": {name: _rounded(ms / time) for name, time in others.items()},
        "sweep": {config: time and _rounded(time) for config, time in sweep.items()},
        "best": min(fitting, key=fitting.__getitem__),
    }


def measured_roof(device: str | torch.device, timer: Timer, dtype: torch.dtype, quick: bool = False) -> Roof:
    """Of a device: bytes of a copy, read and written, and operations of one large product, a second."""
    source = torch.empty(1 << (20 if quick else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = timer(lambda: target.copy_(source))
    size = 256 if quick else 8192
    left, right = torch.randn(2, size, size, dtype=dtype, device=device)
    product_ms = timer(lambda: left @ right)
    return Roof(bandwidth=2 * len(source) / copy_ms * 1e3, peak=2 * size**3 / product_ms * 1e3)


def do_bench(call: Callable[[], Any]) -> float:
    """Median of repetitions on a GPU, its cache cleared before each."""
    from triton import testing

    return float(testing.do_bench(call, return_mode="median"))  # type: ignore[arg-type]


def no_room() -> type[Exception]:
    """What Triton raises where a configuration takes more shared memory or registers than the device has."""
    if triton is None:
        return MemoryError
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")
