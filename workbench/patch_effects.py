"""What patching found: which experts matter, how good the estimate is, a figure, sentences.

The frame is that of `workbench.causal.patch`. Where it has one patch a position, effects of an expert are summed over
positions first. The unit of every interval is a pair of prompts: 95% of bootstrap resamples of pairs, NaN where there
is only one.

- **mean effect** of a layer's expert (or of its router): the mean over pairs; a pair in which the patch changes nothing
  counts with 0.
- **correlation** of estimate and exact effect, Pearson's r and Spearman's rho, over the patches that change anything,
  those of all pairs together; in a layer, and over all layers. The many patches with an effect of exactly 0 would make
  it look better.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.stats import rankdata

from workbench import figures
from workbench.analysis.resampling import draws, text_interval

TOP = 5
"""Findings say what share of all effects the largest so many have."""


def mean_effects(frame: pd.DataFrame, *, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The mean effect over pairs, one row a layer and expert (a missing expert for routers).

    Columns: layer, expert; effect, estimate (mean over pairs) with effect_low, effect_high, estimate_low,
    estimate_high; n_pairs; n_changing, the pairs in which the patch changes anything; n_source, n_target, the positions
    at which source and target runs select the expert, summed over pairs.
    """
    numbers = ["effect", "estimate", "n_changed", "n_source", "n_target"]
    keys = frame[["layer", "expert"]].drop_duplicates().sort_values(["layer", "expert"], ignore_index=True)
    pairs = np.sort(frame["pair"].unique())
    summed = frame.groupby(["layer", "expert", "pair"], dropna=False)[numbers].sum(min_count=1).reset_index()
    every = keys.merge(pd.Series(pairs, name="pair"), how="cross").merge(summed, how="left")
    # With one patch a position, a pair in which neither run selects the expert has no row.
    every.loc[every["n_changed"].isna(), numbers] = 0
    grid = {name: every[name].to_numpy(float).reshape(len(keys), len(pairs)) for name in numbers}
    if not frame["effect"].notna().any():
        grid["effect"] = np.full_like(grid["effect"], np.nan)
    result = keys.copy()
    drawn = _draws(len(pairs), n_resamples, seed)
    for name in ("effect", "estimate"):
        result[name] = grid[name].mean(1)
        low, high = text_interval(drawn @ grid[name].T / len(pairs), len(pairs))
        result[f"{name}_low"], result[f"{name}_high"] = low, high
    result["n_pairs"] = len(pairs)
    result["n_changing"] = (grid["n_changed"] > 0).sum(1)
    for name in ("n_source", "n_target"):
        result[name] = grid[name].sum(1).astype(np.int64)
    return result


def _draws(n_pairs: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each resample drew each pair, (n_resamples, n_pairs)."""
    return np.concatenate([np.zeros((0, n_pairs), np.float32), *draws(n_pairs, n_resamples, seed)])


def correlation(frame: pd.DataFrame, *, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well the estimate agrees with the exact effect: a row a layer, and one with a missing layer for all.

    Columns: layer; pearson, spearman in [-1, 1] with _low and _high, NaN where there are fewer than three patches or
    one side is constant; n_patches, those that change anything; n_pairs.
    """
    done = frame[(frame["n_changed"] > 0) & frame["effect"].notna()]
    pairs = np.sort(frame["pair"].unique())
    # Few pairs can be drawn in few ways: each is computed once.
    drawn, same = np.unique(_draws(len(pairs), n_resamples, seed), axis=0, return_inverse=True)
    rows = []
    for layer in [*np.sort(frame["layer"].unique()), None]:
        part = done if layer is None else done[done["layer"] == layer]
        effect, estimate = part["effect"].to_numpy(float), part["estimate"].to_numpy(float)
        place = np.searchsorted(pairs, part["pair"].to_numpy())
        again = (np.repeat(np.arange(len(part)), times[place].astype(int)) for times in drawn)
        resampled = np.array([_correlations(effect[at], estimate[at]) for at in again]).reshape(-1, 2)
        low, high = text_interval(resampled[same], len(pairs))
        row: dict[str, Any] = {"layer": layer}
        for at, (name, value) in enumerate(zip(("pearson", "spearman"), _correlations(effect, estimate), strict=True)):
            row |= {name: value, f"{name}_low": low[at], f"{name}_high": high[at]}
        rows.append(row | {"n_patches": len(part), "n_pairs": len(pairs)})
    result = pd.DataFrame(rows)
    return result.assign(layer=result["layer"].astype("Int64"))


def _correlations(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Pearson's r and Spearman's rho, NaN where there are none."""
    return _pearson(x, y), _pearson(rankdata(x), rankdata(y))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def figure(frame: pd.DataFrame) -> Figure:
    """The mean effect, layer × expert (a line over layers for routers), above exact effects against estimates."""
    exact = bool(frame["effect"].notna().any())
    mean = mean_effects(frame)
    experts = bool(mean["expert"].notna().any())
    what = "expert's contribution, by layer and number of the expert" if experts else "router's choice, by layer"
    summed = " (one position at a time, summed)" if frame["position"].notna().any() else ""
    titles = [f"{'effect' if exact else 'estimated effect'} of patching each {what}{summed}"]
    titles += ["each patch: exact effect against the estimate"] * exact
    n_layers = mean["layer"].nunique()
    result = figures.panels(titles, height=max(300, 16 * n_layers), legend=not experts)
    if experts:
        _heatmap(result, mean, "effect" if exact else "estimate")
    else:
        styles = {"effect": figures.MAIN, "estimate": figures.NULL}
        for name in ("effect", "estimate")[not exact :]:
            ends = mean[f"{name}_low"], mean[f"{name}_high"]
            figures.line(result, mean["layer"], mean[name], *ends, name=name, style=styles[name])
        result.update_xaxes(dtick=max(1, n_layers // 16), row=1, col=1)
        result.update_yaxes(title="logits", row=1, col=1)
    if exact:
        _scatter(result, frame)
    return result


def _heatmap(result: Figure, mean: pd.DataFrame, name: str) -> None:
    columns = (name, f"{name}_low", f"{name}_high", "estimate", "n_source", "n_target", "n_pairs")
    experts = range(int(mean["expert"].max()) + 1)  # also those that no run selects
    wide = [mean.pivot(index="layer", columns="expert", values=column).reindex(columns=experts) for column in columns]
    details = np.stack([grid.to_numpy(float, na_value=np.nan) for grid in wide], axis=-1)
    result.add_trace(
        figures.differences(
            details[..., 0],
            x=list(experts),
            y=[f"layer {layer}" for layer in wide[0].index],
            hover="%{y} · expert %{x}<br>%{customdata[0]:+.3f} logits [%{customdata[1]:+.3f}, %{customdata[2]:+.3f}]"
            "<br>estimate %{customdata[3]:+.3f}<br>selected at %{customdata[4]:.0f} source and %{customdata[5]:.0f} "
            "target positions of %{customdata[6]:.0f} pairs<extra></extra>",
            details=details,
        )
    )
    figures.difference_scale(result, "logits", float(np.nanmax(np.abs(details[..., 0]), initial=0)))
    result.update_xaxes(showgrid=False, row=1, col=1)
    result.update_yaxes(autorange="reversed", showgrid=False, ticks="", row=1, col=1)


def _scatter(result: Figure, frame: pd.DataFrame) -> None:
    done = frame[frame["n_changed"] > 0]
    reach = 1.05 * float(done[["effect", "estimate"]].abs().max().max()) if len(done) else 1.0
    reach = reach or 1.0
    result.add_scatter(
        x=[-reach, reach], y=[-reach, reach], **figures.axes(1), mode="lines", showlegend=False, hoverinfo="skip",
        line={"color": figures.NULL.colour, "dash": figures.NULL.dash, "width": 1},
    )  # fmt: skip
    names = [
        " · ".join(f"{name} {value}" for name, value in row.items() if not pd.isna(value))
        for row in done[["pair", "layer", "expert", "position"]].astype("Int64").to_dict("records")
    ]
    result.add_scatter(
        x=done["estimate"], y=done["effect"], **figures.axes(1), mode="markers", showlegend=False, text=names,
        marker={"size": 6, "color": figures.faded(figures.MAIN.colour, 0.6)},
        hovertemplate="%{text}<br>exact %{y:+.3f}<br>estimate %{x:+.3f}<extra></extra>",
    )  # fmt: skip
    result.update_xaxes(title="estimate, logits", range=[-reach, reach], row=2, col=1)
    result.update_yaxes(title="exact effect, logits", range=[-reach, reach], row=2, col=1)


def findings(frame: pd.DataFrame) -> list[str]:
    """What the two runs say, what matters most, how concentrated it is, and how good the estimate is."""
    runs = frame.groupby("pair")[["source", "target"]].first()
    n_pairs = len(runs)
    mean_of = "" if n_pairs == 1 else f", mean of {n_pairs} pairs"
    sentences = [
        f"The first answer's logit is {_ahead(runs['source'].mean())} the second's in the source run and "
        f"{_ahead(runs['target'].mean())} it in the target run{mean_of}."
    ]
    exact = bool(frame["effect"].notna().any())
    name, noun = ("effect", "effect") if exact else ("estimate", "estimated effect")
    mean = mean_effects(frame)
    changing = mean[mean["n_changing"] > 0]
    if changing.empty:
        return [*sentences, "No patch changes anything: both runs route and compute alike."]
    size = changing[name].abs()
    top = changing.loc[[size.idxmax()]].to_dict("records")[0]
    router = pd.isna(top["expert"])
    whose = f"the router of layer {top['layer']}" if router else f"expert {top['expert']} of layer {top['layer']}"
    moved = f"{top[name]:+.2f} logits"
    moved += "" if n_pairs == 1 else f" [{top[f'{name}_low']:+.2f}, {top[f'{name}_high']:+.2f}]"
    gap = (runs["source"] - runs["target"]).mean()
    share = f", {top[name] / gap:.0%} of what lies between the runs" if gap else ""
    unit = "routers" if router else "experts"
    sentences.append(
        f"Of the {len(changing)} {unit} whose patch changes anything, {whose} has the largest {noun}: {moved}{share}."
    )
    if len(changing) > TOP and size.sum() > 0:
        sentences.append(
            f"The {TOP} largest make up {size.nlargest(TOP).sum() / size.sum():.0%} of the sum of absolute {noun}s."
        )
    if exact:
        overall = correlation(frame).to_dict("records")[-1]
        if np.isfinite(overall["pearson"]):
            sentences.append(
                f"The estimate correlates with the exact effect at r = {_value(overall, 'pearson')} (Spearman's rho "
                f"{_value(overall, 'spearman')}) over the {overall['n_patches']:,} patches that change "
                "anything."
            )
    return sentences


def _ahead(difference: float) -> str:
    return f"{abs(difference):.2f} {'behind' if difference < 0 else 'ahead of'}"


def _value(row: dict[Hashable, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{row[name]:.2f}" + (f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else "")
