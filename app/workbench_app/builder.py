"""The widgets that make one intervention: its kind, where it acts, its strength."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import streamlit as st

from workbench.errors import InputError
from workbench.interventions import (
    Ablate,
    AnyIntervention,
    Bias,
    Contrast,
    Forbid,
    Force,
    OnExperts,
    Scale,
    SetTopK,
    TopP,
)
from workbench_app import panel

SAYS = {
    "Ablate": "Take experts away; the next best take their place.",
    "Forbid": "Never select experts, though they still have a score.",
    "Force": "Select experts, whatever the router thinks.",
    "Bias": "Make experts more likely, or less.",
    "Scale": "Multiply the weight of experts where they are selected.",
    "SetTopK": "Select another number of experts a token.",
    "TopP": "Select as many experts as together reach a probability.",
    "Contrast": "Prefer tokens that the model finds likelier than it does with weaker routing.",
}
KINDS = {kind.__name__: kind for kind in (Ablate, Forbid, Force, Bias, Scale, SetTopK, TopP, Contrast)}
NAMES = {"SetTopK": "Top-k", "TopP": "Top-p"}
EVERYWHERE, PROMPT, GENERATED, POSITION, TOKEN, PATTERN, OTHER = SCOPES = (
    "all tokens", "the prompt", "generated tokens", "positions", "a token", "tokens by pattern", "a condition",
)  # fmt: skip
PLACEHOLDERS = {
    POSITION: "4-15, or 256+",
    TOKEN: "the text of the token, with its space",
    PATTERN: "a regular expression: ^ ?[0-9]+$",
    OTHER: "phase=generated & text~<think>",
}
SCOPE_HELP = (
    "Which tokens are edited. Positions are counted from 0, the prompt included. A condition joins several by ` & `, "
    'as in `phase=prompt & position=4-15`; others are `token=" the"`, `token~[0-9]` and `text~<think>`: a match in the '
    "text so far ends in the token."
)


def build(layers: list[tuple[int, int]]) -> AnyIntervention | None:
    """Widgets for a new intervention, and a button; what it makes when that is clicked. InputError says what is wrong.

    layers  experts and k of each layer
    """
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(
            "Edit", list(KINDS), key="steer_kind", format_func=lambda kind: NAMES.get(kind, str(kind)), width=180
        )
        panel.definition(inspect.getdoc(KINDS[name]) or "")
    st.caption(SAYS[name])
    kind = KINDS[name]
    given: dict[str, Any] = {}
    if kind is not Contrast:
        where = st.columns(2)
        with where[0]:
            chosen = st.multiselect(
                "Layers", range(len(layers)), key="steer_layers", placeholder="all layers",
                help="Layers with experts, counted from 0. None chosen: all of them.",
            )  # fmt: skip
        given["layer"] = None if not chosen else sorted(chosen) if len(chosen) > 1 else chosen[0]
        with where[1]:
            if issubclass(kind, OnExperts):
                given["experts"] = sorted(
                    st.multiselect(
                        "Experts",
                        range(max((size for size, _ in _of(layers, chosen)), default=0)),
                        key="steer_experts",
                        placeholder="choose",
                        help="Numbers from 0. The same number in another layer is another expert.",
                    )  # fmt: skip
                )
            else:
                parameters(kind, given, layers)
        if issubclass(kind, OnExperts):
            parameters(kind, given, layers)
    else:
        parameters(kind, given, layers)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        if kind is not Contrast:
            given["scope"] = scope()
        if not st.button("Add to the recipe", key="steer_add", icon=":material/add:"):
            return None
    if "experts" in given and not given["experts"]:
        raise InputError("no experts are chosen; expected at least one.")
    if given.get("scope", "all") != "all":
        from workbench import scope as scopes

        scopes.conditions(given["scope"])
    return kind(**given)


def scope() -> str:
    """Which tokens, as interventions have it."""
    what = st.selectbox("Tokens", SCOPES, key="steer_scope", help=SCOPE_HELP, width=180)
    fixed = {EVERYWHERE: "all", PROMPT: "phase=prompt", GENERATED: "phase=generated"}
    if what in fixed:
        return fixed[what]
    text = st.text_input(what.capitalize(), key=f"steer_scope_{what}", placeholder=PLACEHOLDERS[what], width="stretch")
    if not text:
        return ""
    if what == TOKEN:
        return f"token={json.dumps(text, ensure_ascii=False)}"
    return {POSITION: f"position={text}", PATTERN: f"token~{text}", OTHER: text}[what]


def parameters(kind: type, given: dict[str, Any], layers: list[tuple[int, int]]) -> None:
    """What else the kind asks for, explained by its docstring."""
    says = panel.parameters(inspect.getdoc(kind) or "")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        for name, widget in PARAMETERS[kind.__name__].items():
            value = widget(f"steer_{kind.__name__}_{name}", says.get(name), given, layers)
            if value is not None:
                given[name] = value
    if kind is Contrast:
        rank = given.pop("rank", 2)
        given["weak"] = (SetTopK(k=1, first=rank),)


Widget = Callable[[str, str | None, dict[str, Any], list[tuple[int, int]]], Any]


def _number(label: str, default: float, low: float | None, high: float | None, step: float) -> Widget:
    def widget(key: str, says: str | None, _given: Any, _layers: Any) -> Any:
        return st.number_input(label, low, high, default, step, key=key, help=says, width=150)

    return widget


def _one_of(label: str, *values: str) -> Widget:
    def widget(key: str, says: str | None, _given: Any, _layers: Any) -> Any:
        return st.segmented_control(label, values, default=values[0], required=True, key=key, help=says)

    return widget


def _renormalise(key: str, says: str | None, given: dict[str, Any], _layers: Any) -> Any:
    return st.toggle("renormalise", key=key, help=says) if given.get("level") == "output" else None


def _most(label: str, default: int | None) -> Widget:
    """A number from 1 up to the experts of a layer."""

    def widget(key: str, says: str | None, _given: Any, layers: list[tuple[int, int]]) -> Any:
        most = max((size for size, _ in layers), default=1)
        start = min(most, default) if default is not None else None
        return st.number_input(label, 1, most, start, 1, key=key, help=says, width=130, placeholder="no limit")

    return widget


PARAMETERS: dict[str, dict[str, Widget]] = {
    "Ablate": {"level": _one_of("level", "logits", "selection", "output"), "renormalise": _renormalise},
    "Forbid": {"margin": _number("margin", 0.01, None, None, 0.01)},
    "Force": {"level": _one_of("level", "logits", "selection"), "margin": _number("margin", 0.01, None, None, 0.01)},
    "Bias": {"strength": _number("strength", 1.0, None, None, 0.1), "unit": _one_of("unit", "std", "logits")},
    "Scale": {"factor": _number("factor", 2.0, 0.0, None, 0.5)},
    "SetTopK": {"k": _most("k", 1), "first": _most("first", 1)},
    "TopP": {"p": _number("p", 0.5, 0.01, 1.0, 0.05), "at_most": _most("at most", None)},
    "Contrast": {
        "alpha": _number("alpha", 0.1, 0.0, 1.0, 0.05),
        "beta": _number("beta", 0.5, 0.0, None, 0.1),
        "rank": _most("weak pass: only the expert of rank", 2),
    },
}


def _of(layers: list[tuple[int, int]], chosen: list[int]) -> list[tuple[int, int]]:
    return [layers[layer] for layer in chosen] if chosen else layers
