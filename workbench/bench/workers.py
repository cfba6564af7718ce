"""`--engine ray` on one machine against one process that uses all of its cores: what the workers cost."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workbench import capture
from workbench.tracefile import Trace

MOST_TOKENS = 100_000


def workers(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of the demonstration model over as many tokens as `folder` has, at most 100,000, by both; rows compared.

    `ratio` is Ray's seconds over the single process's, the whole run with the start of the workers and the load of the
    file from their parts; `running` the same of what comes after the first texts are done, a token. Of each the best
    of `repeats`.
    """
    from workbench.engines import ray

    cores = os.cpu_count() or 1
    options: dict[str, Any] = {
        "max_tokens": min(MOST_TOKENS, Trace(folder).n_tokens),
        "mode": "overwrite",
        "run": "demo",
    }
    torch.set_num_threads(cores)
    single = [_timed(capture.trace, folder.with_name("single.duckdb"), options) for _ in range(repeats)]
    spread = [
        _timed(ray.trace, folder.with_name("spread.duckdb"), options | {"workers": cores}) for _ in range(repeats)
    ]
    same = _same_choices(Trace(folder.with_name("single.duckdb")), Trace(folder.with_name("spread.duckdb")))
    (one, one_running), (many, many_running) = (map(min, zip(*runs, strict=True)) for runs in (single, spread))
    return {
        "workers": cores,
        "tokens": Trace(folder.with_name("spread.duckdb")).n_tokens,
        "same_choices": same,
        "seconds": round(one, 1),
        "ray_seconds": round(many, 1),
        "ratio": round(many / one, 2),
        "running": round(many_running / one_running, 2),
    }


def _timed(trace: Callable[..., Trace], out: Path, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a run, and of a token once the first are done."""
    told: list[tuple[float, int]] = []
    started = time.perf_counter()
    trace(
        "demo", "udhr", out, long_texts="split", **options, progress=lambda n, _: told.append((time.perf_counter(), n))
    )
    seconds = time.perf_counter() - started
    (first, had), (last, has) = next(one for one in told if one[1]), told[-1]
    return seconds, (last - first) / (has - had)


def _same_choices(one: Trace, other: Trace) -> float:
    """Share of tokens and layers with the same experts. AssertionError below 0.999: threads change the last bits."""
    same = [(one.experts(layer) == other.experts(layer)).all(axis=1).mean() for layer in range(one.n_layers)]
    share = float(sum(same) / len(same))
    if share < 0.999:
        raise AssertionError(f"only {share:.4f} of the choices of the workers are those of one process")
    return round(share, 6)
