"""How much a token's experts in one layer tell about its experts in another: mutual information between layers.

One expert of the token is drawn at random in each of the two layers; p(i, j) is the part of all such pairs:

- **mutual information** I = Σ p(i, j) · log( p(i, j) / p(i)p(j) ), in nats (asked of routers by Qiu et al. 2024,
  RMoE, and Omni-Router, 2025). 0: the layers route independently.
- **most**: the largest value that the loads and k allow. An expert is drawn from the token's k, so that I can't exceed
  what an expert tells about its token, H(layer) − mean log k; the smaller of the two layers counts.
  **normalised** = I / most, 0 to 1.
- **chance**: the value expected if the tokens of one layer were shuffled over the whole trace: sampling noise,
  (E − k)(E' − k') / (2 k k' (N − 1)) for constant k. Under it, nothing is there.
- **within text**: the value expected if the tokens of one layer were shuffled inside their texts: what language, topic
  and style explain, since they choose experts in every layer. A text of one token stays as it is.
- **excess** = I − within text: what the two layers share about the single token.

Both nulls are expectations over all shuffles, to second order (no shuffle is drawn). Intervals cover 95% of bootstrap
resamples of texts, shifted by the resampling bias; texts are first put at random into at most 64 blocks.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import entropy, experts_of
from workbench.analysis.mutual_information import nats
from workbench.analysis.pairs import Blocks, count_choices, count_pairs, most_experts, ratio, text_blocks
from workbench.analysis.resampling import CHUNK, draws, interval
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace


def layer_links(trace: Trace, *, gap: int | None = None, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mutual information between the expert choices of two layers, for all pairs of layers.

    gap  only layers this far apart; None is every pair, L (L − 1) / 2 of them

    Returns one row a layer × later layer: layer, other, gap; mutual_information (nats) with low, high; most,
    normalised; chance; within_text; excess with excess_low, excess_high; n_experts, n_other_experts; n_tokens with
    experts in both layers; n_texts, n_blocks. NaN: all values where no token has experts in both, normalised where
    `most` is 0, intervals where there is only one text.

    InputError for a single MoE layer, and a gap that the trace has no layers for.
    """
    n_layers = trace.n_layers
    if n_layers < 2:
        raise InputError("links between layers take at least two MoE layers; this model has one.")
    if gap is not None and not 1 <= gap < n_layers:
        raise InputError(f"gap is {gap}; this trace has {n_layers} MoE layers, so 1 to {n_layers - 1} is possible.")
    blocks = text_blocks(trace, most_experts(trace) ** 2, seed)
    table = []
    for layer in range(n_layers - 1):
        others = range(layer + 1, n_layers) if gap is None else range(layer + gap, min(layer + gap + 1, n_layers))
        left = trace.experts(layer) if others else np.empty((0, 0), np.uint16)
        for other in others:
            sizes = experts_of(trace, layer), experts_of(trace, other)
            values = link(left, trace.experts(other), sizes, blocks, n_resamples, seed)
            row = {"layer": layer, "other": other, "gap": other - layer, **values, "n_experts": sizes[0]}
            table.append({**row, "n_other_experts": sizes[1], "n_texts": blocks.n_texts, "n_blocks": blocks.n_blocks})
    frame = pd.DataFrame(table)
    frame.insert(len(frame.columns) - 3, "n_tokens", frame.pop("n_tokens"))
    return frame


def link(
    left: np.ndarray,
    right: np.ndarray,
    n_experts: tuple[int, int],
    blocks: Blocks,
    n_resamples: int,
    seed: int,
) -> dict[str, float]:
    """The numbers of one pair of layers."""
    pairs = count_pairs(left, right, *n_experts, blocks)
    shuffled, noise = shuffle_inside(left, right, n_experts, blocks)
    joint = pairs.both.sum(axis=0)
    value = float(nats(joint))
    whole = int(pairs.tokens.sum())
    ends = (np.nan,) * 4
    within = float(nats(shuffled.sum(axis=0))) + noise
    if blocks.n_blocks > 1 and n_resamples > 0:
        seen, null = (resampled(tables, n_resamples, seed) for tables in (pairs.both, shuffled))
        ends = (*interval(seen, np.array(value)), *interval(seen - null, np.array(value - within)))
    most = largest(left, right, joint)
    return {
        "mutual_information": value,
        "low": max(float(ends[0]), 0.0) if np.isfinite(ends[0]) else np.nan,
        "high": float(ends[1]),
        "most": most,
        "normalised": value / most if most > 1e-12 else np.nan,
        "chance": noise_of(pairs.left.sum(axis=0)[None], pairs.right.sum(axis=0)[None], np.array([whole]), joint.sum()),
        "within_text": within,
        "excess": value - within,
        "excess_low": float(ends[2]),
        "excess_high": float(ends[3]),
        "n_tokens": whole,
    }


def shuffle_inside(
    left: np.ndarray, right: np.ndarray, n_experts: tuple[int, int], blocks: Blocks
) -> tuple[np.ndarray, float]:
    """Mean table of pairs after shuffling the tokens of each text, float64 (n_blocks, E, E'), and the nats that the
    noise of a single shuffle adds."""
    lefts, rights, tokens = count_choices(left, right, *n_experts, blocks.text, blocks.n_texts)
    mean = np.zeros((blocks.n_blocks, *n_experts))
    for block in range(blocks.n_blocks):
        of_block = blocks.of_text == block
        mean[block] = lefts[of_block].T @ (rights[of_block] / np.maximum(tokens[of_block], 1)[:, None])
    table = mean.sum(axis=0)
    return mean, noise_of(lefts, rights, tokens, table.sum(), table)


def noise_of(
    lefts: np.ndarray, rights: np.ndarray, tokens: np.ndarray, n_pairs: float, mean: np.ndarray | None = None
) -> float:
    """Nats that shuffling adds to the mutual information of the mean table: Σ var(n_ij) / (2 · mean n_ij · pairs).

    lefts (n_texts, E), rights (n_texts, E'): tokens of each text that chose an expert; tokens (n_texts,)
    """
    movable = tokens > 1
    n = tokens[movable, None]
    a, b = lefts[movable], rights[movable]
    # Matching at random the n tokens of a text: variance n² / (n − 1) · a(1 − a) · b(1 − b), with a and b as shares.
    variance = (a * (1 - a / n)).T @ (b * (1 - b / n) / (n - 1))
    if mean is None:
        mean = lefts.T @ (rights / np.maximum(tokens, 1)[:, None])
    if n_pairs == 0:
        return np.nan
    return float(np.nansum(ratio(variance, mean)) / (2 * n_pairs))


def resampled(tables: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Mutual information of bootstrap resamples of blocks: float64 (n_resamples,)."""
    n_blocks, *shape = tables.shape
    flat = tables.reshape(n_blocks, -1).astype(np.float64)
    drawn = np.concatenate(list(draws(n_blocks, n_resamples, seed)))
    step = max(1, CHUNK // flat.shape[1])
    parts = [nats((drawn[start : start + step] @ flat).reshape(-1, *shape)) for start in range(0, n_resamples, step)]
    return np.concatenate(parts)


def largest(left: np.ndarray, right: np.ndarray, joint: np.ndarray) -> float:
    """The most that the mutual information could be, in nats: the smaller H(layer) − mean log k."""
    k_left, k_right = ((experts != NO_EXPERT).sum(axis=1) for experts in (left, right))
    shape = left.shape[1] + 1, right.shape[1] + 1
    tokens = np.bincount(k_left * shape[1] + k_right, minlength=shape[0] * shape[1]).reshape(shape)
    ks = np.arange(shape[0]), np.arange(shape[1])
    weight = tokens * np.outer(*ks)
    if weight.sum() == 0:
        return np.nan
    logs = [np.log(np.maximum(k, 1)) for k in ks]
    of_left = float(entropy(joint.sum(axis=1))) - (weight.sum(axis=1) @ logs[0]) / weight.sum()
    of_right = float(entropy(joint.sum(axis=0))) - (weight.sum(axis=0) @ logs[1]) / weight.sum()
    return max(min(of_left, of_right), 0.0)


def figure(frame: pd.DataFrame) -> Figure:
    """Two maps of layer × later layer, information and excess; lines by depth where all pairs have the same gap."""
    if frame["gap"].nunique() == 1 and len(frame) > 1:
        result = figures.panels([""], height=260, legend=True)
        figures.line(
            result, frame["layer"], frame["within_text"], name="tokens shuffled inside their texts",
            style=figures.NULL, fill=True,
        )  # fmt: skip
        gap = frame["gap"].iloc[0]
        figures.line(
            result, frame["layer"], frame["mutual_information"], frame["low"], frame["high"],
            name="with the next MoE layer" if gap == 1 else f"with the MoE layer {gap} later",
        )  # fmt: skip
        figures.layer_axes(result, frame["layer"])
        result.update_yaxes(title="mutual information (nats)", rangemode="tozero")
        return result
    titles = {"mutual_information": "mutual information", "excess": "beyond what the text explains"}
    result = figures.panels(list(titles.values()), columns=2, height=380)
    layers, others = sorted(set(frame["layer"])), sorted(set(frame["other"]))
    names = ("mutual_information", "low", "high", "normalised", "within_text", "excess", "excess_low", "excess_high")
    grids = [
        frame.pivot(index="layer", columns="other", values=name).reindex(index=layers, columns=others) for name in names
    ]
    details = np.stack([grid.to_numpy(float) for grid in grids], axis=-1)
    for panel, name in enumerate(titles):
        result.add_trace(
            figures.amounts(
                details[..., names.index(name)],
                x=others,
                y=[str(layer) for layer in layers],
                hover="layers %{y} and %{x}<br>%{customdata[0]:.3f} nats [%{customdata[1]:.3f}, %{customdata[2]:.3f}], "
                "%{customdata[3]:.0%} of the most possible<br>inside texts shuffled %{customdata[4]:.3f}, excess "
                "%{customdata[5]:.3f} [%{customdata[6]:.3f}, %{customdata[7]:.3f}]<extra></extra>",
                details=details,
                panel=panel,
            )
        )
    figures.amount_scale(result, "nats", 0, max(frame["mutual_information"].max(), 1e-9))
    result.update_xaxes(title="later layer", showgrid=False, dtick=max(1, len(others) // 16))
    result.update_yaxes(title="layer", showgrid=False, autorange="reversed", type="category")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The strongest link, and how links fall off with distance, in sentences."""
    if not frame["mutual_information"].notna().any():
        return ["No token used experts in two layers."]
    top = frame.iloc[frame["mutual_information"].argmax()]
    sentences = [
        f"Layers {top['layer']:.0f} and {top['other']:.0f} are linked most: {top['mutual_information']:.2f} nats, "
        f"{top['normalised']:.0%} of the most their loads allow; {top['within_text']:.2f} of them remain when the "
        "tokens are shuffled inside their texts."
    ]
    by_gap = frame.groupby("gap")["mutual_information"].mean()
    if len(by_gap) > 1:
        sentences.append(
            f"On average {by_gap.iloc[0]:.2f} nats between neighbours and {by_gap.iloc[-1]:.2f} between layers "
            f"{by_gap.index[-1]} apart."
        )
    clear = (frame["excess_low"] > 0).sum()
    if frame["excess_low"].notna().any():
        sentences.append(f"The token itself adds to what its text explains in {clear} of {len(frame)} pairs of layers.")
    return sentences
