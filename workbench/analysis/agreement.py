"""Whether two runs over the same tokens choose the same experts, layer by layer.

Both runs must be of one architecture, over the same texts with the same tokenizer. For a token with the experts S in
this run and S' in the other:

- **overlap** = |S ∩ S'| / max(|S|, |S'|), 0 to 1: the part of the choices that agree. Between a checkpoint and the last
  one it is the router saturation of OLMoE (Muennighoff et al. 2024, arXiv:2409.02060, §5.1); 1 − overlap is the routing
  drift between stages of training.
- **exact_match**: share of tokens with S = S'.
- **top1_match**: share of tokens whose first expert is the same: that of the largest gate weight if both runs recorded
  weights, else the first in the routers' own order.
- **differs_anywhere**: share of tokens with S ≠ S' in at least one layer. R3 (Ma et al. 2025, arXiv:2510.11370) reports
  94% between a training and an inference engine, about 10% of the routers differing.
- **weight_difference** = Σ |w − w'| over S ∪ S', a missing expert having the weight 0; **weight_shift** is that divided
  by Σw + Σw', 0 (same weights) to 1 (no expert in common). Both need recorded weights.
- **router_kl** = KL(p ‖ p') in nats, mean over tokens, p and p' being the full router probabilities of this run and
  the other. Needs logits in both.
- **profile_kl**: the same between the mean router probabilities of whole sequences, mean over sequences. Needs profiles
  in both. Much smaller than router_kl, as averaging hides what tokens do: don't compare the two.
- **nll_difference** = nll' − nll, nats a token: above 0 where the other run predicts the text worse.

A missing layer stands for all layers together: the mean over all tokens and layers. differs_anywhere and
nll_difference exist only there.

**chance** is what overlap, exact_match and top1_match would be if each token were compared with the other run's
choices for a *different* token of the same group, computed exactly over all such pairs; it is high where few experts
do most of the work. **kappa** = (value − chance) / (1 − chance): 1 is full agreement, 0 is no more than chance.

Tokens for which neither run chose an expert are left out of a layer. Intervals cover 95% of bootstrap resamples of
texts.

What it is good for:

- checkpoints: `workbench trace demo-early --run early --out t.duckdb`, then
  `workbench trace demo --run final --out t.duckdb --append`, then
  `workbench analyze agreement t.duckdb --run early --set other=final`
- precisions: the same with `--dtype float32` and `--dtype bfloat16`
- batch dependence, whether a text's routing depends on what it is batched with: the same model with `--batch-tokens 1`
  (every text alone, no padding) and with the default
- engines, and steered against plain: any two runs of the same texts; of generated text the tokens up to the first
  difference are compared

OLMoE's script compares each checkpoint's choices rank-free as here, for one domain at a time and without an interval.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.choice_overlap import chances, choices, taken
from workbench.analysis.counting import Cells, experts_of, sort_into_cells
from workbench.analysis.group_heatmap import group_heatmap
from workbench.analysis.matching import Matched, match, name_of, need_same_layers, other_run
from workbench.analysis.router_probabilities import chunks, log_probabilities, scoring
from workbench.analysis.token_means import by_group, drawn_texts, in_blocks, means, only, ratio, sums
from workbench.tracefile import Trace

ALL_LAYERS = None
"""Layer of the rows about all layers together, missing in the table."""
CHOICES = ("overlap", "exact_match", "top1_match")
"""What has a chance level."""
SMALLEST = 1e-12
"""Mean probabilities below this count as this, so that a KL divergence stays finite."""


def agreement(
    trace: Trace,
    *,
    other: Trace | str | None = None,
    by: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far another run over the same tokens routes them alike.

    other        a Trace, the name of a run of the same file, the path of another file, or `path#run`; None: the other
                 run of a file that holds exactly two
    by           column of the sequences (of this run), `phase` or `position`; None puts all tokens into the group "all"
    n_resamples  bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row a group × layer × measure (see the top of the file; layer missing: all): run, other, by, group,
    layer, measure; value with low, high; chance, kappa (NaN where there is no chance level); n_compared (tokens of the
    layer, or of all layers; sequences for profile_kl), n_tokens, n_sequences, n_texts of the group;
    n_unlabelled sequences without a label; n_only_here, n_only_there sequences that only one run has, n_apart tokens
    that follow a difference in matched sequences: all left out. A measure that the runs didn't record has no rows.

    Raises InputError if the runs can't be compared, or share no token.
    """
    other = other_run(trace, other)
    need_same_layers(trace, other)
    matched = match(trace, other)
    of_sequence = trace.sequence_index()
    kept = np.zeros(len(of_sequence), bool)
    kept[matched.first] = True
    cells = in_blocks(only(sort_into_cells(trace, by), kept, of_sequence), seed)
    drawn = drawn_texts(cells, n_resamples, seed)
    shared = {
        "run": trace.run,
        "other": name_of(other, trace),
        "by": by,
    }
    left_out = {
        "n_unlabelled": cells.n_unlabelled,
        "n_only_here": matched.only_first,
        "n_only_there": matched.only_second,
        "n_apart": matched.n_apart,
    }
    # Values stand in the order of the matched tokens, so their cells do too.
    aligned = cells_of(cells, matched.first)
    tables = []

    def add(layer: int | None, names: list[str], total: np.ndarray, number: np.ndarray, chance: dict) -> None:
        value, low, high = means(total, number, aligned, drawn)
        compared = by_group(number, aligned)
        for column, name in enumerate(names):
            expected = chance.get(name, np.full(len(cells.labels), np.nan))
            room = np.where(expected < 1, 1 - expected, np.nan)
            tables.append(
                pd.DataFrame(
                    {
                        **shared,
                        "group": cells.labels,
                        "layer": pd.array([layer] * len(cells.labels), dtype="Int64"),
                        "measure": name,
                        "value": value[:, column],
                        "low": low[:, column],
                        "high": high[:, column],
                        "chance": expected,
                        "kappa": (value[:, column] - expected) / room,
                        "n_compared": compared[:, column].astype(np.int64),
                        "n_tokens": cells.n_tokens,
                        "n_sequences": cells.n_sequences,
                        "n_texts": cells.n_texts,
                        **left_out,
                    }
                )
            )

    pooled: dict[str, list[np.ndarray]] = {}
    differs = np.zeros(len(matched.first))
    for layer in range(trace.n_layers):
        columns, chance = compare_layer(trace, other, layer, matched, aligned, differs)
        total, number = sums(list(columns.values()), aligned)
        if (profiles := profile_sums(trace, other, layer, matched, cells, by)) is not None:
            total, number = np.hstack([total, profiles[0]]), np.hstack([number, profiles[1]])
        names = [*columns, "profile_kl"][: total.shape[1]]
        add(layer, names, total, number, chance)
        for column, name in enumerate(names):
            level = chance.get(name, np.full(len(cells.labels), np.nan))
            counted = by_group(number[:, [column]], aligned)[:, 0]
            parts = [total[:, column], number[:, column], np.where(counted > 0, level * counted, 0)]
            kept_so_far = pooled.setdefault(name, [np.zeros_like(part) for part in parts])
            pooled[name] = [sum_ + part for sum_, part in zip(kept_so_far, parts, strict=True)]
    if trace.n_layers:
        total, number = (np.stack([parts[at] for parts in pooled.values()], axis=1) for at in (0, 1))
        counted = by_group(number, aligned)
        chance = {
            name: ratio(pooled[name][2], counted[:, column]) for column, name in enumerate(pooled) if name in CHOICES
        }
        add(ALL_LAYERS, list(pooled), total, number, chance)
        add(ALL_LAYERS, ["differs_anywhere"], *sums([differs], aligned), {})
    nll = [run.tokens()["nll"].to_numpy()[at] for run, at in ((trace, matched.first), (other, matched.second))]
    if np.isfinite(nll[0] + nll[1]).any():
        add(ALL_LAYERS, ["nll_difference"], *sums([nll[1].astype(np.float64) - nll[0]], aligned), {})
    return pd.concat(tables, ignore_index=True)


def cells_of(cells: Cells, tokens: np.ndarray) -> Cells:
    """The same cells for arrays that hold only `tokens`."""
    return replace(cells, of_token=cells.of_token[tokens])


def compare_layer(
    trace: Trace, other: Trace, layer: int, matched: Matched, cells: Cells, differs: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One layer's measures of each matched token (NaN where undefined), and the chance level of each group.

    `differs` (n,) becomes 1 where the sets differ.
    """
    found = choices(trace, other, layer, matched)
    columns, n_experts = found.columns, experts_of(trace, layer)
    differs[columns["exact_match"] == 0] = 1
    chance = chances(found, cells, n_experts)
    if "logits" in trace.recorded and "logits" in other.recorded:
        n = len(found.here)
        kl = np.full(n, np.nan)
        za, zb = taken(trace.logits(layer), matched.first), taken(other.logits(layer), matched.second)
        for part in chunks(n, n_experts):
            p = log_probabilities(za[part], scoring(trace, layer))
            q = log_probabilities(zb[part], scoring(other, layer))
            kl[part] = divergence(p, q)
        columns["router_kl"] = kl
    return columns, chance


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p ‖ q) in nats over the last axis; an expert of probability 0 in p adds nothing."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.maximum(np.where(p == 0, 0, p * (log_p - log_q)).sum(axis=-1), 0)


def profile_sums(
    trace: Trace, other: Trace, layer: int, matched: Matched, cells: Cells, by: str | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Sum and number of the sequences' profile divergences by cell, each (n_cells, 1).

    None if a run has no profiles, or the groups cut through sequences.
    """
    if by in ("phase", "position") or not {"profiles"} <= trace.recorded & other.recorded:
        return None
    lengths = np.bincount(trace.sequence_index(), minlength=trace.n_sequences)
    pairs = matched.sequences[matched.whole & (lengths[matched.sequences[:, 0]] > 0)]
    starts = np.searchsorted(trace.sequence_index(), pairs[:, 0])
    p, q = trace.profiles(layer)[pairs[:, 0]], other.profiles(layer)[pairs[:, 1]]
    known = np.isfinite(p).all(axis=1) & np.isfinite(q).all(axis=1)
    cell = cells.of_token[starts[known]]
    logs = [np.log(np.maximum(x[known].astype(np.float64), SMALLEST)) for x in (p, q)]
    value = divergence(*(x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in logs))[cell >= 0]
    cell = cell[cell >= 0]
    n_cells = len(cells.group)
    total = np.bincount(cell, value, minlength=n_cells)
    return total[:, None], np.bincount(cell, minlength=n_cells)[:, None].astype(np.float64)


NAMES = {
    "overlap": "overlap of the choices",
    "exact_match": "same set of experts",
    "top1_match": "same first expert",
}
"""What the figure calls the measures that have a chance level."""


def figure(frame: pd.DataFrame) -> Figure:
    """Agreement by layer above its chance level (dotted): the three measures of all tokens, or the overlap by group.

    Many groups become rows of a heatmap, most alike on top.
    """
    frame = frame[frame["layer"].notna()]
    overlap = frame[frame["measure"] == "overlap"]
    groups = list(overlap.groupby("group", sort=False)["value"].mean().sort_values(ascending=False).index)
    if len(groups) > figures.MOST_LINES:
        return group_heatmap(overlap, "overlap")
    result = figures.panels([""], height=300, legend=True)
    if len(groups) > 1:
        for group in figures.ordered(groups):
            part = overlap[overlap["group"] == group]
            figures.line(
                result, part["layer"], part["value"], part["low"], part["high"], name=group,
                style=figures.style(group), band=len(groups) <= figures.MOST_BANDS,
            )  # fmt: skip
        level = overlap.groupby("layer")["chance"].mean()
        figures.line(result, level.index, level, name="chance (mean of the groups)", style=figures.NULL)
        title = NAMES["overlap"]
    else:
        for at, (measure, name) in enumerate(NAMES.items()):
            part = frame[frame["measure"] == measure]
            style = figures.Style(figures.COLOURS[at])
            figures.line(result, part["layer"], part["value"], part["low"], part["high"], name=name, style=style)
            figures.line(
                result, part["layer"], part["chance"], name=f"{name}, by chance", legend=False,
                style=style._replace(dash="dot", width=1),
            )  # fmt: skip
        title = "share (dotted: by chance)"
    if len(overlap):
        figures.layer_axes(result, overlap["layer"])
    # Two precisions of one model differ in a few per mille: then the axis begins where they do, far above chance.
    values = frame.loc[frame["measure"].isin(NAMES), ["value", "low"]].to_numpy(float)
    least = float(np.nanmin(values, initial=1))
    gap = max(1 - least, 1e-3) if least > 0.9 else 1
    result.update_yaxes(title=title, range=[max(1 - 1.1 * gap, 0), 1 + 0.02 * gap])
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How much of the choices agree, where least, and what that means for whole tokens, in sentences."""
    run, other = frame["run"].iloc[0], frame["other"].iloc[0]
    overlap = frame[frame["measure"] == "overlap"]
    layers = overlap[overlap["layer"].notna() & overlap["value"].notna()]
    if layers.empty:
        return [f"Neither {run} nor {other} chose any expert for the tokens they share."]
    pooled = overlap[overlap["layer"].isna()]
    differs = frame[frame["measure"] == "differs_anywhere"]
    weights = pooled["n_tokens"].to_numpy()
    value, chance = (np.average(pooled[name], weights=weights) for name in ("value", "chance"))
    least = layers.iloc[layers["value"].argmin()]
    whose = "" if overlap["group"].nunique() == 1 else f" on {least['group']}"
    changed = np.average(differs["value"], weights=differs["n_tokens"])
    sentences = [
        f"{value:.2%} of the expert choices of {run} are those of {other} too (a random other token would give "
        f"{chance:.1%}); {changed:.2%} of the tokens have another set of experts in at least one layer.",
    ]
    if value == 1:
        return [f"{run} and {other} choose the same experts for every one of {int(weights.sum()):,} tokens."]
    sentences.append(
        f"They agree least in layer {least['layer']}{whose}: {least['value']:.2%} of the choices, "
        f"{least['chance']:.1%} by chance."
    )
    loss = frame[frame["measure"] == "nll_difference"]
    if len(loss) == 1 and np.isfinite(loss["low"].iloc[0]):
        row = loss.iloc[0]
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        if row["low"] <= 0 <= row["high"]:
            sentences.append(f"Their losses don't differ measurably: {row['value']:+.4f} nats a token {interval}.")
        else:
            change = f"{abs(row['value']):.4f} nats a token {'worse' if row['value'] > 0 else 'better'}"
            sentences.append(f"{other} predicts the text {change} than {run} {interval}.")
    return sentences
