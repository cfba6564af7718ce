"""What takes longer to say of an expert: whom it works with, who is like it, how important it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from workbench import analysis as analyses
from workbench import expert_grid, expert_profile, figures
from workbench.reading import visible
from workbench.tracefile import Trace
from workbench_app import messages, one_expert, panel, view

PARTNERS, SIMILAR, IMPORTANCE, VOCABULARY, COLUMNS, WEIGHTS = (
    "Partners", "Similar experts", "Importance", "Vocabulary", "Other groups", "Likeness of weights",
)  # fmt: skip
RESAMPLES = 200
"""Fewer than the analyses' own default: what is shown here has to come soon."""


def more_part(trace: Trace) -> None:
    """Whom it works with, who is like it, how important it is."""
    layer, expert = one_expert.chosen(trace)
    names = [PARTNERS, SIMILAR, IMPORTANCE, VOCABULARY, COLUMNS, *([WEIGHTS] if view.model_name() else [])]
    st.divider()
    shown = st.segmented_control(
        "More about the expert", names, default=PARTNERS, required=True, key="experts_more", bind="query-params",
        label_visibility="collapsed",
    )  # fmt: skip
    with messages.guarded():
        {
            PARTNERS: partners, SIMILAR: similar, IMPORTANCE: importance, VOCABULARY: favourites, COLUMNS: columns,
            WEIGHTS: weights,
        }[shown](trace, layer, expert)  # fmt: skip


def headed(text: str, analysis: str) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(text, width="stretch")
        panel.definition(analyses.file(analysis).__doc__ or "")


def linked(frame: pd.DataFrame, name: str, layer: str | int, other: str, **options: Any) -> None:
    """A table whose rows are experts: choosing one leads to it.

    layer  the column that has its layer, or the layer; other: the column that has its number
    """

    def follow() -> None:
        rows = st.session_state[name]["selection"]["rows"]
        if rows:
            row = frame.iloc[rows[0]]
            one_expert.go_to(row[layer] if isinstance(layer, str) else layer, row[other])

    panel.table(frame, name, key=name, on_select=follow, selection_mode="single-row", **options)
    st.caption("Choose a row to look at that expert.")


def partners(trace: Trace, layer: int, expert: int) -> None:
    headed("Experts of the layer that tokens choose beside this one, against what their loads explain.", "coactivation")
    if trace.layers["top_k"].iloc[layer] < 2:
        st.info("A token of this layer chooses a single expert: there are no partners.", icon=":material/info:")
        return
    asked = panel.asking("coactivation", {"layers": (layer,), "n_resamples": RESAMPLES})
    answer = panel.finished(asked, one_expert.MORE)
    if answer is None:
        return
    frame = answer.table()
    mine = frame[frame["expert"] == expert].sort_values("lift_low", ascending=False)
    left, right = st.columns(2, gap="medium")
    with left:
        panel.figure(expert_profile.partner_figure(mine), f"experts-partners-{layer}-{expert}")
    with right:
        columns = ["other", "lift", "lift_low", "lift_high", "probability", "count", "expected", "q", "n_texts"]
        linked(
            mine[columns].reset_index(drop=True), f"experts-partners-of-{layer}-{expert}", layer, "other", height=380,
            column_config={
                "other": "expert", "probability": st.column_config.NumberColumn("of its tokens", format="percent"),
                "lift_low": "at least", "lift_high": "at most",
                "expected": st.column_config.NumberColumn(format="localized"),
                "q": st.column_config.NumberColumn(format="%.3g"),
            },
        )  # fmt: skip


def similar(trace: Trace, layer: int, expert: int) -> None:
    headed("Experts that fire on the same things, whether or not on the same token.", "similar_experts")
    index = one_expert.index(trace)
    with st.container(horizontal=True):
        by = "text"
        if index.known:
            by = st.segmented_control("By", ["token", "text"], default="token", required=True, key="experts_alike",
                                      bind="query-params", label_visibility="collapsed",
                                      format_func=lambda name: f"by {name}s")  # fmt: skip
        everywhere = st.toggle("In all layers", key="experts_everywhere", bind="query-params")
    arguments = {"layer": layer, "expert": expert, "by": by} | ({} if everywhere else {"layers": (layer,)})
    answer = panel.finished(panel.asking("similar_experts", arguments), one_expert.MORE)
    if answer is None:
        return
    frame = answer.table()
    st.markdown(f"- {messages.text(analyses.file('similar_experts').findings(frame)[0])}")
    name = f"{layer}-{expert}-{by}{'-all' * bool(everywhere)}"
    left, right = st.columns(2, gap="medium")
    with left:
        panel.figure(analyses.file("similar_experts").figure(frame), f"experts-similar-{name}")
    with right:
        linked(
            frame[["other_layer", "other", "value", "low", "high", "count", "both", "n_texts"]],
            f"experts-similar-to-{name}", "other_layer", "other", height=380,
            column_config={"other_layer": "layer", "other": "expert", "value": "cosine", "both": "tokens of both"},
        )  # fmt: skip


def importance(trace: Trace, layer: int, expert: int) -> None:
    headed("The scores that pruning and quantising go by, against the other experts of the layer.", "importance")
    answer = panel.finished(panel.asking("importance", {"n_resamples": RESAMPLES}), one_expert.MORE)
    if answer is None:
        return
    frame = answer.table()
    row = frame[(frame["layer"] == layer) & (frame["expert"] == expert)].iloc[0]
    scores = [name.removesuffix("_rank") for name in frame.columns if name.endswith("_rank")]
    of_layer = frame[frame["layer"] == layer]
    shown = pd.DataFrame(
        {
            "score": [score.replace("_", " ") for score in scores],
            "value": [row[score] for score in scores],
            "low": [row[f"{score}_low"] for score in scores],
            "high": [row[f"{score}_high"] for score in scores],
            "rank": [row[f"{score}_rank"] for score in scores],
            "of": len(of_layer),
            "median of the layer": [of_layer[score].median() for score in scores],
            "largest of the layer": [of_layer[score].max() for score in scores],
        }
    )
    number = st.column_config.NumberColumn(format="%.4g")
    panel.table(
        shown, f"experts-importance-{layer}-{expert}",
        column_config=dict.fromkeys(("value", "low", "high", "median of the layer", "largest of the layer"), number),
    )  # fmt: skip
    missing = [name for name, needs in analyses.file("importance").NEEDS.items() if not trace.recorded >= set(needs)]
    if missing:
        st.caption(
            f"{', '.join(name.replace('_', ' ') for name in missing)}: not known, because the run didn't record what "
            "they take. Trace again with `--record ids,weights,norms,shift`."
        )


def favourites(trace: Trace, layer: int, expert: int) -> None:
    headed("Token ids whose first choice goes to this expert more often than to any other.", "vocabulary")
    answer = panel.finished(panel.asking("vocabulary", {}), one_expert.MORE)
    if answer is None:
        return
    frame = answer.table()
    mine = frame[(frame["layer"] == layer) & (frame["expert"] == expert)].sort_values("low", ascending=False)
    sure = mine[mine["q"] < expert_grid.SIGNIFICANT]
    st.markdown(
        f"- It is the favourite of {len(mine):,} of {frame['token_id'].nunique():,} token ids, of {len(sure):,} of "
        "them by more than chance explains (false-discovery rate 5%)."
    )
    if mine.empty:
        return
    shown = mine.assign(text=mine["text"].map(visible, na_action="ignore"))
    columns = ["text", "value", "low", "high", "chance", "q", "count", "n_tokens", "n_texts", "token_id"]
    percent = st.column_config.NumberColumn(format="percent")
    panel.table(
        shown[columns].reset_index(drop=True), f"experts-vocabulary-{layer}-{expert}", height=380,
        column_config={
            "text": "token", "value": st.column_config.NumberColumn("of its first choices", format="percent"),
            "low": percent, "high": percent, "chance": st.column_config.NumberColumn("by chance", format="percent"),
            "q": st.column_config.NumberColumn(format="%.3g"),
        },
    )  # fmt: skip


def columns(trace: Trace, layer: int, expert: int) -> None:
    index = one_expert.index(trace)
    names = expert_profile.groupings(index)
    by = st.selectbox("Groups of tokens", names, max(names.index("position"), 0), key="experts_column",
                      bind="query-params", width=260, format_func=figures.noun)  # fmt: skip
    group_part(trace, layer, expert, by, "-other")


def weights(trace: Trace, layer: int, expert: int) -> None:
    headed("How alike the experts of the layer are by their weights, neurons as they are.", "similarity")
    asked = panel.asking("similarity", {"layers": (layer,), "n_matched": 0, "n_chance": 0})
    if view.workers().known(asked) is None:
        name = messages.text(view.model_name())
        st.markdown(f"This loads the model {name} in a process of its own.")
        if not st.button("Compare the weights", icon=":material/compare:", key="experts_weights"):
            return
    answer = panel.finished(asked, one_expert.MORE, stays=True)
    if answer is None:
        return
    frame = answer.table()
    whole = frame[frame["matrix"] == "all"]
    mine = whole[(whole["expert"] == expert) | (whole["other"] == expert)]
    other = np.where(mine["expert"] == expert, mine["other"], mine["expert"])
    shown = mine.assign(other=other)[["other", "cosine", "mean_cosine", "router_cosine"]]
    linked(
        shown.sort_values("cosine", ascending=False, ignore_index=True), f"experts-weights-{layer}-{expert}", layer,
        "other", height=380,
        column_config={"other": "expert", "mean_cosine": "averages over neurons", "router_cosine": "router rows"},
    )  # fmt: skip


def group_part(trace: Trace, layer: int, expert: int, by: str, key: str = "") -> None:
    """What an expert prefers among the values of a column."""
    frame = one_expert.groups(trace, layer, expert, by)
    noun = messages.text(figures.noun(by))
    st.subheader(f"By {noun}", anchor=False)
    if len(frame) < 2:
        st.caption(f"Every token has the same {noun}, so there is nothing to compare.")
        return
    name = f"experts-{by.replace(' ', '-')}{key}-{layer}-{expert}"
    panel.figure(expert_profile.group_figure(frame), name)
    with st.expander("Table", icon=":material/table:"):
        percent = st.column_config.NumberColumn(format="percent")
        panel.table(frame.drop(columns="by"), name, column_config={
            "group": figures.noun(by), "share": percent, "overall": percent, "rate": percent, "share_low": percent,
            "share_high": percent,
        })  # fmt: skip
