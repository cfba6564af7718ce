"""How important each expert is, by the scores that pruning and quantising go by.

For an expert e of a layer, over the tokens t of a group that chose it, with the gate weight g and the L2 norm
‖E_e(h_t)‖ of the expert's output before weighting:

- **frequency**: its share of the layer's assignments; the shares of a layer sum to 1.
- **weighted_frequency** = Σ g / Σ of all the layer's gate weights; sums to 1 too.
- **output_norm** = mean ‖E_e(h_t)‖ over the tokens that chose it; 0 where none did.
- **weighted_norm** = Σ g·‖E_e(h_t)‖ / number of tokens: what the expert adds to the residual stream of a token, on
  average over all tokens.
- **reap** = mean g·‖E_e(h_t)‖ over the tokens that chose it (Lasby et al. 2025, REAP, arXiv:2510.13999); 0 where none
  did.
- **easy_ep** = Σ g·‖E_e(h_t)‖·s_t / number of tokens, with s_t = max(0, 1 − cos(x_t, x_t + r_t)), x the residual stream
  before the block and r the routed experts' output without shared experts (Dong et al. 2025, EASY-EP,
  arXiv:2504.06792, §3). There it is the sum over tokens; the mean has the same ranks and doesn't grow with the corpus.

Frequencies need nothing but ids; weighted_frequency needs weights, the norms need norms, weighted_norm and reap both,
easy_ep also shift: `workbench trace … --record ids,weights,norms,shift`. Norms are in the units of the model's hidden
states, so they compare experts of one layer, not layers.

For each score S there are **S_low** and **S_high**, the 95% interval of bootstrap resamples of texts, and **S_rank**
within the layer (and group), 1 for the most important; equal scores share their mean rank.
`workbench prune` takes the table with `--importance` and one of the scores with `--score`.

**bits** (only if asked for): a number of bits for each expert with a given mean per layer, for quantising important
experts less. A uniform quantiser's squared error falls fourfold with each bit, so the sum of S·4^(−bits) is minimised:
bit by bit to the expert that gains most, which is optimal because gains only shrink. It takes the place of the measured
errors that MC# and MC-MoE (Huang et al. 2024, arXiv:2410.06270) put into their integer program: a hint where to
begin, not a measurement.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.stats import rankdata

from workbench import figures
from workbench.analysis.counting import Cells, experts_of, sizes, sort_into_cells
from workbench.analysis.filters import mask
from workbench.analysis.resampling import interval
from workbench.analysis.token_means import by_group, drawn_texts, in_blocks, only, ratio, resampled
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

NEEDS = {
    "frequency": (),
    "weighted_frequency": ("weights",),
    "output_norm": ("norms",),
    "weighted_norm": ("weights", "norms"),
    "reap": ("weights", "norms"),
    "easy_ep": ("weights", "norms", "shift"),
}
"""The scores, the simplest first, and what a run must have recorded for each."""
FEWEST_BITS, MOST_BITS = 1, 8
FEW_PANELS = 6
PREFERRED = ("easy_ep", "weighted_norm", "reap", "weighted_frequency", "output_norm", "frequency")
"""Which score decides where one has to: the first of these there is."""


def importance(
    trace: Trace,
    *,
    by: str | None = None,
    where: str | None = None,
    scores: tuple[str, ...] | None = None,
    bits: float | None = None,
    bits_by: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Importance scores of every expert of every layer.

    by           column of the sequences, `phase` or `position`: importance for a language or a domain
    where        filter of the tokens that count (see workbench.analysis.filters); None: all
    scores       some of those at the top of the file; None: all that the trace allows
    bits         mean bits a weight to give out in each layer, 1 to 8; None: no column `bits`
    bits_by      the score that decides about them; None: the first there is of easy_ep, weighted_norm, reap,
                 weighted_frequency, output_norm and frequency
    n_resamples  bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row a group × layer × expert: group, layer, expert; for each score S the columns S, S_low, S_high,
    S_rank; bits; count (tokens that chose the expert); n_experts; n_tokens, n_sequences, n_texts of the group;
    n_unlabelled sequences left out for want of a label. A score that the trace doesn't allow has no columns.

    Raises InputError for a score that isn't one, or that was asked for and needs what was not recorded.
    """
    wanted = possible(trace, scores)
    check_bits(bits, bits_by, wanted)
    cells = sort_into_cells(trace, by)
    if where is not None:
        cells = only(cells, mask(trace, where), trace.sequence_index())
    cells = in_blocks(cells, seed)
    drawn = drawn_texts(cells, n_resamples, seed)
    n_groups = len(cells.labels)
    tables = []
    for layer in range(trace.n_layers):
        n_experts = experts_of(trace, layer)
        found = expert_sums(trace, layer, cells, wanted)
        together = {name: by_group(rows, cells) for name, rows in found.items()}
        values = {name: scored(name, together) for name in wanted}
        ends = intervals(found, cells, drawn, wanted)
        columns: dict[str, np.ndarray] = {}
        for name in wanted:
            ranks = rankdata(-np.nan_to_num(values[name], nan=-1), axis=1)
            columns |= {
                name: values[name],
                f"{name}_low": ends[name][0],
                f"{name}_high": ends[name][1],
                f"{name}_rank": ranks,
            }
        if bits is not None:
            score = values[bits_by or decisive(wanted)]
            columns["bits"] = np.stack([allot(np.nan_to_num(row), bits) for row in score])
        tables.append(
            pd.DataFrame(
                {
                    "group": np.repeat(cells.labels, n_experts),
                    "layer": layer,
                    "expert": np.tile(np.arange(n_experts), n_groups),
                    **{name: column.ravel() for name, column in columns.items()},
                    "count": together["count"].ravel().astype(np.int64),
                    "n_experts": n_experts,
                    **sizes(cells, n_experts),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def possible(trace: Trace, scores: Sequence[str] | None) -> list[str]:
    """The scores asked for, or all that the trace allows, the simplest first; InputError says what to record."""
    if scores is None:
        return [name for name, needs in NEEDS.items() if trace.recorded.issuperset(needs)]
    for name in scores:
        if name not in NEEDS:
            raise InputError(f"scores has {name!r}; expected some of {', '.join(NEEDS)}.")
        missing = [need for need in NEEDS[name] if need not in trace.recorded]
        if missing:
            had = ",".join(sorted(trace.recorded - {"ids", "counts"} | set(missing)))
            raise InputError(
                f"{name} needs {' and '.join(NEEDS[name])}, and run {trace.run!r} has no {' and no '.join(missing)}: "
                f"trace again with --record ids,{had}."
            )
    if not scores:
        raise InputError(f"scores names none; expected some of {', '.join(NEEDS)}.")
    return [name for name in NEEDS if name in scores]


def check_bits(bits: float | None, bits_by: str | None, scores: Sequence[str]) -> None:
    """Refuse a number of bits, or a score to give them out by, that can't be."""
    if bits is not None and not FEWEST_BITS <= bits <= MOST_BITS:
        raise InputError(f"bits is {bits}; expected a mean of {FEWEST_BITS} to {MOST_BITS} bits a weight.")
    if bits_by is not None and bits is None:
        raise InputError(f"bits_by is {bits_by!r}, but no bits are to be given out: give their mean too, as in bits=4.")
    if bits_by is not None and bits_by not in scores:
        raise InputError(f"bits_by is {bits_by!r}; expected one of the scores of this table, {', '.join(scores)}.")


def expert_sums(trace: Trace, layer: int, cells: Cells, scores: Sequence[str]) -> dict[str, np.ndarray]:
    """What the scores are made of, summed over the tokens of each cell: float64 (n_cells, n_experts) each.

    count, and as far as `scores` need them weight (Σ g), norm (Σ ‖E‖), output (Σ g‖E‖), shifted (Σ g‖E‖s). And, of one
    column, the number of tokens there are and of those whose shift is known.
    """
    n_experts, n_cells = experts_of(trace, layer), len(cells.group)
    needs = {need for name in scores for need in NEEDS[name]}
    experts = trace.experts(layer)
    weights = trace.weights(layer) if "weights" in needs else None
    norms = trace.norms(layer) if "norms" in needs else None
    shift = trace.shift(layer) if "shift" in needs else None
    kept = cells.of_token >= 0
    base = cells.of_token.astype(np.int64) * n_experts
    found: dict[str, np.ndarray] = {}
    for rank in range(experts.shape[1]):
        used = kept & (experts[:, rank] != NO_EXPERT)
        place = base[used] + experts[used, rank]
        parts: dict[str, np.ndarray | None] = {"count": None}
        if weights is not None:
            parts["weight"] = weights[used, rank]
        if norms is not None:
            parts["norm"] = norms[used, rank]
        if weights is not None and norms is not None:
            parts["output"] = weights[used, rank].astype(np.float64) * norms[used, rank]
            if shift is not None:
                parts["shifted"] = parts["output"] * np.nan_to_num(shift[used])
        for name, values in parts.items():
            total = np.bincount(place, values, minlength=n_cells * n_experts).reshape(n_cells, n_experts)
            found[name] = found[name] + total if name in found else total.astype(np.float64)
    for name, counted in (("tokens", kept), ("known", kept if shift is None else kept & np.isfinite(shift))):
        found[name] = np.bincount(cells.of_token[counted], minlength=n_cells)[:, None].astype(np.float64)
    return found


def scored(name: str, found: dict[str, np.ndarray]) -> np.ndarray:
    """A score (…, n_experts) from the sums of `expert_sums`."""
    value = ratio(*fraction(name, found))
    # An expert that no token chose has no norm; for pruning it counts as nothing.
    return np.nan_to_num(value) if name in ("output_norm", "reap") else value


def fraction(name: str, found: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What a score is the ratio of: sums (…, n_experts), and the sums they are divided by, (…, 1 or n_experts)."""
    if name == "frequency":
        return found["count"], found["count"].sum(axis=-1, keepdims=True)
    if name == "weighted_frequency":
        return found["weight"], found["weight"].sum(axis=-1, keepdims=True)
    if name == "easy_ep":
        return found["shifted"], found["known"]
    if name == "weighted_norm":
        return found["output"], found["tokens"]
    return found["norm" if name == "output_norm" else "output"], found["count"]


def intervals(
    found: dict[str, np.ndarray], cells: Cells, drawn: np.ndarray, scores: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ends of each score's interval: two (n_groups, n_experts) a score, NaN where there is a single text."""
    shape = (len(cells.labels), found["count"].shape[1])
    ends = {name: (np.full(shape, np.nan), np.full(shape, np.nan)) for name in scores}
    bounds = np.cumsum([rows.shape[1] for rows in found.values()])[:-1]
    for group, together in enumerate(resampled(np.hstack(list(found.values())), cells, drawn)):
        if cells.n_texts[group] < 2:
            continue
        sums = dict(zip(found, np.split(together, bounds, axis=1), strict=True))
        for name in scores:
            ends[name][0][group], ends[name][1][group] = interval(scored(name, sums))
    return ends


def allot(score: np.ndarray, mean_bits: float) -> np.ndarray:
    """Bits of each expert, 1 to 8, of the given mean (rounded down to whole bits a layer), from scores >= 0.

    Minimises Σ score · 4^(−bits). Experts of equal gain get their bit in order of their number.

    >>> allot(np.array([1.0, 1.0, 0.01, 0.0]), 3)
    array([5, 4, 2, 1])
    """
    bits = np.full(len(score), FEWEST_BITS)
    left = int(mean_bits * len(score) + 1e-9) - bits.sum()
    # The gain of one more bit, S·4^(−b)·3/4, shrinks with every bit.
    queue = [(-float(value) * 4.0**-FEWEST_BITS, expert) for expert, value in enumerate(score)]
    heapq.heapify(queue)
    while left > 0 and queue:
        gain, expert = heapq.heappop(queue)
        bits[expert] += 1
        left -= 1
        if bits[expert] < MOST_BITS:
            heapq.heappush(queue, (gain / 4, expert))
    return bits


def columns_of(frame: pd.DataFrame) -> list[str]:
    """The scores that a table has, the simplest first."""
    return [name for name in NEEDS if name in frame]


def decisive(scores: Sequence[str]) -> str:
    """The score that orders experts in the figure, and gives out bits unless told otherwise."""
    return next(name for name in PREFERRED if name in scores)


def figure(frame: pd.DataFrame) -> Figure:
    """Each score relative to its mean in the layer, a row a layer; the experts ordered by the decisive score.

    Where scores agree, all panels run from red to blue alike. With several groups: the decisive score, a panel a group.
    """
    scores = columns_of(frame)
    groups = figures.ordered(frame["group"].unique())
    decides = decisive(scores)
    if len(groups) > 1:
        shown = groups[:FEW_PANELS]
        parts = [(figures.plain(group), decides, frame[frame["group"] == group]) for group in shown]
    else:
        parts = [(name.replace("_", " "), name, frame) for name in scores]
    n_layers = frame["layer"].nunique()
    result = figures.panels([title for title, *_ in parts], columns=3, height=max(14 * n_layers, 110), tight=True)
    width = int(frame["n_experts"].max())
    layers = sorted(frame["layer"].unique())
    # Panels of groups keep the order of the first group's experts, so that a column is one expert everywhere.
    order = {
        layer: part.sort_values(f"{decides}_rank", kind="stable")["expert"].to_numpy()
        for layer, part in parts[0][2].groupby("layer")
    }
    for panel, (_, name, part) in enumerate(parts):
        rows = part.set_index(["layer", "expert"])
        grid = np.full((len(layers), width, 5), np.nan)
        for at, layer in enumerate(layers):
            found = rows.loc[layer].reindex(order[layer])
            values = found[name].to_numpy(float)
            known = values[np.isfinite(values)]
            mean = known.mean() if len(known) and known.mean() > 0 else np.nan
            grid[at, : len(values)] = np.stack(
                [values / mean, values, found[f"{name}_low"], found[f"{name}_high"], order[layer]], axis=-1
            )
        result.add_trace(
            figures.ratios(
                grid[..., 0],
                x=list(range(1, width + 1)),
                y=[f"layer {layer}" for layer in layers],
                hover="%{y} · expert %{customdata[4]:.0f}<br>%{customdata[1]:.4g} "
                "[%{customdata[2]:.4g}, %{customdata[3]:.4g}]<br>%{customdata[0]:.2f} × the layer's mean"
                "<extra></extra>",
                details=grid,
                panel=panel,
            )
        )
    figures.ratio_scale(result, "× mean")
    result.update_xaxes(showgrid=False, showticklabels=False, ticks="", title="")
    for panel in range(max(len(parts) - 3, 0), len(parts)):
        axis = figures.axes(panel)["xaxis"].replace("x", "xaxis")
        result.layout[axis].update(title=f"experts by {decides.replace('_', ' ')}")
    result.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How unequal the experts are, and whether the scores agree, in sentences."""
    scores = columns_of(frame)
    if not (frame["count"] > 0).any():
        return ["No token used any expert."]
    decides = decisive(scores)
    name = decides.replace("_", " ")
    cells = frame.groupby(["group", "layer"], sort=False)
    sentences = []
    if decides in ("output_norm", "reap"):
        spread = [part[decides].max() / part[decides].median() for _, part in cells if part[decides].median() > 0]
        if spread:
            sentences.append(f"The most important expert of a layer has {np.mean(spread):.1f} times its median {name}.")
    else:
        halves = [
            part[decides].nsmallest(len(part) // 2).sum() / part[decides].sum()
            for _, part in cells
            if part[decides].sum() > 0
        ]
        if halves:
            sentences.append(
                f"By {name}, the less important half of a layer's experts has {np.mean(halves):.0%} of the layer's "
                f"total ({min(halves):.0%} to {max(halves):.0%})."
            )
    pairs = []
    for at, first in enumerate(scores):
        for second in scores[at + 1 :]:
            found = [alike(part[f"{first}_rank"], part[f"{second}_rank"]) for _, part in cells]
            found = [value for value in found if np.isfinite(value)]
            if found:
                pairs.append((float(np.mean(found)), first.replace("_", " "), second.replace("_", " ")))
    if pairs:
        least, most = min(pairs), max(pairs)
        text = f"{least[1]} and {least[2]} rank the experts least alike (mean Spearman over layers {least[0]:+.2f})"
        if len(pairs) > 1:
            text += f", {most[1]} and {most[2]} most alike ({most[0]:+.2f})"
        sentences.append(text[0].upper() + text[1:] + ".")
    return sentences or ["The scores of this trace are all zero."]


def alike(first: pd.Series, second: pd.Series) -> float:
    """Spearman's correlation of two rankings; NaN where one of them doesn't vary."""
    if first.nunique() < 2 or second.nunique() < 2:
        return np.nan
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
