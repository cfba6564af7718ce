"""Buttons that put an edit of an expert into the recipe that is being built."""

from __future__ import annotations

from typing import Any

import streamlit as st

from workbench.analysis.counting import experts_of
from workbench.errors import InputError
from workbench.interventions import Ablate, Bias, Forbid, Force, OnExperts, Scale
from workbench.recipe import described
from workbench.tracefile import Trace
from workbench_app import draft, messages


def actions(trace: Trace, layer: int, expert: int) -> None:
    """Buttons that put an edit of this expert into the recipe that is being built."""
    this: dict[str, Any] = {"layer": layer, "experts": [expert]}
    st.button("Ablate", icon=":material/block:", key="experts_ablate", on_click=add, args=(Ablate(**this),),
              help="Take the expert away: the next best takes its place.")  # fmt: skip
    with st.popover("Boost", icon=":material/trending_up:"):
        strength = st.slider(
            "Strength", -3.0, 3.0, 1.0, 0.1, key="experts_strength",
            help="Standard deviations of a token's router logits that are added to the expert's; below 0 it is chosen "
            "less often.",
        )  # fmt: skip
        st.button("Add the bias", key="experts_bias", on_click=add, args=(Bias(**this, strength=strength),),
                  type="primary")  # fmt: skip
        factor = st.number_input(
            "Factor", 0.0, 100.0, 2.0, 0.5, key="experts_factor",
            help="The expert's gate weight is multiplied by it where it is chosen; what is chosen stays.",
        )  # fmt: skip
        st.button("Add the scale", key="experts_scale", on_click=add, args=(Scale(**this, factor=factor),))
    st.button("Force", icon=":material/push_pin:", key="experts_force", on_click=add, args=(Force(**this),),
              help="Every token chooses the expert.")  # fmt: skip
    with st.popover("Add to recipe", icon=":material/playlist_add:"):
        kind = st.selectbox("Edit", ["Ablate", "Forbid", "Force", "Bias", "Scale"], key="experts_kind")
        others = st.text_input(
            "More experts of this layer", key="experts_others", placeholder="none: or 3, 17",
            help="Numbers, with commas: they are edited alike.",
        )  # fmt: skip
        scope = st.text_input(
            "Tokens", "all", key="experts_scope",
            help="all, or conditions such as `phase=generated`, `position=4-15`, `token=\" the\"`, joined by &.",
        )  # fmt: skip
        amount = 1.0
        if kind in ("Bias", "Scale"):
            amount = st.number_input("Strength" if kind == "Bias" else "Factor", value=1.0, key="experts_amount")
        with messages.guarded():
            made = edit(kind, layer, [expert, *numbers_in(others, experts_of(trace, layer))], scope, amount)
            st.code(described(made), "python", wrap_lines=True)
            st.button("Add", key="experts_add", type="primary", on_click=add, args=(made,))


def edit(kind: str, layer: int, experts: list[int], scope: str, amount: float) -> OnExperts:
    """The intervention that the form means. InputError for one that can't be."""
    kinds = {"Ablate": Ablate, "Forbid": Forbid, "Force": Force, "Bias": Bias, "Scale": Scale}
    more = {"Bias": {"strength": amount}, "Scale": {"factor": amount}}.get(kind, {})
    return kinds[kind](layer=layer, experts=list(dict.fromkeys(experts)), scope=scope.strip() or "all", **more)


def numbers_in(text: str, n_experts: int) -> list[int]:
    """Experts of a text such as "3, 17"."""
    words = [word for word in text.replace(",", " ").split() if word]
    wrong = [word for word in words if not word.isdecimal() or int(word) >= n_experts]
    if wrong:
        raise InputError(f"{wrong[0]!r} is no expert of this layer; expected numbers from 0 to {n_experts - 1}.")
    return [int(word) for word in words]


def add(intervention: OnExperts) -> None:
    """Put an edit into the recipe: from a callback."""
    draft.add(intervention)
    st.session_state["experts_added"] = described(intervention)


def added() -> None:
    """What was put into the recipe last, and the way to where it is tried."""
    if "experts_added" not in st.session_state:
        return
    with st.container(horizontal=True, vertical_alignment="center", key="experts-added"):
        st.success(
            f"In the recipe now: {messages.text(st.session_state['experts_added'])}", icon=":material/check:",
            width="stretch",
        )  # fmt: skip
        st.page_link("steer.py", label="Try it on the Steer page", icon=":material/tune:")
