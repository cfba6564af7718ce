"""Whether languages are routed more alike in the middle of the model than at its ends.

The layers are cut into thirds by depth (the middle takes the rest). **first − middle** and **last − middle** are
differences of the mean divergence (see alignment) of a third from that of the middle third.

- **U**: both are above 0 with 95% confidence. This shape is reported for large multilingual models.
- **inverted U**: both below 0. **falling**, **rising**: one above, one below. **none**: anything else.

The intervals cover 95% of bootstrap resamples of texts, all layers and languages of a text drawn together. A single
text has none, and its shape is **none**.

Source: the shape by Bandarkar et al. 2025 (as in alignment); thirds, intervals and names of shapes are ours.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.parallel import (
    POOLED,
    align,
    average,
    choose_measure,
    divergences,
    means,
    resample,
    text_profiles,
)
from workbench.analysis.resampling import text_interval
from workbench.errors import InputError
from workbench.tracefile import Trace


def u_shape(
    trace: Trace,
    *,
    reference: str = "en",
    measure: str | None = None,
    by: str = "lang",
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether the divergence is lower in the middle third of the layers than at both ends.

    Arguments as for `alignment`. Returns one row a language, and "all": measure, reference, lang; first, middle, last
    (mean divergence of each third); first_minus_middle and last_minus_middle, each with _low and _high (NaN for a
    single text); shape: "U" (both ends above the middle with 95% confidence), "inverted U" (both below), "falling" or
    "rising" (one above, one below), "none" otherwise; n_texts. Fewer than three layers have no middle: InputError.
    """
    measure = choose_measure(trace, measure)
    if trace.n_layers < 3:
        raise InputError(f"a U-shape takes at least three MoE layers; this model has {trace.n_layers}.")
    aligned = align(trace, by, reference)
    values = np.stack(
        [divergences(text_profiles(trace, layer, aligned, measure), aligned.cells) for layer in range(trace.n_layers)]
    )
    third = trace.n_layers // 3
    parts = [average(part) for part in (values[:third], values[third:-third], values[-third:])]
    point = [means(part, np.ones((1, len(part)), np.float32))[0] for part in parts]
    first, middle, last = (resample(part, n_resamples, seed) for part in parts)
    n_texts = np.append(np.isfinite(parts[1]).sum(axis=0), np.isfinite(parts[1]).any(axis=1).sum())
    frame = pd.DataFrame(
        {
            "measure": measure,
            "reference": reference,
            "lang": [*aligned.languages[1:], POOLED],
            "first": point[0],
            "middle": point[1],
            "last": point[2],
        }
    )
    for name, end, value in (("first", first, point[0]), ("last", last, point[2])):
        frame[f"{name}_minus_middle"] = value - point[1]
        low, high = text_interval(end - middle, n_texts)
        frame[f"{name}_minus_middle_low"], frame[f"{name}_minus_middle_high"] = low, high
    frame["shape"] = [shape_of(row) for _, row in frame.iterrows()]
    frame["n_texts"] = n_texts
    return frame


def shape_of(row: pd.Series) -> str:
    """Name of the shape from the two intervals of a row of `u_shape`."""
    ends = []
    for name in ("first", "last"):
        low, high = row[f"{name}_minus_middle_low"], row[f"{name}_minus_middle_high"]
        ends.append(1 if low > 0 else -1 if high < 0 else 0)
    names = {(1, 1): "U", (-1, -1): "inverted U", (1, -1): "falling", (-1, 1): "rising"}
    return names.get((ends[0], ends[1]), "none")


def figure(frame: pd.DataFrame) -> Figure:
    """A dot and an interval a language for each end, minus the middle: to the right of 0 is a U."""
    ordered = frame.sort_values("last_minus_middle", ascending=False)
    ordered = pd.concat([ordered[ordered["lang"] == POOLED], ordered[ordered["lang"] != POOLED]])
    names = ["<b>all languages</b>" if lang == POOLED else figures.plain(lang) for lang in ordered["lang"]]
    titles = ["first third − middle third", "last third − middle third"]
    result = figures.panels(titles, columns=2, height=17 * max(len(names), 6), tight=True)
    for panel, end in enumerate(("first", "last")):
        column = f"{end}_minus_middle"
        figures.dots(result, ordered[column], names, ordered[f"{column}_low"], ordered[f"{column}_high"], panel=panel)
    result.update_xaxes(zeroline=True, zerolinewidth=2, rangemode="tozero")
    result.update_yaxes(autorange="reversed", tickmode="linear", dtick=1)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """Whether there is a U-shape, in sentences."""
    row = frame[frame["lang"] == POOLED].iloc[0]
    meaning = {
        "U": "There is a U-shape: languages are routed most alike in the middle layers",
        "inverted U": "There is no U-shape but its opposite: languages are routed least alike in the middle layers",
        "falling": "There is no U-shape: divergence falls from the first layers to the last",
        "rising": "There is no U-shape: divergence rises from the first layers to the last",
        "none": "There is no clear U-shape",
    }[row["shape"]]
    count = (frame.loc[frame["lang"] != POOLED, "shape"] == "U").sum()
    ends = [
        f"{end} − middle [{row[f'{end}_minus_middle_low']:+.3f}, {row[f'{end}_minus_middle_high']:+.3f}]"
        for end in ("first", "last")
        if pd.notna(row[f"{end}_minus_middle_low"])
    ]
    said = "; " + ", ".join(ends).replace("-", "−") if ends else ""
    alone = f"{count} of {len(frame) - 1} languages show a U on their own."
    return [
        f"{meaning} (mean divergence of each third of the layers: {row['first']:.3f}, {row['middle']:.3f}, "
        f"{row['last']:.3f}{said}). {alone}"
    ]
