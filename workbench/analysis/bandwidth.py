"""How many experts a batch touches, and what reading them costs: the sparse bandwidth model of MoE-CAP.

Decoding is bound by reading weights: an expert is read once for a batch, however many of its tokens use it.

- **activated** A(B): mean number of distinct experts of a layer that a batch of B tokens uses, k to E. **uniform** is
  what it would be if every token drew k different experts evenly, E · (1 − (1 − k/E)^B); **independent** if tokens
  drew with the loads of the trace but independently of each other, Σ_e (1 − (1 − r_e)^B), r_e the share of tokens
  that use e. Less than `independent` means that the tokens of a batch go to the same experts.
- **step bytes** = (Σ_layers (A · S_expert + S_attention) + S_other) · bytes a parameter + B · KV bytes of a text,
  with S_expert = 3 · hidden · intermediate (gate, up and down).
- **TPOT bound** = step bytes / (devices · peak bandwidth): no step takes less.
- **S-MBU** = TPOT bound / TPOT measured, 0 to 1 (Fu et al. 2025, MoE-CAP, arXiv:2412.07067).
- **S-MFU** = B / TPOT · (2 · (Σ_layers (S_attention + k · S_expert) + S_other) + attention FLOPs) / (devices · peak
  FLOP/s). Their code counts S_expert once and not k times in S-MFU, and divides by half the peak; here a token's k
  experts count, and the peak is as given.

Batches are formed from the texts as `decode` (one token of each of B texts in lockstep, the default, which the model
is about) or `prefill` (consecutive tokens); MoE-CAP takes them from a running engine. Intervals cover 95% of
bootstrap resamples of texts, in at most 64 random blocks. Bytes, bounds and utilisations are a model, not a
measurement.
"""

import math

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.batches import batches, block_weights, check, mean_of, stream
from workbench.analysis.counting import add_choices, experts_of
from workbench.errors import InputError
from workbench.tracefile import Trace


def bandwidth(
    trace: Trace,
    *,
    batch_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128),
    batching: str = "decode",
    hidden: int | None = None,
    intermediate: int | None = None,
    bytes_per_parameter: float = 2.0,
    attention_parameters: float = 0.0,
    other_parameters: float = 0.0,
    kv_bytes: float = 0.0,
    attention_flops: float = 0.0,
    n_devices: int = 1,
    peak_bandwidth: float | None = None,
    peak_flops: float | None = None,
    tpot: tuple[float, ...] | None = None,
    n_batches: int = 1000,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Experts touched by batches of each size, and what follows for given hardware.

    batch_tokens          batch sizes B
    batching              "decode" or "prefill"
    hidden, intermediate  sizes of the model and of one expert; without them there are no bytes
    bytes_per_parameter   2 for bf16
    attention_parameters  of one layer; other_parameters: all else read in a step (shared experts, dense layers, head)
    kv_bytes              keys and values of one text of the batch, all layers
    attention_flops       of one token: scores and sums over the context
    n_devices             that the experts are spread over
    peak_bandwidth        GB/s of a device; peak_flops: TFLOP/s of a device
    tpot                  measured ms a step, one for each of batch_tokens
    n_batches             batches of each size, at most, spread evenly over the texts

    Returns one row a batch size × layer, layer missing for all layers together: batch_tokens, layer; activated with
    low, high; share = activated / E; uniform, independent; expert_bytes; step_bytes, tpot_bound (ms), tpot (ms), s_mbu,
    s_mfu (all layers together only); batching, n_experts, top_k; n_batches, n_tokens in them, n_texts. All layers
    together have the mean of the counts and the sum of the bytes. NaN: what wasn't given, where no batch could be
    filled, intervals where the texts give fewer than eight blocks.
    """
    check(batch_tokens, batching, n_batches)
    sizes = dict.fromkeys(batch_tokens)
    given = {
        "hidden": hidden, "intermediate": intermediate, "bytes_per_parameter": bytes_per_parameter,
        "n_devices": n_devices, "peak_bandwidth": peak_bandwidth, "peak_flops": peak_flops,
    }  # fmt: skip
    check_hardware(given, batch_tokens, tpot)
    expert = math.nan if hidden is None or intermediate is None else 3.0 * hidden * intermediate
    tokens = stream(trace, seed)
    formed = {size: batches(tokens, size, batching, n_batches) for size in sizes}
    weights = {size: block_weights(made, n_resamples, seed) for size, made in formed.items()}
    distinct: dict[int, list[np.ndarray]] = {size: [] for size in sizes}
    expected: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for layer in range(trace.n_layers):
        experts = trace.experts(layer)
        rates = np.zeros((1, experts_of(trace, layer)))
        add_choices(experts, np.zeros(len(experts), np.int64), rates)
        rate = rates[0] / max(len(experts), 1)
        for size, made in formed.items():
            distinct[size].append(touched(experts, made.tokens, len(rate)))
            expected[size].append((len(rate) * (1 - (1 - rate.mean()) ** size), (1 - (1 - rate) ** size).sum()))

    rows = []
    numbers = [experts_of(trace, layer) for layer in range(trace.n_layers)]
    ks = [int(k) for k in trace.layers["top_k"]]
    for size, made in formed.items():
        each = [*distinct[size], np.mean(distinct[size], axis=0)]
        chances = [*expected[size], tuple(np.mean(expected[size], axis=0))]
        for place, (values, (uniform, independent)) in enumerate(zip(each, chances, strict=True)):
            whole = place == len(distinct[size])
            mean, low, high = mean_of(values, weights[size])
            n_experts = float(np.mean(numbers)) if whole else float(numbers[place])
            row = {
                "batch_tokens": size, "layer": None if whole else place, "activated": mean, "low": low, "high": high,
                "share": mean / n_experts, "uniform": uniform, "independent": independent,
                "expert_bytes": mean * expert * bytes_per_parameter * (len(numbers) if whole else 1),
                "n_experts": n_experts, "top_k": float(np.mean(ks)) if whole else float(ks[place]),
                "n_batches": len(made.tokens),
            }  # fmt: skip
            rows.append(row)
    frame = pd.DataFrame(rows)
    frame["layer"] = frame["layer"].astype("Int64")
    whole = frame["layer"].isna()
    size = frame["batch_tokens"]
    attention = attention_parameters * len(numbers)
    fixed = (attention + other_parameters) * bytes_per_parameter
    frame["step_bytes"] = (frame["expert_bytes"] + fixed + size * kv_bytes).where(whole)
    speed = math.nan if peak_bandwidth is None else n_devices * peak_bandwidth * 1e9
    frame["tpot_bound"] = frame["step_bytes"] / speed * 1e3
    measured = dict(zip(batch_tokens, tpot, strict=True)) if tpot else {}
    frame["tpot"] = size.map(measured).astype(float).where(whole)
    frame["s_mbu"] = frame["tpot_bound"] / frame["tpot"]
    flops = 2 * (attention + sum(ks) * expert + other_parameters) + attention_flops
    peak = math.nan if peak_flops is None else n_devices * peak_flops * 1e12
    frame["s_mfu"] = size / (frame["tpot"] / 1e3) * flops / peak
    frame = frame.assign(batching=batching, n_tokens=frame["n_batches"] * size, n_texts=tokens.n_texts)
    columns = ["batch_tokens", "layer", "activated", "low", "high", "share", "uniform", "independent", "expert_bytes"]
    columns += ["step_bytes", "tpot_bound", "tpot", "s_mbu", "s_mfu", "batching", "n_experts", "top_k"]
    return frame[[*columns, "n_batches", "n_tokens", "n_texts"]]


def check_hardware(
    given: dict[str, float | None], batch_tokens: tuple[int, ...], tpot: tuple[float, ...] | None
) -> None:
    """Refuse numbers that can't be."""
    for name, value in given.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name} is {value}; expected a number above 0.")
    if (given["hidden"] is None) != (given["intermediate"] is None):
        missing = "hidden" if given["hidden"] is None else "intermediate"
        raise InputError(f"{missing} is missing: the size of an expert takes both hidden and intermediate.")
    for name in ("peak_bandwidth", "peak_flops"):
        if given[name] is not None and given["hidden"] is None:
            raise InputError(f"{name} says nothing without hidden and intermediate, the sizes of the model.")
    if tpot is not None and (len(tpot) != len(batch_tokens) or min(tpot) <= 0):
        raise InputError(
            f"tpot is {tpot}; expected {len(batch_tokens)} numbers above 0, ms a step for each of the batch sizes "
            f"{', '.join(map(str, batch_tokens))}."
        )
    if tpot is not None and given["peak_bandwidth"] is None and given["peak_flops"] is None:
        raise InputError("tpot is compared with peak_bandwidth (GB/s) or peak_flops (TFLOP/s); give one of them.")


def touched(experts: np.ndarray, tokens: np.ndarray, n_experts: int) -> np.ndarray:
    """Distinct experts of each batch: float64 (n_batches,)."""
    n_batches, size = tokens.shape
    loads = np.zeros((n_batches, n_experts))
    add_choices(experts[tokens.ravel()], np.repeat(np.arange(n_batches), size), loads)
    return (loads > 0).sum(axis=1).astype(np.float64)


def figure(frame: pd.DataFrame) -> Figure:
    """The share of experts touched, by batch size against both expectations, and by layer."""
    result = figures.panels(
        ["experts that a batch touches, mean over layers", "the same by layer"], columns=2, height=300, legend=True
    )
    whole = frame[frame["layer"].isna()]
    n = whole["n_experts"]
    names = {"uniform": "uniform routing", "independent": "independent tokens"}
    looks = {"uniform": figures.CONTEXT, "independent": figures.NULL}
    for name in names:
        figures.line(
            result, whole["batch_tokens"], whole[name] / n, name=names[name], style=looks[name],
            x_name="tokens a batch",
        )  # fmt: skip
    figures.line(
        result, whole["batch_tokens"], whole["share"], whole["low"] / n, whole["high"] / n, name="measured",
        x_name="tokens a batch",
    )  # fmt: skip
    each = frame[frame["layer"].notna()]
    for place, size in enumerate(figures.spread(frame["batch_tokens"], figures.MOST_BANDS)):
        rows = each[each["batch_tokens"] == size]
        colour = figures.COLOURS[(place + 1) % len(figures.COLOURS)]  # the first is that of what was measured
        figures.line(
            result, rows["layer"].astype(int), rows["share"], rows["low"] / rows["n_experts"],
            rows["high"] / rows["n_experts"], name=f"{size:,} tokens" if size > 1 else "1 token",
            style=figures.Style(colour), panel=1,
        )  # fmt: skip
    figures.layer_axes(result, each["layer"].astype(int))
    sizes = sorted(whole["batch_tokens"].unique())
    result.update_layout(
        xaxis={"type": "log", "title": {"text": "tokens a batch"}, "tickmode": "array", "tickvals": sizes,
               "ticktext": [f"{size:,}" for size in sizes], "range": None, "autorange": True},
    )  # fmt: skip
    result.update_yaxes(tickformat=".0%", rangemode="tozero")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How many experts a batch touches, and what a step costs, in sentences."""
    whole = frame[frame["layer"].isna() & frame["activated"].notna()]
    if whole.empty:
        return ["The trace has too few tokens for a batch of these sizes."]
    # The size at which touching few or all experts makes most difference.
    row = whole.loc[(whole["share"] - 0.5).abs().idxmin()]
    sentences = [
        f"A batch of {row['batch_tokens']:,} tokens touches {row['activated']:.1f} of {row['n_experts']:.0f} experts a "
        f"layer ({row['share']:.0%}); {row['independent']:.1f} would be touched by independent tokens with the same "
        f"loads, {row['uniform']:.1f} by uniform routing."
    ]
    last = whole.iloc[-1]
    if np.isfinite(last["step_bytes"]):
        text = f"A step of {last['batch_tokens']:,} tokens reads {last['step_bytes'] / 1e9:.2f} GB"
        if np.isfinite(last["tpot_bound"]):
            text += f", which takes at least {last['tpot_bound']:.2f} ms"
        if np.isfinite(last["s_mbu"]):
            text += f"; it took {last['tpot']:.2f} ms, an S-MBU of {last['s_mbu']:.0%}"
        sentences.append(text + ".")
    return sentences
