"""The expert that is looked at: which one, and what is computed of it, once for all sessions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from workbench import expert_profile
from workbench.analysis.counting import experts_of
from workbench.expert_profile import TokenIndex
from workbench.tracefile import Trace
from workbench_app import view

MAP, FIRES, MORE = "experts-map", "experts-fires", "experts-more"
"""Keys of the parts of the page that are drawn by themselves when something in them is clicked."""


def chosen(trace: Trace) -> tuple[int, int]:
    """Layer and expert: what the widgets say, else the link, else the first; the last where there aren't as many."""

    def number(name: str, below: int) -> int:
        value = str(st.session_state.get(name, st.query_params.get(name, 0)))
        return min(int(value), below - 1) if value.isdecimal() else 0

    layer = number("experts_layer", trace.n_layers)
    return layer, number("experts_expert", experts_of(trace, layer))


def go_to(layer: int, expert: int) -> None:
    """Look at another expert: from a callback. The page is drawn anew, because its widgets say which one it is."""
    st.session_state["experts_go_to"] = int(layer), int(expert)
    st.rerun()


def arrive() -> None:
    """What `go_to` wanted, before the widgets are drawn."""
    if "experts_go_to" in st.session_state:
        st.session_state["experts_layer"], st.session_state["experts_expert"] = st.session_state.pop("experts_go_to")
        moved()


def moved() -> None:
    """Another expert is looked at: what was said of the last one no longer holds."""
    st.session_state["experts_token"] = None
    st.session_state.pop("experts_added", None)


def index(trace: Trace) -> TokenIndex:
    """Whose token each is."""
    return _index(_part(), trace)


def firings(trace: Trace, layer: int, expert: int) -> tuple[pd.DataFrame, pd.Series]:
    """The tokens that chose it, and the expert in numbers (workbench.expert_profile)."""
    return _firings(_part(), layer, expert, trace)


def tokens(trace: Trace, layer: int, expert: int, minimum: int) -> pd.DataFrame:
    """The token ids that fire it."""
    return _tokens(_part(), layer, expert, minimum, trace)


def groups(trace: Trace, layer: int, expert: int, by: str) -> pd.DataFrame:
    """The groups of tokens that fire it."""
    return _groups(_part(), layer, expert, by, trace)


def labels(trace: Trace, by: str) -> list[str]:
    """The groups that there are, in the order of all figures."""
    return _labels(_part(), by, trace)


def _part() -> tuple[view.Version, str, int]:
    """What tells apart the texts that the sidebar can mean."""
    return view.version(view.whole()), view.where(), view.tokens()


@st.cache_resource(max_entries=3, show_spinner="Reading the tokens …")
def _index(part: tuple, _trace: Trace) -> TokenIndex:
    return expert_profile.token_index(_trace)


@st.cache_resource(max_entries=4, show_spinner=False)
def _choices(part: tuple, layer: int, _trace: Trace) -> tuple[np.ndarray, np.ndarray | None]:
    return expert_profile.choices(_trace, layer)


@st.cache_resource(max_entries=32, show_spinner=False)
def _firings(part: tuple, layer: int, expert: int, _trace: Trace) -> tuple[pd.DataFrame, pd.Series]:
    experts, weights = _choices(part, layer, _trace)
    fired = expert_profile.firings_among(experts, weights, expert)
    return fired, expert_profile.summary(_index(part, _trace), fired, experts, experts_of(_trace, layer))


@st.cache_resource(max_entries=32, show_spinner=False)
def _tokens(part: tuple, layer: int, expert: int, minimum: int, _trace: Trace) -> pd.DataFrame:
    fired, _ = _firings(part, layer, expert, _trace)
    return expert_profile.token_table(_index(part, _trace), fired, minimum=minimum)


@st.cache_resource(max_entries=64, show_spinner=False)
def _groups(part: tuple, layer: int, expert: int, by: str, _trace: Trace) -> pd.DataFrame:
    fired, _ = _firings(part, layer, expert, _trace)
    return expert_profile.group_table(_trace, _index(part, _trace), fired, by)


@st.cache_data(max_entries=32, show_spinner=False)
def _labels(part: tuple, by: str, _trace: Trace) -> list[str]:
    return expert_profile.group_labels(_trace, _index(part, _trace), by)
