"""Every expert on one grid, and the page of one: what it fires on, whom it works with, how important it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from workbench import analysis as analyses
from workbench import expert_contexts, expert_grid, expert_profile, figures
from workbench.analysis.counting import experts_of
from workbench.background import Asked
from workbench.expert_grid import METRICS
from workbench.reading import visible
from workbench.tracefile import Trace
from workbench_app import messages, one_expert, panel, view
from workbench_app.context_lines import context_lines
from workbench_app.expert_cells import expert_cells
from workbench_app.expert_edits import actions, added
from workbench_app.expert_panels import RESAMPLES, group_part, more_part

CLEAREST, RANDOM = "largest weight", "drawn at random"
ALL = "all"


# --- the grid


def grid_part(trace: Trace) -> None:
    """All experts by one number; a click chooses one."""
    index = one_expert.index(trace)
    columns = expert_profile.groupings(index)
    by_columns = [name for name in columns if name != expert_profile.CLASS]
    names = expert_grid.possible(trace.recorded, labels=bool(by_columns), ids=index.known)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        metric = st.selectbox(
            "Experts by", names, key="experts_metric", bind="query-params", width=210,
            format_func=lambda name: METRICS[name].title, help=METRICS[names[0]].meaning,
        )  # fmt: skip
        labelled = metric in ("lift", "divergence", "information")
        by = group = None
        if labelled:
            by = st.selectbox("Groups", by_columns, key="experts_by", bind="query-params", width=160,
                              format_func=figures.noun)  # fmt: skip
        elif by_columns:
            by = st.session_state.get("experts_by", by_columns[0])
            by = by if by in by_columns else by_columns[0]
        if METRICS[metric].grouped and by is not None:
            labels = one_expert.labels(trace, by)
            label = messages.text(figures.noun(by).capitalize())
            group = st.selectbox(label, labels, key="experts_group", bind="query-params", width=180)
        by_value = st.toggle("In order of value", key="experts_sorted", bind="query-params")
        each = METRICS[metric].kind == "amount" and st.toggle(
            "Colours of each layer", key="experts_each", bind="query-params",
            help="Each layer has the whole colour scale for itself: norms, for instance, grow from layer to layer.",
        )  # fmt: skip
        panel.definition(analyses.file(METRICS[metric].analysis).__doc__ or "")
    st.caption(METRICS[metric].meaning)
    arguments: dict[str, Any] = {"n_resamples": RESAMPLES}
    if METRICS[metric].analysis == "expert_values":
        arguments = {"by": by} | ({"weights": True} if metric == "mean_weight" else {})
    elif METRICS[metric].analysis == "vocabulary":
        arguments = {}
    asked = panel.asking(METRICS[metric].analysis, arguments)
    answer = view.workers().known(asked)
    if answer is None or not answer.done or answer.cancelled:
        st.fragment(guarded(wait), key=one_expert.MAP)(asked)
        return
    frame = expert_grid.values(answer.table(), metric, ALL if group is None else group)
    unit = METRICS[metric].unit
    drawn: dict[str, Any] = {
        "by_value": bool(by_value), "each_layer": bool(each), "chosen": one_expert.chosen(trace),
    }  # fmt: skip
    expert_cells(frame, METRICS[metric], unit=unit, key="experts-cells", on_choose=clicked, **drawn)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.caption("Click a cell, or move with the arrow keys, to look at an expert.", width="stretch")
        panel.table_downloads(frame, f"experts-{metric}")
        panel.figure_downloads(
            partial(expert_grid.grid_figure, frame, unit, METRICS[metric].kind, **drawn), f"experts-{metric}"
        )


def wait(asked: Asked) -> None:
    """Until the answer is there: then the page is drawn anew."""
    if panel.finished(asked, one_expert.MAP) is not None:
        st.rerun()


def clicked() -> None:
    place = st.session_state["experts-cells"].get("choose")
    if place:
        one_expert.go_to(*place)


# --- one expert


def one_part(trace: Trace) -> None:
    """The expert in numbers, what can be done with it, and what it fires on."""
    layer, expert = chooser(trace)
    with st.container(horizontal=True, key="experts-actions"):
        actions(trace, layer, expert)
    added()
    if not trace.n_tokens:
        st.info("The chosen texts have no tokens. Loosen the filter in the sidebar.", icon=":material/info:")
        return
    fired, facts = one_expert.firings(trace, layer, expert)
    numbers(facts)
    if not len(fired):
        st.info(
            f"None of the {len(one_expert.index(trace).token_id):,} tokens that are looked at chose expert {expert} of "
            f"layer {layer}. It may be one that is never used: take more tokens in the sidebar, or choose another one "
            "in the grid.",
            icon=":material/do_not_disturb_on:",
        )
        return
    st.fragment(guarded(fires_part), key=one_expert.FIRES)(trace, layer, expert)
    columns = [name for name in ("lang", "domain") if name in expert_profile.groupings(one_expert.index(trace))]
    for place, by in zip(st.columns(max(len(columns), 1), gap="medium"), columns, strict=False):
        with place, messages.guarded():
            group_part(trace, layer, expert, by)


def fires_part(trace: Trace, layer: int, expert: int) -> None:
    """The tokens that fire it, and their contexts."""
    index = one_expert.index(trace)
    if not index.known:
        st.info(
            "The trace doesn't say which tokens these are: it was made without their ids. What the expert fires on can "
            "be told by groups of texts only.",
            icon=":material/info:",
        )
        return
    left, right = st.columns([0.44, 0.56], gap="medium")
    with left, messages.guarded():
        token_part(trace, layer, expert)
    with right, messages.guarded():
        if index.vocabulary:
            context_part(trace, layer, expert)
        else:
            st.info("The trace has no vocabulary: tokens are known by their ids only.", icon=":material/info:")


def chooser(trace: Trace) -> tuple[int, int]:
    """Which expert, by number, and what can be done with it."""
    layer, expert = one_expert.chosen(trace)
    for name, value in (("experts_layer", layer), ("experts_expert", expert)):
        if st.session_state.get(name, value) != value:  # of another run, that had more
            st.session_state[name] = value
    n_experts = experts_of(trace, layer)
    with st.container(horizontal=True, vertical_alignment="bottom", key="experts-chooser"):
        st.header(f"Layer {layer} · expert {expert}", anchor=False, width="content")
        st.number_input("Layer", 0, trace.n_layers - 1, step=1, key="experts_layer", bind="query-params", width=110,
                        on_change=one_expert.moved)  # fmt: skip
        st.number_input("Expert", 0, n_experts - 1, step=1, key="experts_expert", bind="query-params", width=110,
                        on_change=one_expert.moved)  # fmt: skip
    return layer, expert


def numbers(facts: pd.Series) -> None:
    """The expert in numbers."""

    def ends(name: str, form: str) -> str | None:
        low, high = facts[f"{name}_low"], facts[f"{name}_high"]
        return None if np.isnan(low) else f"{low:{form}} to {high:{form}}"

    def shown(value: float, form: str) -> str:
        return "–" if np.isnan(value) else f"{value:{form}}"

    with st.container(horizontal=True, key="experts-numbers"):
        quiet: dict[str, Any] = {"delta_color": "off", "delta_arrow": "off"}
        st.metric("Tokens that chose it", f"{facts['n_fired']:,.0f}", f"of {facts['n_tokens']:,.0f}", **quiet)
        st.metric("Part of all tokens", shown(facts["rate"], ".2%"), ends("rate", ".2%"), **quiet)
        st.metric("Load (1: even)", shown(facts["load"], ".2f"), ends("load", ".2f"), **quiet)
        st.metric("Mean gate weight", shown(facts["mean_weight"], ".3f"), ends("mean_weight", ".3f"), **quiet)
        st.metric("First choice", shown(facts["first"], ".0%"), "of its tokens", **quiet)
        st.metric("Texts", f"{facts['n_texts_fired']:,.0f}", f"of {facts['n_texts']:,.0f}", **quiet)
        panel.definition(f"{expert_profile.__doc__}\n\n{expert_profile.summary.__doc__}")


def token_part(trace: Trace, layer: int, expert: int) -> None:
    """Token ids that fire the expert; a row that is chosen narrows the contexts to it."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("Tokens it fires on", anchor=False, width="stretch")
        minimum = st.number_input(
            "Seen at least", 1, 100_000, 10, 5, key="experts_minimum", bind="query-params", width=120,
            help="Token ids that occur less often among the tokens looked at are left out: little is known of them.",
        )  # fmt: skip
    frame = one_expert.tokens(trace, layer, expert, int(minimum))
    shown = frame.assign(text=frame["text"].map(visible, na_action="ignore"))

    def narrow() -> None:
        rows = st.session_state["experts-tokens"]["selection"]["rows"]
        st.session_state["experts_token"] = int(frame["token_id"].iloc[rows[0]]) if rows else None

    panel.table(
        shown, f"experts-tokens-{layer}-{expert}", key="experts-tokens", on_select=narrow, selection_mode="single-row",
        height=446, column_order=["text", "lift", "lift_low", "share", "rate", "count", "n_texts", "mean_weight", "q",
                                  "lift_high", "overall", "n_tokens", "max_weight", "n_effective", "token_id"],
        column_config={
            "text": st.column_config.TextColumn("token", width=110, pinned=True),
            "lift": st.column_config.NumberColumn("lift", format="%.2f", width=60),
            "lift_low": st.column_config.NumberColumn("at least", format="%.2f", width=64,
                                                      help="lower end of the 95% interval of the lift"),
            "lift_high": st.column_config.NumberColumn("at most", format="%.2f"),
            "share": st.column_config.NumberColumn("share", format="percent", width=66,
                                                   help="part of what the expert fires on"),
            "overall": st.column_config.NumberColumn("of all tokens", format="percent"),
            "rate": st.column_config.ProgressColumn("of the id's tokens", format="percent", min_value=0.0,
                                                    max_value=1.0, width=96, color="primary"),
            "count": st.column_config.NumberColumn("count", format="localized", width=64),
            "n_texts": st.column_config.NumberColumn("texts", width=54),
            "mean_weight": st.column_config.NumberColumn("mean weight", format="%.3f", width=84),
            "max_weight": st.column_config.NumberColumn("largest weight", format="%.3f"),
            "q": st.column_config.NumberColumn("q", format="%.3g"),
        },
    )  # fmt: skip
    sure = int(((frame["q"] < 0.05) & (frame["lift"] > 1)).sum())
    covered = frame["share"].sum()
    st.caption(
        f"{sure:,} of {len(frame):,} token ids fire it more often than chance explains (q < 0.05). These ids are "
        f"{covered:.0%} of what it fires on. Choose a row to see its contexts only."
    )


def context_part(trace: Trace, layer: int, expert: int) -> None:
    """Where it fires."""
    index = one_expert.index(trace)
    fired, _ = one_expert.firings(trace, layer, expert)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("Contexts", anchor=False, width="stretch")
        order = st.segmented_control(
            "Which", [CLEAREST, RANDOM], default=CLEAREST, required=True, key="experts_which", bind="query-params",
            label_visibility="collapsed",
        )  # fmt: skip
        sequences = None
        if "lang" in expert_profile.groupings(index):
            known = figures.ordered(index.sequences["lang"].dropna().astype(str).unique())
            lang = st.selectbox("Language", [ALL, *known], key="experts_lang", bind="query-params", width=110)
            sequences = None if lang == ALL else (index.sequences["lang"] == lang).to_numpy()
        with st.popover("", icon=":material/tune:", help="How many"):
            most = st.number_input("Contexts", 1, 200, 12, 4, key="experts_most", bind="query-params")
            per_text = st.number_input("At most of one text", 1, 200, 1, 1, key="experts_per_text",
                                       bind="query-params")  # fmt: skip
            per_token = st.number_input(
                "At most of one token id", 1, 200, 3, 1, key="experts_per_token", bind="query-params",
                help="So that the list isn't all one frequent token. It doesn't count where one id is chosen.",
            )  # fmt: skip
            token_id = st.number_input("Only the token id", 0, None, None, 1, key="experts_token", bind="query-params",
                                       placeholder="all")  # fmt: skip
    only = None if token_id is None else int(token_id)
    if only is not None:
        name = index.vocabulary.get(only)
        label = f"Only “{messages.text(visible(name))}”" if name else f"Only token id {only}"
        st.button(label, icon=":material/close:", key="experts_all", on_click=widen, type="tertiary",
                  help="All tokens again")  # fmt: skip
    found = expert_contexts.contexts(
        index, fired, most=int(most), per_text=int(per_text), per_token=int(per_token) if only is None else None,
        order="weight" if order == CLEAREST else "random", token_id=only, sequences=sequences,
    )  # fmt: skip
    if found.empty:
        st.info("No token that chose this expert meets the choice above.", icon=":material/search:")
        return
    with st.container(height=470, border=True):
        context_lines(found, expert_contexts.excerpts(index, fired, found), key="experts-contexts", on_open=opened)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.caption("Shaded tokens chose it too. Click a line to see the whole text.", width="stretch")
        panel.table_downloads(found.drop(columns="place"), "experts-contexts")
    if to := st.session_state.pop("experts_open", None):
        seq, pos = to
        st.switch_page(
            "tokens.py",
            query_params={"tokens_seq": str(seq), "tokens_pin": str(pos), "tokens_layer": str(layer)},
        )


def widen() -> None:
    st.session_state["experts_token"] = None


def opened() -> None:
    st.session_state["experts_open"] = st.session_state["experts-contexts"].get("open")


def page() -> None:
    st.title("Experts", anchor=False)
    one_expert.arrive()
    trace = view.trace()
    with messages.guarded():
        grid_part(trace)
    st.divider()
    with messages.guarded():
        one_part(trace)
    st.fragment(guarded(more_part), key=one_expert.MORE)(trace)


def guarded(draw: Callable[..., None]) -> Callable[..., None]:
    """The same with its errors as messages, when it is drawn again by itself, too."""

    def drawn(*arguments: Any) -> None:
        with messages.guarded():
            draw(*arguments)

    return drawn


view.need_trace()
page()
