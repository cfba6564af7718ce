"""Which experts a task takes in each language, and whether they are the same ones as in English.

Two sets of tokens are filters: texts of a task (`domain=math-word-problems`) and general text (`source=udhr-articles`;
without it, every other token). For a language and an expert e of a layer:

- **difference** Δ = activations of e / tokens on the task, minus the same on general text of the same language
  (Bandarkar et al. 2025, Multilingual Routing in Mixture-of-Experts). It takes away what the language uses anyway.
- **chosen**: Δ > τ and q < 0.05: e is a task expert in this language. The paper takes τ alone (0.4 for Qwen3-30B-A3B);
  here 0.1 by default, since Δ shrinks where a task is not much unlike general text.
- **in_reference**: e is a task expert in the reference language (English unless asked otherwise).
- **p**: two-sided, over texts, as in contrast. **q**: false-discovery rate (Benjamini–Hochberg) over the table.

The intervals cover 95% of bootstrap resamples of texts. Languages without tokens of both sets are left out. How many
task experts two languages share is compared with what random sets of the same sizes in each layer share
(hypergeometric).
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.stats import hypergeom

from workbench import figures
from workbench.analysis import rates
from workbench.analysis.contrast import EVERYTHING_ELSE, SIGNIFICANT
from workbench.analysis.counting import cells_of_labels, count, token_labels
from workbench.analysis.filters import mask
from workbench.analysis.resampling import q_values
from workbench.errors import InputError
from workbench.tracefile import Trace

MOST_NUMBERS = 48
"""Experts beside each other that can have their numbers below."""
MOST_PANELS = 6
"""Layers that the figure shows when there are more: evenly spread."""


def task_experts(
    trace: Trace,
    *,
    task: str | None = None,
    general: str | None = None,
    by: str = "lang",
    reference: str = "en",
    tau: float = 0.1,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Experts used oftener on a task than on general text of the same language, language by language.

    task       filter of the task's tokens (see workbench.analysis.filters)
    general    filter of the tokens compared with; None: all others
    by         column of the sequences that holds the language
    reference  language whose task experts the others' are compared with
    tau        smallest difference of a task expert

    Returns one row a language × layer × expert: by, task, general, reference, lang, layer, expert; rate, rate_general;
    difference with low, high; p, q; chosen, in_reference; count, count_general (activations); n_experts; n_tokens,
    n_tokens_general, n_texts, n_texts_general. NaN: intervals where a set is a single text, p where chance can't move
    the difference. InputError if a filter is wrong, the sets share a token, or the reference lacks one of them.
    """
    if task is None:
        raise InputError("task_experts needs the tokens of a task: give task='domain=code-c' (and general='…').")
    sequences, of_sequence = trace.sequences(), trace.sequence_index()
    first = mask(trace, task)
    second = ~first if general is None else mask(trace, general)
    if (both := int((first & second).sum())) > 0:
        raise InputError(f"{both:,} tokens are both {task!r} and {general!r}; narrow one of the filters.")
    label, labels = token_labels(trace, sequences, of_sequence, by)
    languages = [at for at in range(len(labels)) if (first & (label == at)).any() and (second & (label == at)).any()]
    names = [labels[at] for at in languages]
    if reference not in names:
        found = f"choose the reference from {', '.join(names)}" if names else f"no {by} has both: change the filters"
        raise InputError(f"{by} {reference!r} doesn't have tokens both of the task and of general text; {found}.")
    place = np.full(len(labels) + 1, -1)
    place[languages] = np.arange(len(languages))
    side = np.where(first, 0, np.where(second, 1, -1))
    pair = np.where((side >= 0) & (place[label] >= 0), 2 * place[label] + side, -1)
    cells = cells_of_labels(sequences, of_sequence, pair, [f"{name} {end}" for name in names for end in (0, 1)])
    n_tokens = rates.tokens_of_cells(cells)
    bounds = np.searchsorted(cells.group, 2 * np.arange(len(names) + 1))
    tables = []
    for layer in range(trace.n_layers):
        activations = count(trace, layer, cells)
        for at, name in enumerate(names):
            rows = slice(bounds[at], bounds[at + 1])
            text = np.unique(cells.text[rows], return_inverse=True)[1]
            found = rates.compare(
                activations[rows], n_tokens[rows], cells.group[rows] - 2 * at, text, n_resamples, n_permutations, seed
            )
            tables.append(
                pd.DataFrame(
                    {
                        "lang": name,
                        "layer": layer,
                        "expert": np.arange(activations.shape[1]),
                        "rate": found["rate"],
                        "rate_general": found["rate_versus"],
                        "difference": found["difference"],
                        "low": found["low"],
                        "high": found["high"],
                        "p": found["p"],
                        "count": found["count"],
                        "count_general": found["count_versus"],
                        "n_experts": activations.shape[1],
                        "n_tokens": cells.n_tokens[2 * at],
                        "n_tokens_general": cells.n_tokens[2 * at + 1],
                        "n_texts": cells.n_texts[2 * at],
                        "n_texts_general": cells.n_texts[2 * at + 1],
                    }
                )
            )
    frame = pd.concat(tables, ignore_index=True)
    q = q_values(frame["p"].to_numpy())
    # Without permutations there is no q to ask for.
    chosen = (frame["difference"] > tau) & ((q < SIGNIFICANT) | (n_permutations == 0))
    of_reference = frame[chosen & (frame["lang"] == reference)]
    there = pd.MultiIndex.from_frame(of_reference[["layer", "expert"]])
    after = frame.columns.get_loc("p") + 1
    frame.insert(after, "q", q)
    frame.insert(after + 1, "chosen", chosen)
    frame.insert(after + 2, "in_reference", pd.MultiIndex.from_frame(frame[["layer", "expert"]]).isin(there))
    for place_of, value in enumerate((by, task, general or EVERYTHING_ELSE, reference)):
        frame.insert(place_of, ("by", "task", "general", "reference")[place_of], value)
    return frame


def overlap(frame: pd.DataFrame) -> pd.DataFrame:
    """What each language's task experts share with the reference's, over all layers.

    One row a language but the reference: lang, n_chosen, n_reference, n_shared; jaccard = shared / in either (NaN if
    neither has any); expected, what random sets of the same sizes in each layer share on average; p, how often they
    share as many.
    """
    rows = []
    for lang, part in frame[frame["lang"] != frame["reference"]].groupby("lang", sort=False):
        chance, expected = np.ones(1), 0.0
        for _, layer in part.groupby("layer"):
            size, mine, theirs = len(layer), int(layer["chosen"].sum()), int(layer["in_reference"].sum())
            chance = np.convolve(chance, hypergeom.pmf(np.arange(min(mine, theirs) + 1), size, mine, theirs))
            expected += mine * theirs / size
        shared = int((part["chosen"] & part["in_reference"]).sum())
        either = int((part["chosen"] | part["in_reference"]).sum())
        rows.append(
            {
                "lang": lang,
                "n_chosen": int(part["chosen"].sum()),
                "n_reference": int(part["in_reference"].sum()),
                "n_shared": shared,
                "jaccard": shared / either if either else np.nan,
                "expected": expected,
                "p": min(1.0, float(chance[shared:].sum())),
            }
        )
    columns = ["lang", "n_chosen", "n_reference", "n_shared", "jaccard", "expected", "p"]
    return pd.DataFrame(rows, columns=columns)


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a layer, a row a language, a column an expert that is a task expert in some language.

    The colour is the difference; experts of most languages stand first, and the reference is the first row.
    """
    shown = figures.spread(frame["layer"], MOST_PANELS)
    reference = frame["reference"].iloc[0]
    languages = [reference, *(lang for lang in figures.ordered(frame["lang"].unique()) if lang != reference)]
    columns = min(3, len(shown))
    result = figures.panels(
        [f"layer {layer}" for layer in shown], columns=columns, height=15 * max(len(languages), 8), tight=True
    )
    any_chosen = bool(frame["chosen"].any())
    widest = 0
    for panel, layer in enumerate(shown):
        part = frame[frame["layer"] == layer]
        wanted = part[part["chosen"]] if any_chosen else part
        # Strongest first among those of equally many languages.
        order = wanted.groupby("expert")["difference"].agg(["size", "sum"])
        order = order.sort_values(["size", "sum"], ascending=False)
        widest = max(widest, len(order))
        table = part.set_index(["lang", "expert"])
        names = ("difference", "low", "high", "rate", "rate_general", "q", "chosen")
        grids = [table[name].astype(float).unstack().reindex(index=languages, columns=order.index) for name in names]
        result.add_trace(
            figures.differences(
                grids[0].to_numpy(),
                x=[str(expert) for expert in order.index],
                y=[figures.plain(lang) for lang in languages],
                hover="%{y} · expert %{x}<br>difference %{z:+.3f} [%{customdata[1]:+.3f}, %{customdata[2]:+.3f}]<br>"
                "rates %{customdata[3]:.3f}, %{customdata[4]:.3f}<br>q %{customdata[5]:.3f}<extra></extra>",
                details=np.stack([grid.to_numpy() for grid in grids], axis=-1),
                panel=panel,
            )
        )
    reach = float(np.nanmax(np.abs(frame["difference"].to_numpy(float)), initial=0))
    figures.difference_scale(result, "task minus<br>general", reach)
    fit = widest * columns <= MOST_NUMBERS
    title = "task experts of any language" if any_chosen else "experts"
    result.update_xaxes(type="category", showticklabels=fit, dtick=1, showgrid=False, ticks="", title=title)
    result.update_yaxes(autorange="reversed", showgrid=False, ticks="", tickmode="linear", dtick=1)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How many task experts there are, and how many the languages share, in sentences."""
    facts = frame.iloc[0]
    noun = figures.noun(facts["by"])
    numbers = frame.groupby("lang", sort=False)["chosen"].sum()
    mine = int(numbers[facts["reference"]])
    n_experts = len(frame[["layer", "expert"]].drop_duplicates())
    if not numbers.any():
        return [f"No expert is a task expert of {facts['task']} in any {noun} ({n_experts} experts)."]
    sentences = [
        f"In {facts['reference']}, {mine} of {n_experts} experts are task experts of {facts['task']} (against "
        f"{facts['general']}; false-discovery rate {SIGNIFICANT:.0%})."
    ]
    others = overlap(frame)
    others = others[others["jaccard"].notna()]
    if len(others) and mine:
        most = others.iloc[others["jaccard"].to_numpy().argmax()]
        least = others.iloc[others["jaccard"].to_numpy().argmin()]
        clear = int((q_values(others["p"].to_numpy()) < SIGNIFICANT).sum())
        sentences.append(
            f"{clear} of {len(others)} other {noun}s share more of them than random sets would; most {most['lang']} "
            f"({most['n_shared']} of its {most['n_chosen']}, {most['expected']:.1f} by chance), least {least['lang']} "
            f"({least['n_shared']} of {least['n_chosen']}, {least['expected']:.1f} by chance)."
        )
    return sentences
