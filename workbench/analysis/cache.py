"""What part of the experts that tokens need would be found in a cache that holds only some of them.

A cache of capacity C holds C of a layer's E experts in fast memory; **hit rate** = accesses found there / accesses, 0
to 1. If routing were even and without memory, every policy would have C/E: the dotted line of the figure.

Policies, each simulated at every capacity in one pass (stack algorithms: Mattson et al. 1970, *Evaluation techniques
for storage hierarchies*):

- **static**: the C most used experts of the whole trace, loaded beforehand (`static-held-out`: chosen on the other half
  of the texts, each half serving the other, as a deployment would).
- **lru**: evicts the least recently used. **lfu**: the least often used so far; ties, least recently used. Counts stay
  when an expert is evicted. **aged-lfu**: the same with counts that halve every `half_life` tokens.
- **window**: evicts the least used in the last `window` tokens.
- **lookahead**: evicts the least used in the `lookahead` tokens that begin with the current one; it knows the future.
- **belady**: evicts what is needed latest (Belady 1966): the best there is when what a token needs must be loaded
  (forced admission). **belady-bypass**: the best of all, may use an expert without keeping it.

How it is counted, each an option and (but for `chunk`) a column of the table:

- **access**: `token`: what a token needs is needed at once, so a cache that has to load it must hold at least k;
  smaller ones are left empty (NaN), but not of static and of bypass. `single`: one expert after the other.
  `snapshot`: looked up at once, loaded one by one, as in moe-lrc's scripts. At the same capacity these are different
  numbers; don't compare one with the other.
- **cold**: the first touch of an expert is a `miss`, or `free` (a hit while the cache isn't full: moe-lrc counts so),
  or `excluded` from hits and accesses. A static cache has no first touches.
- **admission**: `forced` or `bypass` for the policies between static and belady.
- **scope**: `layer`: a cache of capacity C for each layer. `global`: one cache for the experts of all layers.
- **phase**, **chunk**, **batch**: `decode` takes one token at a time, `prefill` a chunk of a text at once, `recorded`
  chunks of prompts and single generated tokens; `batch` texts advance together and share what they load.
- **keep**: whether the cache lives on from text to text, in the order of the trace, or starts empty at each.

**share of Belady** = hits / hits of Belady's policy under the same admission. The **knee** of a curve is where it is
farthest above the straight line between its ends (both axes 0 to 1; Satopää et al. 2011).

Intervals cover 95% of bootstrap resamples of texts (blocks of texts where there are more than 256).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import experts_of
from workbench.analysis.events import Events, Plan, events, joint_events, plan
from workbench.analysis.eviction import ACCESS, ADMISSION, COLD, Counts, check, hits_by_capacity, replay, resident, uses
from workbench.analysis.hit_rates import divide, ends, held_out, knee, resampled_rates, side_by_side
from workbench.errors import InputError
from workbench.tracefile import Trace

POLICIES = (
    "static", "static-held-out", "lru", "lfu", "aged-lfu", "window", "lookahead", "belady", "belady-bypass",
)  # fmt: skip
REAL = ("static-held-out", "lru", "lfu", "aged-lfu", "window")
"""Policies that a deployment can follow: they don't look ahead."""
SCOPES = ("layer", "global")
WHOLE = None
"""Layer of the rows about all layers, missing in the table."""
STYLES = {
    "static": figures.Style("#CC79A7"), "static-held-out": figures.Style("#CC79A7", "dot"),
    "lru": figures.Style("#0072B2"), "lfu": figures.Style("#D55E00"), "aged-lfu": figures.Style("#E69F00", "dash"),
    "window": figures.Style("#009E73", "dash"), "lookahead": figures.Style("#56B4E9"),
    "belady": figures.Style(figures.INK), "belady-bypass": figures.Style(figures.INK, "dot"),
}  # fmt: skip
MOST_PANELS = 5
"""Layers that the figure shows beside the whole model."""


def cache(
    trace: Trace,
    *,
    policies: tuple[str, ...] = ("static", "lru", "lfu", "aged-lfu", "window", "lookahead", "belady", "belady-bypass"),
    capacities: tuple[int, ...] | None = None,
    access: str = "token",
    cold: str = "miss",
    admission: str = "forced",
    scope: str = "layer",
    phase: str = "decode",
    chunk: int | None = None,
    batch: int = 1,
    keep: bool = True,
    window: int = 64,
    lookahead: int = 16,
    half_life: float = 64.0,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Hit rate by capacity of each policy, for each layer and for all layers together.

    policies    any of static, static-held-out, lru, lfu, aged-lfu, window, lookahead, belady, belady-bypass
    capacities  experts that the cache holds (of each layer, or in all with scope="global"); None: all from 1 to E
    window, lookahead, half_life   in tokens
    access, cold, admission, scope, phase, chunk, batch, keep   see above; chunk None: whole texts

    Returns one row a layer × policy × capacity, and the same for the whole model: scope ("layer"; "model": all layers,
    with a cache of that capacity each; "global": one cache), layer (missing where it isn't one), policy, capacity;
    hit_rate with low, high; hits, accesses, first_touches (counts); share_of_belady with share_low, share_high (NaN
    unless that policy was asked for); knee (bool); the options access, cold, admission, phase, batch, keep; n_experts,
    n_tokens, n_texts (batches, if batch > 1). Hit rates are NaN where an event needs more experts than fit, and
    without accesses.
    scope="global" holds the choices of all layers in memory.
    """
    check_options(policies, capacities, access, cold, admission, scope, window, lookahead, half_life)
    planned = plan(trace, phase=phase, chunk=chunk, batch=batch, seed=seed)
    spans = {"window": window, "lookahead": lookahead}
    options = {"access": access, "keep": keep, "half_life": half_life}

    def jobs(stream: Events) -> list[Callable[[], Counts]]:
        return [simulation(stream, policy, admission, spans, options, seed) for policy in policies]

    said = {"access": access, "cold": cold, "admission": admission, "phase": phase, "batch": batch, "keep": keep}
    tables = []
    if scope == "global":
        stream = joint_events(trace, planned)
        tallies = [tally(counts, cold) for counts in side_by_side(jobs(stream))]
        tables.append(curves(policies, tallies, ("global", WHOLE), admission, capacities, n_resamples, seed))
    else:
        widest = max((experts_of(trace, layer) for layer in range(trace.n_layers)), default=1)
        pooled = [tally(empty(planned, widest), cold) for _ in policies]
        for layer in range(trace.n_layers):
            stream = events(trace, layer, planned)
            tallies = [tally(counts, cold) for counts in side_by_side(jobs(stream))]
            tables.append(curves(policies, tallies, ("layer", layer), admission, capacities, n_resamples, seed))
            pooled = [add(total, part) for total, part in zip(pooled, tallies, strict=True)]
        tables.append(curves(policies, pooled, ("model", WHOLE), admission, capacities, n_resamples, seed))
    return pd.concat(tables, ignore_index=True).assign(**said, n_tokens=trace.n_tokens, n_texts=planned.n_texts)


def check_options(
    policies: Sequence[str], capacities: Sequence[int] | None, access: str, cold: str, admission: str, scope: str,
    window: int, lookahead: int, half_life: float,
) -> None:  # fmt: skip
    """Refuse what can't be simulated, before the trace is read."""
    for policy in policies:
        check(policy, POLICIES, "policy")
    for name, value, known in (
        ("access", access, ACCESS), ("cold", cold, COLD), ("admission", admission, ADMISSION), ("scope", scope, SCOPES),
    ):  # fmt: skip
        check(value, known, name)
    if not policies or (capacities is not None and not capacities):
        raise InputError("nothing to simulate: give at least one policy and one capacity.")
    for capacity in capacities or ():
        if capacity < 1:
            raise InputError(f"capacity {capacity}: expected at least 1 expert.")
    if window < 1 or lookahead < 1 or not half_life > 0:
        raise InputError(
            f"window is {window}, lookahead {lookahead}, half_life {half_life}: expected at least 1 token, and above 0."
        )


def simulation(
    stream: Events, policy: str, admission: str, spans: dict[str, int], options: dict, seed: int
) -> Callable[[], Counts]:
    """The simulation of one policy, to be called."""
    if policy == "static":
        return lambda: resident(stream, np.argsort(-uses(stream).sum(axis=0), kind="stable"))
    if policy == "static-held-out":
        return partial(held_out, stream, seed)
    if policy.startswith("belady"):
        admission = "bypass" if policy == "belady-bypass" else "forced"
    name = policy.removesuffix("-bypass")
    return partial(replay, stream, name, admission=admission, span=spans.get(policy, 1), **options)


Tally = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Hits (n_units, E), NaN where undefined; accesses (n_units,); first touches (n_units,)."""


def tally(counts: Counts, cold: str) -> Tally:
    """What is kept of a simulation."""
    return *hits_by_capacity(counts, cold), counts.cold.sum(axis=1)


def empty(planned: Plan, n_experts: int) -> Counts:
    """Counts of nothing, to add to."""
    nothing = np.zeros((planned.n_units, n_experts), np.int64)
    return Counts(nothing, nothing, 0)


def add(total: Tally, part: Tally) -> Tally:
    """The sum of two layers; a layer with fewer experts than the capacity has them all in its cache."""
    hits, wide = part[0], total[0].shape[1]
    hits = np.pad(hits, ((0, 0), (0, wide - hits.shape[1])), mode="edge") if hits.shape[1] < wide else hits
    return total[0] + hits, total[1] + part[1], total[2] + part[2]


def curves(
    policies: Sequence[str], tallies: Sequence[Tally], place: tuple[str, int | None], admission: str,
    capacities: Sequence[int] | None, n_resamples: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """The rows of one layer."""
    scope, layer = place
    n_units, n_experts = tallies[0][0].shape
    every = np.arange(1, n_experts + 1)
    asked = every if capacities is None else every[np.isin(every, capacities)]
    if not len(asked) and scope != "layer":
        raise InputError(f"no capacity of {list(capacities or ())} is at most the {n_experts} experts there are.")
    best = "belady-bypass" if admission == "bypass" else "belady"
    reference = np.full(len(asked), np.nan)
    reference_drawn = np.full((n_resamples, len(asked)), np.nan)
    if best in policies:
        hits, accesses, _ = tallies[list(policies).index(best)]
        reference = hits.sum(axis=0)[asked - 1]
        reference_drawn = resampled_rates(hits[:, asked - 1], accesses, n_resamples, seed)[0]
    tables = []
    for policy, (hits, accesses, first) in zip(policies, tallies, strict=True):
        total = hits.sum(axis=0)
        rate = divide(total, accesses.sum())
        drawn, drawn_rate = resampled_rates(hits[:, asked - 1], accesses, n_resamples, seed)
        low, high = ends(drawn_rate, n_units)
        share_low, share_high = ends(divide(drawn, reference_drawn), n_units)
        tables.append(
            pd.DataFrame(
                {
                    "scope": scope, "layer": pd.array([layer] * len(asked), dtype="Int64"), "policy": policy,
                    "capacity": asked,
                    "hit_rate": rate[asked - 1], "low": low, "high": high,
                    "hits": total[asked - 1], "accesses": accesses.sum(), "first_touches": first.sum(),
                    "share_of_belady": divide(total[asked - 1], reference), "share_low": share_low,
                    "share_high": share_high, "knee": asked == knee(every, rate), "n_experts": n_experts,
                }
            )
        )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def figure(frame: pd.DataFrame) -> Figure:
    """Hit rate by capacity, a line a policy: all layers together, then some of them. Circles mark the knees."""
    whole = frame[frame["layer"].isna()]
    layers = figures.spread(frame.loc[frame["scope"] == "layer", "layer"], MOST_PANELS)
    one_cache = (whole["scope"] == "global").all()
    parts = [("one cache for all layers" if one_cache else "all layers", whole)]
    parts += [(f"layer {layer}", frame[frame["layer"] == layer]) for layer in layers if len(layers) > 1]
    result = figures.panels(
        [title for title, _ in parts], columns=3 if len(parts) > 1 else 1, height=260, legend=True, tight=True
    )
    for panel, (_, part) in enumerate(parts):
        n_experts = part["n_experts"].iloc[0]
        figures.line(
            result, [0, n_experts], [0, 1], name="even routing", style=figures.NULL, panel=panel, band=False,
            legend=panel == 0, x_name="capacity",
        )  # fmt: skip
        result.update_traces(mode="lines", selector={"name": "even routing"})
        for policy, rows in part.groupby("policy", sort=False):
            look = STYLES[str(policy)]
            figures.line(
                result, rows["capacity"], rows["hit_rate"], rows["low"], rows["high"], name=str(policy), style=look,
                panel=panel, band=False, legend=panel == 0, x_name="capacity",
            )  # fmt: skip
            bend = rows[rows["knee"]]
            result.add_scatter(
                x=bend["capacity"], y=bend["hit_rate"], mode="markers", hoverinfo="skip", showlegend=False,
                marker={"size": 9, "symbol": "circle-open", "color": look.colour, "line": {"width": 1.5}},
                legendgroup=str(policy), **figures.axes(panel),
            )  # fmt: skip
    result.update_traces(marker_size=4, selector={"mode": "lines+markers"})
    result.update_xaxes(rangemode="tozero")
    for panel in range(max(0, len(parts) - 3), len(parts)):  # below the lowest panel of each column
        axis = figures.axes(panel)["xaxis"].replace("x", "xaxis")
        result.layout[axis]["title"] = {"text": "experts in the cache" + ("" if one_cache else ", of each layer")}
    result.update_yaxes(range=[0, 1.02], tickformat=".0%")
    result.update_layout(yaxis={"title": {"text": "hit rate"}})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The best policy that doesn't know the future at its knee, how far it is from the best possible, in sentences."""
    whole = frame[frame["layer"].isna() & frame["hit_rate"].notna()]
    if whole.empty:
        if (frame["accesses"] == 0).all():
            return ["No token used any expert."]
        return ["An event needs more experts than any capacity asked for: ask for larger ones, or admission=bypass."]
    real = whole[whole["policy"].isin(REAL)]
    real = whole if real.empty else real
    marked = real[real["knee"]]
    capacity = (marked if len(marked) else real)["capacity"].min()
    top = real[real["capacity"] == capacity].sort_values("hit_rate").iloc[-1]
    n_experts = top["n_experts"]
    where = f"{capacity} of {n_experts} experts" + (" of all layers" if top["scope"] == "global" else " a layer")
    sentences = [
        f"A cache of {where} finds {top['hit_rate']:.1%}{between(top)} of what tokens need, with {top['policy']}"
        f"{', the best of the policies that don' + chr(39) + 't look ahead' if real['policy'].nunique() > 1 else ''}; "
        f"even routing would give {capacity / n_experts:.1%}."
    ]
    if np.isfinite(top["share_of_belady"]) and not str(top["policy"]).startswith("belady"):
        sentences.append(
            f"That is {top['share_of_belady']:.1%} of the hits of the best possible policy with the same admission, "
            "which would have to know the future."
        )
    sentences.append(
        f"Counted with access={top['access']}, cold={top['cold']}, admission={top['admission']}, "
        f"phase={top['phase']}, batch={top['batch']}, and a cache that "
        + ("lives on from text to text." if top["keep"] else "starts empty at every text.")
    )
    return sentences


def between(row: pd.Series) -> str:
    """An interval, for a sentence; nothing where there is none."""
    return f" [{row['low']:.1%}, {row['high']:.1%}]" if np.isfinite(row["low"]) else ""
