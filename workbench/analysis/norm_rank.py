"""Whether the experts that a router weights most are those with the largest outputs.

For a token with the gate weights g and the L2 norms ‖E_e(x)‖ of its chosen experts' outputs before weighting, rank 1
is the largest of each. Over the tokens with at least two experts in a layer (and group):

- **frequency** of (gate_rank, norm_rank): the part of the tokens with that many experts whose expert of that gate rank
  has that norm rank. The columns of a row sum to 1; **chance** is what independent ranks would give, 1/k.
- **mean_norm** of a gate_rank: mean ‖E_e(x)‖ of the experts of that rank, in the units of the hidden states;
  **relative_norm**: mean of the norm divided by the mean norm of the token's experts, 1 by chance.
- **top_match**: the part of the tokens whose most weighted expert has the largest norm; 1/k by chance.
- **kendall** (τ-b) and **spearman**: rank correlation of weight and norm among a token's experts, −1 to 1, mean over
  tokens; 0 by chance. Tokens whose weights or whose norms are all equal have none.

Rows of a measure that has no gate_rank or norm_rank hold 0 there. Equal weights or norms are ranked in the router's
order for frequency and top_match, and share their mean rank for spearman. Intervals cover 95% of bootstrap resamples of
texts.

Lo et al. 2025 (A Closer Look into Mixture-of-Experts, arXiv:2406.18219, §4) find that routers tend to choose experts
with larger output norms. Their script runs *all* experts on every token and ranks all E of them; a trace holds the
norms of the chosen k, so the ranks here are among those: what the gate prefers within its choice, not the choice.
"""

import numba
import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import sort_into_cells
from workbench.analysis.group_heatmap import group_heatmap
from workbench.analysis.token_means import by_group, drawn_texts, in_blocks, means
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

WHOLE = ("top_match", "kendall", "spearman")
"""Measures of a token as a whole."""
MOST_PANELS = 6


def norm_rank(trace: Trace, *, by: str | None = None, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Ranks of output norm against ranks of gate weight among each token's experts, layer by layer.

    by           column of the sequences, `phase` or `position`; None puts all tokens into the group "all"
    n_resamples  bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row a group × layer × measure (× gate_rank × norm_rank): by, group, layer, measure, gate_rank,
    norm_rank; value with low, high; chance; n_compared tokens; top_k; n_tokens, n_sequences, n_texts of the group;
    n_unlabelled sequences without a label. A layer whose tokens have at most one expert has no ranks: its values are
    NaN.

    Raises InputError if weights or norms were not recorded.
    """
    if missing := [name for name in ("weights", "norms") if name not in trace.recorded]:
        had = ",".join(sorted(trace.recorded - {"ids", "counts"} | set(missing)))
        raise InputError(
            f"norm_rank needs weights and norms, and run {trace.run!r} has no {' and no '.join(missing)}: trace again "
            f"with --record ids,{had}."
        )
    cells = in_blocks(sort_into_cells(trace, by), seed)
    drawn = drawn_texts(cells, n_resamples, seed)
    n_cells = len(cells.group)
    tables = []
    for layer in range(trace.n_layers):
        experts = trace.experts(layer)
        k = experts.shape[1]
        names = rows_of(k)
        total, number, chance = (np.zeros((n_cells, len(names))) for _ in range(3))
        rank_tokens(experts, trace.weights(layer), trace.norms(layer), cells.of_token, total, number, chance)
        value, low, high = means(total, number, cells, drawn)
        compared, expected = by_group(number, cells), by_group(chance, cells)
        expected = np.divide(expected, compared, out=np.full(value.shape, np.nan), where=compared > 0)
        for at, (measure, gate_rank, norm_rank_) in enumerate(names):
            tables.append(
                pd.DataFrame(
                    {
                        "by": by,
                        "group": cells.labels,
                        "layer": layer,
                        "measure": measure,
                        "gate_rank": gate_rank,
                        "norm_rank": norm_rank_,
                        "value": value[:, at],
                        "low": low[:, at],
                        "high": high[:, at],
                        "chance": np.nan if measure == "mean_norm" else expected[:, at],
                        "n_compared": compared[:, at].astype(np.int64),
                        "top_k": k,
                        "n_tokens": cells.n_tokens,
                        "n_sequences": cells.n_sequences,
                        "n_texts": cells.n_texts,
                        "n_unlabelled": cells.n_unlabelled,
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def rows_of(k: int) -> list[tuple[str, int, int]]:
    """Measure, gate rank and norm rank of the columns that `rank_tokens` fills."""
    ranks = range(1, k + 1)
    return [
        *((name, 0, 0) for name in WHOLE),
        *(("mean_norm", gate, 0) for gate in ranks),
        *(("relative_norm", gate, 0) for gate in ranks),
        *(("frequency", gate, norm) for gate in ranks for norm in ranks),
    ]


@numba.njit(cache=True, nogil=True)
def rank_tokens(experts, weights, norms, cell_of, total, number, chance):
    """Add every token to the sums, numbers and chance levels of its cell: (n_cells, 3 + 2k + k²), as in `rows_of`."""
    k = experts.shape[1]
    gate_rank, norm_rank = np.zeros(k, np.int64), np.zeros(k, np.int64)
    g, e = np.zeros(k), np.zeros(k)
    for token in range(len(experts)):
        cell = cell_of[token]
        if cell < 0:
            continue
        n = 0
        for i in range(k):
            if experts[token, i] != NO_EXPERT:
                g[n], e[n] = weights[token, i], norms[token, i]
                n += 1
        if n < 2:
            continue
        concordant, ties_g, ties_e = 0.0, 0.0, 0.0
        mean = 0.0
        xx, yy, xy = 0.0, 0.0, 0.0
        for i in range(n):
            above_g, equal_g, before_g, above_e, equal_e, before_e = 0, 0, 0, 0, 0, 0
            for j in range(n):
                above_g += g[j] > g[i]
                above_e += e[j] > e[i]
                if j == i:
                    continue
                equal_g += g[j] == g[i]
                equal_e += e[j] == e[i]
                if j < i:
                    before_g += g[j] == g[i]
                    before_e += e[j] == e[i]
                    concordant += np.sign(g[i] - g[j]) * np.sign(e[i] - e[j])
                    ties_g += g[j] == g[i]
                    ties_e += e[j] == e[i]
            gate_rank[i], norm_rank[i] = above_g + before_g, above_e + before_e
            x = above_g + equal_g / 2 - (n - 1) / 2  # mean rank of ties, around 0
            y = above_e + equal_e / 2 - (n - 1) / 2
            xx += x * x
            yy += y * y
            xy += x * y
            mean += e[i] / n
        pairs = n * (n - 1) / 2
        number[cell, 0] += 1
        chance[cell, 0] += 1 / n
        if xx > 0 and yy > 0:
            number[cell, 1] += 1
            total[cell, 1] += concordant / np.sqrt((pairs - ties_g) * (pairs - ties_e))
            number[cell, 2] += 1
            total[cell, 2] += xy / np.sqrt(xx * yy)
        for i in range(n):
            gate, norm = gate_rank[i], norm_rank[i]
            if gate == 0 and norm == 0:
                total[cell, 0] += 1
            total[cell, 3 + gate] += e[i]
            number[cell, 3 + gate] += 1
            if mean > 0:
                total[cell, 3 + k + gate] += e[i] / mean
                number[cell, 3 + k + gate] += 1
                chance[cell, 3 + k + gate] += 1
            for rank in range(n):
                at = 3 + 2 * k + gate * k + rank
                number[cell, at] += 1
                chance[cell, at] += 1 / n
                if rank == norm:
                    total[cell, at] += 1


def figure(frame: pd.DataFrame) -> Figure:
    """The share of tokens by gate and norm rank, relative to chance, a panel a layer; with groups Spearman by layer."""
    groups = list(frame["group"].unique())
    if len(groups) > 1:
        return lines(frame, groups)
    shown = figures.spread(frame["layer"], MOST_PANELS)
    titles = []
    for layer in shown:
        whole = frame[(frame["layer"] == layer) & (frame["measure"] == "spearman")]["value"].iloc[0]
        titles.append(f"layer {layer}" + (f", Spearman {whole:+.2f}" if np.isfinite(whole) else ""))
    result = figures.panels(titles, columns=3, height=200)
    for panel, layer in enumerate(shown):
        part = frame[(frame["layer"] == layer) & (frame["measure"] == "frequency")]
        names = ("value", "low", "high", "chance")
        wide = {name: part.pivot(index="norm_rank", columns="gate_rank", values=name) for name in names}
        result.add_trace(
            figures.ratios(
                (wide["value"] / wide["chance"]).to_numpy(),
                x=list(wide["value"].columns),
                y=[str(rank) for rank in wide["value"].index],
                hover="gate rank %{x}, norm rank %{y}<br>%{customdata[0]:.1%} of the tokens "
                "[%{customdata[1]:.1%}, %{customdata[2]:.1%}]<br>by chance %{customdata[3]:.1%}<extra></extra>",
                details=np.stack([values.to_numpy() for values in wide.values()], axis=-1),
                panel=panel,
            )
        )
    figures.ratio_scale(result, "× chance")
    result.update_xaxes(showgrid=False, ticks="", dtick=max(1, int(frame["top_k"].max()) // 8))
    result.update_yaxes(showgrid=False, ticks="", autorange="reversed", type="category")
    for panel in range(len(shown)):
        if panel % 3 == 0:
            result.layout[figures.axes(panel)["yaxis"].replace("y", "yaxis")].update(title="rank of norm")
        if panel >= len(shown) - 3:
            result.layout[figures.axes(panel)["xaxis"].replace("x", "xaxis")].update(title="rank of weight")
    return result


def lines(frame: pd.DataFrame, groups: list[str]) -> Figure:
    """Spearman by layer: a line a group, or a row of a heatmap where there are many."""
    part = frame[frame["measure"] == "spearman"]
    if len(groups) <= figures.MOST_LINES:
        result = figures.panels([""], height=300, legend=True)
        for group in groups:
            one = part[part["group"] == group]
            figures.line(
                result, one["layer"], one["value"], one["low"], one["high"], name=group, style=figures.style(group),
                band=len(groups) <= figures.MOST_BANDS,
            )  # fmt: skip
        figures.layer_axes(result, frame["layer"])
        result.update_yaxes(title="Spearman, weight and norm")
        return result
    return group_heatmap(part.drop(columns="chance"), "Spearman", signed=True)


def findings(frame: pd.DataFrame) -> list[str]:
    """Whether weight and norm go together, where most and where least, in sentences."""
    known = frame[(frame["measure"] == "spearman") & frame["value"].notna()]
    if known.empty:
        return ["No token has two experts whose weights and norms differ: there is nothing to rank."]
    several = frame["group"].nunique() > 1

    def where(row: pd.Series) -> str:
        name = f", {figures.noun(row['by'])} {row['group']}" if several else ""
        ends = f" [{row['low']:+.2f}, {row['high']:+.2f}]" if np.isfinite(row["low"]) else ""
        return f"layer {row['layer']}{name}: {row['value']:+.2f}{ends}"

    most, least = known.iloc[known["value"].argmax()], known.iloc[known["value"].argmin()]
    sentences = [f"Spearman's correlation of gate weight and output norm is largest in {where(most)}."]
    if len(known) > 1:
        sentences[0] = sentences[0][:-1] + f", and smallest in {where(least)}."
    top = frame[(frame["measure"] == "top_match") & frame["value"].notna()]
    value, chance = (np.average(top[name], weights=top["n_compared"]) for name in ("value", "chance"))
    sentences.append(
        f"The most weighted expert has the largest output of a token's experts in {value:.0%} of the cases; "
        f"independent ranks would give {chance:.0%}."
    )
    return sentences
