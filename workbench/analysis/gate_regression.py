"""Whether experts with like weights have like rows in the router, layer by layer.

Over all pairs of experts of a layer, x is the cosine of their matrices (gate, up, down, or all of them) and y the
cosine of their router rows (gate embeddings); both as in `similarity`. With `measure=cosine` the matrices are
flattened, neurons as they are; with `measure=mean_cosine` they are averaged over neurons, whose order then doesn't
matter.

- **slope** of the least-squares line y = intercept + slope · x, and **r2**, the square of Pearson's correlation **r**:
  the part of the variance of y that x explains, 0 to 1. (Lo et al. 2025, A Closer Look into Mixture-of-Experts in Large
  Language Models, arXiv:2406.18219, §4.2; their code regresses in the same direction.)
- **p**: how often |r| is as large when the experts' router rows are shuffled among the experts (Mantel 1967, Cancer
  Research 27). Pairs that share an expert depend on each other, so the p that a regression prints is much too small.
- **q**: false-discovery rate (Benjamini–Hochberg) over all layers × matrices of the table.

The interval covers 95% of bootstrap resamples of experts (a pair counts as often as both its experts were drawn;
an expert isn't paired with itself). The experts of a model are all there are: it says how much the slope hangs on
single experts, not what other models would give.
"""

from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.resampling import draws, interval, q_values
from workbench.analysis.similarity import COLOURS, chosen_layers, expert_cosines, loaded, mean_cosines
from workbench.errors import InputError
from workbench.neurons import cosines

TIE = 1e-12


def gate_regression(
    model: Any,
    *,
    measure: str = "cosine",
    layers: tuple[int, ...] | None = None,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Regression of the cosine of two experts' router rows on the cosine of their weights.

    model    what `workbench.load` returns, or a name for it
    measure  "cosine" or "mean_cosine": how alike two experts' weights are
    layers   which routers; None: all

    Returns one row a layer × matrix (gate, up, down, all): measure, layer, matrix; slope with low, high; intercept; r,
    r2 with r2_low, r2_high; p, q; mean_expert_cosine, mean_router_cosine over pairs; n_experts, n_pairs. NaN where
    there are fewer than three pairs, or all x or all y are equal.

    InputError for another measure, and if no layer has both router rows and experts' weights.
    """
    from workbench.experts import numbers, read

    if measure not in ("cosine", "mean_cosine"):
        raise InputError(f"measure is {measure!r}; expected 'cosine' or 'mean_cosine'.")
    rows = []
    for layer in chosen_layers(model, layers):
        weights = read(layer)
        router = numbers(weights.router).astype(np.float64)
        y = cosines(router @ router.T)
        pairs = np.triu_indices(weights.n_experts, 1)
        drawn = list(draws(weights.n_experts, n_resamples, seed)) if n_resamples else []
        random = np.random.default_rng([seed, layer.index])
        orders = [random.permutation(weights.n_experts) for _ in range(n_permutations)]
        for name, x in (expert_cosines if measure == "cosine" else mean_cosines)(weights).items():
            slope, intercept, r = fit(x[pairs], y[pairs])
            p = np.nan
            if n_permutations and np.isfinite(r):
                chance = np.array([fit(x[pairs], y[order][:, order][pairs])[2] for order in orders])
                p = (1 + (np.abs(chance) >= abs(r) - TIE).sum()) / (n_permutations + 1)
            slopes, r2s = np.concatenate([resample(x, y, counts) for counts in drawn], axis=1) if drawn else ([], [])
            low, high = interval(np.asarray(slopes)) if np.isfinite(r) else (np.nan, np.nan)
            r2_low, r2_high = interval(np.asarray(r2s)) if np.isfinite(r) else (np.nan, np.nan)
            rows.append(
                {
                    "measure": measure,
                    "layer": layer.index,
                    "matrix": name,
                    "slope": slope,
                    "low": float(low),
                    "high": float(high),
                    "intercept": intercept,
                    "r": r,
                    "r2": r * r,
                    "r2_low": float(r2_low),
                    "r2_high": float(r2_high),
                    "p": p,
                    "mean_expert_cosine": x[pairs].mean() if len(pairs[0]) else np.nan,
                    "mean_router_cosine": y[pairs].mean() if len(pairs[0]) else np.nan,
                    "n_experts": weights.n_experts,
                    "n_pairs": len(pairs[0]),
                }
            )
    if not rows:
        raise InputError(f"no layer of {loaded(model).name} was asked for; leave `layers` out for all.")
    frame = pd.DataFrame(rows)
    frame.insert(list(frame.columns).index("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame


def fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and r of the least-squares line; NaN where it isn't defined."""
    if len(x) < 3:
        return np.nan, np.nan, np.nan
    from_x, from_y = x - x.mean(), y - y.mean()
    xx, xy, yy = from_x @ from_x, from_x @ from_y, from_y @ from_y
    if not (xx > TIE and yy > TIE):
        return np.nan, np.nan, np.nan
    slope = xy / xx
    return float(slope), float(y.mean() - slope * x.mean()), float(xy / np.sqrt(xx * yy))


def resample(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Slope and r² of resamples of experts: float64 (2, n_resamples); counts are (n_resamples, E)."""
    apart = 1.0 - np.eye(len(x))
    x, y = np.nan_to_num(x) * apart, np.nan_to_num(y) * apart
    counts = counts.astype(np.float64)
    # A pair of experts drawn m and n times counts m · n times, so every sum over pairs is a quadratic form.
    n, sx, sy, sxx, sxy, syy = (
        np.einsum("re,re->r", counts @ form, counts) for form in (apart, x, y, x * x, x * y, y * y)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        vx, vy, vxy = sxx - sx * sx / n, syy - sy * sy / n, sxy - sx * sy / n
        usable = (vx > TIE) & (vy > TIE)
        return np.where(usable, [vxy / vx, vxy * vxy / (vx * vy)], np.nan)


def figure(frame: pd.DataFrame) -> Figure:
    """r² by layer, a line a matrix; the interval is that of all matrices together."""
    result = figures.panels([""], height=280, legend=True)
    for matrix in (name for name in COLOURS if name in set(frame["matrix"])):
        part = frame[frame["matrix"] == matrix]
        figures.line(
            result, part["layer"], part["r2"], part["r2_low"], part["r2_high"], name=matrix, band=matrix == "all",
            style=figures.Style(COLOURS[matrix], "solid" if matrix == "all" else "dash"),
        )  # fmt: skip
    figures.layer_axes(result, frame["layer"])
    result.update_yaxes(title="r² of router cosine on expert cosine", rangemode="tozero")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """In how many layers like experts have like router rows, in a sentence."""
    whole = frame[frame["matrix"] == "all"]
    known = whole[whole["r2"].notna()]
    if known.empty:
        return ["No layer has enough different experts for a regression."]
    top = known.iloc[known["r2"].argmax()]
    clear = ((known["q"] < 0.05) & (known["slope"] > 0)).sum()
    return [
        f"Experts with more alike weights have more alike router rows in {clear} of {len(whole)} layers "
        f"(false-discovery rate 5%); r² is {known['r2'].mean():.2f} on average and at most {top['r2']:.2f}, in layer "
        f"{top['layer']} [{top['r2_low']:.2f}, {top['r2_high']:.2f}]."
    ]
