"""How well the experts that a token will need can be told in time to load them.

Each predictor names the n likeliest experts of a layer before its router has spoken, for every token:

- **lookahead**: what that layer's router chooses given the input of the layer before (recorded by
  `--record lookahead`; at most k experts are known). Eliseev & Mazur 2023, *Fast Inference of MoE Language Models with
  Offloading*, §3.2.
- **affinity**: the experts with the largest Σ P(E_j in this layer | E_i in the layer before) over the experts i that
  the token used there; all k × k pairs are counted.
- **previous**: the experts that the tokens before used in this layer, the latest first, best-ranked first; texts apart.
- **frequent**: the experts used most.

`affinity` and `frequent` learn from one half of the texts and are scored on the other, and the other way round.

**Recall** = experts named and needed / experts needed, the part of the loads that a prefetcher has under way in time.
**Precision** = experts named and needed / experts named, the part of what it loads that is of use. Both 0 to 1. If
routing were even, both would follow from chance: recall n/E, precision k/E. A token without anything to go by (the
first of a text, a dropped one) gets no prediction: it counts in recall and not in precision.

With a cache: **cached** is the hit rate of an LRU cache of `capacity` experts (which lives on from text to text, and
loads what a token needs at once), **covered** the part of the needs that are in that cache or named by the predictor
(loaded into a place apart), and **loads** what it names a token that isn't in the cache: the traffic it costs.
**useless** is the part of these loads that isn't needed.

Intervals cover 95% of bootstrap resamples of texts (blocks of texts where there are more than 256). The rows of the
whole model leave out layers that have none before them, so that the predictors can be compared.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numba import njit
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.cache import WHOLE
from workbench.analysis.counting import experts_of
from workbench.analysis.events import Plan, plan
from workbench.analysis.eviction import check
from workbench.analysis.hit_rates import divide, ends, halves, resampled_rates
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

PREDICTORS = ("lookahead", "affinity", "previous", "frequent")
STYLES = {
    "lookahead": figures.Style("#0072B2"), "affinity": figures.Style("#D55E00"),
    "previous": figures.Style("#009E73"), "frequent": figures.Style("#CC79A7"),
}  # fmt: skip
NONE = int(NO_EXPERT)
NAMED, RIGHT, COVERED, LOADED, NEEDED, CACHED = range(6)


def prefetch(
    trace: Trace,
    *,
    predictors: tuple[str, ...] | None = None,
    ratios: tuple[float, ...] = (1.0, 2.0),
    capacity: int | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Precision and recall of predictors of the next layer's experts, alone and beside a cache.

    predictors  any of lookahead, affinity, previous, frequent; None: all that the trace allows
    ratios      experts named / k, k being what a token uses in the layer; lookahead knows no more than k
    capacity    experts a layer in the cache, at least k; None: 2k (at most E)

    Returns one row a layer × predictor × ratio, and the same for the whole model (layer missing): layer, predictor,
    ratio, budget (experts named at most; in the rows of the whole model a mean); recall with recall_low, recall_high;
    precision with precision_low, precision_high; cached, covered with covered_low, covered_high; loads (a token and
    layer), useless; capacity (in the rows of the whole model a mean); n_experts, top_k (likewise); named, needed, right
    (counts); n_tokens, n_texts. Values are NaN where there is nothing to divide by. Left out are lookahead and affinity
    in the first layer, and affinity and frequent where there is only one text. InputError for lookahead by name where
    it wasn't recorded.
    """
    if predictors is None:
        predictors = PREDICTORS if "lookahead" in trace.recorded else PREDICTORS[1:]
    for predictor in predictors:
        check(predictor, PREDICTORS, "predictor")
    if not predictors or not ratios or not min(ratios) > 0:
        raise InputError("nothing to predict: give at least one predictor, and ratios above 0.")
    if "lookahead" in predictors:
        trace._need("lookahead")
    top_k = [int(k) for k in trace.layers["top_k"]]
    if capacity is not None and capacity < max(top_k, default=1):
        raise InputError(f"capacity is {capacity}; a token needs up to {max(top_k)} experts of a layer at once.")
    ratios = tuple(sorted(set(ratios)))
    planned = plan(trace, seed=seed)
    before = layers_before(trace)
    tables: list[pd.DataFrame] = []
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray, dict[str, float]]]] = {}
    chosen: dict[int, np.ndarray] = {}  # of this layer, and of those that are before a later one
    for layer, k in enumerate(top_k):
        n_experts = experts_of(trace, layer)
        chosen[layer] = trace.experts(layer)
        budgets = np.clip(np.round(np.array(ratios) * k).astype(np.int64), 1, n_experts)
        held = min(2 * k if capacity is None else capacity, n_experts)
        facts: dict[str, float] = {"capacity": held, "n_experts": n_experts, "top_k": k, "n_tokens": trace.n_tokens}
        for predictor in predictors:
            named = predict(trace, predictor, layer, before[layer], chosen, planned, int(budgets.max()), seed)
            if named is None:
                continue
            known = budgets if predictor != "lookahead" else budgets[: max(1, int((budgets <= k).sum()))]
            counts = np.zeros((planned.n_units, len(known), 6), np.int64)
            _score(chosen[layer], named, planned.runs, planned.unit, n_experts, held, known, counts)
            tables.append(rates(counts, predictor, layer, ratios, known, facts, n_resamples, seed))
            if before[layer] is not None or all(one is None for one in before):
                pooled.setdefault(predictor, []).append((counts, known, facts))
        chosen = {other: experts for other, experts in chosen.items() if other in before[layer + 1 :]}
    for predictor, parts in pooled.items():
        n_kept = min(len(known) for _, known, _ in parts)
        counts = sum((counts[:, :n_kept] for counts, _, _ in parts), np.zeros((1, 1, 1), np.int64))
        budget = np.mean([known[:n_kept] for _, known, _ in parts], axis=0)
        facts = {name: float(np.mean([facts[name] for _, _, facts in parts])) for name in parts[0][2]}
        facts["n_tokens"] = trace.n_tokens * len(parts)
        tables.append(rates(counts, predictor, WHOLE, ratios, budget, facts, n_resamples, seed))
    if not tables:
        raise InputError(
            f"nothing to predict from: {', '.join(predictors)} take a layer before, or a second text to learn from. "
            "Ask for previous."
        )
    return pd.concat(tables, ignore_index=True).assign(n_tokens=trace.n_tokens, n_texts=planned.n_texts)


def layers_before(trace: Trace) -> list[int | None]:
    """For each layer the one before it in the same stack."""
    last: dict[str, int] = {}
    found = []
    for layer, stack in enumerate(trace.layers["stack"]):
        found.append(last.get(stack))
        last[stack] = layer
    return found


def predict(
    trace: Trace, predictor: str, layer: int, before: int | None, chosen: dict[int, np.ndarray], planned: Plan,
    most: int, seed: int,
) -> np.ndarray | None:  # fmt: skip
    """What a predictor names for each token, likeliest first: uint16 (n_tokens, most), NO_EXPERT for nothing.

    None where it has nothing to go by: no layer before, or no other text to learn from.
    """
    if before is None and predictor in ("lookahead", "affinity"):
        return None
    if planned.n_units < 2 and predictor in ("affinity", "frequent"):
        return None
    n_experts, experts = experts_of(trace, layer), chosen[layer]
    half = halves(planned.n_units, seed)[planned.unit].astype(np.int64)  # of each text
    named = np.full((trace.n_tokens, most), NO_EXPERT, np.uint16)
    if predictor == "previous":
        _name_previous(experts, planned.runs, n_experts, named)
    elif predictor == "frequent":
        used = np.zeros((2, n_experts), np.int64)
        _count_used(experts, planned.runs, half, used)
        order = np.argsort(-used[::-1], axis=1, kind="stable")[:, :most]  # of the other half
        named[:] = order[np.repeat(half, np.diff(planned.runs))]
    elif before is not None and predictor == "lookahead":
        known = trace.lookahead(before)[:, :most]
        named[:, : known.shape[1]] = known
    elif before is not None:
        n_before, earlier = experts_of(trace, before), chosen[before]
        pairs, used = np.zeros((2, n_before, n_experts), np.int64), np.zeros((2, n_before), np.int64)
        _count_pairs(earlier, experts, planned.runs, half, pairs, used)
        share = np.nan_to_num(divide(pairs[::-1], used[::-1, :, None]))
        _name_likeliest(earlier, share, planned.runs, half, named)
    return named


def rates(
    counts: np.ndarray, predictor: str, layer: int | None, ratios: Sequence[float], budget: np.ndarray,
    facts: dict[str, float], n_resamples: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """The rows of one layer and predictor, from counts (n_units, n_budgets, 6)."""
    n_units = len(counts)
    total = counts.sum(axis=0)

    def estimate(part: int, whole: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        drawn = resampled_rates(counts[:, :, part], counts[:, :, whole], n_resamples, seed)[1]
        return divide(total[:, part], total[:, whole]), *ends(drawn, n_units)

    recall, precision, covered = estimate(RIGHT, NEEDED), estimate(RIGHT, NAMED), estimate(COVERED, NEEDED)
    useful = total[:, COVERED] - total[:, CACHED]
    return pd.DataFrame(
        {
            "layer": pd.array([layer] * len(budget), dtype="Int64"), "predictor": predictor,
            "ratio": np.array(ratios, float)[: len(budget)], "budget": budget,
            "recall": recall[0], "recall_low": recall[1], "recall_high": recall[2],
            "precision": precision[0], "precision_low": precision[1], "precision_high": precision[2],
            "cached": divide(total[:, CACHED], total[:, NEEDED]),
            "covered": covered[0], "covered_low": covered[1], "covered_high": covered[2],
            "loads": total[:, LOADED] / max(facts["n_tokens"], 1),
            "useless": divide(total[:, LOADED] - useful, total[:, LOADED]), **facts,
            "named": total[:, NAMED], "needed": total[:, NEEDED], "right": total[:, RIGHT],
        }
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _score(experts, named, runs, unit, n_experts, capacity, budgets, counts):
    """Count, by unit and budget, what was named, right, covered, loaded, needed and cached (the six columns)."""
    recent = np.empty(n_experts, np.int64)  # by time of last use, the latest first
    depth = np.full(n_experts, n_experts, np.int64)
    place = np.zeros(n_experts, np.int64)  # in what is named
    stamp = np.full(n_experts, -1, np.int64)
    n_recent = 0
    for run in range(len(unit)):
        row = counts[unit[run]]
        for token in range(runs[run], runs[run + 1]):
            for at in range(n_recent):
                depth[recent[at]] = at
            for at in range(named.shape[1]):
                expert = np.int64(named[token, at])
                if expert == NONE:
                    break
                place[expert], stamp[expert] = at, token
                for budget in range(len(budgets)):
                    if at < budgets[budget]:
                        row[budget, NAMED] += 1
                        row[budget, LOADED] += depth[expert] >= capacity
            for rank in range(experts.shape[1]):
                expert = np.int64(experts[token, rank])
                if expert == NONE:
                    continue
                cached = depth[expert] < capacity
                for budget in range(len(budgets)):
                    right = stamp[expert] == token and place[expert] < budgets[budget]
                    row[budget, NEEDED] += 1
                    row[budget, RIGHT] += right
                    row[budget, CACHED] += cached
                    row[budget, COVERED] += right or cached
            for rank in range(experts.shape[1]):
                if experts[token, rank] != NONE:
                    n_recent = _bring_forward(np.int64(experts[token, rank]), recent, n_recent)


@njit(cache=True, nogil=True)
def _bring_forward(expert, recent, n_recent):
    """Put an expert at the front of a list without repeats; the list's length."""
    carried = expert
    for at in range(n_recent):
        recent[at], carried = carried, recent[at]
        if carried == expert:
            return n_recent
    recent[n_recent] = carried
    return n_recent + 1


@njit(cache=True, nogil=True)
def _name_previous(experts, runs, n_experts, named):
    recent = np.empty(n_experts, np.int64)
    for run in range(len(runs) - 1):
        n_recent = 0
        for token in range(runs[run], runs[run + 1]):
            for at in range(min(n_recent, named.shape[1])):
                named[token, at] = recent[at]
            for rank in range(experts.shape[1] - 1, -1, -1):  # so that the best-ranked comes first
                if experts[token, rank] != NONE:
                    n_recent = _bring_forward(np.int64(experts[token, rank]), recent, n_recent)


@njit(cache=True, nogil=True)
def _count_used(experts, runs, half, used):
    for run in range(len(half)):
        for token in range(runs[run], runs[run + 1]):
            for rank in range(experts.shape[1]):
                if experts[token, rank] != NONE:
                    used[half[run], experts[token, rank]] += 1


@njit(cache=True, nogil=True)
def _count_pairs(earlier, later, runs, half, pairs, used):
    for run in range(len(half)):
        for token in range(runs[run], runs[run + 1]):
            for rank in range(earlier.shape[1]):
                first = np.int64(earlier[token, rank])
                if first == NONE:
                    continue
                used[half[run], first] += 1
                for other in range(later.shape[1]):
                    if later[token, other] != NONE:
                        pairs[half[run], first, later[token, other]] += 1


@njit(cache=True, nogil=True)
def _name_likeliest(earlier, share, runs, half, named):
    """Name the experts with the largest sums of shares (2, E_before, E), ties: the lower number."""
    n_experts, most = share.shape[2], named.shape[1]
    total = np.empty(n_experts)
    best = np.empty(most)
    for run in range(len(half)):
        for token in range(runs[run], runs[run + 1]):
            total[:] = 0
            known = False
            for rank in range(earlier.shape[1]):
                if earlier[token, rank] != NONE:
                    total += share[half[run], earlier[token, rank]]
                    known = True
            if not known:
                continue
            n = 0
            for expert in range(n_experts):
                score = total[expert]
                if n == most and score <= best[n - 1]:
                    continue
                at = n if n < most else n - 1
                while at > 0 and best[at - 1] < score:
                    best[at], named[token, at] = best[at - 1], named[token, at - 1]
                    at -= 1
                best[at], named[token, at] = score, expert
                n = min(n + 1, most)


def figure(frame: pd.DataFrame) -> Figure:
    """Recall and precision by layer, a line a predictor, each naming as many experts as a token uses."""
    ratio = min(frame["ratio"], key=lambda value: abs(value - 1))
    layers = frame[frame["layer"].notna() & (frame["ratio"] == ratio)]
    result = figures.panels(
        ["recall", "precision", "in the cache or named"], columns=3, height=300, legend=True, tight=True
    )
    for panel, value in enumerate(("recall", "precision", "covered")):
        for predictor in (name for name in PREDICTORS if name in set(layers["predictor"])):
            part = layers[layers["predictor"] == predictor]
            figures.line(
                result, part["layer"], part[value], part[f"{value}_low"], part[f"{value}_high"], name=predictor,
                style=STYLES[predictor], panel=panel, band=False, legend=panel == 0,
            )  # fmt: skip
        if panel < 2:
            one = layers.drop_duplicates("layer")
            chance = one["budget" if value == "recall" else "top_k"] / one["n_experts"]
            figures.line(
                result, one["layer"], chance, name="even routing", style=figures.NULL, panel=panel, legend=panel == 0
            )
    one = layers.drop_duplicates("layer")
    figures.line(result, one["layer"], one["cached"], name="LRU cache alone", style=figures.CONTEXT, panel=2)
    if len(layers):
        figures.layer_axes(result, layers["layer"], sparse=True)
    result.update_xaxes(title="layer")
    result.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The best predictor, and what it adds to a cache, in sentences."""
    ratio = min(frame["ratio"], key=lambda value: abs(value - 1))
    whole = frame[frame["layer"].isna() & (frame["ratio"] == ratio) & frame["recall"].notna()]
    if whole.empty:
        return ["Nothing could be predicted: no token used any expert, or there is only one text to learn from."]
    order = whole.sort_values("recall", ascending=False)
    best = order.iloc[0]
    others = ", ".join(f"{row['predictor']} {row['recall']:.1%}" for _, row in order.iloc[1:].iterrows())
    chance = best["budget"] / best["n_experts"]
    return [
        f"Naming {best['budget']:g} experts a layer in advance, {best['predictor']} finds {best['recall']:.1%} "
        f"[{best['recall_low']:.1%}, {best['recall_high']:.1%}] of those needed; {others + '; ' if others else ''}"
        f"even routing would give {chance:.1%}.",
        f"Beside an LRU cache of {best['capacity']:g} experts a layer ({best['cached']:.1%} of what is needed), "
        f"{best['predictor']} raises that to {best['covered']:.1%}, for {best['loads']:.2f} loads a token and layer, "
        f"of which {best['useless']:.1%} are useless.",
    ]
