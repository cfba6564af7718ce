"""Whether languages that are routed unlike the reference are predicted worse: correlation of divergence and loss.

Each language (but the reference) is a point: its divergence from the reference in a layer (see alignment), and its mean
loss over the same texts. Only texts that all these languages have count, so that all are measured on the same content;
`common=false` takes what each shares with the reference, and then what differs may be the content:

- **loss**: nats a token, a byte or a text. A token is worth more text in some languages than in others; scripts differ
  in bytes a letter; a text says the same in all languages, so the nats of a whole text are the fairest.
- **pearson**: linear correlation, −1 to 1. **spearman**: the same of the ranks. Positive: the more unlike, the worse.
- **p**: two-sided, from permuting the losses over the languages; at least 1/(permutations + 1), and with few languages
  not below one over the number of their orders. **q**: false-discovery rate (Benjamini–Hochberg) over the table.
- The rows without a layer take the **mean over layers** of the divergence.

The intervals cover 95% of bootstrap resamples of texts, all languages of a text drawn together, shifted by the
resampling bias: they say how well these languages are measured; p says whether the next languages would do the same.
Bandarkar et al. 2025 (Multilingual Routing in Mixture-of-Experts) correlate the divergence with the accuracy on a
parallel benchmark; the loss needs none.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.stats import rankdata

from workbench import figures, spelling
from workbench.analysis.parallel import (
    MEASURES,
    Aligned,
    align,
    average,
    choose_measure,
    divergences,
    means,
    per_language,
    resample,
    text_profiles,
)
from workbench.analysis.resampling import draws, q_values, text_interval
from workbench.errors import InputError
from workbench.tracefile import Trace

UNITS = ("token", "byte", "text")
STATISTICS = ("pearson", "spearman")
FEWEST = 4
"""Languages that a correlation takes."""
TIE = 1e-9


def loss_correlation(
    trace: Trace,
    *,
    reference: str = "en",
    per: str = "token",
    common: bool = True,
    measure: str | None = None,
    by: str = "lang",
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation over languages of the divergence from the reference with the loss, by layer and over all layers.

    per     "token", "byte" of the text, or whole "text" (which takes common texts)
    common  only texts that all languages have
    reference, measure, by  as for `alignment`

    Returns one row a layer × statistic, and one a statistic with a missing layer (divergence averaged over layers):
    measure, reference, per, layer, statistic ("pearson", "spearman"); value with low, high; p, q; n_languages, n_texts,
    n_tokens with a known loss. NaN where the languages don't differ in one of the two. InputError if the loss was
    unknown or fewer than four languages have both.
    """
    if per not in UNITS:
        raise InputError(f"per is {per!r}; expected one of {', '.join(UNITS)}.")
    if per == "text" and not common:
        raise InputError("per=text compares whole texts, which must be the same in all languages: use common=true.")
    measure = choose_measure(trace, measure)
    aligned = align(trace, by, reference)
    if common:
        aligned = in_all(aligned)
    loss, size, n_tokens = losses(trace, aligned, per)
    resampled_loss = np.concatenate(
        [ratio(weights @ loss, weights @ size) for weights in draws(len(loss), n_resamples, seed)]
        or [np.empty((0, loss.shape[1]))]
    )
    mean_loss = ratio(loss.sum(axis=0), size.sum(axis=0))
    points, resamples = [], []
    for layer in range(trace.n_layers):
        values = divergences(text_profiles(trace, layer, aligned, measure), aligned.cells)
        points.append(means(values, np.ones((1, len(values)), np.float32))[0, :-1])
        resamples.append(resample(values, n_resamples, seed)[:, :-1])
    points.append(average(np.stack(points)))
    resamples.append(average(np.stack(resamples)))
    known = np.isfinite(mean_loss) & np.isfinite(points[-1])
    if known.sum() < FEWEST:
        raise InputError(
            f"{int(known.sum())} languages beside {reference!r} have parallel texts with a divergence and a loss; a "
            f"correlation takes at least {FEWEST}."
        )
    random = np.random.default_rng(seed)
    turns = random.permuted(np.tile(mean_loss[known], (n_permutations, 1)), axis=1)
    rows = []
    for at, (value, resampled) in enumerate(zip(points, resamples, strict=True)):
        for statistic in STATISTICS:
            found = correlation(value[known], mean_loss[known], statistic)
            low, high = text_interval(
                correlation(resampled[:, known], resampled_loss[:, known], statistic), len(loss), found
            )
            chance = np.abs(correlation(value[known], turns, statistic))
            p = (1 + (chance >= np.abs(found) - TIE).sum()) / (n_permutations + 1)
            rows.append(
                {
                    "measure": measure,
                    "reference": reference,
                    "per": per,
                    "layer": at if at < trace.n_layers else pd.NA,
                    "statistic": statistic,
                    "value": float(found),
                    "low": float(np.clip(low, -1, 1)),
                    "high": float(np.clip(high, -1, 1)),
                    "p": p if n_permutations and np.isfinite(found) else np.nan,
                    "n_languages": int((known & np.isfinite(value)).sum()),
                    "n_texts": len(loss),
                    "n_tokens": n_tokens,
                }
            )
    frame = pd.DataFrame(rows).astype({"layer": "Int64"})
    frame.insert(list(frame).index("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame


def in_all(aligned: Aligned) -> Aligned:
    """The texts that exist in all languages."""
    everywhere = (aligned.cells >= 0).all(axis=1)
    if not everywhere.any():
        raise InputError(
            f"no text exists in all {len(aligned.languages)} languages; use common=false to compare each language on "
            "the texts it shares with the reference."
        )
    return replace(aligned, cells=aligned.cells[everywhere], source=aligned.source[everywhere])


def losses(trace: Trace, aligned: Aligned, per: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each text in each language but the reference: sum of the loss (nats) and of what it is divided by, both
    float64 (n_texts, n_languages - 1); and how many tokens have a known loss."""
    nll = trace.tokens()["nll"].to_numpy(float)
    cell = aligned.cell[trace.sequence_index()]
    used = np.isfinite(nll) & (cell >= 0)
    if not used.any():
        raise InputError(
            f"the loss of no token was recorded in run {trace.run!r}: trace with a model that predicts the next token "
            "(from_arrays and encoders leave nll unknown)."
        )
    weight = spelling.n_bytes(trace).astype(float) if per == "byte" else np.ones(len(nll))
    if not weight[used].any():
        raise InputError(
            f"the texts of the tokens of run {trace.run!r} are unknown, so are their bytes; use per=token."
        )
    n_cells = int(aligned.cell.max()) + 1
    both = []
    for values in (nll, weight):
        of_cell = np.bincount(cell[used], values[used], minlength=n_cells)
        both.append(np.where(aligned.cells >= 0, of_cell[aligned.cells], 0.0)[:, 1:])
    n_tokens = per_language(aligned, np.bincount(trace.sequence_index()[used], minlength=trace.n_sequences))[1:]
    size = (both[1] > 0).astype(float) if per == "text" else both[1]
    return both[0], size, int(n_tokens.sum())


def ratio(total: np.ndarray, size: np.ndarray) -> np.ndarray:
    """total / size, NaN where the size is 0."""
    return np.divide(total, size, out=np.full(np.shape(total), np.nan), where=np.asarray(size) > 0)


def correlation(x: np.ndarray, y: np.ndarray, statistic: str) -> np.ndarray:
    """Correlation over the last axis (the other axes broadcast); places where one is NaN are left out; NaN where one
    doesn't vary."""
    x, y = np.broadcast_arrays(x, y)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(known, x, np.nan), np.where(known, y, np.nan)
    if statistic == "spearman" and x.size:
        x, y = (rankdata(values, axis=-1, nan_policy="omit") for values in (x, y))
    n = known.sum(axis=-1, keepdims=True)
    x, y = (np.where(known, values, 0) for values in (x, y))
    x, y = (np.where(known, values - ratio(values.sum(axis=-1, keepdims=True), n), 0) for values in (x, y))
    spread = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.where(spread > TIE**2, ratio((x * y).sum(axis=-1), spread), np.nan)


def figure(frame: pd.DataFrame) -> Figure:
    """Both correlations by layer with their intervals."""
    result = figures.panels([""], height=280, legend=True)
    by_layer = frame[frame["layer"].notna()]
    for statistic, style in zip(STATISTICS, (figures.MAIN, figures.Style(figures.COLOURS[1], "dash")), strict=True):
        part = by_layer[by_layer["statistic"] == statistic]
        figures.line(
            result, part["layer"].astype(int), part["value"], part["low"], part["high"], name=statistic, style=style
        )
    figures.layer_axes(result, by_layer["layer"].astype(int))
    title = f"correlation of loss a {frame['per'].iloc[0]}<br>and {MEASURES[frame['measure'].iloc[0]]}"
    result.update_yaxes(title=title, range=[-1.05, 1.05], zeroline=True)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The correlation over all layers and the strongest layer, in sentences."""
    ranks = frame[(frame["statistic"] == "spearman") & frame["value"].notna()]
    if ranks.empty:
        return ["The languages don't differ in loss or in divergence: there is nothing to correlate."]
    facts = frame.iloc[0]
    measure = MEASURES[facts["measure"]]
    sentences = []
    pooled = ranks[ranks["layer"].isna()]
    for row in pooled.to_dict("records"):
        kind = "have a higher loss" if row["value"] > 0 else "have a lower loss"
        clear = row["p"] < 0.05
        said = f"Languages routed less like {facts['reference']} {kind} a {facts['per']}" if clear else (
            f"Loss a {facts['per']} and {measure} from {facts['reference']} show no clear correlation"
        )  # fmt: skip
        sentences.append(
            f"{said}: rank correlation {row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}] over "
            f"{row['n_languages']} languages, layers averaged (p {row['p']:.3f})."
        )
    layers = ranks[ranks["layer"].notna()]
    if len(layers) > 1:
        top = layers.iloc[layers["value"].abs().to_numpy().argmax()]
        sentences.append(
            f"It is strongest in layer {top['layer']} ({top['value']:+.2f} [{top['low']:+.2f}, {top['high']:+.2f}], "
            f"q {top['q']:.3f})."
        )
    return sentences
