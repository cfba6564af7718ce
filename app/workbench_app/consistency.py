"""Consistency and cache: does a text stay with its experts, and what is a cache of experts worth on given hardware?"""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from workbench import questions
from workbench.analysis.cache import REAL
from workbench.analysis.cache_speed import amount, marked, parameters, rounded, speeds
from workbench.analysis.cache_speed import what_if as answer_of
from workbench.background import Answer, Asked
from workbench.errors import InputError, RunError
from workbench_app import messages, panel, view
from workbench_app.topics import Topic, sequences, show

POLICIES = (*REAL, "belady")
"""What the what-if offers: policies that can be followed, and the best there could be."""
SAID = {
    "static-held-out": "static: the most used experts of other texts",
    "lru": "LRU: evicts the least recently used",
    "lfu": "LFU: evicts the least often used",
    "aged-lfu": "aged LFU: the same, and counts fade",
    "window": "window: evicts the least used of late",
    "belady": "Belady: knows the future, the best there is",
}
GUESS = 20.0
"""Megabytes of an expert where the model isn't at hand to be asked."""
KEY = "consistency-what-if"


def what_if() -> None:
    """A cache of one policy and capacity on given hardware: everything but the texts at a time is arithmetic."""
    with messages.guarded():
        with st.container(horizontal=True, vertical_alignment="center"):
            st.subheader("What would a cache of experts give?", anchor=False, width="stretch")
            panel.definition(panel.analyses.file("cache_speed").__doc__ or "")
        controls, answers = st.columns([1, 2], gap="large")
        with controls:
            upper, lower = st.container(), st.container()
        with lower:
            batch, keep = access()
        asked = panel.asking("cache", {"policies": POLICIES, "batch": batch, "keep": keep})
        with answers:
            described = sizes()
            answer = panel.finished(asked, KEY)
        if described is None or answer is None:
            return
        found = answer.table()
        with upper:
            policy, capacity = one_cache(found)
            given = hardware(*said(described))
        frame = priced(asked, found, tuple(view.whole().layers["n_experts"]), **given)
        with answers:
            numbers(answer_of(frame, policy, capacity), capacity, int(frame["n_experts"].iloc[0]))
            panel.figure(drawn(frame, policy, capacity), "what-if")
        panel.table(frame, "what-if", column_order=[name for name in frame.columns if name not in given])


def access() -> tuple[int, bool]:
    """Texts that advance together, and whether the cache lives on: what takes a new simulation."""
    st.caption("What takes a new simulation:")
    batch = st.number_input(
        "Texts at a time", 1, 256, 1, key="consistency_batch", bind="query-params",
        help="Texts that advance together, one token each, and share what they load.",
    )  # fmt: skip
    keep = st.toggle(
        "The cache lives on from text to text", True, key="consistency_keep", bind="query-params",
        help="Otherwise it begins empty with every text.",
    )  # fmt: skip
    return int(batch), keep


def one_cache(found: pd.DataFrame) -> tuple[str, int]:
    """The policy and the capacity that are looked at."""
    policy = st.selectbox(
        "Policy", POLICIES, POLICIES.index("lru"), key="consistency_policy", bind="query-params",
        format_func=SAID.__getitem__,
    )  # fmt: skip
    most = int(found["n_experts"].max())
    capacity = st.slider(
        "Experts in the cache, of each layer", 1, max(most, 2), max(most // 2, 1), key="consistency_capacity",
        bind="query-params",
    )  # fmt: skip
    return policy, min(capacity, most)


def hardware(known: float | None, others: float) -> dict[str, Any]:
    """What the machine can do, and how large an expert is.

    known   megabytes of an expert as the model says, None where it can't be asked
    others  bytes of the other parameters that a token reads
    """
    bandwidth = st.number_input(
        "Link, GB/s", 0.1, 10_000.0, 25.0, key="consistency_bandwidth", bind="query-params",
        help="Between the memory that holds all experts and the cache: 25 is PCIe 4 ×16 in practice, 5 a good SSD.",
    )  # fmt: skip
    latency = st.number_input(
        "Latency, µs a load", 0.0, 1e6, 10.0, key="consistency_latency", bind="query-params",
        help="What every transfer of an expert adds.",
    )  # fmt: skip
    size = st.number_input(
        "An expert, MB", 1e-6, 1e6, known or GUESS, format="%.4g", key="consistency_size", bind="query-params",
        help=("As the model says, in bfloat16." if known else "The model isn't at hand to be asked.")
        + " For others: 3 · width of the model · width of an expert · bytes a parameter.",
    )  # fmt: skip
    memory = st.number_input(
        "Fast memory, GB/s", 1.0, 100_000.0, 1000.0, key="consistency_memory", bind="query-params",
        help="What decoding waits for where no compute time is given: the bytes that a token reads.",
    )  # fmt: skip
    compute = st.number_input(
        "Compute, ms a token", 0.0, 1e6, None, key="consistency_compute", bind="query-params",
        placeholder="from the memory", help="Empty: the bytes that a token reads, at the speed of the fast memory.",
    )  # fmt: skip
    overlap = st.slider(
        "Overlap", 0.0, 1.0, 0.0, key="consistency_overlap", bind="query-params",
        help="The part of the compute time behind which transfers hide: 0 never, 1 with a perfect prefetcher.",
    )  # fmt: skip
    return {
        "bytes_per_expert": size * 1e6,
        "other_bytes": others if compute is None else 0.0,
        "bandwidth": bandwidth,
        "latency_us": latency,
        "memory_bandwidth": memory,
        "compute_ms": compute,
        "overlap": overlap,
    }


def sizes() -> Answer | None:
    """What the model says of itself, asked in the background; None while it isn't there."""
    facts = view.runs()[view.run()]
    revision = (("revision", facts["revision"]),) if facts["revision"] else ()
    return panel.finished(Asked("describe", revision, model=str(facts["model"])), f"{KEY}-size")


def said(answer: Answer) -> tuple[float | None, float]:
    """Megabytes of an expert in bfloat16 (None: not known), and bytes of the other parameters that a token reads."""
    try:
        each, rest = parameters(answer.table().to_dict("records")[0], view.whole().layers)
    except (InputError, RunError):
        return None, 0.0
    return each * 2 / 1e6, rest * 2


@st.cache_data(max_entries=64, show_spinner=False, hash_funcs={Asked: repr})
def priced(asked: Asked, _found: pd.DataFrame, n_experts: tuple[int, ...], **given: Any) -> pd.DataFrame:
    """`workbench.analysis.cache_speed.speeds` of an answer."""
    return speeds(_found, n_experts, **given)


def numbers(found: dict[str, float], capacity: int, n_experts: int) -> None:
    """The answer as numbers, with their intervals."""
    if found["hit_rate"] != found["hit_rate"]:
        st.warning(
            "A cache this small can't hold what one token needs at once: make it larger.", icon=":material/info:"
        )
        return
    first, second, third, fourth = st.columns(4)
    first.metric(
        "Hit rate", f"{found['hit_rate']:.1%}", help="Of the experts that tokens need, those found in the cache."
    )
    first.caption(between(found["low"], found["high"], ".1%") or f"{capacity / n_experts:.0%} by even routing")
    second.metric("Tokens a second", rounded(found["tokens_per_second"]), help="A model, not a measurement.")
    second.caption(between(found["speed_low"], found["speed_high"], ",.0f" if found["speed_low"] > 100 else ".3g"))
    third.metric("Of full speed", f"{found['of_resident']:.1%}", help="Of the speed with everything resident.")
    third.caption(f"{rounded(found['resident'])} tokens/s with all {n_experts} experts a layer in fast memory")
    fourth.metric("Against no cache", f"{found['speedup']:.2f} ×")
    fourth.caption(f"{rounded(found['without'])} tokens/s where every expert is loaded")
    st.caption(
        f"{amount(found['memory_gb'])} of fast memory hold {capacity} of {n_experts} experts a layer. A token waits "
        f"for {found['loads']:.3g} experts: {found['transfer_ms']:.3g} ms beside {found['compute_ms']:.3g} ms of "
        "compute."
    )


def between(low: float, high: float, form: str) -> str:
    """An interval in words; "" where there is none."""
    return f"95% interval {format(low, form)} to {format(high, form)}" if low == low else ""


@st.cache_data(max_entries=64, show_spinner=False)
def drawn(frame: pd.DataFrame, policy: str, capacity: int) -> go.Figure:
    """`workbench.analysis.cache_speed.marked`."""
    return marked(frame, policy, capacity)


view.need_trace()
st.title("Consistency and cache", anchor=False)
with messages.guarded():
    (section,) = (one for one in questions.sections(view.whole(), sequences()) if one["id"] == "cache")
    consistency, segment, policies, speed, prefetch = section["questions"]

    def begin() -> list[questions.Question]:
        """The what-if, as a fragment of its own."""
        st.fragment(what_if, key=KEY)()
        return []

    show(
        "consistency",
        [
            Topic("What if", "How large must a cache be, and what is it worth? Move a slider.", begin=begin),
            Topic("Local consistency", section["lead"], [consistency]),
            Topic("Known segments", "What if the cache knew the next tokens?", [segment]),
            Topic("Policies", "Hit rates of every policy, capacity and layer.", [policies]),
            Topic("Speed", "The same model of speed with all its options.", [speed]),
            Topic("Prefetch", "Can the experts of the next layer be told in time to load them?", [prefetch]),
        ],
    )
