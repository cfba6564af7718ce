"""Checkpoints with fewer experts: the least important of every layer dropped.

    scores = analysis.importance(trace)                         # columns layer, expert, frequency, …
    prune("demo", scores, 16, "demo-16", score="frequency")

A configuration has one number of experts, so every layer keeps equally many. A router of groups (deepseek_v3, …) keeps
equally many of each group. The rows of the router, its biases and the factors of single experts follow their experts;
nothing is trained. A token gets top_k experts as before, or all that are left if those are fewer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.checkpoint import check_target, save
from workbench.errors import InputError
from workbench.models import Model, load
from workbench.subset import check, check_count, groups, subset

TABLES = (".csv", ".tsv", ".parquet")


def prune(
    model: Model | str | Path,
    importance: pd.DataFrame | str | os.PathLike,
    keep: int,
    out: str | os.PathLike,
    *,
    score: str = "score",
    overwrite: bool = False,
) -> pd.DataFrame:
    """Write a checkpoint with the `keep` most important experts of every layer.

    importance  table with a row a layer × expert and the columns layer, expert and `score`; or the name of a .csv, .tsv
                or .parquet file of one. Higher scores are kept; of equal ones the lower ids
    out         folder to make; InputError if it exists, unless `overwrite`

    With keep = E the checkpoint is the model, bit for bit. Returns one row a layer × expert: layer, expert, score,
    kept, became (its new id; -1 if dropped). InputError for tables that don't fit the model, a `keep` that can't be,
    and families whose experts can't be taken apart (`workbench.subset`).
    """
    loaded = ready(model, keep, out, overwrite)
    scores = read_scores(importance, loaded, score)
    chosen = best(loaded, scores, keep)
    save(subset(loaded, chosen), out, note("prune", loaded, score, chosen), overwrite=overwrite)
    return choices(scores, chosen)


def ready(model: Model | str | Path, keep: int, out: str | os.PathLike, overwrite: bool) -> Model:
    """The model, loaded, once everything that can be wrong with a request has been looked at."""
    loaded = model if isinstance(model, Model) else load(model)
    check_target(loaded, out, overwrite)
    check(loaded)
    check_count(loaded, keep)
    return loaded


def read_scores(importance: pd.DataFrame | str | os.PathLike, model: Model, score: str) -> np.ndarray:
    """The scores as float64 (n_layers, E). InputError unless every expert of the model has exactly one finite score."""
    table = importance if isinstance(importance, pd.DataFrame) else _read(Path(importance))
    missing = [name for name in ("layer", "expert", score) if name not in table]
    if missing:
        raise InputError(
            f"the importance table has no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}. Expected "
            "layer, expert and a score: name its column with --score."
        )
    n_layers, n_experts = len(model.layers), model.layers[0].n_experts
    if table.duplicated(["layer", "expert"]).any():
        row = table[table.duplicated(["layer", "expert"])].iloc[0]
        raise InputError(
            f"the importance table has several rows for layer {int(row['layer'])}, expert {int(row['expert'])}; "
            "expected one an expert. Take one group of it."
        )
    try:
        place = table[["layer", "expert"]].to_numpy(dtype=np.int64)
        values = table[score].to_numpy(dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise InputError(f"the importance table holds something that isn't a number ({error}).") from error
    wrong = (place < 0).any(axis=1) | (place[:, 0] >= n_layers) | (place[:, 1] >= n_experts)
    if wrong.any():
        layer, expert = place[np.flatnonzero(wrong)[0]]
        raise InputError(
            f"the importance table names expert {expert} of layer {layer}; {model.name} has {n_layers} layers of "
            f"{n_experts} experts. Expected a table made from this model."
        )
    scores = np.full((n_layers, n_experts), np.nan)
    scores[place[:, 0], place[:, 1]] = values
    if not np.isfinite(scores).all():
        layer, expert = np.argwhere(~np.isfinite(scores))[0]
        raise InputError(
            f"the importance table has no finite {score} for expert {expert} of layer {layer}; expected one for each "
            f"of the {n_layers} × {n_experts} experts of {model.name}."
        )
    return scores


def _read(path: Path) -> pd.DataFrame:
    if path.suffix.lower() not in TABLES:
        raise InputError(f"{path}: expected a table as {', '.join(TABLES)}.")
    if not path.is_file():
        raise InputError(f"{path}: no such file. Write one: workbench analyze importance TRACE --out {path}")
    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    except (ValueError, OSError) as error:
        raise InputError(f"{path} can't be read as a table: {str(error).splitlines()[0]}") from error


def best(model: Model, scores: np.ndarray, keep: int) -> list[np.ndarray]:
    """Ids of the `keep` highest scores of every layer, ascending; equally many of each group that a router has."""
    check_count(model, keep)
    chosen = []
    for layer, score in zip(model.layers, scores, strict=True):
        n_groups, _ = groups(layer)
        parts = score.reshape(n_groups, -1)
        order = np.argsort(-parts, axis=1, kind="stable")[:, : keep // n_groups]
        chosen.append(np.sort(order + parts.shape[1] * np.arange(n_groups)[:, None], axis=None))
    return chosen


def at_random(model: Model, keep: int, seed: int = 0) -> list[np.ndarray]:
    """As `best`, of random scores: the control for every choice."""
    shape = (len(model.layers), model.layers[0].n_experts)
    return best(model, np.random.default_rng(seed).random(shape), keep)


def choices(scores: np.ndarray, chosen: list[np.ndarray]) -> pd.DataFrame:
    """The table that `prune` returns."""
    n_layers, n_experts = scores.shape
    became = np.full(scores.shape, -1)
    for layer, ids in enumerate(chosen):
        became[layer, ids] = np.arange(len(ids))
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), n_experts),
            "expert": np.tile(np.arange(n_experts), n_layers),
            "score": scores.ravel(),
            "kept": (became >= 0).ravel(),
            "became": became.ravel(),
        }
    )


def note(method: str, model: Model, score: str, chosen: list[np.ndarray]) -> dict[str, Any]:
    """What experts.json says; `experts` are the ids in the original model, a list a layer, by new id."""
    return {
        "made_by": f"workbench {method}",
        "model": model.name,
        "revision": model.revision,
        "score": score,
        "experts": [ids.tolist() for ids in chosen],
    }
