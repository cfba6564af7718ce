"""Which experts one set of tokens uses oftener than another: code against prose, German against English, `<think>`.

Both sets are filters (`lang=de`, `domain=code-c & phase=prompt`, `token=" the"`, `text~<think>`); without the second,
it is every other token. For an expert e of a layer, with the rate of a set = activations of e / tokens of the set:

- **difference** = rate of the group − rate of the other set, −1 to 1: the risk difference of SteerMoE (Fayyaz et al.
  2025, there over the tokens of the compared spans), and Δ of Multilingual Routing (Bandarkar et al. 2025), whose task
  experts are those with Δ > τ. **above** marks them: difference > τ (an option, 0 by default).
- **nPMI** = log( p(x, e) / p(x)p(e) ) / −log p(x, e) with x "the token is of the group" (RICE, Wang et al. 2025):
  [log k/M + log T/K] / log(T/k), for k activations of e at the M tokens of the group and K at all T tokens of both
  sets. 1: e serves the group, all of it and nothing else; 0: independent; −1: never. It favours experts that are rare
  elsewhere, the difference those that are busy here.
- **p**: two-sided, over texts. Where no text has tokens of both sets, the labels are shuffled over texts, and the
  difference over its standard error is compared, so that texts of unlike length do no harm. Where texts have both
  (a token against the rest, a language against its translations), each text's part in the difference keeps its size
  and gets a random sign: tokens never leave their text. It serves the nPMI too, which is 0 exactly where the
  difference is. With fewer than about 20 texts, random signs are only roughly right.
- **q**: false-discovery rate (Benjamini–Hochberg) over all layers × experts of the table.

The intervals, those of the nPMI too, cover 95% of bootstrap resamples of texts; a sequence's translations and pieces
(same segment) are one text.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis import rates
from workbench.analysis.counting import Cells, cells_of_labels, count
from workbench.analysis.filters import mask
from workbench.analysis.layer_rows import layer_rows
from workbench.analysis.resampling import q_values
from workbench.errors import InputError
from workbench.tracefile import Trace

SIGNIFICANT = 0.05
"""False-discovery rate below which findings and figure call a difference one."""
EVERYTHING_ELSE = "everything else"
MOST_NAMED = 10
"""Experts with a row of their own in the figure, from each end."""


def contrast(
    trace: Trace,
    *,
    group: str | None = None,
    versus: str | None = None,
    tau: float = 0.0,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rates of each expert at the tokens of `group` and of `versus`, and their contrast.

    group   filter of the tokens asked about (see workbench.analysis.filters)
    versus  filter of the tokens compared with; None: all others
    tau     smallest difference that `above` marks

    Returns one row a layer × expert: group, versus, layer, expert; rate, rate_versus; difference with low, high; npmi
    with npmi_low, npmi_high; above; p, q; count, count_versus (activations); n_experts; n_tokens, n_tokens_versus,
    n_texts, n_texts_versus. NaN: nPMI of an expert that nobody uses, intervals where a set is a single text, p where
    chance can't move the difference. InputError if a filter is wrong or the sets share a token.
    """
    if group is None:
        raise InputError("contrast compares two sets of tokens: give group='lang=de' (and versus='lang=en').")
    first = mask(trace, group)
    second = ~first if versus is None else mask(trace, versus)
    cells = two_sets(trace, first, second, group, versus or EVERYTHING_ELSE)
    n_tokens = rates.tokens_of_cells(cells)
    tables = []
    for layer in range(trace.n_layers):
        activations = count(trace, layer, cells)
        found = rates.compare(activations, n_tokens, cells.group, cells.text, n_resamples, n_permutations, seed)
        n_experts = len(found["rate"])
        counts = {name: found.pop(name) for name in ("count", "count_versus")}
        p = found.pop("p")
        tables.append(
            pd.DataFrame(
                {
                    "group": group,
                    "versus": versus or EVERYTHING_ELSE,
                    "layer": layer,
                    "expert": np.arange(n_experts),
                    **found,
                    "above": found["difference"] > tau,
                    "p": p,
                    **counts,
                    "n_experts": n_experts,
                    "n_tokens": cells.n_tokens[0],
                    "n_tokens_versus": cells.n_tokens[1],
                    "n_texts": cells.n_texts[0],
                    "n_texts_versus": cells.n_texts[1],
                }
            )
        )
    frame = pd.concat(tables, ignore_index=True)
    frame.insert(frame.columns.get_loc("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame


def two_sets(trace: Trace, first: np.ndarray, second: np.ndarray, name: str, other: str) -> Cells:
    """Cells of two sets of tokens, bool (n_tokens,) each; InputError if they overlap or the second is empty."""
    both = int((first & second).sum())
    if both:
        raise InputError(
            f"{both:,} tokens are both {name!r} and {other!r}; narrow one of the filters, or leave the second out."
        )
    if not second.any():
        raise InputError(f"every token is {name!r}: nothing is left to compare with.")
    label = np.where(first, 0, np.where(second, 1, -1))
    return cells_of_labels(trace.sequences(), trace.sequence_index(), label, [name, other])


def figure(frame: pd.DataFrame) -> Figure:
    """Every expert's difference, a row a layer, largest first; below, the largest of all with their intervals."""
    shown = ("difference", "expert", "rate", "rate_versus", "low", "high", "npmi", "q")
    names, grids = layer_rows(frame, "difference", shown)
    titles = [f"{side(frame, 'group')} minus {side(frame, 'versus')}", ""]
    result = figures.panels(titles, height=max(32 * MOST_NAMED, 11 * len(names)))
    result.add_trace(
        figures.differences(
            grids["difference"],
            x=list(range(1, grids["difference"].shape[1] + 1)),
            y=names,
            hover="%{y} · expert %{customdata[1]:.0f}<br>difference %{z:+.3f} [%{customdata[4]:+.3f}, "
            "%{customdata[5]:+.3f}]<br>rates %{customdata[2]:.3f}, %{customdata[3]:.3f}<br>nPMI %{customdata[6]:+.3f}"
            "<br>q %{customdata[7]:.3f}<extra></extra>",
            details=np.stack(list(grids.values()), axis=-1),
        )
    )
    figures.difference_scale(result, "difference<br>of rates", float(np.nanmax(np.abs(frame["difference"]), initial=0)))
    top = named(frame)
    labels = [f"layer {row.layer} · expert {row.expert}" for row in top.itertuples()]
    figures.dots(result, top["difference"], labels, top["low"], top["high"], panel=1)
    result.update_xaxes(title="experts of each layer, largest difference first", showgrid=False, row=1, col=1)
    result.update_xaxes(title="largest differences of rates (activations a token)", zeroline=True, row=2, col=1)
    result.update_yaxes(autorange="reversed", showgrid=False)
    result.update_yaxes(tickmode="linear", dtick=1, row=2, col=1)
    return result


def side(frame: pd.DataFrame, column: str) -> str:
    """A filter as a title."""
    text = str(frame[column].iloc[0])
    return figures.plain(text if len(text) <= 50 else f"{text[:49]}…")


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest differences of either sign, the significant ones if there are any."""
    known = frame[frame["difference"].notna()]
    clear = known[known["q"] < SIGNIFICANT]
    chosen = (clear if len(clear) else known).sort_values("difference", ascending=False)
    ends = pd.concat([chosen.head(MOST_NAMED), chosen.tail(MOST_NAMED)])
    return ends[~ends.index.duplicated()]


def findings(frame: pd.DataFrame) -> list[str]:
    """How many experts differ, and the one that differs most, in sentences."""
    group, versus = frame["group"].iloc[0], frame["versus"].iloc[0]
    clear = frame[frame["q"] < SIGNIFICANT]
    if clear.empty:
        return [
            f"No expert is used at another rate by {group} than by {versus} (false-discovery rate {SIGNIFICANT:.0%}; "
            f"{frame['n_texts'].iloc[0]:,} and {frame['n_texts_versus'].iloc[0]:,} texts)."
        ]
    more = clear[clear["difference"] > 0]
    sentences = [
        f"{len(clear)} of {len(frame)} experts are used at another rate by {group} than by {versus}, {len(more)} of "
        f"them oftener (false-discovery rate {SIGNIFICANT:.0%})."
    ]
    top = clear.iloc[clear["difference"].abs().to_numpy().argmax()]
    sentences.append(
        f"The largest difference: expert {top['expert']} of layer {top['layer']} is used at {top['rate']:.1%} of the "
        f"tokens of {group} and at {top['rate_versus']:.1%} of {versus} ({top['difference']:+.3f} [{top['low']:+.3f}, "
        f"{top['high']:+.3f}], nPMI {top['npmi']:+.2f})."
    )
    return sentences
