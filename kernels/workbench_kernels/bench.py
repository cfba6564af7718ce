"""Measure the kernels on a GPU; without one, count what they have to do.

    python kernels/bench.py                what a GPU can be measured by: bytes, operations; and on one, times
    python kernels/bench.py --compiled     registers, spills and shared memory, from the compilers; needs no GPU

On a GPU nothing is timed before every kernel, in every configuration that is tried, gave the right results at every
shape (`agreement`). Times are medians of `triton.testing.do_bench`. The roof is that of the device itself: bandwidth of
a copy of 1 GiB, throughput of a product of 8192 × 8192 in bfloat16. The last line is JSON with all figures.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from workbench_kernels.agreement import Backend
from workbench_kernels.roofline import Work
from workbench_kernels.shapes import SHAPES, SMALL_SHAPES, SMALL_TOKENS, TOKENS, Inputs, Shape, experts_module, inputs
from workbench_kernels.timing import Timer, cases, check, do_bench, measure, measured_roof, works

UNMEASURED = "not measured on a GPU yet"
DTYPE = torch.bfloat16
ROOM = 1.3
"""A layer is measured where its weights, so many times, fit into the device's free memory."""


def run(
    quick: bool = False,
    device: str | torch.device | None = None,
    timer: Timer = do_bench,
    backend: Backend = "triton",
) -> dict[str, Any]:
    """Print tables, and return all figures. `device` None is the GPU if there is one, else nothing is measured.

    AssertionError, and no times, if a kernel's results are wrong. quick: small shapes, to see that it runs.
    """
    if device is None and torch.cuda.is_available():
        device = "cuda"
    counted = counts()
    print(table_of_counts(counted))
    result: dict[str, Any] = {
        "bench": "kernels",
        "device": _name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": _versions(),
        "counted": counted,
        "measured": None,
    }
    if device is None:
        print(f"\nTimes: {UNMEASURED}.")
    else:
        result["measured"] = _measured(quick, torch.device(device), timer, backend)
    return result


# -- counted -----------------------------------------------------------------------------------------------------------


def counts() -> list[dict[str, Any]]:
    """A row a shape, number of tokens and kernel: bytes, operations, operations a byte, experts that are hit."""
    rows = []
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            ids = inputs(shape, tokens).ids
            for kernel, work in works(shape, ids, DTYPE).items():
                row = {"shape": name, "tokens": tokens, "hit": len(ids.unique()), "kernel": kernel}
                numbers = {"read": work.read, "written": work.written, "products": work.products, "others": work.others}
                rows.append(row | numbers | {"intensity": float(f"{work.intensity:.3g}")})
    return rows


def table_of_counts(counted: list[dict[str, Any]]) -> str:
    """In Markdown: a row a shape and number of tokens, a column a kernel."""
    kernels = list(dict.fromkeys(row["kernel"] for row in counted))
    lines = [
        "| layer | tokens | experts hit | " + " | ".join(kernels) + " |",
        "|---|---:|---:|" + "---:|" * len(kernels),
    ]
    for shape, tokens, hit in dict.fromkeys((row["shape"], row["tokens"], row["hit"]) for row in counted):
        cells = []
        for row in counted:
            if (row["shape"], row["tokens"]) == (shape, tokens):
                work = Work(row["read"], row["written"], row["products"], row["others"])
                cells.append(f"{_short(work.moved, 'B')} · {_short(work.operations)} · {work.intensity:.3g}")
        lines.append(f"| {shape} | {tokens:,} | {hit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(number: float, unit: str = "") -> str:
    """Three digits, a decimal prefix and the unit."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{number:.0f} {unit}".rstrip()


# -- measured ----------------------------------------------------------------------------------------------------------


def _measured(quick: bool, device: torch.device, timer: Timer, backend: Backend) -> dict[str, Any]:
    shapes = SMALL_SHAPES if quick else SHAPES
    kept = {name: shape for name, shape in shapes.items() if _fits(shape, device)}
    skipped = {
        name: f"needs {ROOM * shape.weight_bytes(DTYPE) / 1e9:.0f} GB of free memory"
        for name, shape in shapes.items()
        if name not in kept
    }
    for name, reason in skipped.items():
        print(f"{name}: {reason}; not measured.")
    agreed = []
    with torch.inference_mode():
        for where, shape, given, module in _each(kept, quick, device):
            agreed += [where | {"kernel": case.kernel} | check(case) for case in cases(shape, given, module, backend)]
        print(f"\nAll results agree. {_name(device)}:")
        roof = measured_roof(device, timer, DTYPE, quick)
        print(f"copies {roof.bandwidth / 1e9:,.0f} GB/s, multiplies {roof.peak / 1e12:,.1f} TFLOP/s in {DTYPE}")
        rows = []
        for where, shape, given, module in _each(kept, quick, device):
            for case in cases(shape, given, module, backend):
                rows.append(where | measure(case, roof, timer))
                _show(rows[-1])
    return {"roof": vars(roof), "skipped": skipped, "agreement": agreed, "times": rows}


def _each(
    shapes: dict[str, Shape], quick: bool, device: torch.device
) -> Iterator[tuple[dict[str, Any], Shape, Inputs, nn.Module]]:
    """Every shape at every number of tokens; a layer's weights are there once."""
    for name, shape in shapes.items():
        module = experts_module(shape, device, DTYPE)
        for tokens in SMALL_TOKENS if quick else TOKENS:
            yield {"shape": name, "tokens": tokens}, shape, inputs(shape, tokens, device, DTYPE), module
        del module


def _fits(shape: Shape, device: torch.device) -> bool:
    return device.type == "cpu" or torch.cuda.mem_get_info(device)[0] > ROOM * shape.weight_bytes(DTYPE)


def _show(row: dict[str, Any]) -> None:
    over = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in row["over"].items())
    best = row["sweep"][row["best"]]
    print(
        f"{row['shape']:<12} {row['tokens']:>6,} tokens  {row['kernel']:<16} {row['ms']:>9.4f} ms  "
        f"{row['roof']:>6.1%} of the roof  {over}  best {best:.4f} ms: {row['best']}"
    )


def _name(device: str | torch.device | None) -> str:
    if device is not None and torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line of kernels/bench.py."""
    parser = argparse.ArgumentParser(description="Measure the kernels on a GPU; without one, count their work.")
    parser.add_argument("--quick", action="store_true", help="small shapes: does it run, not how fast")
    parser.add_argument("--compiled", action="store_true", help="registers, spills and shared memory instead")
    chosen = parser.parse_args(arguments)
    if chosen.compiled:
        from workbench_kernels import resources  # compiles, so it wants Triton

        print(resources.table(resources.measured()))
    else:
        print(json.dumps(run(chosen.quick)))
