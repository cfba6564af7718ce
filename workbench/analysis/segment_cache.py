"""Segment Cache best Hit rate (SCH): how far a cache gets that knows which experts the next m tokens use.

A cache of C = ρ·k experts (k: experts that a token uses) loads what a token needs and it lacks, and evicts instead the
experts used least in a window of m tokens, ties: least recently used. **SCH** is its hit rate, 0 to 1 (Liang et al.
2025, *Not All Models Suit Expert Offloading*, arXiv 2505.16056, §2.3). It says how much the routing of a text stays
with the same experts for about m tokens: a property of the model, and a goal for caches that guess instead of knowing.
Every text begins with an empty cache. C is rounded to a whole number, and at most E.

- **compatible**: counted as the authors' scripts do (github.com/ljcleo/moe-lrc): the first touch of an expert is a hit
  as long as the cache isn't full. The shorter the texts and the larger the cache, the more of it is such hits.
- **honest**: a first touch is a miss, as it is when the expert has to be loaded.

What the scripts do beside the paper's text, and this does too: the window of m tokens begins with the current token, so
they look m − 1 tokens ahead; hits are judged against the cache as the token finds it, but its experts are then loaded
one by one, and one may evict another (`access="snapshot"`; `access="token"` loads them at once, as the paper says:
then C = k leaves no choice, and all policies are equal). They read every 16th text, this reads all. They average the
rates of texts of equal length, this weighs texts by their accesses. Their model-level numbers are those of one cache
for the experts of all layers with whole tokens as events: `scope="global"`, C = ρ·k·layers.

Beside it, in the same cache: **lru**, **lfu** (counts persist when an expert is evicted), and **belady**, which evicts
what is used latest. **Share of Belady** = hits / hits of `belady`, as in the paper's table on its toy models (% of
Belady, LRU/LFU/SCH: ρ=1 56/62/81, ρ=2 67/71/91, ρ=3 75/78/96). With `access="snapshot"` Belady's rule is only nearly
optimal, since it minimises loads one by one.

Intervals cover 95% of bootstrap resamples of texts (blocks of texts where there are more than 256).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.cache import SCOPES, STYLES, WHOLE, between
from workbench.analysis.events import Events, events, joint_events, plan
from workbench.analysis.eviction import ACCESS, Counts, check, hits_by_capacity, replay
from workbench.analysis.hit_rates import divide, ends, resampled_rates, side_by_side
from workbench.errors import InputError
from workbench.tracefile import Trace

COUNTS = {"compatible": "free", "honest": "miss"}
"""The two ways of counting, and what `hits_by_capacity` calls them."""
SHADES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
"""Of windows, shortest to longest; the longest is dashed."""

LABEL = 0.055
"""Height of a label in the figure, in hit rate."""


def segment_cache(
    trace: Trace,
    *,
    windows: tuple[int, ...] = (4, 16, 64, 256),
    ratios: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0),
    access: str = "snapshot",
    scope: str = "layer",
    baselines: bool = True,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """SCH at each window m and cache ratio ρ in both counts, with LRU, LFU and Belady beside it.

    windows    m, in tokens
    ratios     ρ: experts in the cache / experts that a token uses
    access     snapshot (as the authors' scripts) or token (as their text); single: one expert after the other
    scope      layer: a cache for each layer; global: one for all, which holds the choices of all layers in memory
    baselines  also lru, lfu and belady; without them share_of_belady is NaN

    Returns one row a layer × policy × ratio × count, and the same for the whole model: scope ("layer"; "model": all
    layers together, each with its cache; "global"), layer (missing where it isn't one), policy (sch-4, …, lru, lfu,
    belady), window (m, 0 where there is none), ratio, capacity (in the rows of the whole model, of all layers
    together), count (compatible, honest); hit_rate with low, high; hits, accesses, first_touches; share_of_belady with
    share_low, share_high; n_experts, n_tokens, n_texts, access.

    InputError for no window or one below 1, and no ratio or one that isn't above 0.
    """
    check(access, ACCESS, "access")
    check(scope, SCOPES, "scope")
    if not windows or min(windows) < 1:
        raise InputError(f"windows are {tuple(windows)}; expected at least one, each at least 1 token.")
    if not ratios or not min(ratios) > 0:
        raise InputError(f"ratios are {tuple(ratios)}; expected at least one, each above 0.")
    planned = plan(trace, seed=seed)
    spans = {f"sch-{m}": m for m in dict.fromkeys(windows)}
    policies = [*(("lru", "lfu") if baselines else ()), *spans, *(("belady",) if baselines else ())]

    def simulate(stream: Events) -> list[Counts]:
        jobs: list[Callable[[], Counts]] = [
            partial(
                replay, stream, "lookahead" if policy in spans else policy, access=access, keep=False,
                span=spans.get(policy, 1),
            )
            for policy in policies
        ]  # fmt: skip
        return side_by_side(jobs)

    top_k = [int(k) for k in trace.layers["top_k"]]
    tables = []
    held_in_all, n_experts = np.zeros(len(ratios), int), 0
    sums: list[Cut] = []
    for layer, k in enumerate(top_k if scope == "layer" else [sum(top_k)]):
        stream = events(trace, layer, planned) if scope == "layer" else joint_events(trace, planned, whole_tokens=True)
        held = np.clip(np.round(np.array(ratios) * k).astype(int), 1, stream.n_experts)
        cuts = [at_capacities(counts, held) for counts in simulate(stream)]
        place = ("layer", layer) if scope == "layer" else ("global", WHOLE)
        tables.append(rows(policies, spans, ratios, held, cuts, place, stream.n_experts, n_resamples, seed))
        held_in_all, n_experts = held_in_all + held, n_experts + stream.n_experts
        sums = [add(total, cut) for total, cut in zip(sums, cuts, strict=True)] if sums else cuts
    if scope == "layer":
        place = ("model", WHOLE)
        tables.append(rows(policies, spans, ratios, held_in_all, sums, place, n_experts, n_resamples, seed))
    return pd.concat(tables, ignore_index=True).assign(n_tokens=trace.n_tokens, n_texts=planned.n_texts, access=access)


Cut = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Hits (2, n_units, n_ratios) in the order of COUNTS, accesses (n_units,), first touches (n_units,)."""


def at_capacities(counts: Counts, held: np.ndarray) -> Cut:
    """What is kept of a simulation."""
    hits = np.stack([hits_by_capacity(counts, cold)[0][:, held - 1] for cold in COUNTS.values()])
    return hits, counts.accesses, counts.cold.sum(axis=1)


def add(one: Cut, two: Cut) -> Cut:
    return one[0] + two[0], one[1] + two[1], one[2] + two[2]


def rows(
    policies: Sequence[str], spans: dict[str, int], ratios: Sequence[float], held: np.ndarray, cuts: Sequence[Cut],
    place: tuple[str, int | None], n_experts: int, n_resamples: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """The rows of one layer."""
    tables = []
    for number, count in enumerate(COUNTS):
        drawn = [resampled_rates(hits[number], accesses, n_resamples, seed) for hits, accesses, _ in cuts]
        best = policies.index("belady") if "belady" in policies else None
        for at, (policy, (hits, accesses, first)) in enumerate(zip(policies, cuts, strict=True)):
            n_units, total = len(accesses), hits[number].sum(axis=0)
            low, high = ends(drawn[at][1], n_units)
            share, share_low, share_high = (np.full(len(held), np.nan) for _ in range(3))
            if best is not None:
                share = divide(total, cuts[best][0][number].sum(axis=0))
                share_low, share_high = ends(divide(drawn[at][0], drawn[best][0]), n_units)
            tables.append(
                pd.DataFrame(
                    {
                        "scope": place[0], "layer": pd.array([place[1]] * len(held), dtype="Int64"),
                        "policy": policy, "window": spans.get(policy, 0),
                        "ratio": np.array(ratios, float), "capacity": held, "count": count,
                        "hit_rate": divide(total, accesses.sum()), "low": low, "high": high,
                        "hits": total, "accesses": accesses.sum(), "first_touches": first.sum(),
                        "share_of_belady": share, "share_low": share_low, "share_high": share_high,
                        "n_experts": n_experts,
                    }
                )
            )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def look(policy: str, window: int, windows: Sequence[int]) -> figures.Style:
    """Colour of a line: those of `cache`, and for SCH the darker the longer the window."""
    if not window:
        return STYLES[policy]
    place = windows.index(window) / max(len(windows) - 1, 1)
    return figures.Style(SHADES[round(place * (len(SHADES) - 1))], "dash" if place == 1 else "solid")


def figure(frame: pd.DataFrame) -> Figure:
    """Hit rate by cache ratio in both counts, a line a policy; and SCH by layer, a line a ratio."""
    whole = frame[frame["layer"].isna()]
    windows = sorted(set(frame["window"]) - {0})
    middle = min(windows, key=lambda m: abs(m - 16))
    by_layer = frame[(frame["scope"] == "layer") & (frame["window"] == middle) & (frame["count"] == "honest")]
    n_layers = by_layer["layer"].nunique()
    titles = ["honest: first touches miss", "compatible: free first touches hit"]
    titles += [f"each layer, m = {middle}, honest"] if n_layers > 1 else []
    result = figures.panels(titles, columns=3, height=300, legend=True, tight=True)
    for panel, count in enumerate(("honest", "compatible")):
        for policy, part in whole[whole["count"] == count].groupby("policy", sort=False):
            window = int(part["window"].iloc[0])
            figures.line(
                result, part["ratio"], part["hit_rate"], part["low"], part["high"],
                name=f"SCH, m = {window}" if window else str(policy), style=look(str(policy), window, windows),
                panel=panel, band=False, legend=panel == 0, x_name="ρ",
            )  # fmt: skip
    result.update_xaxes(title="cache ratio ρ (experts held / used by a token)", title_font_size=11)
    if n_layers > 1:
        last, level = by_layer["layer"].max(), -1.0
        ends_of = by_layer[by_layer["layer"] == last].set_index("ratio")["hit_rate"]
        for number, (ratio, part) in enumerate(by_layer.groupby("ratio")):
            colour = figures.COLOURS[number % len(figures.COLOURS)]
            figures.line(
                result, part["layer"], part["hit_rate"], part["low"], part["high"], name=f"ρ = {ratio:g}",
                style=figures.Style(colour), panel=2, legend=False,
            )  # fmt: skip
            level = max(float(np.nan_to_num(ends_of[ratio])), level + LABEL)
            result.add_annotation(
                x=last, y=level, text=f"ρ = {ratio:g}", showarrow=False, xanchor="left", xshift=6,
                font={"size": 11, "color": colour}, xref="x3", yref="y3",
            )  # fmt: skip
        result.update_layout(xaxis3={"range": [-0.05 * last, 1.25 * last]})
        result.update_layout(xaxis3={"title": {"text": "layer"}})
    result.update_yaxes(range=[0, 1.02], tickformat=".0%")
    result.update_layout(yaxis={"title": {"text": "hit rate"}})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """SCH at twice the experts a token uses, in both counts, and the share of Belady, in sentences."""
    whole = frame[frame["layer"].isna() & frame["hit_rate"].notna()]
    if whole.empty:
        if (frame["accesses"] == 0).all():
            return ["No token used any expert."]
        return ["No cache of these ratios holds what one token uses: ask for larger ratios."]
    ratio = min(whole["ratio"], key=lambda value: abs(value - 2))
    window = min((m for m in whole["window"] if m), key=lambda m: abs(m - 16))
    at = whole[whole["ratio"] == ratio]
    honest, compatible = (
        at[(at["window"] == window) & (at["count"] == count)].iloc[0] for count in ("honest", "compatible")
    )
    kind = "one cache for all layers" if honest["scope"] == "global" else "caches"
    sentences = [
        f"With {kind} that hold {ratio:g} times the experts a token uses, keeping what the next {window} tokens use "
        f"most finds {honest['hit_rate']:.1%}{between(honest)} of what tokens need; {compatible['hit_rate']:.1%} if "
        "first touches of a cache that isn't full count as hits, as in the published scripts."
    ]
    if np.isfinite(honest["share_of_belady"]):
        parts = at[at["count"] == "honest"].set_index("policy")["share_of_belady"]
        sentences.append(
            f"Of Belady's hits, LRU has {parts['lru']:.1%}, LFU {parts['lfu']:.1%}, and this "
            f"{parts[honest['policy']]:.1%}."
        )
    return sentences
