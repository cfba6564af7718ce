"""How sure the routers are of their choice, and whether that goes with the model's loss.

For a token with the router probabilities p over the E experts of a layer (softmax of the logits; normalised scores for
routers that score with a sigmoid or sqrt-softplus):

- **entropy** = −Σ p log p / log E, mean over tokens: 0 where one expert has all the probability, 1 where all are
  alike.
- **near_uniform**: share of tokens whose entropy is above a threshold (0.9 unless asked otherwise): the uncertain
  tokens of GW-MoE (Wu et al. 2024, arXiv:2406.12375, §3), for which any choice is as good as another. The threshold is
  a number to tune for each model, there as here.
- **margin**: the k-th minus the (k+1)-th score as the router's top-k saw them, mean over tokens. Near 0 a rounding
  error changes the choice. Its unit is that of the scores (of a probability for softmax routers).
- **experts_to_mass**: the fewest experts whose probabilities reach a mass (0.4 unless asked otherwise), mean over
  tokens: how many experts top-p routing would use (Huang et al. 2024, arXiv:2403.07652, §3, with p = 0.4). 1 to E.
  Needs recorded logits.

And how they go together with the loss, nats a token: **nll** is that of the token itself given those before it, the
surprise of what the router reads; **next_nll** is that of the token after it, the loss of what the model goes on to
predict.

- **entropy_nll**, **entropy_next_nll**, **margin_nll**, **margin_next_nll**, **entropy_position**,
  **margin_position**: Spearman's rank correlation over the tokens of a layer (and group), −1 to 1. Resamples of texts
  keep the ranks of the whole sample.
- **nll** and **next_nll** with a **decile** of 1 to 10: mean loss of the tokens in that tenth of the layer's (and
  group's) entropies, 1 the surest. In all other rows decile is 0.

Everything needs recorded entropy, margin or logits (the entropy follows from logits; a margin does not, because
selection biases and groups act after them); a measure that the trace can't give has no rows. Entropies of hash layers
are undefined. Intervals cover 95% of bootstrap resamples of texts.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.stats import rankdata

from workbench import figures
from workbench.analysis.counting import Cells, experts_of, sort_into_cells
from workbench.analysis.group_heatmap import group_heatmap
from workbench.analysis.resampling import interval
from workbench.analysis.router_probabilities import chunks, log_probabilities, scoring
from workbench.analysis.token_means import by_group, drawn_texts, in_blocks, means, resampled, sums
from workbench.errors import InputError
from workbench.tracefile import Trace

N_DECILES = 10
MEANS = ("entropy", "near_uniform", "margin", "experts_to_mass")
CORRELATIONS = (
    "entropy_nll", "entropy_next_nll", "entropy_position", "margin_nll", "margin_next_nll", "margin_position",
)  # fmt: skip
BY_DECILE = ("nll", "next_nll")
MEASURES = (*MEANS, *CORRELATIONS, *BY_DECILE)
LOSSES = ("nll", "next_nll", "position")


def uncertainty(
    trace: Trace,
    *,
    by: str | None = None,
    near_uniform: float = 0.9,
    mass: float = 0.4,
    measures: tuple[str, ...] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Entropy and margin of each layer's router, and their relation to the loss.

    by            column of the sequences, `phase` or `position`; None puts all tokens into the group "all"
    near_uniform  threshold of the measure of that name, a part of log E, in [0, 1]
    mass          probability that experts_to_mass has to reach, in (0, 1]
    measures      some of those at the top of the file; None: all that the trace allows
    n_resamples   bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row a group × layer × measure (× decile): by, group, layer, measure, decile; value with low, high;
    n_compared tokens that have the value; threshold (near_uniform, experts_to_mass; else NaN); n_experts; n_tokens,
    n_sequences, n_texts of the group; n_unlabelled sequences without a label. NaN: a mean over nothing, the correlation
    of something that doesn't vary, the interval of a single text.

    InputError for near_uniform outside [0, 1], mass outside (0, 1], and what wasn't recorded.
    """
    if not 0 <= near_uniform <= 1:
        raise InputError(f"near_uniform is {near_uniform}; expected a part of the largest entropy, 0 to 1.")
    if not 0 < mass <= 1:
        raise InputError(f"mass is {mass}; expected a probability above 0 and at most 1.")
    wanted = possible(trace, measures)
    cells = in_blocks(sort_into_cells(trace, by), seed)
    drawn = drawn_texts(cells, n_resamples, seed)
    context = losses(trace)
    members = [np.flatnonzero(cell_group(cells) == label) for label in range(len(cells.labels))]
    tables = []
    for layer in range(trace.n_layers):
        n_experts = experts_of(trace, layer)

        def add(measure: str, decile: int, numbers: tuple[np.ndarray, ...], threshold: float = np.nan) -> None:
            value, low, high, compared = numbers
            tables.append(
                pd.DataFrame(
                    {
                        "by": by,
                        "group": cells.labels,
                        "layer": layer,  # noqa: B023 - called within the loop only
                        "measure": measure,
                        "decile": decile,
                        "value": value,
                        "low": low,
                        "high": high,
                        "n_compared": compared.astype(np.int64),
                        "threshold": threshold,
                        "n_experts": n_experts,  # noqa: B023
                        "n_tokens": cells.n_tokens,
                        "n_sequences": cells.n_sequences,
                        "n_texts": cells.n_texts,
                        "n_unlabelled": cells.n_unlabelled,
                    }
                )
            )

        found = router_values(trace, layer, mass if "experts_to_mass" in wanted else None)
        columns = {name: found[name] for name in ("entropy", "margin", "experts_to_mass") if name in found}
        if "entropy" in found:
            above = (found["entropy"] > near_uniform).astype(np.float32)
            columns["near_uniform"] = np.where(np.isnan(found["entropy"]), np.float32(np.nan), above)
        columns = {name: columns[name] for name in MEANS if name in wanted}
        total, number = sums(list(columns.values()), cells)
        value, low, high = means(total, number, cells, drawn)
        compared = by_group(number, cells)
        for at, name in enumerate(columns):
            threshold = {"near_uniform": near_uniform, "experts_to_mass": mass}.get(name, np.nan)
            add(name, 0, (value[:, at], low[:, at], high[:, at], compared[:, at]), threshold)
        for name in (name for name in CORRELATIONS if name in wanted):
            measure, _, loss = name.partition("_")
            add(name, 0, correlation(found[measure], context[loss], cells, members, drawn))
        deciles = None
        for name in (name for name in BY_DECILE if name in wanted):
            deciles = tenths(found["entropy"], members) if deciles is None else deciles
            parts = [np.where(deciles == tenth, context[name], np.nan) for tenth in range(N_DECILES)]
            total, number = sums(parts, cells)
            value, low, high = means(total, number, cells, drawn)
            compared = by_group(number, cells)
            for at in range(N_DECILES):
                add(name, at + 1, (value[:, at], low[:, at], high[:, at], compared[:, at]))
    return pd.concat(tables, ignore_index=True)


def possible(trace: Trace, measures: Sequence[str] | None) -> list[str]:
    """The measures asked for, or all that the trace allows; InputError says what to record."""
    if unknown := [name for name in measures or () if name not in MEASURES]:
        raise InputError(f"measures has {unknown[0]!r}; expected some of {', '.join(MEASURES)}.")
    if measures is not None and not measures:
        raise InputError(f"measures names none; expected some of {', '.join(MEASURES)}.")
    asked: list[str] = [name for name in MEASURES if measures is None or name in measures]
    known = trace.tokens()["nll"].notna().any()
    reasons = {}
    for name in asked:
        if name == "experts_to_mass":
            needs = [] if "logits" in trace.recorded else ["logits"]
        elif name.startswith("margin"):
            needs = [] if "margin" in trace.recorded else ["margin"]
        else:
            needs = [] if trace.recorded & {"entropy", "logits"} else ["entropy"]
        if needs:
            reasons[name] = needs[0]
        elif name.endswith("nll") and not known:
            reasons[name] = "nll"
    if measures is None:
        kept = [name for name in asked if name not in reasons]
        if kept:
            return kept
        trace._need("entropy")  # nothing of what the analysis rests on
    for name, missing in reasons.items():
        if missing == "nll":
            raise InputError(
                f"{name} needs the loss of each token, which run {trace.run!r} doesn't have: trace a model that "
                "predicts the next token, with `workbench trace`."
            )
        trace._need(missing)
    return asked


def losses(trace: Trace) -> dict[str, np.ndarray]:
    """nll and next_nll, float32 (n_tokens,) with NaN where unknown, and position."""
    tokens = trace.tokens()
    nll, seq = tokens["nll"].to_numpy(np.float32), tokens["seq"].to_numpy()
    following = np.full(len(nll), np.nan, np.float32)
    following[:-1] = np.where(seq[1:] == seq[:-1], nll[1:], np.float32(np.nan))
    return {"nll": nll, "next_nll": following, "position": tokens["pos"].to_numpy(np.float32)}


def router_values(trace: Trace, layer: int, mass: float | None) -> dict[str, np.ndarray]:
    """Normalised entropy, margin and experts to reach a mass, each (n_tokens,), of those that can be had."""
    n_experts = experts_of(trace, layer)
    found: dict[str, np.ndarray] = {}
    # One expert has no entropy to compare with: log E is 0.
    most = np.log(n_experts) if n_experts > 1 else np.nan
    if "margin" in trace.recorded:
        found["margin"] = trace.margin(layer)
    if "entropy" in trace.recorded:
        found["entropy"] = (trace.entropy(layer) / most).astype(np.float32)
    if mass is None and ("entropy" in found or "logits" not in trace.recorded):
        return found
    logits, score = trace.logits(layer), scoring(trace, layer)
    entropy, needed = (np.full(len(logits), np.nan, np.float32) for _ in range(2))
    for part in chunks(len(logits), n_experts):
        log_p = log_probabilities(logits[part], score)
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):
            entropy[part] = -np.where(p == 0, 0, p * log_p).sum(axis=1) / most
        if mass is not None:
            needed[part] = experts_to_mass(p, mass)
    found.setdefault("entropy", entropy)
    if mass is not None:
        found["experts_to_mass"] = needed
    return found


def experts_to_mass(p: np.ndarray, mass: float) -> np.ndarray:
    """Fewest experts whose probabilities p (n, E) add up to `mass`: float64 (n,), NaN where p is."""
    reached = np.cumsum(-np.sort(-p, axis=1), axis=1)
    # Rounding must not ask for one more expert than there are, nor for one that only rounding is short of.
    needed = 1 + (reached < mass - 1e-9).sum(axis=1)
    return np.where(np.isnan(p).any(axis=1), np.nan, np.minimum(needed, p.shape[1]))


def cell_group(cells: Cells) -> np.ndarray:
    """Group of each token: (n_tokens,), -1 for none."""
    return np.where(cells.of_token >= 0, np.append(cells.group, -1)[cells.of_token], -1)


def correlation(
    x: np.ndarray, y: np.ndarray, cells: Cells, members: list[np.ndarray], drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Spearman's correlation of each group, its interval, and the number of tokens: four (n_groups,).

    Resampled from sums over cells of the ranks and their products.
    """
    first, second = (np.full(len(x), np.nan) for _ in range(2))
    for tokens in members:
        known = tokens[np.isfinite(x[tokens]) & np.isfinite(y[tokens])]
        # Around 0 and at most 1/2, so that sums of squares lose nothing.
        first[known] = (rankdata(x[known]) - (len(known) + 1) / 2) / max(len(known), 1)
        second[known] = (rankdata(y[known]) - (len(known) + 1) / 2) / max(len(known), 1)
    total, number = sums([first, second, first**2, second**2, first * second], cells)
    rows = np.hstack([total, number[:, :1]])
    value = pearson(by_group(rows, cells))
    low, high = np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    for group, moments in enumerate(resampled(rows, cells, drawn)):
        if cells.n_texts[group] > 1 and np.isfinite(value[group]):
            low[group], high[group] = interval(pearson(moments))
    return value, low, high, by_group(number[:, :1], cells)[:, 0]


def pearson(moments: np.ndarray) -> np.ndarray:
    """Pearson's correlation from sums (…, 6) of x, y, x², y², xy and 1; NaN where x or y doesn't vary."""
    n = np.maximum(moments[..., 5], 1)
    x, y, xx, yy, xy = (moments[..., at] / n for at in range(5))
    spread = (xx - x * x) * (yy - y * y)
    return np.divide(xy - x * y, np.sqrt(np.maximum(spread, 0)), out=np.full(x.shape, np.nan), where=spread > 1e-18)


def tenths(entropy: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
    """Which tenth of its group's entropies each token is in, 0 the lowest: int8 (n_tokens,), -1 where it has none.

    Equal entropies stay together.
    """
    found = np.full(len(entropy), -1, np.int8)
    for tokens in members:
        known = tokens[np.isfinite(entropy[tokens])]
        if len(known):
            found[known] = (rankdata(entropy[known]) - 0.5) * N_DECILES // len(known)
    return found


def figure(frame: pd.DataFrame) -> Figure:
    """Entropy, near-uniform tokens and the correlation with the loss by layer; the loss by decile of the entropy.

    Up to 8 groups are lines; more are rows of a heatmap of the entropy.
    """
    groups = list(frame["group"].unique())
    if len(groups) > figures.MOST_LINES:
        measure = "entropy" if (frame["measure"] == "entropy").any() else frame["measure"].iloc[0]
        part = frame[frame["measure"] == measure].drop_duplicates(["group", "layer"])  # its first decile, if it has any
        return group_heatmap(part, PANELS.get(measure, measure), ascending=True)
    if frame["by"].iloc[0] not in ("position", "phase"):
        groups = figures.ordered(groups)
    measures = set(frame["measure"])
    loss = next((name for name in ("next_nll", "nll") if name in measures and len(groups) == 1), None)
    shown = [name for name in PANELS if name in measures]
    shown = shown or ([] if loss else [frame["measure"].iloc[0]])
    titles = [PANELS.get(name, name) for name in shown]
    titles += [] if loss is None else [f"loss of the {'next ' if loss == 'next_nll' else ''}token, nats"]
    columns = 2 if len(titles) in (2, 4) else 3
    result = figures.panels(titles, columns=columns, height=220, legend=len(groups) > 1 or loss is not None)
    for panel, measure in enumerate(shown):
        for group in groups:
            part = frame[(frame["measure"] == measure) & (frame["group"] == group)].drop_duplicates("layer")
            style = figures.MAIN if len(groups) == 1 else figures.style(group)
            figures.line(
                result, part["layer"], part["value"], part["low"], part["high"], name=group, style=style, panel=panel,
                band=len(groups) <= figures.MOST_BANDS, legend=panel == 0 and len(groups) > 1,
            )  # fmt: skip
    figures.layer_axes(result, frame["layer"], sparse=True)
    result.update_yaxes(rangemode="tozero")
    for panel in range(max(len(titles) - columns, 0), len(shown)):
        result.layout[figures.axes(panel)["xaxis"].replace("x", "xaxis")].update(title="layer")
    if loss is not None:
        panel = len(shown)
        for at, layer in enumerate(figures.spread(frame["layer"], 4)):
            part = frame[(frame["measure"] == loss) & (frame["layer"] == layer)]
            figures.line(
                result, part["decile"], part["value"], part["low"], part["high"], name=f"layer {layer}", band=False,
                style=figures.Style(figures.COLOURS[at + 1], figures.DASHES[at]), panel=panel, x_name="tenth",
            )  # fmt: skip
        place = figures.axes(panel)
        result.layout[place["xaxis"].replace("x", "xaxis")].update(
            title="tenth of the entropies, surest first", dtick=1, tick0=1, range=[0.5, N_DECILES + 0.5]
        )
        result.layout[place["yaxis"].replace("y", "yaxis")].update(rangemode="normal")
    return result


PANELS = {
    "entropy": "entropy / log E",
    "near_uniform": "share of near-uniform tokens",
    "margin": "margin",
    "experts_to_mass": "experts to reach the mass",
    "entropy_next_nll": "rank correlation: entropy, next loss",
}
"""What the figure shows, and its name there."""


def findings(frame: pd.DataFrame) -> list[str]:
    """How uncertain the routers are, and whether uncertainty goes with the loss, in sentences."""
    sentences = []
    entropy = frame[(frame["measure"] == "entropy") & frame["value"].notna()]
    if len(entropy):
        most, least = entropy.iloc[entropy["value"].argmax()], entropy.iloc[entropy["value"].argmin()]
        sentences.append(
            f"The routers' entropy is between {least['value']:.0%} (layer {least['layer']}{on(least, frame)}) and "
            f"{most['value']:.0%} (layer {most['layer']}{on(most, frame)}) of the largest possible."
        )
        uniform = frame[(frame["measure"] == "near_uniform") & frame["value"].notna()]
        if len(uniform):
            top = uniform.iloc[uniform["value"].argmax()]
            sentences[-1] += (
                f" At most {top['value']:.1%} of the tokens of a layer are near-uniform "
                f"(above {top['threshold']:.0%}; layer {top['layer']}{on(top, frame)})."
            )
    related = frame[(frame["measure"] == "entropy_next_nll") & frame["low"].notna()]
    if len(related):
        top = related.iloc[related["value"].abs().argmax()]
        clear = ((related["low"] > 0) | (related["high"] < 0)).sum()
        sentences.append(
            f"Entropy and the loss of the next token correlate most in layer {top['layer']}{on(top, frame)}: Spearman "
            f"{top['value']:+.2f} [{top['low']:+.2f}, {top['high']:+.2f}]; the interval leaves out 0 in {clear} of "
            f"{len(related)} {'layers' if frame['group'].nunique() == 1 else 'layers and groups'}."
        )
    return sentences or ["No entropy is defined in any layer."]


def on(row: pd.Series, frame: pd.DataFrame) -> str:
    """Whose number it is, where there are several groups."""
    return "" if frame["group"].nunique() == 1 else f", {figures.noun(row['by'])} {row['group']}"
