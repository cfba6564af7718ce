"""What a trace says of a run, whoever writes it: the rows of the tables `runs` and `layers`."""

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.schema import COUNTS, RECORDABLE
from workbench.transaction import as_json, clean

_RUN_TEXT = ("run", "model", "revision", "family", "engine", "dtype")
_RUN_JSON = ("recipe", "corpus", "versions")
SAME = ("model", "revision", "family", "engine", "dtype", "recipe", "recorded")
"""What all parts of a run agree in."""


def run_row(run: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of `runs` that the caller gives, as a trace holds them. InputError if they aren't a run's."""
    if unknown := set(run) - {*_RUN_TEXT, *_RUN_JSON, "recorded"}:
        raise InputError(f"a run has no {', '.join(sorted(unknown))}; expected {', '.join((*_RUN_TEXT, *_RUN_JSON))}.")
    if not run.get("run"):
        raise InputError("the run has no name: give --run NAME.")
    row: dict[str, Any] = {name: clean(run.get(name)) for name in _RUN_TEXT}
    row |= {name: None if run.get(name) is None else as_json(run[name]) for name in _RUN_JSON}
    if list(run.get("recorded") or ()) == [COUNTS]:
        return row | {"recorded": [COUNTS]}
    asked = {"ids", *(run.get("recorded") or ())}
    if unknown := asked - set(RECORDABLE):
        raise InputError(f"can't record {', '.join(sorted(unknown))}; choose from {', '.join(RECORDABLE)}.")
    return row | {"recorded": [name for name in RECORDABLE if name in asked]}


def layer_rows(run: str, layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `layers` as a trace holds them. InputError if they aren't a run's layers."""
    rows = []
    for index, layer in enumerate(layers):
        n_experts, top_k = int(layer["n_experts"]), int(layer["top_k"])
        if layer.get("layer", index) != index:
            raise InputError(f"layer {layer['layer']} comes at place {index}: layers are numbered from 0, in order.")
        if not 1 <= top_k <= n_experts < NO_EXPERT:
            raise InputError(
                f"layer {index}: top-{top_k} of {n_experts} experts; expected 1 <= top_k <= n_experts < {NO_EXPERT}."
            )
        rows.append(
            {
                "run": run,
                "layer": index,
                "name": clean(layer["name"]),
                "n_experts": n_experts,
                "top_k": top_k,
                "n_shared": int(layer.get("n_shared") or 0),
                "gating": clean(layer.get("gating")),
                "stack": clean(layer.get("stack") or "decoder"),
            }
        )
    if not rows:
        raise InputError("a run needs at least one MoE layer.")
    return rows


def check_same(
    path: os.PathLike,
    had: Mapping[str, Any],
    had_layers: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
) -> None:
    """InputError if the run in the trace at `path`, with these rows, isn't the one that is to be resumed."""
    name = run["run"]
    for key in (*SAME, "corpus"):
        if key == "recipe" and had[key] != run[key]:
            without = "was begun without a recipe" if had[key] is None else "has another recipe"
            raise InputError(
                f"run {name!r} in {path} can't be resumed: it {without}. Resume with what it was begun with, "
                "or use --append or --overwrite."
            )
        if had[key] != run[key]:
            raise InputError(
                f"run {name!r} in {path} can't be resumed: its {key} is {had[key]!r}, now it is "
                f"{run[key]!r}. Resume with what it was begun with, or use --append or --overwrite."
            )
    if list(had_layers) != list(layers):
        raise InputError(f"run {name!r} in {path} can't be resumed: the model's MoE layers are not the same.")


def now() -> datetime:
    """UTC, as a trace holds times."""
    return datetime.now(UTC).replace(tzinfo=None)
