"""Which experts to put on which device, so that tokens stay where they are and devices are equally busy.

With expert parallelism every device holds the same number of experts of each layer. A placement is judged by

- **crossing**: the share of transitions between devices. A transition is a pair of one expert of a token in a layer
  and one in the next MoE layer (k × k a token); it crosses if the two lie on different devices. Even chance gives 1 −
  1/D.
- **straggler**: load of the busiest device over the load of the mean device, 1 to D, over all tokens; `straggler` has
  it batch by batch, where it is larger.

**optimised** minimises crossing + `balance` · mean over layers of (straggler − 1), given the counts of pairs (after
Yao et al. 2024, ExFlow, and Go & Mahajan 2025, MoETuner). It is solved by HiGHS: for the whole model at once
where it is small, and layer by layer otherwise; `how` says which won, and **bound** is what the relaxed program
proves that no placement costs less than (NaN where the model is too large for it). `cost` can thus be at most `cost −
bound` from the best. **contiguous** is what engines do by themselves: experts 0 … E/D − 1 on the first device, and so
on. **random** is the mean over random placements with equal numbers.

A placement that is scored on the texts it was made for looks better than it is: **fitted** are scores on a random
half of the texts, for which it was optimised, **held out** on the other half. **all** is a second placement,
optimised for and scored on all texts: the one that `assign` returns and `workbench place` writes.

Intervals cover 95% of bootstrap resamples of texts (in at most 64 random blocks), those of stragglers shifted by the
resampling bias; for `random` they cover 95% of the placements instead. Transitions count pairs of experts; an engine
sends a token once to each device, whatever number of experts it uses there. Time limits decide how far the search
goes: where one is reached, a faster machine may return a better placement.
"""

import re

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.assignment import (
    PROVED,
    Solution,
    Traffic,
    at_random,
    busiest,
    check,
    contiguous,
    crossing,
    solve,
)
from workbench.analysis.counting import add_choices, experts_of
from workbench.analysis.pairs import Blocks, count_pairs, ratio, text_blocks
from workbench.analysis.resampling import draws, interval
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

PLACEMENTS = ("contiguous", "random", "optimised")
TEXTS = ("fitted", "held out", "all")
MEASURES = {"crossing": "transitions that cross devices", "straggler": "busiest device / mean device"}


def placement(
    trace: Trace,
    *,
    devices: int = 4,
    balance: float = 1.0,
    time_limit: float = 60.0,
    n_random: int = 100,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """An optimised placement of the experts against the contiguous and random ones.

    devices     D; must divide the number of experts of every layer
    balance     what a straggler factor of 2 instead of 1 costs, in shares of transitions
    time_limit  seconds for each of the two optimisations, about
    n_random    random placements

    Returns one row a placement × texts × measure × layer: placement ("contiguous", "random", "optimised"); texts
    ("fitted", "held out", "all"; only "all" where there is one text); measure ("crossing", of a layer to the next, or
    "straggler"); layer, missing for all layers together; value with low, high; cost, bound, how of the optimised
    placement; n_devices, balance; n_tokens, n_texts scored on. NaN: crossing of the last layer or without transitions,
    stragglers without load.
    """
    sizes = [experts_of(trace, layer) for layer in range(trace.n_layers)]
    check(sizes, devices, balance, time_limit)
    blocks = text_blocks(trace, seed=seed)
    half = np.arange(blocks.n_blocks) % 2
    halves = traffic(trace, Blocks(blocks.text, half[blocks.of_text].astype(np.int32), 2))
    every = added(halves)
    options = {"balance": balance, "time_limit": time_limit, "seed": seed}
    split = blocks.n_blocks > 1
    solutions = {"all": solve(every, devices, **options)}
    if split:
        solutions["fitted"] = solutions["held out"] = solve(halves[0], devices, **options)
    default = contiguous(sizes, devices)
    random = np.random.default_rng(seed)
    drawn = [at_random(sizes, devices, random) for _ in range(n_random)]

    tables = []
    seen: dict[int, Seen] = {}  # a placement is looked at once, whatever texts it is scored on
    for texts in TEXTS if split else ("all",):
        members = {"fitted": half == 0, "held out": half == 1, "all": np.ones(blocks.n_blocks, bool)}[texts]
        counted = {"fitted": halves[0], "held out": halves[1], "all": every}[texts]
        solution = solutions[texts]
        for name, placed in (("contiguous", default), ("optimised", solution.devices)):
            if id(placed) not in seen:
                seen[id(placed)] = look(trace, placed, devices, blocks)
            tables.append(scores(seen[id(placed)], members, n_resamples, seed).assign(placement=name, texts=texts))
        tables.append(random_scores(counted, drawn, devices).assign(placement="random", texts=texts))
        for table in tables[-3:]:
            table["n_tokens"] = int(np.isin(blocks.of_token, np.flatnonzero(members)).sum())
            table["n_texts"] = int(members[blocks.of_text].sum())
        tables[-2] = tables[-2].assign(cost=solution.cost, bound=solution.bound, how=solution.how)
    frame = pd.concat(tables, ignore_index=True)
    frame["placement"] = pd.Categorical(frame["placement"], PLACEMENTS)
    frame["texts"] = pd.Categorical(frame["texts"], TEXTS)
    frame = frame.sort_values(["placement", "texts", "measure"], kind="stable", ignore_index=True)
    frame = frame.astype({"placement": str, "texts": str}).assign(n_devices=devices, balance=balance)
    columns = ["placement", "texts", "measure", "layer", "value", "low", "high", "cost", "bound", "how"]
    return frame[[*columns, "n_devices", "balance", "n_tokens", "n_texts"]]


def assign(
    trace: Trace, *, devices: int = 4, balance: float = 1.0, time_limit: float = 60.0, seed: int = 0
) -> pd.DataFrame:
    """The optimised placement for all texts of a trace; arguments as for `placement`.

    Returns one row a layer × expert: layer, model_layer (number of the layer in the model, read from its router's name;
    equal to layer where the name has none), expert, device; count (assignments of the expert); n_devices, n_experts;
    cost, bound, how; n_tokens. What `workbench.placements.export_placement` writes.
    """
    sizes = [experts_of(trace, layer) for layer in range(trace.n_layers)]
    check(sizes, devices, balance, time_limit)
    everything = Blocks(np.zeros(trace.n_tokens, np.int32), np.zeros(1, np.int32), 1)
    counted = traffic(trace, everything)[0]
    solution = solve(counted, devices, balance=balance, time_limit=time_limit, seed=seed)
    return table_of(trace, counted, solution, devices)


def model_layers(trace: Trace) -> list[int]:
    """Number of each router's layer in the model, read from its name; its place among the routers if that has none."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", str(name)) for name in trace.layers["name"]]
    return [int(number[1]) if number else layer for layer, number in enumerate(found)]


def table_of(trace: Trace, counted: Traffic, solution: Solution, devices: int) -> pd.DataFrame:
    """A solution as a table."""
    numbers = model_layers(trace)
    tables = [
        pd.DataFrame(
            {
                "layer": layer,
                "model_layer": numbers[layer],
                "expert": np.arange(len(where)),
                "device": where,
                "count": counted.load[layer].astype(np.int64),
                "n_devices": devices,
                "n_experts": len(where),
                "cost": solution.cost,
                "bound": solution.bound,
                "how": solution.how,
                "n_tokens": trace.n_tokens,
            }
        )
        for layer, where in enumerate(solution.devices)
    ]
    return pd.concat(tables, ignore_index=True)


def traffic(trace: Trace, blocks: Blocks) -> list[Traffic]:
    """Loads and transitions of each block."""
    n_blocks, group = blocks.n_blocks, blocks.of_token
    result = [Traffic([], []) for _ in range(n_blocks)]
    before: np.ndarray | None = None
    for layer in range(trace.n_layers):
        experts = trace.experts(layer)
        loads = np.zeros((n_blocks, experts_of(trace, layer)))
        add_choices(experts, group, loads)
        for block in range(n_blocks):
            result[block].load.append(loads[block])
        if before is not None:
            pairs = count_pairs(before, experts, experts_of(trace, layer - 1), loads.shape[1], blocks)
            for block in range(n_blocks):
                result[block].moves.append(pairs.both[block].astype(np.float64))
        before = experts
    return result


def added(parts: list[Traffic]) -> Traffic:
    """The traffic of several blocks together."""
    loads = [sum(load) for load in zip(*(part.load for part in parts), strict=True)]
    moves = [sum(move) for move in zip(*(part.moves for part in parts), strict=True)]
    return Traffic([np.asarray(load) for load in loads], [np.asarray(move) for move in moves])


Seen = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Crossing transitions and all transitions, int64 (n_layers, n_blocks) both, 0 in the last layer; assignments of each
device, int64 (n_layers, n_blocks, devices)."""


def look(trace: Trace, placed: list[np.ndarray], devices: int, blocks: Blocks) -> Seen:
    """What a placement means for each block of texts."""
    n_layers, n_blocks = trace.n_layers, blocks.n_blocks
    crossed, total = np.zeros((2, n_layers, n_blocks), np.int64)
    loads = np.zeros((n_layers, n_blocks, devices))
    before: np.ndarray | None = None
    for layer in range(n_layers):
        experts = trace.experts(layer)
        with_none = np.append(placed[layer], NO_EXPERT).astype(np.uint16)
        here = with_none[np.minimum(experts, len(placed[layer]))]
        add_choices(here, blocks.of_token, loads[layer])
        if before is not None:
            both = count_pairs(before, here, devices, devices, blocks).both
            total[layer - 1] = both.sum(axis=(1, 2))
            crossed[layer - 1] = total[layer - 1] - np.trace(both, axis1=1, axis2=2)
        before = here
    return crossed, total, loads.astype(np.int64)


def scores(seen: Seen, members: np.ndarray, n_resamples: int, seed: int) -> pd.DataFrame:
    """Both measures of a placement over some blocks, a layer each and for all layers."""
    crossed, total, loads = (numbers[:, members] for numbers in seen)
    n_blocks = int(members.sum())
    values = summed(crossed, total, loads, np.ones((1, n_blocks)))
    ends = [np.full((2, values.shape[1]), np.nan) for _ in range(2)]
    if n_blocks > 1 and n_resamples > 0:
        drawn = np.concatenate(list(draws(n_blocks, n_resamples, seed))).astype(np.float64)
        resampled = summed(crossed, total, loads, drawn)
        n = len(crossed) + 1
        ends[0][:, :n] = interval(resampled[:, :n])
        ends[0][:, n:] = np.maximum(interval(resampled[:, n:], values[0, n:]), 1)
    return tidy(values[0], *ends[0])


def summed(crossed: np.ndarray, total: np.ndarray, loads: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Crossing of each layer and of all, then stragglers likewise: float64 (n_resamples, 2 · (n_layers + 1)).

    weights  (n_resamples, n_blocks): how often each block counts
    """
    crossings, transitions = weights @ crossed.T, weights @ total.T
    of_device = np.einsum("rb,lbd->rld", weights, loads)
    stragglers = ratio(of_device.max(axis=2), of_device.mean(axis=2))
    return np.column_stack(
        [
            ratio(crossings, transitions),
            ratio(crossings.sum(axis=1), transitions.sum(axis=1)),
            stragglers,
            mean_known(stragglers),
        ]
    )


def mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what isn't NaN."""
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0).sum(axis=-1), known.sum(axis=-1))


def random_scores(counted: Traffic, drawn: list[list[np.ndarray]], devices: int) -> pd.DataFrame:
    """Mean over random placements, and between which values 95% of them lie."""
    moved = np.array([moves.sum() for moves in counted.moves])
    rows = []
    for placed in drawn:
        crossed, stragglers = crossing(counted, placed), busiest(counted, placed, devices)
        whole = ratio(np.nansum(crossed * moved), moved.sum())
        rows.append([*crossed, np.nan, float(whole), *stragglers, float(mean_known(stragglers))])
    n_values = 2 * (len(counted.load) + 1)
    table = np.array(rows).reshape(len(rows), n_values)
    if not rows:
        return tidy(*np.full((3, n_values), np.nan))
    return tidy(mean_known(table.T), *interval(table))


def tidy(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> pd.DataFrame:
    """Rows of the table, from the order of `summed`."""
    n = len(value) // 2
    layer = pd.array([*range(n - 1), None], dtype="Int64")
    return pd.DataFrame(
        {
            "measure": np.repeat(list(MEASURES), n),
            "layer": pd.concat([pd.Series(layer)] * 2, ignore_index=True),
            "value": value,
            "low": low,
            "high": high,
        }
    )


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a measure: its value by layer for each placement, on texts that the optimised one hasn't seen."""
    texts = "held out" if "held out" in set(frame["texts"]) else "all"
    result = figures.panels(list(MEASURES.values()), columns=2, height=280, legend=True)
    looks = {"contiguous": figures.Style("#D55E00"), "random": figures.NULL, "optimised": figures.MAIN}
    part = frame[(frame["texts"] == texts) & frame["layer"].notna()]
    for panel, measure in enumerate(MEASURES):
        for name, look_of in looks.items():
            rows = part[(part["measure"] == measure) & (part["placement"] == name) & part["value"].notna()]
            figures.line(
                result, rows["layer"].astype(int), rows["value"], rows["low"], rows["high"],
                name={"random": "random (band: 95% of placements)", "optimised": f"optimised ({texts} texts)"}.get(
                    name, name
                ),
                style=look_of, panel=panel, legend=panel == 0,
            )  # fmt: skip
    figures.layer_axes(result, part["layer"].astype(int))
    result.update_layout(yaxis={"tickformat": ".0%", "rangemode": "tozero"}, yaxis2={"rangemode": "normal"})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """What the optimised placement saves on new texts, and how far from the best it may be, in sentences."""
    texts = "held out" if "held out" in set(frame["texts"]) else "all"
    whole = frame[frame["layer"].isna()].set_index(["placement", "texts", "measure"])
    values = {
        (name, measure): whole["value"].get((name, texts, measure), np.nan)
        for name in PLACEMENTS
        for measure in MEASURES
    }
    where = "in texts it was not made for" if texts == "held out" else "in the texts it was made for"
    sentences = []
    if np.isfinite(values["optimised", "crossing"]):
        sentences.append(
            f"Placed for this traffic on {frame['n_devices'].iloc[0]} devices, {values['optimised', 'crossing']:.1%} "
            f"of the transitions between layers cross devices {where}; {values['contiguous', 'crossing']:.1%} do with "
            f"contiguous blocks, {values['random', 'crossing']:.1%} at random."
        )
    if np.isfinite(values["optimised", "straggler"]):
        sentences.append(
            f"The busiest device has {values['optimised', 'straggler']:.2f} times the mean load, against "
            f"{values['contiguous', 'straggler']:.2f} contiguous and {values['random', 'straggler']:.2f} at random."
        )
    else:
        return ["No token used any expert."]
    made = frame[(frame["placement"] == "optimised") & (frame["texts"] == "all")].iloc[0]
    if np.isfinite(made["bound"]):
        proved = made["cost"] - made["bound"] <= PROVED * max(made["cost"], 1)
        sentences.append(
            f"The placement costs {made['cost']:.3f}; "
            + ("it is proved to be the best." if proved else f"no placement costs less than {made['bound']:.3f}.")
        )
    else:
        sentences.append(f"The placement costs {made['cost']:.3f}; how far that is from the best isn't known.")
    return sentences
