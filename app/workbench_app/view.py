"""What is looked at: the trace and the model that the server was started with, and in the sidebar which run of the
trace and which of its texts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench import background, tracefile
from workbench.location import Url, located
from workbench.printing import plain
from workbench.runs import corpus_of
from workbench.tracefile import Trace
from workbench_app import link, messages

if TYPE_CHECKING:
    from workbench.models import Model

SAMPLES = {20_000: "20 k tokens", 50_000: "50 k tokens", 200_000: "200 k tokens", 1_000_000: "1 M tokens", 0: "all"}
"""Most tokens that the analyses of a page look at."""
SAMPLE = 50_000
GROWTH = 1.1
"""A run that is being written is looked at anew when it has grown by this factor."""
Version = tuple[str, str, int, str]
"""See `version`."""


def file() -> Path | Url | None:
    """The trace; None if the server was started without one."""
    given = os.environ.get("WORKBENCH_TRACE")
    return located(given) if given else None


def need_trace() -> None:
    """Where there is no trace, say what to do, and end the page."""
    if file() is None:
        st.info(
            "No trace is open. Record one, and start the page with it:\n\n"
            "```sh\nworkbench trace demo --corpus udhr --out udhr.duckdb\nworkbench app udhr.duckdb\n```",
            icon=":material/folder_open:",
        )
        st.stop()
    if not runs():
        st.info(
            f"{messages.text(file())} holds no run yet. Add one: `workbench trace MODEL --corpus … --out FILE "
            "--append`.",
            icon=":material/folder_open:",
        )
        st.stop()


def runs() -> dict[str, dict[str, Any]]:
    """Every run of the file by its name, as `workbench.tracefile.info` says, in the order they were started."""
    path = file()
    return {} if path is None else {one["run"]: one for one in _info(str(path))["runs"]}


@st.cache_data(ttl=1, max_entries=4, show_spinner=False)
def _info(path: str) -> dict[str, Any]:
    return tracefile.info(path)


def run() -> str:
    """The run that is looked at; the last finished one if nothing was chosen."""
    known = runs()
    chosen = st.session_state.get("run")
    return chosen if chosen in known else default_run(known)


def default_run(known: dict[str, dict[str, Any]]) -> str:
    """The run that `Trace` opens: the last that finished, else the last that began."""
    finished = [one for one in known.values() if one["status"] == "finished"]
    return max(finished, key=lambda one: one["finished"])["run"] if finished else list(known)[-1]


def where() -> str:
    """The filter of sequences in the sidebar, "" for none."""
    return str(st.session_state.get("where") or "")


def tokens() -> int:
    """Most tokens that analyses look at; 0: all."""
    return int(st.session_state.get("sample", SAMPLE))


def whole() -> Trace:
    """The run, all of its texts that were there when it was last looked at."""
    need_trace()
    name = run()
    facts = runs()[name]
    shown = st.session_state.setdefault("snapshots", {})
    one = name, facts["started"]
    if one not in shown or facts["status"] != "running" or facts["tokens"] > GROWTH * shown[one]:
        shown[one] = facts["tokens"]
    return _trace((str(file()), name, shown[one], str(facts["started"])))


def version(trace: Trace) -> Version:
    """What answers about a trace are kept by: path, run, its tokens (a run may grow) and when it was started (another
    run may take its place)."""
    return str(trace.path), trace.run, trace.n_tokens, str(trace.started)


def trace() -> Trace:
    """The texts of the run that the sidebar means. InputError for a wrong filter."""
    found = whole()
    return _part(version(found), where(), tokens())


@st.cache_resource(max_entries=8, show_spinner=False)
def _trace(version: Version) -> Trace:
    return Trace(version[0], version[1])


@st.cache_resource(max_entries=16, show_spinner=False)
def _part(version: Version, where: str, sample: int) -> Trace:
    return background.part(_trace(version), where, sample)


@st.cache_resource(show_spinner=False)
def workers() -> background.Workers:
    """The processes that answer the questions of all sessions."""
    found = background.Workers()
    found.warm()
    return found


def description() -> str:
    """What analyses look at, in a line, to be shown as Markdown."""
    found, part = whole(), trace()
    if part.n_sequences == found.n_sequences:
        return f"all {found.n_tokens:,} tokens in {found.n_sequences:,} texts"
    how = [f"`{plain(where()).replace('`', ' ')}`"] if where() else []  # an empty line in it would end the code
    how += ["drawn at random"] if tokens() and part.n_tokens >= tokens() else []
    return (
        f"{part.n_tokens:,} of {found.n_tokens:,} tokens, {part.n_sequences:,} of {found.n_sequences:,} texts "
        f"({', '.join(how)})"
    )


def model_name() -> str | None:
    """The model that the server was started with, or else the one that recorded the run."""
    given = os.environ.get("WORKBENCH_MODEL")
    known = runs()
    return given or (known[run()]["model"] if known else "demo")


def model(name: str | None = None) -> Model:
    """A model, by default `model_name()`; loaded once for all sessions. InputError if it can't be."""
    device, dtype = os.environ.get("WORKBENCH_DEVICE", "cpu"), os.environ.get("WORKBENCH_DTYPE", "auto")
    return _load(str(name or model_name()), device, dtype)


@st.cache_resource(max_entries=2, show_spinner="Loading the model …")
def _load(name: str, device: str, dtype: str) -> Model:
    from workbench.models import load

    return load(name, device=device, dtype=dtype)


def sidebar() -> None:
    """Which run, which texts, how far a run is that is being written, and the link to what is shown."""
    workers()
    with st.sidebar:
        known = runs()
        if known:
            names = list(known)
            st.selectbox(
                "Run", names, index=names.index(default_run(known)), key="run", bind="query-params",
                help="A trace file holds any number of runs. `workbench trace … --append` adds one.",
            )  # fmt: skip
            st.text_input(
                "Texts", key="where", bind="query-params", placeholder="all: or lang=de & domain=legal-rights",
                help="A filter by any column of the texts: `lang=de,fr`, `source=udhr & lang~^zh`. Everything on the "
                "pages that is computed is then about these texts.",
            )  # fmt: skip
            st.selectbox(
                "Most tokens", list(SAMPLES), index=list(SAMPLES).index(SAMPLE), key="sample", bind="query-params",
                format_func=lambda size: SAMPLES[size],
                help="Analyses look at whole texts drawn at random until they have so many tokens. Take all of them "
                "for the numbers of a paper.",
            )  # fmt: skip
            with messages.guarded():
                st.caption(f"Shown: {description()}.")
            if known[run()]["status"] == "running":
                growth()
        link.copy_button()


@st.fragment(run_every=2)
def growth() -> None:
    """How far the run is; the page is shown anew when there is more of it."""
    facts = runs()[run()]
    planned = corpus_of(facts).get("tokens")
    text = f"Being written: {facts['tokens']:,} tokens"
    if isinstance(planned, int) and planned > 0:
        text = f"Being written: {facts['tokens']:,} of {planned:,} tokens"
        st.progress(min(1.0, facts["tokens"] / planned), text)
    else:
        st.caption(text)
    seen = st.session_state.get("snapshots", {}).get((run(), facts["started"]), facts["tokens"])
    if facts["status"] != "running" or facts["tokens"] > GROWTH * seen:
        st.rerun()
