"""How much longer a batch takes because one device has more to do, and what a capacity limit would cost.

With expert parallelism all devices wait for the busiest. For every batch and layer:

- **straggler** = load of the busiest device / load of the mean device, 1 to D: the mean over batches, and **straggler
  p95**, the value that 95% of the batches don't exceed. **expert straggler** = load of the busiest expert / of the
  mean expert, 1 to E (He et al. 2026, Capacity-Aware Inference, §3: max N_e / N̄).
- **dropped**: share of assignments beyond the capacity of their expert, C = ⌈c · B · k / E⌉ in a batch of B tokens
  with capacity factor c (as in their code). **tokens hit**: share of tokens that lose an expert so. An expert keeps
  those who come first in the batch; their paper also keeps those with the highest scores, which changes who is hit
  and not how many assignments are dropped.
- **rerouted**: share of assignments that, instead of being dropped, find an expert with room on the same device that
  the token doesn't use yet (the one with most room, then the lowest number), in the order of the batch. **lost**:
  what is dropped even so; dropped = rerouted + lost. Their *expanded drop* sends tokens to local experts too, by
  router score; a trace has no scores of experts that weren't chosen, so which expert takes the token is a stand-in,
  but how many find room is not far from it.

Batches are formed from the texts as `prefill` (consecutive tokens) or `decode` (one token of each of B texts) would;
see the options. Loads in prefill are less even, because tokens of one text go to the same experts. Intervals cover
95% of bootstrap resamples of texts, in at most 64 random blocks.
"""

import math

import numpy as np
import pandas as pd
from numba import njit
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.assignment import check as check_devices
from workbench.analysis.assignment import contiguous
from workbench.analysis.batches import Batches, batches, block_weights, check, mean_of, percentile_of, stream
from workbench.analysis.counting import add_choices, experts_of
from workbench.analysis.pairs import ratio
from workbench.errors import InputError
from workbench.placements import by_layer, read_placement
from workbench.tracefile import Trace

DEVICES = 4
P95 = 95.0
LIMITED = ("dropped", "tokens_hit", "rerouted", "lost")
"""Measures that depend on a capacity factor."""


def straggler(
    trace: Trace,
    *,
    devices: int | None = None,
    placement: str | pd.DataFrame | None = None,
    batch_tokens: tuple[int, ...] = (64, 256, 1024, 4096),
    capacity_factors: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0),
    batching: str = "prefill",
    n_batches: int = 1000,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Straggler factors, and dropped and rerouted assignments, by layer and batch size.

    devices           D; None is 4, or what the placement has
    placement         file written by `workbench place … --format table`, or such a table; None is contiguous blocks
    batch_tokens      batch sizes B, in tokens
    capacity_factors  c; none leaves dropping out
    batching          "prefill": consecutive tokens; "decode": one token of each of B texts
    n_batches         batches of each size, at most, spread evenly over the texts

    Returns one row a layer × batch size × measure (× capacity factor): layer, batch_tokens, measure ("straggler",
    "straggler_p95", "expert_straggler", "dropped", "tokens_hit", "rerouted", "lost"), capacity_factor (NaN for
    stragglers); value with low, high; batching, placement ("contiguous", "table" or the file), n_devices, n_experts;
    n_batches, n_tokens in them; n_texts. NaN: everything where no batch could be filled or no token chose an expert,
    intervals where the texts give fewer than eight blocks (see `batches`).

    InputError for a capacity factor that isn't above 0, and a placement that doesn't fit the trace.
    """
    check(batch_tokens, batching, n_batches)
    if any(not (factor > 0 and math.isfinite(factor)) for factor in capacity_factors):
        raise InputError(f"capacity_factors is {capacity_factors}; expected numbers above 0.")
    placed, name = devices_of(trace, devices, placement)
    n_devices = int(max(where.max() for where in placed)) + 1
    tokens = stream(trace, seed)
    formed = {size: batches(tokens, size, batching, n_batches) for size in dict.fromkeys(batch_tokens)}
    weights = {size: block_weights(made, n_resamples, seed) for size, made in formed.items()}
    rows = []
    for layer in range(trace.n_layers):
        experts = trace.experts(layer)
        for size, made in formed.items():
            known = {"layer": layer, "batch_tokens": size, "n_batches": len(made.tokens)}
            for measure, factor, value in measures(
                experts, made, placed[layer], n_devices, capacity_factors, weights[size]
            ):
                row = {**known, "measure": measure, "capacity_factor": factor}
                rows.append({**row, **dict(zip(("value", "low", "high"), value, strict=True))})
    frame = pd.DataFrame(rows).assign(batching=batching, placement=name, n_devices=n_devices, n_texts=tokens.n_texts)
    frame["n_experts"] = [experts_of(trace, layer) for layer in frame["layer"]]
    frame["n_tokens"] = frame["n_batches"] * frame["batch_tokens"]
    columns = ["layer", "batch_tokens", "measure", "capacity_factor", "value", "low", "high", "batching", "placement"]
    return frame[[*columns, "n_devices", "n_experts", "n_batches", "n_tokens", "n_texts"]]


def devices_of(trace: Trace, devices: int | None, placement: str | pd.DataFrame | None) -> tuple[list[np.ndarray], str]:
    """Device of each expert, int64 (E,) a layer, and what the placement is called."""
    sizes = [experts_of(trace, layer) for layer in range(trace.n_layers)]
    if placement is None:
        check_devices(sizes, devices if devices is not None else DEVICES, 0.0, 1.0)
        return contiguous(sizes, devices if devices is not None else DEVICES), "contiguous"
    table = placement if isinstance(placement, pd.DataFrame) else read_placement(placement)
    placed = by_layer(table)
    if [len(where) for where in placed] != sizes:
        raise InputError(
            f"the placement has layers of {[len(where) for where in placed]} experts, this trace of {sizes}: they "
            "aren't of the same model."
        )
    found = int(max(where.max() for where in placed)) + 1
    if devices is not None and devices != found:
        raise InputError(f"devices is {devices}, but the placement has {found}; leave `devices` out.")
    return placed, "table" if isinstance(placement, pd.DataFrame) else str(placement)


def measures(
    experts: np.ndarray,
    made: Batches,
    devices: np.ndarray,
    n_devices: int,
    capacity_factors: tuple[float, ...],
    weights: np.ndarray | None,
) -> list[tuple[str, float, tuple[float, float, float]]]:
    """Measure, capacity factor and (value, low, high), for one layer and one batch size."""
    n_batches, size = made.tokens.shape
    chosen = experts[made.tokens.ravel()]
    loads = np.zeros((n_batches, len(devices)))
    add_choices(chosen, np.repeat(np.arange(n_batches), size), loads)
    of_device = loads @ np.eye(n_devices)[devices]
    slowest = ratio(of_device.max(axis=1), of_device.mean(axis=1))
    result = [
        ("straggler", np.nan, mean_of(slowest, weights)),
        ("straggler_p95", np.nan, percentile_of(slowest, P95, weights)),
        ("expert_straggler", np.nan, mean_of(ratio(loads.max(axis=1), loads.mean(axis=1)), weights)),
    ]
    for factor in capacity_factors:
        capacity = math.ceil(factor * size * experts.shape[1] / len(devices))
        counts = np.zeros((n_batches, 3), np.int64)
        limit(chosen.reshape(n_batches, size, experts.shape[1]), devices, capacity, counts)
        total = loads.sum(axis=1)
        dropped, rerouted, hit = counts.T.astype(np.float64)
        result += [
            ("dropped", factor, mean_of(dropped, weights, total)),
            ("tokens_hit", factor, mean_of(hit, weights, np.full(n_batches, size))),
            ("rerouted", factor, mean_of(rerouted, weights, total)),
            ("lost", factor, mean_of(dropped - rerouted, weights, total)),
        ]
    return result


@njit(cache=True, nogil=True)
def limit(chosen: np.ndarray, devices: np.ndarray, capacity: int, counts: np.ndarray) -> None:
    """Fill experts in the order of the batch; count into (n_batches, 3): dropped, of these rerouted, tokens hit.

    chosen   uint16 (n_batches, batch_tokens, k)
    devices  int64 (E,)
    """
    n_batches, size, k = chosen.shape
    n_experts = len(devices)
    over = np.empty((size * k, 2), np.int64)
    for batch in range(n_batches):
        load = np.zeros(n_experts, np.int64)
        used = chosen[batch].copy()
        n_over = 0
        for token in range(size):
            hit = False
            for rank in range(k):
                expert = used[token, rank]
                if expert >= n_experts:
                    continue
                if load[expert] < capacity:
                    load[expert] += 1
                else:
                    over[n_over] = token, rank
                    n_over += 1
                    hit = True
            counts[batch, 2] += hit
        counts[batch, 0] = n_over
        for place in range(n_over):
            token, rank = over[place]
            here = devices[used[token, rank]]
            best = -1
            for expert in range(n_experts):
                if devices[expert] != here or load[expert] >= capacity:
                    continue
                if best >= 0 and load[expert] >= load[best]:
                    continue
                taken = False
                for other in range(k):
                    taken |= used[token, other] == expert
                if not taken:
                    best = expert
            if best >= 0:
                load[best] += 1
                used[token, rank] = best
                counts[batch, 1] += 1


def figure(frame: pd.DataFrame) -> Figure:
    """The straggler factor by layer, a line a batch size; dropped and lost assignments by capacity factor."""
    sizes = figures.spread(frame["batch_tokens"], figures.MOST_LINES)
    limited = frame["capacity_factor"].notna().any()
    titles = ["busiest device / mean device, mean over batches"]
    titles += ["assignments over capacity (dashed: after rerouting)"] if limited else []
    result = figures.panels(titles, columns=2, height=300, legend=True)
    for place, size in enumerate(sizes):
        colour = figures.COLOURS[place % len(figures.COLOURS)]
        part = frame[frame["batch_tokens"] == size]
        rows = part[part["measure"] == "straggler"]
        figures.line(
            result, rows["layer"], rows["value"], rows["low"], rows["high"], name=f"{size:,} tokens a batch",
            style=figures.Style(colour), band=len(sizes) <= figures.MOST_BANDS,
        )  # fmt: skip
        if not limited:
            continue
        for measure, dash in (("dropped", "solid"), ("lost", "dash")):
            mean = part[part["measure"] == measure].groupby("capacity_factor")["value"].mean()
            figures.line(
                result, mean.index, mean, name=f"{size:,} tokens a batch, {measure}",
                style=figures.Style(colour, dash), panel=1, legend=False, x_name="capacity factor",
            )  # fmt: skip
    figures.layer_axes(result, frame["layer"])
    if limited:
        factors = sorted(frame["capacity_factor"].dropna().unique())
        layout = {"title": {"text": "capacity factor"}, "tickmode": "array", "tickvals": factors, "autorange": True}
        result.update_layout(xaxis2=layout, yaxis2={"tickformat": ".0%", "rangemode": "tozero"})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How much the busiest device delays, and what a capacity limit drops, in sentences."""
    known = frame[frame["value"].notna()]
    if known.empty:
        return ["The trace has too few tokens for a batch of these sizes, or no token used any expert."]
    size = known["batch_tokens"].max()
    part = known[known["batch_tokens"] == size]
    by_layer_ = part[part["measure"] == "straggler"].set_index("layer")["value"]
    kind = {"prefill": "consecutive tokens", "decode": "tokens of as many texts"}[frame["batching"].iloc[0]]
    sentences = [
        f"In batches of {size:,} {kind} the busiest of {frame['n_devices'].iloc[0]} devices has "
        f"{by_layer_.mean():.2f} times the mean load (mean over layers; most in layer {by_layer_.idxmax()}, "
        f"{by_layer_.max():.2f})."
    ]
    limited = part[part["measure"].isin(("dropped", "lost"))]
    if len(limited):
        factor = limited["capacity_factor"].min()
        mean = limited[limited["capacity_factor"] == factor].groupby("measure")["value"].mean()
        sentences.append(
            f"A capacity factor of {factor:g} drops {mean['dropped']:.1%} of the assignments; {mean['lost']:.1%} if "
            "they may move to other experts of the same device."
        )
    return sentences
