"""Whether a cache of experts is worth it: tokens a second by capacity, as a stated model and not a measurement.

All experts lie in slow memory (host memory, say); a cache of C experts a layer lies in fast memory. Of each policy and
capacity, `cache` gives the hit rate on this trace. Then, of one token:

- **loads** = Σ over layers of accesses a token · (1 − hit rate): what has to be brought.
- **transfer** = loads · (bytes of an expert / `bandwidth` + `latency_us`).
- **compute**: `compute_ms`; or, where that isn't given, the bytes a token reads / `memory_bandwidth`, since decoding
  one token at a time waits for weights. These bytes are the experts it uses and, where the model is at hand, the rest
  of its active parameters (attention, embeddings, …); attention over a long context isn't in it.
- **time** = compute + transfer − min(transfer, `overlap` · compute): the part of the compute time behind which
  transfers hide. 0 means that they never do, 1 that a perfect prefetcher has them running all the time.
- **tokens a second** = 1 / time. Without a cache every access is a load; with everything resident none is.

Bytes of an expert are `bytes_per_expert`; or 3 · `hidden` · `intermediate` · `bytes_per_parameter` (gate, up and down
projection); or, with neither given, what the traced model says of itself. A first touch is a load. With `batch` > 1,
texts in lockstep share what they load, and a compute time that isn't given is shared likewise.

Defaults: 25 GB/s and 10 µs (PCIe 4 ×16 in practice), 1,000 GB/s (a graphics card's memory), no overlap, bfloat16.

A capacity is **worth it** (column `worth`) if it is the policy's smallest that gives at least `target` times the speed
of everything resident, while holding less than everything. The interval is that of the hit rate.

Source: ours.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.cache import REAL, STYLES, cache
from workbench.errors import InputError
from workbench.tracefile import Trace

GIGA = 1e9
MATRICES = 3
"""Of a gated expert: gate, up and down projection."""


def cache_speed(
    trace: Trace,
    *,
    policies: tuple[str, ...] = ("static-held-out", "lru", "window", "belady"),
    bytes_per_expert: float | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    bytes_per_parameter: float = 2.0,
    bandwidth: float = 25.0,
    latency_us: float = 10.0,
    compute_ms: float | None = None,
    memory_bandwidth: float = 1000.0,
    overlap: float = 0.0,
    memory_gb: float | None = None,
    target: float = 0.5,
    access: str = "token",
    scope: str = "layer",
    batch: int = 1,
    keep: bool = True,
    window: int = 64,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Tokens a second by policy and capacity.

    bytes_per_expert, hidden, intermediate, bytes_per_parameter   size of an expert, see above; hidden and intermediate
        are the width of the model and of one expert
    bandwidth, memory_bandwidth   GB/s (10⁹ bytes) of the link, and of the fast memory
    latency_us   microseconds that each transfer adds; compute_ms  milliseconds of compute a token; overlap  0 to 1
    memory_gb    fast memory there is for experts: the column `fits` says what goes into it
    target       part of the speed of everything resident that makes a cache worth it, above 0 to 1
    policies, access, scope, batch, keep, window   as in `cache`

    Returns one row a policy × capacity: policy, capacity (experts a layer; in all with scope="global"), n_experts (the
    same for everything); hit_rate with low, high; loads (a token), memory_gb (of the cache), transfer_ms, compute_ms;
    tokens_per_second with speed_low, speed_high; speedup (over no cache), of_resident (part of the speed of everything
    resident); worth, fits (bool); scope, accesses (a token), bytes_per_expert, bandwidth, latency_us, overlap, target,
    batch, n_tokens, n_texts. NaN where `cache` has no hit rate.
    """
    check_hardware(
        bytes_per_expert=bytes_per_expert, hidden=hidden, intermediate=intermediate,
        bytes_per_parameter=bytes_per_parameter, bandwidth=bandwidth, memory_bandwidth=memory_bandwidth,
        memory_gb=memory_gb, target=target, latency_us=latency_us, compute_ms=compute_ms, overlap=overlap,
    )  # fmt: skip
    size, rest = sizes(trace, bytes_per_expert, hidden, intermediate, bytes_per_parameter, compute_ms is None)
    found = cache(
        trace, policies=policies, access=access, scope=scope, batch=batch, keep=keep, window=window,
        n_resamples=n_resamples, seed=seed,
    )  # fmt: skip
    return speeds(
        found, trace.layers["n_experts"].tolist(), bytes_per_expert=size, other_bytes=rest, bandwidth=bandwidth,
        latency_us=latency_us, compute_ms=compute_ms, memory_bandwidth=memory_bandwidth, overlap=overlap,
        memory_gb=memory_gb, target=target,
    )  # fmt: skip


def speeds(
    found: pd.DataFrame,
    n_experts: Sequence[int],
    *,
    bytes_per_expert: float,
    other_bytes: float = 0.0,
    bandwidth: float = 25.0,
    latency_us: float = 10.0,
    compute_ms: float | None = None,
    memory_bandwidth: float = 1000.0,
    overlap: float = 0.0,
    memory_gb: float | None = None,
    target: float = 0.5,
) -> pd.DataFrame:
    """What the hit rates of a table of `cache` mean in tokens a second: arithmetic, the trace isn't read.

    found        what `cache` returned; its rows of all layers together count
    n_experts    of each layer
    bytes_per_expert, other_bytes   bytes of an expert, and of the other parameters that a token reads
    The other options, and the columns: as in `cache_speed`. InputError for a number that is out of range.
    """
    check_hardware(
        bytes_per_expert=bytes_per_expert, bandwidth=bandwidth, memory_bandwidth=memory_bandwidth, memory_gb=memory_gb,
        target=target, latency_us=latency_us, compute_ms=compute_ms, overlap=overlap, other_bytes=other_bytes,
    )  # fmt: skip
    found = found[found["layer"].isna()].reset_index(drop=True)
    accesses = found["accesses"].to_numpy(float) / np.maximum(found["n_tokens"].to_numpy(), 1)
    rate, low, high = (found[name].to_numpy(float) for name in ("hit_rate", "low", "high"))
    size, batch, scope = float(bytes_per_expert), int(found["batch"].iloc[0]), str(found["scope"].iloc[0])
    if compute_ms is None:
        compute = (accesses * size + other_bytes / batch) / (memory_bandwidth * GIGA) * 1e3
    else:
        compute = np.full(len(found), float(compute_ms))
    each = (size / (bandwidth * GIGA) + latency_us * 1e-6) * 1e3  # milliseconds a load

    def speed(loads: np.ndarray) -> np.ndarray:
        transfer = loads * each
        with np.errstate(divide="ignore"):  # where nothing takes any time
            return 1e3 / (compute + transfer - np.minimum(transfer, overlap * compute))

    loads = accesses * (1 - rate)
    resident, without = speed(0 * accesses), speed(accesses)
    held = found["capacity"].to_numpy()
    if scope != "global":  # a layer with fewer experts than that holds them all
        held = sum((np.minimum(held, n) for n in n_experts), 0 * held)
    frame = pd.DataFrame(
        {
            "policy": found["policy"], "capacity": found["capacity"], "n_experts": found["n_experts"],
            "hit_rate": rate, "low": low, "high": high,
            "loads": loads, "memory_gb": held * size / GIGA, "transfer_ms": loads * each, "compute_ms": compute,
            "tokens_per_second": speed(loads), "speed_low": speed(accesses * (1 - low)),
            "speed_high": speed(accesses * (1 - high)),
        }
    )  # fmt: skip
    frame["speedup"] = frame["tokens_per_second"] / without
    frame["of_resident"] = (frame["tokens_per_second"] / resident).where(np.isfinite(resident))
    enough = frame[(frame["of_resident"] >= target) & (frame["capacity"] < frame["n_experts"])]
    frame["worth"] = frame.index.isin(enough.groupby("policy")["capacity"].idxmin())
    frame["fits"] = True if memory_gb is None else frame["memory_gb"] <= memory_gb
    return frame.assign(
        scope="global" if scope == "global" else "layer", accesses=accesses, bytes_per_expert=size,
        bandwidth=float(bandwidth), latency_us=float(latency_us), overlap=float(overlap), target=float(target),
        batch=batch, n_tokens=found["n_tokens"], n_texts=found["n_texts"],
    )  # fmt: skip


def what_if(frame: pd.DataFrame, policy: str, capacity: int) -> dict[str, float]:
    """One cache of a table of `speeds`, beside everything resident and no cache at all.

    Returns the row's hit_rate, low, high, loads, memory_gb, transfer_ms, compute_ms, tokens_per_second, speed_low,
    speed_high, speedup and of_resident, and resident, without: tokens a second with everything resident and without a
    cache (NaN where the row has no hit rate). InputError where the table has no such policy or capacity.
    """
    rows = frame[frame["policy"] == policy]
    if rows.empty:
        raise InputError(f"policy is {policy!r}; the table has {', '.join(frame['policy'].unique())}.")
    rows = rows[rows["capacity"] == capacity]
    if rows.empty:
        known = frame["capacity"]
        raise InputError(f"capacity is {capacity}; the table has {known.min()} to {known.max()}.")
    row = rows.iloc[0]
    names = (
        "hit_rate", "low", "high", "loads", "memory_gb", "transfer_ms", "compute_ms", "tokens_per_second", "speed_low",
        "speed_high", "speedup", "of_resident",
    )  # fmt: skip
    speed = float(row["tokens_per_second"])
    ends = {"resident": speed / row["of_resident"], "without": speed / row["speedup"]}
    return {name: float(value) for name, value in ({name: row[name] for name in names} | ends).items()}


def check_hardware(**given: float | None) -> None:
    """Refuse numbers that hardware and models don't have; None is not given."""
    for name, value in given.items():
        above = name not in ("latency_us", "compute_ms", "overlap", "other_bytes")
        if value is not None and not (value > 0 or (value == 0 and not above)):
            raise InputError(f"{name} is {value}; expected a number {'above' if above else 'of at least'} 0.")
    for name in ("overlap", "target"):
        if (value := given[name]) is not None and value > 1:
            raise InputError(f"{name} is {value}; expected at most 1.")


def sizes(
    trace: Trace, bytes_per_expert: float | None, hidden: int | None, intermediate: int | None,
    bytes_per_parameter: float, with_rest: bool,
) -> tuple[float, float]:  # fmt: skip
    """Bytes of an expert, and of the other parameters that a token reads (0 where the model isn't asked)."""
    if bytes_per_expert is not None:
        return float(bytes_per_expert), 0.0
    if hidden is not None and intermediate is not None:
        return float(MATRICES * hidden * intermediate * bytes_per_parameter), 0.0
    runs = trace.runs()
    model, revision = runs.loc[runs["run"] == trace.run, ["model", "revision"]].iloc[0]
    ask = "give hidden= and intermediate= (the width of the model and of one expert), or bytes_per_expert="
    if hidden is not None or intermediate is not None or not isinstance(model, str):
        raise InputError(f"the size of an expert isn't known: {ask}.")
    from workbench.models import describe

    try:
        facts = describe(model, revision=revision if isinstance(revision, str) else None, local=True)
    except InputError as error:
        raise InputError(f"the size of an expert of {model!r} isn't known ({error}): {ask}.") from None
    each, rest = parameters(facts, trace.layers)
    return each * bytes_per_parameter, rest * bytes_per_parameter if with_rest else 0.0


def parameters(facts: Mapping[Any, Any], layers: pd.DataFrame) -> tuple[float, float]:
    """Parameters of an expert, and the others that a token reads.

    facts   of `workbench.models.describe`: expert_parameters (of all experts) and active_parameters
    layers  of the trace: n_experts and top_k of each
    """
    each = facts["expert_parameters"] / max(int(layers["n_experts"].sum()), 1)
    return each, max(facts["active_parameters"] - each * int(layers["top_k"].sum()), 0.0)


def figure(frame: pd.DataFrame) -> Figure:
    """Tokens a second by the memory of the cache, a line a policy, between no cache and everything resident."""
    scale, unit = memory_unit(frame["memory_gb"].max())
    result = figures.panels([""], height=340, legend=True)
    reach = [0, frame["memory_gb"].max() * scale]
    resident = frame["tokens_per_second"] / frame["of_resident"]
    none = frame["tokens_per_second"] / frame["speedup"]
    for name, speed, dash in (("everything resident", resident, "dash"), ("no cache", none, "dot")):
        known = speed[np.isfinite(speed)]
        if len(known):
            figures.line(
                result, reach, [known.iloc[0]] * 2, name=name, style=figures.Style(figures.NULL.colour, dash, 1.5),
                x_name=unit,
            )  # fmt: skip
    result.update_traces(mode="lines")
    for policy, part in frame.groupby("policy", sort=False):
        part = part[np.isfinite(part["tokens_per_second"])]
        style = STYLES[str(policy)]
        result.add_scatter(
            x=part["memory_gb"] * scale, y=part["tokens_per_second"], name=figures.plain(policy), mode="lines",
            line={"color": style.colour, "dash": style.dash, "width": style.width},
            customdata=np.column_stack([part[name] for name in DETAILS]),
            hovertemplate="%{fullData.name}, %{customdata[0]:.0f} experts, %{x:.3g} " + unit + "<br>%{y:.4g} tokens/s "
            "[%{customdata[1]:.4g}, %{customdata[2]:.4g}]<br>hit rate %{customdata[3]:.1%}, "
            "%{customdata[4]:.1f} loads a token<br>%{customdata[5]:.1f} × no cache, %{customdata[6]:.0%} of everything "
            "resident<extra></extra>",
        )  # fmt: skip
        best = part[part["worth"]]
        result.add_scatter(
            x=best["memory_gb"] * scale, y=best["tokens_per_second"], mode="markers", hoverinfo="skip",
            showlegend=False,
            marker={"size": 9, "symbol": "circle-open", "color": style.colour, "line": {"width": 1.5}},
        )  # fmt: skip
    result.update_xaxes(title=f"memory of the cache ({unit})", rangemode="tozero")
    result.update_yaxes(title="tokens a second (modelled)", rangemode="tozero")
    return result


DETAILS = ("capacity", "speed_low", "speed_high", "hit_rate", "loads", "speedup", "of_resident")


def memory_unit(gigabytes: float) -> tuple[float, str]:
    """The unit in which an amount reads best, and its number in a gigabyte."""
    return (1.0, "GB") if not gigabytes < 1 else (1e3, "MB")


def amount(gigabytes: float) -> str:
    scale, unit = memory_unit(gigabytes)
    return f"{gigabytes * scale:.3g} {unit}"


def rounded(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{number:.3g}'):,.6g}"


def marked(frame: pd.DataFrame, policy: str, capacity: int) -> Figure:
    """The figure, with a diamond on one cache: a policy and a capacity."""
    result = figure(frame)
    row = frame[(frame["policy"] == policy) & (frame["capacity"] == capacity)]
    result.add_scatter(
        x=row["memory_gb"] * memory_unit(frame["memory_gb"].max())[0], y=row["tokens_per_second"], mode="markers",
        name="this cache", hoverinfo="skip",
        marker={"size": 13, "symbol": "diamond", "color": STYLES[policy].colour,
                "line": {"width": 2, "color": figures.INK}},
    )  # fmt: skip
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """Which capacity is worth it, what fits, and what all this assumes, in sentences."""
    known = frame[np.isfinite(frame["tokens_per_second"])]
    if known.empty or not frame["accesses"].max() > 0:
        return ["No token used any expert, or no cache holds what an event needs: there is no speed to tell."]
    real = known[known["policy"].isin(REAL)]
    real = known if real.empty else real
    target, all_of_it = known["target"].iloc[0], known["memory_gb"].max()
    layers = "of all layers" if known["scope"].iloc[0] == "global" else "a layer"
    worth = real[real["worth"]].sort_values(["capacity", "tokens_per_second"], ascending=[True, False])
    sentences = []
    if len(worth):
        row = worth.iloc[0]
        sentences.append(
            f"The smallest cache with at least {target:.0%} of the speed of everything resident holds "
            f"{row['capacity']} of {row['n_experts']} experts {layers} ({amount(row['memory_gb'])} of "
            f"{amount(all_of_it)}) with {row['policy']}: {rounded(row['tokens_per_second'])} tokens/s, "
            f"{row['speedup']:.1f} times no cache."
        )
    else:
        most = real[real["capacity"] < real["n_experts"]].sort_values("tokens_per_second")
        gets = ""
        if len(most):
            row = most.iloc[-1]
            gets = (
                f": {row['capacity']} of {row['n_experts']} experts {layers} with {row['policy']} give "
                f"{row['of_resident']:.0%}, {row['speedup']:.1f} times no cache"
            )
        sentences.append(
            f"No cache smaller than the model reaches {target:.0%} of the speed of everything resident{gets}."
        )
    if not frame["fits"].all():
        inside = real[real["fits"]].sort_values("tokens_per_second")
        if len(inside):
            row = inside.iloc[-1]
            sentences.append(
                f"In the memory given, {row['policy']} with {row['capacity']} experts {layers} "
                f"({amount(row['memory_gb'])}) is fastest: {rounded(row['tokens_per_second'])} tokens/s, "
                f"{row['of_resident']:.0%} of everything resident."
            )
        else:
            sentences.append("Nothing that holds what a token needs fits in the memory given.")
    row = known.iloc[0]
    sentences.append(
        f"A model, not a measurement: {row['bytes_per_expert'] / 1e6:.3g} MB an expert, {row['bandwidth']:g} GB/s and "
        f"{row['latency_us']:g} µs a load, {row['compute_ms']:.3g} ms of compute a token, {row['overlap']:.0%} of it "
        "overlapped with transfers."
    )
    return sentences
