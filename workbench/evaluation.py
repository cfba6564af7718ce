"""What a recipe does to a model on texts: the plain model, the steered one, and edits of random experts as a control.

    evaluate("demo", "udhr", "recipe.json", by="lang", max_tokens=20_000)

Every condition (`plain`, `steered`, one `random N` a seed) reads the same batches, one after the other, so that all
comparisons are paired and no more than two batches of logits are in memory. A control makes the same edits to as many
other experts of the same layers (`workbench.interventions.control`).

- **nll**: mean loss in nats a predicted token; the first token of a text is predicted from nothing and left out.
- **kl** = KL(plain ‖ condition) = Σ p ln(p / q) in nats over the vocabulary, p and q being the next-token distributions
  of the plain model and of the condition after the same text; mean over predicted tokens. It is what a reader who
  expects q pays more for text that follows p. 0: nothing changed.
- **overlap** = |S ∩ S'| / max(|S|, |S'|), S and S' being the experts that a token has in the plain model and in the
  condition: selected, with a weight that isn't 0 (an expert ablated at its output is gone). Mean over tokens, of one
  layer or (layer missing) of all. As in `workbench analyze agreement`; 1: the same routing.

**group** is the text's label; **token_class** (see `workbench.token_classes`) is that of the token that is predicted
for nll and kl, of the token that is routed for overlap. "all" stands for all of them.

**delta** is nll − plain nll. **versus_random** is the steered value minus the mean of the controls: a recipe whose
interval has 0 in it does no more than random experts do. **n_random_worse** counts the controls that do as much or
more: whose nll or kl is no smaller, or whose overlap is no larger. Intervals cover 95% of bootstrap resamples of texts,
the same for all conditions; they say nothing about other random draws, whose spread the rows `random N` show.

A recipe that names no experts (SetTopK, TopP, Replay) has no control. Experts found on the same texts as they are
evaluated on look better than they are: find them on other texts.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import corpus as corpora
from workbench import figures
from workbench.analysis.counting import EVERYTHING, MOST_GROUPS, Cells, as_label, cells_of_labels, sum_by
from workbench.analysis.resampling import text_interval
from workbench.analysis.token_means import by_group, drawn_texts, in_blocks, ratio, resampled
from workbench.conditions import PLAIN, RANDOM, STEERED, conditions, refuse_generation
from workbench.effects import MEASURES, effects
from workbench.errors import InputError, not_negative
from workbench.intervening import Given
from workbench.losses import texts_with_loss
from workbench.models import Model, load
from workbench.token_classes import CLASSES
from workbench.tokenization import LongTexts, Sequence


def evaluate(
    model: Model | str | Path,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    recipe: Given,
    *,
    by: str | None = None,
    n_random: int = 5,
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "cut",
    batch_tokens: int = 4096,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Loss, change of the next-token distributions and routing agreement: plain, steered, and with random experts.

    corpus        names, files or corpora, one or several
    recipe        what `workbench.intervene` takes: a Recipe, a path, one or several interventions
    by            column of the texts: lang, domain, source or any metadata; None puts all into the group "all"
    n_random      controls, drawn with the seeds seed, seed + 1, …; 0 for none
    max_tokens    stop after the text that reaches this many tokens
    max_length    of a text in tokens; None: what the model is made for
    long_texts    as in `workbench.trace`
    batch_tokens  padded tokens in one forward pass, at most
    n_resamples   of texts, for the intervals

    Returns one row a condition × group × token class × measure (× layer, for the overlap of token class "all"):
    condition ("plain", "steered", "random" for the mean of the controls, "random N" for that of seed N; plain only
    with nll), by, group, token_class, layer (missing: all), measure; value with low, high; delta with delta_low,
    delta_high (nll only); versus_random with versus_random_low, versus_random_high, n_random, n_random_worse (steered
    only); n_compared (predicted tokens; for overlap those of the layer, or of all layers), n_texts (what is resampled:
    segments of a corpus, or texts). Intervals are NaN where there is a single text.

    Raises InputError for a recipe that isn't for this model, a Contrast, a column that the texts don't have, a model
    without tokenizer or one that doesn't predict the next token; RunError if the recipe touched no token at all, or
    where a condition's loss isn't a number.
    """
    not_negative(n_resamples=n_resamples)
    loaded = model if isinstance(model, Model) else load(model)
    runs = conditions(loaded, recipe, n_random, seed)
    refuse_generation(runs, "a loss")
    texts = texts_with_loss(loaded, corpus, max_tokens=max_tokens, max_length=max_length, long_texts=long_texts)
    sequences = _columns(texts)
    label, labels = _labels(sequences, by)
    found = effects(loaded, texts, runs, batch_tokens, progress)

    of_class = np.stack([sums.of_class for sums in found])  # (condition, 2, measure, text, class)
    of_layer = np.stack([sums.of_layer for sums in found])  # (condition, 2, layer, text)
    whole = np.concatenate([of_class.sum(-1), of_layer], axis=2)[..., np.newaxis]
    rows = []
    for kinds, sums in (((EVERYTHING,), whole), (CLASSES, of_class)):
        code = label[:, np.newaxis] * len(kinds) + np.arange(len(kinds))
        empty = ~(sums[:, 1] > 0).any((0, 1))  # not every text has tokens of every class
        code = np.where((label[:, np.newaxis] < 0) | empty, -1, code).ravel()
        keys = [(group, kind) for group in labels for kind in kinds]
        of_row = np.arange(len(texts)).repeat(len(kinds))
        cells = cells_of_labels(sequences, of_row, code, [str(key) for key in keys])
        rows += _rows(list(runs), sums.reshape(*sums.shape[:3], -1), cells, keys, n_resamples, seed)
    table = pd.DataFrame(rows).astype({"layer": "Int64", "n_random_worse": "Int64"})
    table.insert(1, "by", by)
    return table


def _columns(texts: list[Sequence]) -> pd.DataFrame:
    """The metadata of each text. Texts without a segment are resampled by themselves, pieces of one text together."""
    rows = [
        {name: getattr(text, name) for name in ("lang", "domain", "source")}
        | {"segment_id": text.segment_id or text.sha256}
        | text.metadata
        for text in texts
    ]
    return pd.DataFrame(rows)


def _labels(sequences: pd.DataFrame, by: str | None) -> tuple[np.ndarray, list[str]]:
    """Label of each text, int64 with -1 for none, and the labels' names."""
    if by is None:
        return np.zeros(len(sequences), np.int64), [EVERYTHING]
    if by not in sequences or sequences[by].isna().all():
        filled = [str(name) for name in sequences if sequences[name].notna().any()]
        raise InputError(f"the texts have no {by!r}; they have {', '.join(filled)}.")
    codes, labels = pd.factorize(sequences[by].map(as_label), sort=True)
    if len(labels) > MOST_GROUPS:
        raise InputError(f"{by!r} has {len(labels):,} different values; at most {MOST_GROUPS} groups can be compared.")
    return codes.astype(np.int64), [str(label) for label in labels]


# -- the table ---------------------------------------------------------------------------------------------------------


def _rows(
    names: list[str], sums: np.ndarray, cells: Cells, keys: list[tuple[str, str]], n_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of the table from sums (condition, 2, measure, row): MEASURES, and overlaps of layers after them.

    cells  which of the rows belong to which of the keys, pairs of group and token class
    """
    kept = cells.of_token >= 0
    cells = in_blocks(cells, seed)
    drawn = drawn_texts(cells, n_resamples, seed)
    flat = sums.reshape(-1, sums.shape[-1]).T[kept]
    by_cell = sum_by(flat, cells.of_token[kept], len(cells.group))
    controls = [place for place, name in enumerate(names) if name.startswith(RANDOM)]
    order = [PLAIN, STEERED, *([RANDOM] if controls else []), *(names[place] for place in controls)]

    def means(totals: np.ndarray) -> np.ndarray:
        """(…, condition × 2 × measure) to (…, condition, measure), in the order of the rows."""
        apart = totals.reshape(*totals.shape[:-1], *sums.shape[:3])
        value = ratio(apart[..., 0, :], apart[..., 1, :])
        together = [value[..., controls, :].mean(-2, keepdims=True)] if controls else []
        return np.concatenate([value[..., :2, :], *together, value[..., controls, :]], axis=-2)

    measures = [*((name, None) for name in MEASURES), *(("overlap", layer) for layer in range(sums.shape[2] - 3))]
    rows = []
    for key, n_texts, total, again in zip(
        keys, cells.n_texts, by_group(by_cell, cells), resampled(by_cell, cells, drawn), strict=True
    ):
        value, values = means(total), means(again)  # (condition, measure), (resample, condition, measure)
        number = total.reshape(sums.shape[:3])[1, 1]
        ends = text_interval(values, n_texts)
        apart = value - value[0], *text_interval(values - values[:, :1], n_texts)
        ahead = (np.full(len(measures), np.nan),) * 3
        if controls:
            ahead = value[1] - value[2], *text_interval(values[:, 1] - values[:, 2], n_texts)
        for condition, name in enumerate(order):
            for place, (measure, layer) in enumerate(measures):
                if number[place] == 0 or (name == PLAIN and measure != "nll"):
                    continue
                here = condition, place
                worse = (
                    value[3:, place] <= value[1, place] if measure == "overlap" else value[3:, place] >= value[1, place]
                )
                rows.append(
                    {"condition": name, "group": key[0], "token_class": key[1], "layer": layer, "measure": measure}
                    | _three("", value[here], ends[0][here], ends[1][here])
                    | _three("delta", *(x[here] if measure == "nll" else np.nan for x in apart))
                    | _three("versus_random", *(x[place] if name == STEERED else np.nan for x in ahead))
                    | {"n_random": len(controls), "n_random_worse": worse.sum() if name == STEERED else None}
                    | {"n_compared": int(number[place]), "n_texts": int(n_texts)}
                )
    return rows


def _three(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """A value and the ends of its interval as columns."""
    prefix = f"{name}_" if name else ""
    return {name or "value": value, f"{prefix}low": low, f"{prefix}high": high}


# -- what is shown -----------------------------------------------------------------------------------------------------


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The table in short, a row a group (or a token class where all texts are one group), costliest steering first.

    nll of the plain model and differences of it, with intervals where texts can be resampled; worse ("1/5": the
    controls that cost as much); kl and overlap, of the steered model and of the mean control; n_tokens, n_texts.
    """
    column, rows = _shown(frame)
    lines = []
    for name, part in rows.groupby(column, sort=False):
        at = {(row["condition"], row["measure"]): row for _, row in part.iterrows()}
        steered, random = at.get((STEERED, "nll")), at.get((RANDOM, "nll"))
        if steered is None:  # no token of the class is predicted
            continue
        line = {column: name, "plain": at[PLAIN, "nll"]["value"], "steered − plain": steered["delta"]}
        line["interval"] = _ends(steered, "delta")
        if random is not None:
            line |= {"random − plain": random["delta"], "steered − random": steered["versus_random"]}
            line["its interval"] = _ends(steered, "versus_random")
            line["worse"] = f"{steered['n_random_worse']}/{steered['n_random']}"
        for measure in ("kl", "overlap"):
            line[measure] = at[STEERED, measure]["value"]
            if random is not None:
                line[f"{measure} random"] = at[RANDOM, measure]["value"]
        lines.append(line | {"n_tokens": steered["n_compared"], "n_texts": steered["n_texts"]})
    return pd.DataFrame(lines).sort_values("steered − plain", ascending=False, kind="stable", ignore_index=True)


def _shown(frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """What the rows of a summary are about (a column), and the rows of the table that it needs."""
    grouped = frame["group"].nunique() > 1
    rows = frame[frame["layer"].isna() & ((frame["token_class"] == EVERYTHING) | (not grouped))]
    return ("group" if grouped else "token_class"), rows


def _ends(row: pd.Series, name: str) -> str:
    """The interval, or nothing where there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"[{low:+.3f}, {high:+.3f}]" if np.isfinite(low) else ""


TITLES = {
    "nll": "loss, difference from plain (nats a token)",
    "kl": "KL(plain ‖ condition) (nats a token)",
    "overlap": "routing overlap with plain",
}
MOST_NAMES = 40
"""Rows that a figure has room for."""


def figure(frame: pd.DataFrame) -> Figure:
    """What steering changes (blue) and what random experts do (grey: mean with its interval, and every draw).

    A row a group, or a token class where all texts are one group; where steering costs most on top.
    """
    column, rows = _shown(frame)
    lost = rows[(rows["condition"] == STEERED) & (rows["measure"] == "nll")].set_index(column)["delta"]
    names = list(lost.sort_values(ascending=False).index[:MOST_NAMES][::-1])
    shown = {name: figures.plain(name) for name in names}
    result = figures.panels(list(TITLES.values()), columns=3, height=90 + 26 * len(names), legend=True, tight=True)
    grey = figures.Style(figures.NULL.colour)
    for panel, measure in enumerate(TITLES):
        part = rows[(rows["measure"] == measure) & rows[column].isin(names)]
        value = "delta" if measure == "nll" else "value"
        ends = ("delta_low", "delta_high") if measure == "nll" else ("low", "high")
        draws = part[part["condition"].str.startswith(f"{RANDOM} ")]
        result.add_scatter(
            x=draws[value], y=draws[column].map(shown), **figures.axes(panel), mode="markers", name="each random draw",
            marker={"color": figures.faded(grey.colour, 0.6), "size": 7, "symbol": "line-ns-open"},
            text=draws["condition"], hovertemplate="%{y}, %{text}: %{x:.3f}<extra></extra>",
            showlegend=panel == 0 and len(draws) > 0,
        )  # fmt: skip
        for condition, style in ((RANDOM, grey), (STEERED, figures.MAIN)):
            one = part[part["condition"] == condition]
            if len(one):
                figures.dots(
                    result, one[value], [shown[name] for name in one[column]], one[ends[0]], one[ends[1]],
                    panel=panel, style=style, name=condition, legend=panel == 0,
                )  # fmt: skip
        if measure != "overlap":
            place: dict[str, Any] = {"row": 1, "col": panel + 1}
            result.add_vline(0, line={"color": figures.AXIS, "width": 1}, **place)
    result.update_yaxes(categoryorder="array", categoryarray=list(shown.values()), range=[-0.6, len(names) - 0.4])
    return result


def findings(frame: pd.DataFrame, most: int = 3) -> list[str]:
    """What steering costs, where most, and whether random experts cost as much, in sentences."""
    steered = frame[(frame["condition"] == STEERED) & (frame["token_class"] == EVERYTHING) & frame["layer"].isna()]
    lost = steered[steered["measure"] == "nll"]
    controlled = bool(lost["n_random"].iloc[0])
    lost = lost.sort_values("delta", ascending=False, key=abs)
    sentences = []
    for _, row in lost.head(most).iterrows():
        whose = "" if len(lost) == 1 and row["group"] == EVERYTHING else f" of {row['group']}"
        said = f"Steering changes the loss{whose} by {row['delta']:+.3f} nats a token {_ends(row, 'delta')}".rstrip()
        if controlled:
            against = f"{row['versus_random']:+.3f} {_ends(row, 'versus_random')}".rstrip() + " against random experts"
            said += f": {against} ({row['n_random_worse']} of {row['n_random']} draws cost as much)"
        sentences.append(said + ".")
    if len(lost) > most:
        rest = lost.iloc[most:]["delta"]
        sentences.append(f"The other {len(rest)} groups change by {rest.min():+.3f} to {rest.max():+.3f} nats a token.")
    moved, kept = (steered[steered["measure"] == measure] for measure in ("kl", "overlap"))
    kl, overlap = (np.average(part["value"], weights=part["n_compared"]) for part in (moved, kept))
    sentences.append(
        f"The next-token distributions are {kl:.3f} nats a token (KL) from the plain model's, and {overlap:.1%} of the "
        "expert choices stay."
    )
    if not controlled:
        sentences.append("There is no control: no edit names experts that could be drawn at random, or none was asked.")
    return sentences
