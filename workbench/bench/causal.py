"""What patching costs: every expert of every layer of the demonstration model, for a pair of prompts of 64 tokens.

`seconds` is one call of `workbench.causal.patch`, wrapping, both plain runs and the gradient included; `estimate` one
without the exact patches; `hooks` the same patches in the same batches by plain PyTorch hooks, without nnsight; and
`over hooks` is (seconds - estimate) / hooks. Patches that change nothing aren't run in either way: `run` says how many
are. No figure is given unless both ways find the same effects.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from workbench import causal
from workbench.contributions import filler
from workbench.errors import InputError
from workbench.models import Model
from workbench.prompt_pairs import Pair, encoded

SOURCE, TARGET = (
    "Every day the people of the town went down to the river and looked at the water, and every day there was",
    "Jeden Tag gingen die Leute aus der Stadt zum Fluss hinunter und sahen auf das Wasser, und jeden Tag war da",
)
"""An English and a German text, repeated and cut to the wanted number of tokens."""
TOLERANCE = 1e-3
"""Logits: that far may effects differ, by rounding, where matrices are multiplied in other shapes."""


def patching(model: Model, quick: bool = False) -> dict[str, Any]:
    """Seconds and ratios as above, medians over rounds in which the ways take turns; {} without nnsight."""
    try:
        causal.check(model)
    except InputError as error:
        print(f"{error} Measured without patching.", file=sys.stderr)
        return {}
    length, rounds = (8, 1) if quick else (64, 3)
    pair = Pair(_cut(model, SOURCE, length), _cut(model, TARGET, length), (" the", " der"))
    frame = causal.patch(model, [pair])  # warms up, too
    changing = frame[frame["n_changed"] > 0]
    jobs = list(zip(changing["layer"].tolist(), changing["expert"].tolist(), strict=True))
    if not np.allclose(changing["effect"], by_hooks(model, pair, jobs), atol=TOLERANCE):
        raise AssertionError("patches by nnsight and by hooks have different effects: nothing was measured")
    ways: dict[str, Callable[[], object]] = {
        "seconds": lambda: causal.patch(model, [pair]),
        "estimate": lambda: causal.patch(model, [pair], exact=False),
        "hooks": lambda: by_hooks(model, pair, jobs),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - started)
    result = {name: round(median(seconds), 3) for name, seconds in taken.items()}
    ratios = [(a - b) / c for a, b, c in zip(taken["seconds"], taken["estimate"], taken["hooks"], strict=True)]
    return {"tokens": length, "patches": len(frame), "run": len(jobs), **result, "over hooks": round(median(ratios), 3)}


def show(measured: dict[str, Any]) -> None:
    """Print what `patching` returned."""
    if not measured:
        return
    print(
        f"patching {measured['patches']} pairs of layer and expert, {measured['tokens']} tokens: "
        f"{measured['seconds']:.2f} s by nnsight ({measured['over hooks']:.3f} × plain hooks), their estimate in "
        f"{measured['estimate']:.2f} s"
    )


def by_hooks(model: Model, pair: Pair, jobs: list[tuple[int, int]], batch_tokens: int = 4096) -> np.ndarray:
    """Effects of patching contributions of jobs (layer, expert): what `causal.patch` runs, by plain hooks."""
    source, target, answers = encoded(pair, model)
    ids = torch.tensor([source, target], device=model.device)
    effects = []

    def patched(layer: int, part: list[tuple[int, int, int]]) -> Callable[..., torch.Tensor]:
        number = model.layers[layer]
        place = causal._Place(layer, number.name, number.n_experts, filler(number), "experts", 0)
        mine = [(row, expert, -1) for row, its, expert in part if its == layer]

        def hook(module: Any, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor:
            given = causal._given((args, kwargs), len(part) + 2)
            return causal._patched(module.forward, given, out, mine, place)

        return hook

    def difference(rows: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(rows)
        out: Any = model.module(input_ids=rows, attention_mask=mask, use_cache=False, logits_to_keep=1)
        logits = out.logits[:, -1].double()
        return logits[:, answers[0]] - logits[:, answers[1]]

    step = max(1, batch_tokens // ids.shape[1] - 2)
    with torch.inference_mode():
        for start in range(0, len(jobs), step):
            part = [(row, *job) for row, job in enumerate(jobs[start : start + step], start=2)]
            handles = [
                model.layers[layer].experts.register_forward_hook(patched(layer, part), with_kwargs=True)
                for layer in {layer for _, layer, _ in part}
            ]
            try:
                found = difference(torch.cat([ids[:1], ids[1:].expand(len(part) + 1, -1)]))
            finally:
                for handle in handles:
                    handle.remove()
            effects.append((found[2:] - found[1]).cpu().numpy())
    return np.concatenate(effects)


def _cut(model: Model, text: str, length: int) -> str:
    """A text that has so many tokens."""
    ids = model.tokenizer(" ".join([text] * 4))["input_ids"][:length]
    return model.tokenizer.decode(ids)
