"""Checkpoints with fewer experts: each expert merged into the one that is most like it among those that stay.

    merge_experts("demo", analysis.importance(trace), 16, "demo-16-merged", score="frequency")

After MC-SMoE (Li et al. 2024, Merge, Then Compress, arXiv:2310.01334, §3) and Sub-MoE (Li et al. 2025,
arXiv:2506.23266: clusters of similar experts, merged by frequency). In every layer:

- The experts with the highest scores are the **dominant** ones, as many as stay (of each group that a router has).
- Every other expert joins the dominant one with the highest **cosine**: of all weights after matching neurons
  (`by="neurons"`), or of their router rows (`by="router"`, MC-SMoE's router-weight; its default are router logits on
  data).
- Neurons of a member are put into the order of the dominant expert's: Hungarian matching on the cosine of all weights
  of a neuron. That changes nothing that the member computes.
- Matrices and biases are averaged with the scores as weights. Where all scores of a cluster are 0, the dominant
  expert stays as it is.
- The router keeps the dominant expert's row, bias and selection bias (`router="dominant"`), or gets their weighted
  means (`router="mean"`).

MC-SMoE's code keeps all E rows of the router, several of which then name one merged expert; a checkpoint with fewer
experts can't. Its permutations are found before the clusters, to one reference; here to each dominant expert. Sub-MoE
clusters by outputs on data and merges in the space of a joint SVD; neither is done here.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from workbench.checkpoint import save
from workbench.errors import InputError
from workbench.experts import Weights, neurons, numbers, read
from workbench.models import Model
from workbench.neurons import cosine, match, unit
from workbench.prune import best, choices, note, read_scores, ready
from workbench.subset import expert_axes, mix, subset


def merge_experts(
    model: Model | str | Path,
    importance: pd.DataFrame | str | os.PathLike,
    keep: int,
    out: str | os.PathLike,
    *,
    score: str = "frequency",
    by: str = "neurons",
    router: str = "dominant",
    overwrite: bool = False,
) -> pd.DataFrame:
    """Write a checkpoint in which the experts of every layer are merged into the `keep` most important of them.

    importance  table with a row a layer × expert and the columns layer, expert and `score`; or the name of a .csv, .tsv
                or .parquet file of one. The scores are also the weights of the average, so none is negative
    out         folder to make; InputError if it exists, unless `overwrite`
    by          "neurons" or "router": what makes an expert like a dominant one
    router      "dominant" or "mean": the router's row of a merged expert

    Returns one row a layer × expert: layer, expert, score, kept (it is a dominant one), became (new id of the expert
    that it is part of), weight (its part in that, 0 to 1), cosine (of its weights, neurons matched, and the dominant
    expert's). With keep = E the checkpoint is the model, bit for bit. InputError as for `prune`, and for experts whose
    weights can't be read (`workbench.experts`).
    """
    for name, value, known in (("by", by, ("neurons", "router")), ("router", router, ("dominant", "mean"))):
        if value not in known:
            raise InputError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}.")
    loaded = ready(model, keep, out, overwrite)
    scores = read_scores(importance, loaded, score)
    merged, table = merged_copy(loaded, scores, keep, by=by, router=router, name=score)
    chosen = best(loaded, scores, keep)
    said = note("merge", loaded, score, chosen) | {"by": by, "router": router}
    said["became"] = [part["became"].tolist() for _, part in table.groupby("layer")]
    save(merged, out, said, overwrite=overwrite)
    return table


def merged_copy(
    model: Model, scores: np.ndarray, keep: int, *, by: str = "neurons", router: str = "dominant", name: str = "score"
) -> tuple[Model, pd.DataFrame]:
    """What `merge` writes, in memory, and the table that it returns. scores: float (n_layers, E), none below 0."""
    if (scores < 0).any():
        raise InputError(
            f"the lowest {name} is {scores.min():g}; merging takes scores as weights: expected none below 0. Merge by "
            "frequency."
        )
    chosen = best(model, scores, keep)
    merged = subset(model, chosen)
    tables = []
    for layer, new_layer, dominant, score in zip(model.layers, merged.layers, chosen, scores, strict=True):
        old, new = read(layer), read(new_layer)
        became, order, cosines = clusters(old, dominant, by)
        total = np.bincount(became, score, minlength=keep)
        weight = np.divide(score, total[became], out=np.zeros(len(score)), where=total[became] > 0)
        weight[dominant[total == 0]] = 1
        for place in np.flatnonzero(np.bincount(became, weight > 0, minlength=keep) > 1):
            members = np.flatnonzero((became == place) & (weight > 0))
            _average(old, new, int(place), members, weight, order)
        if router == "mean":
            mixing = np.zeros((keep, len(score)), np.float32)
            mixing[became, np.arange(len(score))] = weight
            _average_router(model, merged, layer.name, mixing)
        tables.append(pd.DataFrame({"became": became, "weight": weight, "cosine": cosines}))
    table = choices(scores, chosen).drop(columns="became")
    return merged, pd.concat([table, pd.concat(tables, ignore_index=True)], axis=1)


def clusters(weights: Weights, dominant: np.ndarray, by: str) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Which dominant expert each expert of a layer joins.

    Returns int (E,) place of it among the dominant; a list of the orders of neurons that match it, int (I,) each; and
    float (E,) the cosine of the weights in that order.
    """
    became = np.zeros(weights.n_experts, int)
    became[dominant] = np.arange(len(dominant))
    order = [np.arange(weights.n_neurons)] * weights.n_experts
    cosines = np.ones(weights.n_experts)
    rows = unit(numbers(weights.router))
    models = [neurons(weights, int(expert)) for expert in dominant]
    for expert in np.setdiff1d(np.arange(weights.n_experts), dominant):
        mine = neurons(weights, int(expert))
        places = [int(np.argmax(rows[dominant] @ rows[expert]))] if by == "router" else range(len(dominant))
        orders = {place: match(models[place], mine) for place in places}
        likeness = {place: cosine(models[place], mine[matched]) for place, matched in orders.items()}
        place = max(likeness, key=lambda place: likeness[place])
        became[expert], order[expert], cosines[expert] = place, orders[place], likeness[place]
    return became, order, cosines


def _average(
    old: Weights, new: Weights, place: int, members: np.ndarray, weight: np.ndarray, order: list[np.ndarray]
) -> None:
    """Write the weighted mean of members, their neurons in order, as expert `place` of the new layer."""
    share = torch.as_tensor(weight, dtype=torch.float32)
    for source, target in zip(old.neuron_parts, new.neuron_parts, strict=True):
        mean = torch.zeros_like(target[place], dtype=torch.float32)
        for expert in members:
            mean += share[expert] * source[expert].float()[torch.as_tensor(order[expert])]
        target[place] = mean.to(target.dtype)
    if old.down_bias is not None and new.down_bias is not None:
        new.down_bias[place] = (share[members] @ old.down_bias[members].float()).to(new.down_bias.dtype)


def _average_router(model: Model, merged: Model, router: str, mixing: np.ndarray) -> None:
    """Weighted means, in the merged model, of all that a layer keeps of its experts besides their matrices."""
    block = router.rpartition(".")[0] + "."
    targets = dict(merged.module.named_parameters()) | dict(merged.module.named_buffers())
    sources = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    for name, axis in expert_axes(model).items():
        if name.startswith(block) and not name.startswith(f"{block}experts."):
            mix(sources[name], targets[name], axis, mixing)
