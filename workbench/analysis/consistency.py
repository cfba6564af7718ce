"""How long a text stays with the same experts: whether few of them, kept for a while, would serve most tokens.

Segment routing best performance (SRP) of Liang et al. 2025, "Not All Models Suit Expert Offloading: On Local Routing
Consistency of Mixture-of-Expert Models", §3. A window is m tokens in a row, inside one text; windows begin at every
token. f(e, p, m) is how many of the m tokens from p on use expert e.

- **SRP** = max over α in {0, …, m} of 2·Σ_{f ≥ α} f / (m·#{f ≥ α} + Σ f). Suppose a router that sees the window
  chooses once for all m tokens, and takes the experts with f ≥ α. SRP is the best F1 score that such a choice reaches
  against the choices really made: 1 if the tokens of a window always share their experts. One α serves a whole row of
  the table (an expert, a layer or the model): the windows of all its texts and experts together.
- **α** is the best threshold. It always equals ⌈m·SRP/2⌉.
- **ρ** = m·#{f ≥ α} / Σ f: how many experts that choice keeps, as a multiple of those that are used at a time (k in a
  layer of constant k). It is the cache size, in units of k, that suits the window.
- **rate** = Σ f / (m·number of windows and experts): how often an expert is used. SRP is at least 2·rate/(1 + rate),
  which taking every expert (α = 0) gives.
- **null**: the SRP that is expected if every token chose by itself, with the loads as they are. Each f is then binomial
  with the expert's own rate, so the null is computed exactly, not simulated. Uneven loads alone raise it: a layer
  that always uses the same experts has a null of 1.
- **excess** = SRP − null: what is due to *when* experts are used, not to how often.
- **within text**: the SRP that is expected if the tokens of each text were shuffled, exact as well. What it has above
  the null is what the text as a whole explains (its language, topic and style choose experts); what SRP has above it
  is owed to neighbouring tokens. In texts hardly longer than the window the two can't be told apart.

The interval covers 95% of bootstrap resamples of texts, each with an α of its own, shifted by the resampling bias; the
null is held fixed in it. More than 256 texts are put into 256 random blocks (fewer where single experts of many groups
are asked for), which are drawn as a whole.

The authors' code (ljcleo/moe-lrc) has the same definition. It takes texts of exactly 512 tokens and windows that are
powers of 2, re-derives the choices from logits (its ranks are 8-bit: at most 128 experts), and gives an expert that is
never used an SRP of 0; here it is NaN. A longer text has more windows and so weighs more.

Published SRP at m = 16: LLaMA-MoE-v2 0.782, Yuan2.0 0.635, PowerMoE 0.552, Qwen3-30B 0.541, Phi-3.5-MoE 0.520,
OLMoE 0.509, Mixtral 0.494, DeepSeek-V2-Lite 0.379, Qwen1.5-MoE 0.307, Switch 0.193; OLMoE at m = 4, 16, 64, 256:
0.647, 0.509, 0.455, 0.426. They rest on texts of several data sets, so other texts give other numbers. To put a model
beside them, on a machine with a GPU: `workbench trace allenai/OLMoE-1B-7B-0125 --corpus texts.jsonl --max-length 512
--long cut --record ids --device cuda --dtype bfloat16 --out olmoe.duckdb`, then `workbench analyze consistency
olmoe.duckdb --set level=model`.
"""

from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import EVERYTHING, sum_by
from workbench.analysis.resampling import bootstrap_sums, interval
from workbench.analysis.windows import Counted, Texts, add, count_windows, sort_into_blocks, windows_of
from workbench.errors import InputError
from workbench.tracefile import Trace

LEVELS = ("expert", "layer", "model")
PUBLISHED = {
    "LLaMA-MoE-v2": 0.7816, "Yuan2.0": 0.6348, "PowerMoE": 0.5517, "Qwen3-30B": 0.5414, "Phi-3.5-MoE": 0.5198,
    "OLMoE": 0.5091, "Mixtral": 0.4936, "DeepSeek-V2-Lite": 0.3792, "Qwen1.5-MoE": 0.3071, "Switch": 0.193,
}  # fmt: skip
"""SRP of whole models at m = 16, from the paper."""
PUBLISHED_OLMOE = {4: 0.6469, 16: 0.5091, 64: 0.4553, 256: 0.4264}
"""SRP of OLMoE by window, from the paper."""
RESAMPLED = 1 << 24
"""Entries of the resamples that are held at a time."""
AXIS = "segment routing best performance (SRP)"
INDEPENDENT = "tokens choosing independently"
MOST_PANELS = 4
"""Windows that a figure of single experts or of many groups has room for."""


def consistency(
    trace: Trace,
    by: str | None = None,
    *,
    windows: tuple[int, ...] = (4, 16, 64, 256),
    level: str = "layer",
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Segment routing best performance for each window.

    by           column of the sequences; None puts all texts into the group "all"
    windows      numbers of tokens, each at least 1
    level        what shares a threshold α and gets a row: "expert", "layer" or "model"
    n_resamples  bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row a group × layer (unless level is "model") × expert (if it is "expert") × window: group, level,
    layer, expert, window; srp in [0, 1] with low, high; alpha (whole, as float), rho, rate, null, excess, within_text;
    n_windows (of one expert in one layer); n_experts (in the row); n_tokens, n_sequences, n_texts: those as long as the
    window; n_short: sequences left out because they are shorter; n_unlabelled: sequences left out because they have no
    label. Numbers are NaN where no text is long enough or nothing was used, intervals also where there is one text.
    """
    check(windows, level)
    texts = sort_into_blocks(trace, by, level, windows, seed)
    tables, total = [], []
    for layer in range(trace.n_layers):
        counted = count_windows(trace, layer, texts, windows, level == "expert")
        if level == "model":
            total = [add(*pair) for pair in zip(total, counted, strict=True)] if total else counted
            continue
        tables += [rows(texts, one, level, layer, n_resamples, seed) for one in counted]
    tables += [rows(texts, one, level, None, n_resamples, seed) for one in total]
    frame = pd.concat(tables, ignore_index=True)
    order = [name for name in ("layer", "expert") if name in frame]
    return frame.sort_values([*order, "group", "window"], kind="stable", ignore_index=True, key=in_order(texts.labels))


def check(windows: tuple[int, ...], level: str) -> None:
    """Refuse windows and levels that there can't be."""
    if level not in LEVELS:
        raise InputError(f"level is {level!r}; expected {', '.join(LEVELS)}.")
    wrong = [window for window in windows if window < 1]
    if wrong or not windows or len(set(windows)) < len(windows):
        raise InputError(f"windows are {', '.join(map(str, windows)) or 'none'}; expected different numbers from 1 on.")


def in_order(labels: list[str]) -> Any:
    """Key for sorting rows: groups in the order of the labels, everything else by value."""
    place = {label: at for at, label in enumerate(labels)}
    return lambda column: column.map(place) if column.name == "group" else column


def score(found: np.ndarray) -> dict[str, np.ndarray]:
    """srp, alpha, rho and rate from numbers of windows by f (last axis: 0, …, m); NaN where nothing was used."""
    window = found.shape[-1] - 1
    kept, matched = at_least(found)
    used = matched[..., :1]
    slots = window * kept
    f1 = np.divide(2 * matched, slots + used, out=np.zeros(found.shape), where=slots + used > 0)
    best = f1.argmax(axis=-1)[..., None]
    undefined = used[..., 0] <= 0
    # Thresholds between two values of f that occur give the same choice: m·SRP/2 rounded up is one of them.
    hit, taken = np.take_along_axis(matched, best, -1), np.take_along_axis(slots, best, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = {
            "srp": np.take_along_axis(f1, best, -1)[..., 0],
            "alpha": np.ceil(window * hit / (taken + used) - 1e-12)[..., 0],
            "rho": (taken / used)[..., 0],
            "rate": (used / slots[..., :1])[..., 0],
        }
    return {name: np.where(undefined, np.nan, value) for name, value in result.items()}


@njit(cache=True, nogil=True)
def best_f1(found: np.ndarray) -> np.ndarray:
    """SRP alone, for many resamples: float64 (n, window + 1) -> (n,)."""
    n, width = found.shape
    result = np.full(n, np.nan)
    for at in range(n):
        used = 0.0
        for f in range(1, width):
            used += f * found[at, f]
        if used <= 0:
            continue
        kept, matched, best = 0.0, 0.0, 0.0
        for f in range(width - 1, -1, -1):
            kept += found[at, f]
            matched += f * found[at, f]
            best = max(best, 2 * matched / ((width - 1) * kept + used))
        result[at] = best
    return result


def at_least(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each α the number of windows with f ≥ α, and the activations in them."""
    found = np.asarray(found, np.float64)
    activations = found * np.arange(found.shape[-1])
    kept, matched = (np.cumsum(values[..., ::-1], axis=-1)[..., ::-1] for values in (found, activations))
    return kept, matched


def rows(texts: Texts, counted: Counted, level: str, layer: int | None, n_resamples: int, seed: int) -> pd.DataFrame:
    """The rows of the result for one window."""
    n_groups, n_rows, window = len(texts.labels), counted.found.shape[1], counted.window
    flat = counted.found.reshape(len(counted.found), -1)
    numbers = score(sum_by(flat, texts.group, n_groups).reshape(n_groups, n_rows, -1))
    n_windows, long = windows_of(texts, window), texts.length >= window
    n_texts = np.array([len(np.unique(texts.text[long & (texts.label == group)])) for group in range(n_groups)])
    low, high = intervals(texts, counted, numbers["srp"], n_resamples, seed)
    low[n_texts < 2], high[n_texts < 2] = np.nan, np.nan
    null, within = score(counted.expected)["srp"], score(counted.shuffled)["srp"]
    n_long, n_short = (np.bincount(texts.label[which], minlength=n_groups) for which in (long, ~long))
    n_tokens = np.bincount(texts.label[long], texts.length[long], minlength=n_groups).astype(np.int64)
    place: dict[str, Any] = {"group": np.repeat(texts.labels, n_rows), "level": level}
    if layer is not None:
        place["layer"] = layer
    if level == "expert":
        place["expert"] = np.tile(np.arange(n_rows), n_groups)
    return pd.DataFrame(
        {
            **place,
            "window": window,
            "srp": numbers["srp"].ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
            **{name: numbers[name].ravel() for name in ("alpha", "rho", "rate")},
            "null": null.ravel(),
            "excess": (numbers["srp"] - null).ravel(),
            "within_text": within.ravel(),
            "n_windows": np.repeat(n_windows, n_rows),
            "n_experts": 1 if level == "expert" else counted.n_experts,
            "n_tokens": np.repeat(n_tokens, n_rows),
            "n_sequences": np.repeat(n_long, n_rows),
            "n_texts": np.repeat(n_texts, n_rows),
            "n_short": np.repeat(n_short, n_rows),
            "n_unlabelled": texts.n_unlabelled,
        }
    )


def intervals(
    texts: Texts, counted: Counted, srp: np.ndarray, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals, (n_groups, n_rows), as many rows at a time as memory allows."""
    n_groups, n_rows = srp.shape
    width = counted.found.shape[-1]
    low, high = np.full(srp.shape, np.nan), np.full(srp.shape, np.nan)
    step = max(1, RESAMPLED // max(1, n_resamples * n_groups * width))
    for begin in range(0, n_rows if n_resamples else 0, step):
        part = slice(begin, begin + step)
        found = counted.found[:, part].reshape(len(counted.found), -1)
        sums = bootstrap_sums(found, texts.block, texts.group, n_groups, n_resamples, seed)
        resampled = best_f1(sums.reshape(-1, width)).reshape(n_resamples, n_groups, -1)
        low[:, part], high[:, part] = interval(resampled, srp[:, part])
    return np.clip(low, 0, 1), np.clip(high, 0, 1)


def figure(frame: pd.DataFrame) -> Figure:
    """SRP by layer, a line a window; dotted, what independent tokens with the same loads would give.

    Several groups: a panel a window with a line a group, or where they are many a panel a group. A whole model: SRP by
    window beside the published OLMoE. Single experts: a row a layer, best experts first.
    """
    level = frame["level"].iloc[0]
    if level == "expert":
        return experts_figure(frame)
    groups = figures.ordered(frame["group"].unique())
    windows = figures.spread(frame["window"], MOST_PANELS)
    if level == "model":
        return model_figure(frame, groups)
    if len(groups) == 1:
        result = figures.panels([""], height=320, legend=True)
        window_lines(result, frame, windows, 0, legend=True)
    elif len(groups) <= figures.MOST_LINES:
        result = figures.panels(
            [f"windows of {window} tokens" for window in windows], columns=2, height=230, legend=True
        )
        for panel, window in enumerate(windows):
            for group in groups:
                part = frame[(frame["window"] == window) & (frame["group"] == group)]
                figures.line(
                    result, part["layer"], part["srp"], part["low"], part["high"], name=group, panel=panel,
                    style=figures.style(group), legend=panel == 0, band=len(groups) <= figures.MOST_BANDS,
                )  # fmt: skip
        figures.same_range(result)
    else:
        result = figures.panels(
            [figures.plain(group) for group in groups], columns=6, height=80, legend=True, tight=True
        )
        for panel, group in enumerate(groups):
            window_lines(result, frame[frame["group"] == group], windows, panel, legend=panel == 0)
        figures.same_range(result)
    figures.layer_axes(result, frame["layer"], sparse=len(groups) > figures.MOST_LINES)
    result.update_yaxes(rangemode="tozero")
    figures.left_title(result, AXIS)
    return result


def window_lines(result: Figure, part: pd.DataFrame, windows: list[int], panel: int, *, legend: bool) -> None:
    """A line a window with its interval, and its null."""
    for place, window in enumerate(windows):
        one, style = part[part["window"] == window], figures.Style(figures.COLOURS[place])
        figures.line(
            result, one["layer"], one["null"], name=INDEPENDENT, panel=panel,
            style=style._replace(dash="dot", width=1.2), legend=False,
        )  # fmt: skip
        result.data[-1].update(mode="lines")
        figures.line(
            result, one["layer"], one["srp"], one["low"], one["high"], name=f"{window} tokens", panel=panel,
            style=style, legend=legend,
        )  # fmt: skip
    if legend:
        figures.line(result, [None], [None], name=INDEPENDENT, panel=panel, style=figures.NULL)


def model_figure(frame: pd.DataFrame, groups: list[str]) -> Figure:
    """SRP by window, a line a group, with the published OLMoE as a measure; many groups get a dot each instead."""
    if len(groups) > figures.MOST_LINES:
        windows = figures.spread(frame["window"], MOST_PANELS)
        titles = [f"windows of {window} tokens" for window in windows]
        result = figures.panels(titles, columns=len(windows), height=17 * max(len(groups), 8), tight=True)
        names = [figures.plain(group) for group in groups]
        for panel, window in enumerate(windows):
            part = frame[frame["window"] == window].set_index("group").loc[groups]
            figures.dots(result, part["srp"], names, part["low"], part["high"], panel=panel)
        result.update_xaxes(title="SRP")
        result.update_yaxes(autorange="reversed", tickmode="linear", dtick=1)
        return result
    result = figures.panels([""], height=320, legend=True)
    known = list(PUBLISHED_OLMOE)
    figures.line(
        result, known, list(PUBLISHED_OLMOE.values()), name="OLMoE, published", style=figures.CONTEXT, x_name="window"
    )
    for group in groups:
        part = frame[frame["group"] == group]
        alone = len(groups) == 1
        figures.line(
            result, part["window"], part["srp"], part["low"], part["high"], name="this trace" if alone else group,
            style=figures.MAIN if alone else figures.style(group), band=len(groups) <= figures.MOST_BANDS,
            x_name="window",
        )  # fmt: skip
        if alone:
            figures.line(result, part["window"], part["null"], name=INDEPENDENT, style=figures.NULL, x_name="window")
    result.update_xaxes(type="log", title="window (tokens)", tickvals=sorted({*known, *frame["window"]}))
    result.update_yaxes(title=AXIS)
    return result


def experts_figure(frame: pd.DataFrame) -> Figure:
    """A panel a window; a row a layer (and group), a column a rank of SRP."""
    windows = figures.spread(frame["window"], MOST_PANELS)
    grouped = frame["group"].nunique() > 1
    n_rows = len(frame[["group", "layer"]].drop_duplicates())
    width = frame.groupby(["group", "layer", "window"]).size().max()
    titles = [f"windows of {window} tokens" for window in windows]
    result = figures.panels(titles, columns=2, height=18 * max(n_rows, 8), tight=True)
    columns = ["expert", "srp", "low", "high", "null", "rate"]
    for panel, window in enumerate(windows):
        names, lines = [], []
        for (group, layer), part in frame[frame["window"] == window].groupby(["group", "layer"], sort=False):
            names.append(f"{figures.plain(group)} · layer {layer}" if grouped else f"layer {layer}")
            values = part.sort_values("srp", ascending=False)[columns].to_numpy(float)
            lines.append(np.pad(values, ((0, width - len(values)), (0, 0)), constant_values=np.nan))
        details = np.stack(lines)
        result.add_trace(
            figures.amounts(
                details[..., 1], x=list(range(1, width + 1)), y=names, panel=panel, details=details,
                hover="%{y}<br>expert %{customdata[0]:.0f}<br>SRP %{customdata[1]:.3f} [%{customdata[2]:.3f}, "
                "%{customdata[3]:.3f}]<br>independent tokens %{customdata[4]:.3f}<br>used by %{customdata[5]:.1%} "
                "of tokens<extra></extra>",
            )
        )  # fmt: skip
    figures.amount_scale(result, "SRP", 0, 1)
    for panel in range(max(0, len(windows) - 2), len(windows)):
        number = panel + 1 if panel else ""
        result.layout[f"xaxis{number}"]["title"] = {"text": "experts of each layer, most consistent first"}
    result.update_xaxes(showgrid=False)
    result.update_yaxes(autorange="reversed", showgrid=False)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """SRP of the window nearest to 16 tokens, and how much of it independent tokens would have, in sentences."""
    known = frame[frame["srp"].notna()]
    if known.empty:
        return ["No text is as long as the shortest window, or no token used any expert: there is nothing to measure."]
    window = min(known["window"], key=lambda window: abs(np.log(window / 16)))
    part = known[known["window"] == window]
    top, least = part.iloc[part["srp"].argmax()], part.iloc[part["srp"].argmin()]
    mean = part["srp"].mean()
    if len(part) == 1:
        sentences = [
            f"In windows of {window} tokens, one choice of experts for the whole window reaches {top['srp']:.2f} of 1 "
            f"(SRP{spread_of(top)}) with a cache of {top['rho']:.1f} times the experts used at a time."
        ]
    else:
        sentences = [
            f"In windows of {window} tokens, one choice of experts for the whole window reaches {mean:.2f} of 1 on "
            f"average (SRP): most in {where(top)} ({top['srp']:.2f}{spread_of(top)}), least in {where(least)} "
            f"({least['srp']:.2f}{spread_of(least)})."
        ]
    clear = (part["low"] > part["null"]).sum()
    null = part["null"].mean()
    verdict = f"tokens that chose independently with the same loads would reach {null:.2f}"
    if part["low"].notna().any():
        verdict += f"; {clear} of {len(part)} intervals are above that"
    within = part["within_text"].mean()
    sentences.append(
        f"{verdict[0].upper()}{verdict[1:]}. Shuffling the tokens inside their texts would leave {within:.2f}: so much "
        "is owed to texts as a whole (language, topic, style), the rest to neighbouring tokens."
    )
    if top["level"] == "model" and window == 16:
        near = min(PUBLISHED, key=lambda name: abs(PUBLISHED[name] - mean))
        sentences.append(
            f"Published values at 16 tokens, on other texts, range from {min(PUBLISHED.values()):.2f} to "
            f"{max(PUBLISHED.values()):.2f}; the nearest is {near} ({PUBLISHED[near]:.2f})."
        )
    return sentences


def where(row: pd.Series) -> str:
    """Which row of the table, in words."""
    parts = [f"expert {row['expert']} of layer {row['layer']}" if "expert" in row else ""]
    if "layer" in row and "expert" not in row:
        parts = [f"layer {row['layer']}"]
    if row["group"] != EVERYTHING:
        parts.append(str(row["group"]))
    return " on ".join(filter(None, parts))


def spread_of(row: pd.Series) -> str:
    """The interval in brackets, where there is one."""
    return f" [{row['low']:.2f}, {row['high']:.2f}]" if np.isfinite(row["low"]) else ""
