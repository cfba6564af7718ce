"""A text, of the trace or typed in, with its tokens coloured by what the routers did with them."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import streamlit as st

from workbench import bundled, colouring, figures, reading, slicing, text_search, token_agreement, token_figure
from workbench.analysis.matching import other_run
from workbench.errors import InputError
from workbench.reading import Reading
from workbench.tracefile import Trace
from workbench_app import messages, panel, view
from workbench_app.token_text import PAGE, token_text

FROM_TRACE, TYPED = "from the trace", "typed in"
ACROSS, ELSEWHERE, DATA = "Across layers", "Same token elsewhere", "Data of the text"
ALL = "all"
IN_LINK = 1000
"""Characters of a typed text that still fit into the link."""
EXAMPLE = "All human beings are born free and equal in dignity and rights."
UNSAID = ("seq", "sha256", "n_prompt", "n_tokens")
"""Columns of a text that the line above it doesn't have."""
FOUND = 200
"""Texts that a search lists."""


# --- which text


def choose() -> tuple[Reading, Trace | None] | None:
    """The text that is looked at, and its trace if it is of one."""
    has_trace = view.file() is not None and bool(view.runs())
    sources = [FROM_TRACE, TYPED] if has_trace else [TYPED]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Tokens", anchor=False, width="content")
        source = st.segmented_control(
            "Text", sources, default=sources[0], required=True, key="tokens_from", bind="query-params",
            label_visibility="collapsed",
        )  # fmt: skip
    if not has_trace:
        st.caption("No trace is open: type a text, and it is traced at once.")
    return of_trace() if source == FROM_TRACE else typed()


def of_trace() -> tuple[Reading, Trace] | None:
    trace = view.whole()
    index = searched(view.version(trace), view.where())
    options = text_search.choices(index)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        words = st.text_input(
            "Search", key="tokens_search", bind="query-params", placeholder='words, or "a phrase"',
            help="Texts that hold every word, wherever it stands and whatever its case. It looks through all texts of "
            "the run that the sidebar's filter leaves, not only those drawn for analyses.",
        )  # fmt: skip
        where = {name: narrowed(name, options[name]) for name in ("lang", "domain") if name in options}
        with st.popover("More", icon=":material/filter_list:"):
            others = [name for name in options if name not in where]
            column = st.selectbox("Column", [ALL, *others], key="tokens_column", bind="query-params")
            if column != ALL:
                where[column] = narrowed(column, options[column], "tokens_value")
    found, seqs = text_search.search(
        index, words, limit=FOUND, **{name: value for name, value in where.items() if value != ALL}
    )
    if not trace.n_sequences:
        st.info("The run has no texts yet: they are listed here as they are traced.", icon=":material/hourglass:")
    elif not seqs:
        st.info("No text meets the search. Take fewer words, or another language or domain.", icon=":material/search:")
    seq = which(found, seqs)
    if seq is None:
        return None
    pieces = pieces_of(view.version(trace), seq)
    if len(pieces) > 1:
        label = f"The whole text ({len(pieces)} pieces)"
        whole = st.toggle(
            label, key="tokens_whole", bind="query-params",
            help="The text was longer than a sequence and was traced in pieces, each without what stands before it.",
        )  # fmt: skip
        pieces = pieces if whole else [seq]
    return read(view.version(trace), tuple(pieces)), trace


def narrowed(column: str, values: list[str], key: str = "") -> str:
    """A choice of one value of a column, or all."""
    values = figures.ordered(values) if column in ("lang", "domain") else values
    label = messages.text(figures.noun(column).capitalize())
    return st.selectbox(label, [ALL, *values], key=key or f"tokens_{column}", bind="query-params", width=190)


def which(found: pd.DataFrame, seqs: list[int]) -> int | None:
    """The text that is looked at: the chosen one, or the first that was found."""

    def chosen() -> None:
        rows = st.session_state["tokens_found"]["selection"]["rows"]
        if rows:
            look_at(int(found["seq"].iloc[rows[0]]))

    if seqs:
        n = len(seqs)
        shown = f"{n:,} text{'s' * (n != 1)}" + (f", the first {len(found)} listed" if n > len(found) else "")
        chosen_before = st.session_state.get("tokens_seq", st.query_params.get("tokens_seq")) is not None
        with st.expander(f"{shown}: click a row to look at it", expanded=not chosen_before, icon=":material/list:"):
            panel.table(
                found, "texts", key="tokens_found", on_select=chosen, selection_mode="single-row", height=212,
                column_config={
                    "seq": st.column_config.NumberColumn("text", width=60),
                    "snippet": st.column_config.TextColumn("begins, or has", width=460),
                    "n_tokens": st.column_config.NumberColumn("tokens", width=70),
                },
            )  # fmt: skip
    first = seqs[0] if seqs else None
    with st.container(horizontal=True, vertical_alignment="bottom"):
        seq = st.number_input(
            "Text", min_value=0, value=None, step=1, key="tokens_seq", bind="query-params", width=140,
            placeholder="the first" if first is None else str(first), on_change=unpin,
            help="The number of the text in the run: `seq` in the tables.",
        )  # fmt: skip
        at = seqs.index(seq) if seq in seqs else 0 if seq is None and seqs else None
        for label, step, icon in (("Previous", -1, "chevron_left"), ("Next", 1, "chevron_right")):
            to = None if at is None or not 0 <= at + step < len(seqs) else seqs[at + step]
            st.button(
                label, key=f"tokens_{label}", icon=f":material/{icon}:", disabled=to is None, on_click=look_at,
                args=(to,), help=f"{label} of the texts found",
            )  # fmt: skip
    return first if seq is None else int(seq)


def look_at(seq: int, pin: int | None = None) -> None:
    """Choose a text, from a callback."""
    st.session_state["tokens_seq"] = seq
    st.session_state["tokens_pin"] = pin
    st.session_state["tokens_part"] = (pin or 0) // PAGE + 1


def unpin() -> None:
    st.session_state["tokens_pin"] = None
    st.session_state["tokens_part"] = 1


@st.cache_resource(max_entries=4, show_spinner="Reading the texts …")
def _index(version: view.Version) -> pd.DataFrame:
    return text_search.texts(view.whole())


@st.cache_resource(max_entries=8, show_spinner=False)
def searched(version: view.Version, where: str) -> pd.DataFrame:
    """The texts that a search looks through: those that the sidebar's filter leaves."""
    index = _index(version)
    if not where.strip():
        return index
    return index[index["seq"].isin(slicing.where(view.whole(), where).sequences()["seq"])].reset_index(drop=True)


@st.cache_data(max_entries=256, show_spinner=False)
def pieces_of(version: view.Version, seq: int) -> list[int]:
    return reading.pieces_of(view.whole(), seq)


@st.cache_resource(max_entries=16, show_spinner=False)
def read(version: view.Version, seqs: tuple[int, ...]) -> Reading:
    return reading.read(view.whole(), seqs)


# --- a typed text


def typed() -> tuple[Reading, None] | None:
    name = view.model_name()
    linked = "tokens_typed" not in st.session_state and "tokens_text" in st.query_params
    st.session_state.setdefault("tokens_typed", st.query_params.get("tokens_text", EXAMPLE))
    text = st.text_area("Text to trace", key="tokens_typed", height=130, max_chars=1_000_000)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        length = st.number_input(
            "Tokens of a piece", 1, None, None, key="tokens_length", bind="query-params", width=190,
            placeholder=str(bundled.CONTEXT.get(str(name), "as many as it takes")),
            help="A longer text is traced in consecutive pieces of so many tokens, each without what stands before it. "
            + why(name),
        )  # fmt: skip
        go = st.button("Trace", type="primary", icon=":material/play_arrow:", key="tokens_go")
    share(text)
    place = st.empty()
    asked = (str(name), text, length)
    if go or linked:
        try:
            with place.container(horizontal=True, vertical_alignment="center"):
                trace_now(asked)
        except InputError:
            place.empty()
            raise
    done = st.session_state.get("tokens_traced")
    if done is None:
        st.info(f"Press Trace: {messages.text(name)} reads the text, and its routing is shown here.")
        return None
    if done[0] != asked:
        st.caption("The text or its settings changed: press Trace to trace it as it is now.")
    return done[1], None


def why(name: str | None) -> str:
    if name in bundled.CONTEXT:
        return f"{name} was trained on contexts of {bundled.CONTEXT[name]} tokens; beyond, its loss rises."
    return "If you give none, pieces are as long as the model allows."


def share(text: str) -> None:
    """A short text stands in the link, a long one doesn't."""
    if len(text) <= IN_LINK:
        st.query_params["tokens_text"] = text
        return
    st.query_params.pop("tokens_text", None)
    st.caption(f"The link doesn't hold this text: it has {len(text):,} characters, more than {IN_LINK:,}.")


def trace_now(asked: tuple[str, str, int | None]) -> None:
    """Trace a text. Whatever the user does meanwhile, such as pressing Cancel, interrupts the script and so the run."""
    from workbench import live  # torch: only who traces waits for it

    bar = st.progress(0.0, "Reading the text …", width="stretch")
    st.button("Cancel", key="tokens_cancel", icon=":material/close:", help="Stop tracing this text")
    shown = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            bar.progress(done / total, f"{done:,} of {total:,} tokens")

    _, text, length = asked
    with live.traced(view.model(), text, max_length=length, progress=progress) as trace:
        bar.progress(1.0, "Reading the routing …")
        found = reading.read(trace, trace.sequences()["seq"].tolist())
    st.session_state["tokens_traced"] = asked, found
    unpin()
    st.rerun()


# --- how it is shown


@st.fragment
def shown(text: Reading, trace: Trace | None) -> None:
    with messages.guarded():
        say(text, trace)
        values, title, layer = coloured_by(text, trace)
        kind = st.session_state["tokens_colour"]
        only = putting_forward(values) if kind == "expert" else None
        pane = st.container()
        with st.container(horizontal=True, vertical_alignment="bottom"):
            detail = details(trace)
            pin, part = places(text)
        with pane:
            token_text(
                text, values, colouring.coloured(values, kind), key="tokens_view", title=title, layer=layer, pin=pin,
                part=part, only=only, numbers=st.session_state["tokens_numbers"], on_pin=on_pin, on_only=on_only,
            )  # fmt: skip
        if detail == DATA:
            st.caption(f"Every token with its experts in layer {layer or 0}.")
            panel.table(reading.table(text, layer or 0), "tokens", height=320)
        elif pin is None:
            st.info(
                "Click a token, or move to it with the arrow keys: its routing is shown here.",
                icon=":material/ads_click:",
            )
        elif detail == ACROSS:
            across(text, pin)
        elif trace is not None:
            elsewhere(text, trace, pin, layer or 0)


def say(text: Reading, trace: Trace | None) -> None:
    """What is known of the text, in a line."""
    if trace is None:
        n = len(text.sequences)
        st.caption(f"{len(text):,} tokens" + (f", traced in {n:,} pieces" if n > 1 else ""))
        return
    row = text.sequences.iloc[0]
    facts = [f"text **{row['seq']}**", f"{len(text):,} tokens"]
    labels = [name for name in map(str, text.sequences) if name not in UNSAID and not name.startswith("split_")]
    facts += [
        f"{messages.text(figures.noun(name))} **{messages.text(row[name])}**" for name in labels if pd.notna(row[name])
    ]
    st.caption(" · ".join(facts))


def coloured_by(text: Reading, trace: Trace | None) -> tuple[np.ndarray, str, int | None]:
    """The value of each token, what it is, and the layer it is of (None: all)."""
    others = [] if trace is None else [name for name in view.runs() if name != trace.run]
    kinds = [*colouring.available(text), *(["agreement"] if others else [])]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        kind = st.selectbox(
            "Colour", kinds, key="tokens_colour", bind="query-params", width=170,
            help="; ".join(f"{name}: {words}" for name, words in colouring.COLOURINGS.items()),
        )  # fmt: skip
        layer = None
        if kind != "nll":
            layers = [*([] if kind == "expert" else ["mean"]), *map(str, range(text.n_layers))]
            chosen = st.selectbox("Layer", layers, key="tokens_layer", bind="query-params", width=110)
            layer = None if chosen == "mean" else int(chosen)
        rank = 0
        if kind == "expert":
            ranks = list(range(int(text.layers["top_k"].iloc[layer or 0])))
            rank = st.selectbox(
                "Rank", ranks, key="tokens_rank", bind="query-params", width=90,
                help="0 is the router's first choice, 1 its second, …",
            )  # fmt: skip
        agreement = other = None
        if kind == "agreement" and trace is not None:
            other = st.selectbox("Other run", others, key="tokens_other", bind="query-params", width=260)
            there = other_run(trace, other)
            agreement = agreeing(view.version(trace), view.version(there), tuple(text.sequences["seq"]), text, there)
        st.toggle(
            "Numbers", key="tokens_numbers", bind="query-params",
            help="Write the value below each token: no palette has a colour for every expert that everyone can tell "
            "apart.",
        )  # fmt: skip
        panel.definition(definition(kind))
    values = colouring.by(text, kind, layer=layer, rank=rank, agreement=agreement)
    where = "" if kind == "nll" else ", mean of the layers" if layer is None else f", layer {layer}"
    return values, f"{colouring.COLOURINGS[kind]}{where}{f', rank {rank}' if kind == 'expert' else ''}", layer


def definition(kind: str) -> str:
    if kind == "agreement":
        return token_agreement.agreement.__doc__ or ""
    return {
        "expert": colouring.__doc__ or "",
        "entropy": Trace.entropy.__doc__ or "",
        "margin": Trace.margin.__doc__ or "",
        "nll": "nats: the negative logarithm of the probability that the model gave this token, given those before it. "
        "The first token of a sequence has none.",
    }[kind]


@st.cache_resource(max_entries=32, show_spinner="Comparing the runs …")
def agreeing(
    version: view.Version, other: view.Version, seqs: tuple[int, ...], _text: Reading, _there: Trace
) -> np.ndarray:
    return token_agreement.agreement(view.whole(), _text, _there)


def putting_forward(values: np.ndarray) -> int | None:
    """The expert whose tokens stand out: a click on the legend chooses it."""
    given = st.query_params.get("tokens_only", "")
    return int(given) if given.isdecimal() and (values == int(given)).any() else None


def on_only() -> None:
    only = st.session_state["tokens_view"]["only"]["at"]
    if only is None:
        st.query_params.pop("tokens_only", None)
    else:
        st.query_params["tokens_only"] = str(int(only))


def on_pin() -> None:
    pin = st.session_state["tokens_view"]["pin"]["at"]
    st.session_state["tokens_pin"] = None if pin is None else int(pin)
    if pin is not None:
        st.session_state["tokens_part"] = int(pin) // PAGE + 1


def places(text: Reading) -> tuple[int | None, int]:
    """The pinned token, None where there is none or not in this text, and which part of a long text is shown."""
    n = -(-len(text) // PAGE)
    pin = st.number_input(
        "Pinned token", 0, None, None, 1, key="tokens_pin", bind="query-params", width=150, placeholder="none",
        on_change=follow,
    )  # fmt: skip
    pin = None if pin is None or pin >= len(text) else int(pin)
    if n <= 1:
        return pin, 0
    at = st.number_input(
        f"Part, of {n}", 1, key="tokens_part", bind="query-params", width=150,
        help=f"{PAGE:,} tokens at a time.",
    )  # fmt: skip
    return pin, min(int(at), n) - 1


def follow() -> None:
    """Show the part of the text that has the pinned token."""
    pin = st.session_state.get("tokens_pin")
    if pin is not None:
        st.session_state["tokens_part"] = int(pin) // PAGE + 1


# --- below the text


def details(trace: Trace | None) -> str:
    """What is shown below the text."""
    return st.segmented_control(
        "Shown below", [ACROSS, *([ELSEWHERE] if trace is not None else []), DATA], default=ACROSS, required=True,
        key="tokens_detail", bind="query-params", width="stretch", label_visibility="collapsed",
    )  # fmt: skip


def across(text: Reading, pin: int) -> None:
    st.markdown(f"“{messages.text(reading.named(text, pin))}” · token {pin}, id {text.token_ids[pin]}")
    panel.figure(token_figure.token_figure(text, pin), "token")
    panel.table(reading.routing(text, pin), "token-routing", height=300)


def elsewhere(text: Reading, trace: Trace, pin: int, layer: int) -> None:
    token_id = int(text.token_ids[pin])
    index = searched(view.version(trace), view.where())
    besides = (int(text.seq[pin]), int(text.pos[pin]))
    found, n = text_search.occurrences(trace, index, token_id, layer, besides=besides)
    if not n:
        st.info("This token occurs nowhere else.", icon=":material/search:")
        return
    experts = text.experts[layer, pin]
    st.markdown(
        f"“{messages.text(reading.named(text, pin))}” occurs {n:,} times elsewhere; the first {len(found)}, with "
        f"their experts in layer {layer}. Here: {', '.join(str(one) for one in experts if one != reading.NO_EXPERT)}."
    )
    found["shared"] = [len(set(row) & set(experts.tolist())) for row in found["experts"]]

    def chosen() -> None:
        rows = st.session_state["tokens_elsewhere"]["selection"]["rows"]
        if rows:
            row = found.iloc[rows[0]]
            look_at(int(row["seq"]), int(row["pos"]))
            st.session_state["tokens_whole"] = False
            st.session_state["tokens_jumps"] = True

    panel.table(
        found, "elsewhere", key="tokens_elsewhere", on_select=chosen, selection_mode="single-row", height=320,
        column_config={"before": st.column_config.TextColumn(alignment="right")},
    )  # fmt: skip
    if st.session_state.pop("tokens_jumps", False):
        st.rerun()  # all of the page: another text was chosen


with messages.guarded():
    with st.container():  # one element, whatever is in it: the text below stays the same element when this changes
        looked_at = choose()
    if looked_at is not None:
        if not len(looked_at[0]):
            raise InputError("this text has no tokens: choose another one.")
        shown(*looked_at)
