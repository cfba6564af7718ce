"""Ways of doing one thing, timed against each other: they take turns batch by batch, so that what else the machine does
falls on all of them alike, and are compared by ratios.
"""

import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from workbench.forward import next_token_nll
from workbench.models import Model

Ids = Callable[[], np.ndarray]
"""The ids of the last batch, sorted, as integers (layers, tokens, k). Reading them back is not timed."""
Way = Callable[[list[torch.Tensor], Path], Generator[None, None, Ids]]
"""Runs one batch a turn, keeping what it keeps in a folder; its last turn closes what it has open."""


def take_turns(
    ways: dict[str, Way], batches: list[torch.Tensor]
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds of each way's turns, one a batch and one to close; the ids that each saw in the last batch."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ids = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        running = {}
        for name, way in ways.items():
            own = Path(folder) / name
            own.mkdir()
            running[name] = way(batches, own)
        for turn in range(len(batches) + 1):
            order = list(ways)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                started = time.perf_counter()
                try:
                    next(running[name])
                except StopIteration as end:
                    ids[name] = end.value
                seconds[name].append(time.perf_counter() - started)
        return seconds, {name: read() for name, read in ids.items()}


def ratio(seconds: list[dict[str, list[float]]], name: str) -> dict[str, float]:
    """A way over the forward pass: of whole runs (median, lowest and highest round), and the median over batches."""
    runs = [sum(one[name]) / sum(one["forward"]) for one in seconds]
    pairs = [pair for one in seconds for pair in zip(one[name][1:-1], one["forward"][1:-1], strict=True)]
    result = {"run": median(runs), "lowest": min(runs), "highest": max(runs)}
    result["batch"] = median(mine / base for mine, base in pairs) if pairs else result["run"]
    return {key: round(value, 4) for key, value in result.items()}


def show(name: str, measured: dict[str, Any]) -> None:
    """Print a comparison: its size, and each way's ratios."""
    print(f"{name}: {measured['rounds']} rounds of {measured['tokens']:,} tokens, time over the forward pass alone")
    print(f"  {'':<12} {'run (lowest to highest)':<26} batch")
    for way, one in measured["ratio"].items():
        run = f"{one['run']:.3f} ({one['lowest']:.3f} to {one['highest']:.3f})"
        print(f"  {way:<12} {run:<26} {one['batch']:.3f}")


def step(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """The forward pass and the loss of each token, as `workbench.capture` has them."""
    logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return next_token_nll(logits, ids)


def forward(model: Model) -> Way:
    """The forward pass and the loss of each token, nothing else."""

    def way(batches: list[torch.Tensor], folder: Path) -> Generator[None, None, Ids]:
        for ids in batches:
            step(model, ids)
            yield
        return lambda: np.empty(0)

    return way
