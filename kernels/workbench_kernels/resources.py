"""What the kernels take of a GPU in their default configurations, read from the compilers; no GPU is needed.

print(table(measured()))
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from workbench_kernels.compiled import TARGETS, Compiled, launched
from workbench_kernels.expert_weights import ExpertWeights
from workbench_kernels.experts import experts
from workbench_kernels.experts_kernel import CONFIGS, FLOAT32, Config
from workbench_kernels.route import route
from workbench_kernels.shapes import SHAPES, Shape
from workbench_kernels.tallies import tally

TOKENS = 4096
KERNELS = {"route_kernel": "route", "gate_up_kernel": "gate-up", "down_kernel": "down", "tally_kernel": "tally"}


def measured(targets: Collection[str] = tuple(TARGETS)) -> dict[str, dict[str, Compiled]]:
    """By kernel with its case, then by target."""
    found: dict[str, dict[str, Compiled]] = {}
    for case, call in calls().items():
        for target in targets:
            for kernel, made in launched(call, target).items():
                found.setdefault(f"{KERNELS[kernel]}, {case}", {})[target] = made
    return found


def table(found: dict[str, dict[str, Compiled]]) -> str:
    """In Markdown: a row a kernel, a column a target."""
    targets = list(next(iter(found.values())))
    lines = ["| kernel | " + " | ".join(targets) + " |", "|---|" + "---:|" * len(targets)]
    for kernel, by_target in found.items():
        cells = [f"{made.registers} · {made.spills} · {_kilobytes(made.shared)}" for made in by_target.values()]
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kilobytes(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size / 1024:.3g} kB"


def calls() -> dict[str, Callable[[], Any]]:
    """Launches of all kernels, by case. Tensors are on "meta": they have shapes, but no memory."""
    found: dict[str, Callable[[], Any]] = {name: _router(shape) for name, shape in SHAPES.items()}
    for config in CONFIGS.values():
        found[_said(config, "bfloat16")] = _layer(config, torch.bfloat16)
    found[_said(FLOAT32, "float32")] = _layer(FLOAT32, torch.float32)
    ids = torch.empty(TOKENS, 8, dtype=torch.int64, device="meta")
    found["load"] = lambda: tally(ids, 256, backend="triton")
    found["co-activation"] = lambda: tally(ids, 256, other=ids, n_other=256, backend="triton")
    return found


def _router(shape: Shape) -> Callable[[], Any]:
    logits = torch.empty(TOKENS, shape.n_experts, dtype=shape.logits, device="meta")
    correction = torch.empty(shape.n_experts, device="meta") if shape.corrected else None
    return lambda: route(logits, shape.top_k, shape.gating, correction=correction, backend="triton")


def _layer(config: Config, dtype: torch.dtype) -> Callable[[], Any]:
    shape = SHAPES["Qwen3-MoE"]
    n_experts, width, neurons = shape.n_experts, shape.width, shape.n_neurons

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    weights = ExpertWeights(empty(n_experts, 2 * neurons, width), empty(n_experts, width, neurons))
    ids = torch.empty(TOKENS, shape.top_k, dtype=torch.int64, device="meta")
    given = (empty(TOKENS, width), ids, empty(TOKENS, shape.top_k))
    return lambda: experts(weights, *given, norms=True, backend="triton", config=config)


def _said(config: Config, dtype: str) -> str:
    return f"{config.rows} × {config.columns} × {config.depth}, {config.warps} warps, {config.stages} stages, {dtype}"
