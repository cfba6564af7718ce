"""Which experts do more, less or other work in another run over the same tokens.

Both runs must be of one architecture, over the same texts with the same tokenizer, as for `agreement`; only tokens that
both have are counted. Of an expert of one layer:

- **share**, **share_other**: its part of all expert choices of the layer, in this run and in the other, 0 to 1.
- **difference** = share_other − share: above 0 where the other run uses it more; **ratio** = share_other / share.
- **kept** = n_both / max(n_here, n_there), 0 to 1: of the tokens that choose the expert, those that choose it in both
  runs. It is the overlap of `agreement` with tokens and experts exchanged: an expert may keep its share, and yet serve
  other tokens.
- **moved** = half the sum of |difference| over the experts of a layer, 0 to 1: the part of the layer's choices that
  went to other experts (total variation distance).

Intervals cover 95% of bootstrap resamples of texts. Of hundreds of experts some have an interval without 0 by chance
alone: 1 of 20 where nothing changed.

Source: ours; the total variation distance as in Levin, Peres & Wilmer 2009, section 4.1.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.choice_overlap import taken
from workbench.analysis.counting import EVERYTHING, Cells, add_choices, cells_of_labels, experts_of
from workbench.analysis.layer_rows import layer_rows
from workbench.analysis.matching import match, name_of, need_same_layers, other_run
from workbench.analysis.resampling import text_interval
from workbench.analysis.token_means import drawn_texts, in_blocks, only, ratio
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

MOST_NAMED = 24
"""Experts that the figure names."""


def expert_changes(
    trace: Trace, *, other: Trace | str | None = None, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The share of every expert in this run and in another over the same tokens.

    other        a Trace, the name of a run of the same file, the path of another file, or `path#run`; None: the other
                 run of a file that holds exactly two
    n_resamples  bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row a layer × expert: run, other, layer, expert; share with share_low, share_high; share_other with
    share_other_low, share_other_high; difference with low, high; ratio (NaN where the expert isn't used in this run);
    kept with kept_low, kept_high (NaN where neither run uses it); moved (of the layer); n_here, n_there, n_both
    (tokens that choose it in this run, in the other, in both); n_tokens, n_texts that both runs have. Shares are NaN in
    a layer without a choice.

    Raises InputError if the runs can't be compared, or share no token.
    """
    other = other_run(trace, other)
    need_same_layers(trace, other)
    matched = match(trace, other)
    cells = matched_cells(trace, matched.first, seed)
    drawn = drawn_texts(cells, n_resamples, seed).astype(np.float64)
    tables = []
    for layer in range(trace.n_layers):
        n_experts = experts_of(trace, layer)
        counts = count(taken(trace.experts(layer), matched.first), taken(other.experts(layer), matched.second),
                       cells, n_experts)  # fmt: skip
        found = measures(counts.sum(axis=0))
        resampled = measures(np.tensordot(drawn, counts, axes=1)) if len(drawn) else {}
        ends = {
            name: text_interval(resampled[name], int(cells.n_texts[0])) if resampled else (np.nan, np.nan)
            for name in ("share", "share_other", "difference", "kept")
        }
        here, there, both = counts.sum(axis=0).astype(np.int64)
        tables.append(
            pd.DataFrame(
                {
                    "run": trace.run, "other": name_of(other, trace), "layer": layer, "expert": np.arange(n_experts),
                    "share": found["share"], "share_low": ends["share"][0], "share_high": ends["share"][1],
                    "share_other": found["share_other"], "share_other_low": ends["share_other"][0],
                    "share_other_high": ends["share_other"][1],
                    "difference": found["difference"], "low": ends["difference"][0], "high": ends["difference"][1],
                    "ratio": ratio(found["share_other"], found["share"]),
                    "kept": found["kept"], "kept_low": ends["kept"][0], "kept_high": ends["kept"][1],
                    "moved": np.abs(found["difference"]).sum() / 2,
                    "n_here": here, "n_there": there, "n_both": both,
                    "n_tokens": int(cells.n_tokens[0]), "n_texts": int(cells.n_texts[0]),
                }
            )
        )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def matched_cells(trace: Trace, tokens: np.ndarray, seed: int) -> Cells:
    """The texts of the tokens that both runs have, as cells of one group for these tokens, at most MOST_BLOCKS."""
    of_sequence = trace.sequence_index()
    kept = np.zeros(len(of_sequence), bool)
    kept[tokens] = True
    cells = cells_of_labels(trace.sequences(), of_sequence, np.zeros(len(of_sequence), np.int64), [EVERYTHING])
    cells = in_blocks(only(cells, kept, of_sequence), seed)
    return Cells(**{**vars(cells), "of_token": cells.of_token[tokens]})


def count(here: np.ndarray, there: np.ndarray, cells: Cells, n_experts: int) -> np.ndarray:
    """Tokens of each text that chose each expert here, there and in both: float64 (n_texts, 3, E)."""
    both = here.copy()
    for rank in range(here.shape[1]):
        gone = (here[:, rank, None] != there).all(axis=1)
        both[gone, rank] = NO_EXPERT
    result = np.zeros((len(cells.group), 3, n_experts))
    for at, experts in enumerate((here, there, both)):
        total = np.zeros((len(cells.group), n_experts))
        add_choices(experts, cells.of_token, total)
        result[:, at] = total
    return result


def measures(counts: np.ndarray) -> dict[str, np.ndarray]:
    """From counts (…, 3, E) of tokens here, there and in both: share, share_other, difference, kept, each (…, E)."""
    here, there, both = (counts[..., at, :] for at in range(3))
    share, share_other = (ratio(part, part.sum(axis=-1, keepdims=True)) for part in (here, there))
    return {
        "share": share,
        "share_other": share_other,
        "difference": share_other - share,
        "kept": ratio(both, np.maximum(here, there)),
    }


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The experts that changed most, judged by the end of the interval that is nearer to 0; gains first."""
    known = frame[np.isfinite(frame["difference"])]
    low, high = known["low"].fillna(known["difference"]), known["high"].fillna(known["difference"])
    surely = np.where(low > 0, low, np.where(high < 0, -high, 0))
    first = known.assign(surely=surely, size=known["difference"].abs())
    first = first.sort_values(["surely", "size"], ascending=False, kind="stable").head(MOST_NAMED)
    return known.loc[first.index].sort_values("difference", ascending=False, kind="stable")


def figure(frame: pd.DataFrame) -> Figure:
    """Every expert's share in the other run relative to this one, a row a layer, gains first; below, the largest."""
    shown = ("ratio", "expert", "share", "share_other", "difference", "low", "high", "kept")
    names, grids = layer_rows(frame, "difference", shown)
    top = named(frame)
    run, other = (figures.plain(frame[name].iloc[0]) for name in ("run", "other"))
    result = figures.panels([f"{other} relative to {run}", ""], height=max(18 * len(top), 14 * len(names), 120))
    result.add_trace(
        figures.ratios(
            grids["ratio"],
            x=list(range(1, grids["ratio"].shape[1] + 1)),
            y=names,
            hover="%{y} · expert %{customdata[1]:.0f}<br>%{customdata[0]:.2f} × its share<br>share "
            "%{customdata[2]:.2%}, then %{customdata[3]:.2%}<br>difference %{customdata[4]:+.2%} "
            "[%{customdata[5]:+.2%}, %{customdata[6]:+.2%}]<br>kept %{customdata[7]:.1%}<extra></extra>",
            details=np.stack(list(grids.values()), axis=-1),
        )
    )
    figures.ratio_scale(result, "× its share")
    labels = [f"layer {row.layer} · expert {row.expert}" for row in top.itertuples()]
    figures.dots(result, top["difference"], labels, top["low"], top["high"], panel=1)
    result.update_xaxes(title="experts of each layer, largest gain first", showgrid=False, row=1, col=1)
    result.update_xaxes(title="difference of shares, largest changes", zeroline=True, tickformat="+.1%", row=2, col=1)
    result.update_yaxes(autorange="reversed", showgrid=False)
    result.update_yaxes(tickmode="linear", dtick=1, row=2, col=1)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The layer in which most work moved, and the experts that gained, lost and changed their tokens most."""
    run, other = frame["run"].iloc[0], frame["other"].iloc[0]
    known = frame[np.isfinite(frame["difference"])]
    if known.empty:
        return [f"Neither {run} nor {other} chose any expert for the tokens they share."]
    if (known["difference"] == 0).all() and (known["kept"].dropna() == 1).all():
        return [f"{run} and {other} choose every expert for the same tokens."]
    moved = known.groupby("layer")["moved"].first()
    sentences = [
        f"Most work went to other experts in layer {moved.idxmax()}: {moved.max():.1%} of its choices, least in layer "
        f"{moved.idxmin()}: {moved.min():.1%} ({known['n_tokens'].iloc[0]:,} tokens in both runs)."
    ]
    sure = known[(known["low"] > 0) | (known["high"] < 0)]
    for part, verb in ((sure.nlargest(1, "difference"), "gained"), (sure.nsmallest(1, "difference"), "lost")):
        for row in part.to_dict("records"):
            if (row["difference"] > 0) == (verb == "gained"):
                sentences.append(
                    f"Expert {row['expert']} of layer {row['layer']} {verb} most in {other}: {row['share']:.1%} of the "
                    f"layer's choices, then {row['share_other']:.1%} ({row['difference']:+.2%} [{row['low']:+.2%}, "
                    f"{row['high']:+.2%}])."
                )
    used = known[known[["n_here", "n_there"]].max(axis=1) > 0]
    least = used.sort_values("kept").iloc[0]
    sentences.append(
        f"Expert {least['expert']} of layer {least['layer']} kept fewest of its tokens: {least['kept']:.1%}; the "
        f"median expert kept {used['kept'].median():.1%}."
    )
    return sentences
