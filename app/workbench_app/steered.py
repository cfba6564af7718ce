"""What came out of the generations of a session: the texts side by side, and what the recipe changed in them."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import streamlit as st
from streamlit import runtime
from streamlit.runtime.scriptrunner import get_script_run_ctx

from workbench import continuations
from workbench.printing import plain
from workbench.recipe import described, to_json
from workbench_app import messages, panel
from workbench_app.streams import TITLES, streams

if TYPE_CHECKING:
    from workbench.steering import Steering

KEPT = 12
"""Generations that the session keeps."""
LONG = 2000
"""Characters of a prompt that is no longer shown in a command line."""
HEIGHT = 380
"""Of a table, in pixels, at most."""
GONE = 10.0
"""Seconds after which a session whose browser is away is no longer generated for."""


# --- the generations of the session


def history() -> dict[int, Steering]:
    """Generations by their number, oldest first."""
    return st.session_state.setdefault("steer_history", {})


def begin(new: Steering) -> None:
    """Look at one that has just begun."""
    number = st.session_state.get("steer_number", 0) + 1
    st.session_state.update(steer_number=number, steer_shown=number, steer_follows=True)
    history()[number] = new
    for old in list(history())[:-KEPT]:
        del history()[old]


def running() -> bool:
    """Whether one is being written."""
    return any(one.running for one in history().values())


def stop() -> None:
    """End what is being written, and wait for that: the time of a layer."""
    for one in history().values():
        one.stop()
        one.wait(10)


def wanted() -> Callable[[], bool]:
    """Asked from another thread: whether the browser of this session is there, or was some seconds ago."""
    ctx, seen = get_script_run_ctx(), time.monotonic()

    def asked() -> bool:
        nonlocal seen
        if ctx is None or not runtime.exists() or runtime.get_instance().is_active_session(ctx.session_id):
            seen = time.monotonic()
        return time.monotonic() - seen < GONE

    return asked


# --- which one is looked at, and where


def shown() -> int | None:
    """The generation that is looked at; the last one unless an earlier was chosen."""
    numbers = list(history())
    if not numbers:
        return None
    if len(numbers) == 1:
        return numbers[0]
    if st.session_state.get("steer_shown") not in numbers:
        st.session_state["steer_shown"] = numbers[-1]
    titles = {number: titled(number, one) for number, one in history().items()}
    return st.selectbox(
        "Generation", numbers[::-1], key="steer_shown", format_func=lambda number: titles[number], on_change=choose,
        help=f"The last {KEPT} generations of this session.",
    )  # fmt: skip


def titled(number: int, one: Steering) -> str:
    """A generation in a line."""
    edits = "plain" if one.recipe is None else ", ".join(map(described, one.recipe.interventions))
    prompt = one.prompt if len(one.prompt) <= 60 else f"{one.prompt[:60]}…"
    return plain(f"{number}: “{prompt}”  {edits if len(edits) <= 100 else edits[:100] + '…'}")


def choose(step: str = "") -> None:
    """Look at a step; "", or what is no number: at the first difference."""
    st.session_state["steer_step"] = int(step) if step.isdecimal() else None


def chosen() -> str:
    """The step that was chosen; "" if none was."""
    step = st.session_state.get("steer_step")
    return "" if step is None else str(step)


def step_of(one: Steering) -> int | None:
    """The step that is looked at: the chosen one, or the first at which steered and plain text differ."""
    longest = max((len(each.steps) for each in one.found.values()), default=0)
    step = st.session_state.get("steer_step")
    if one.running or (step is not None and step < longest):
        return step
    marks = continuations.differences(one.found)
    return next((mark["at"] for mark in marks.values() if mark is not None), 0)


# --- what came out


@st.fragment(key="steer_texts")
def texts(number: int) -> None:
    """The continuations; while they are written, the component asks for this again and again."""
    one = history()[number]
    writing = one.running  # asked before what there is, so that the last picture is complete
    clicked = streams(one.found, name=f"generation {number}", running=writing, chosen=step_of(one))
    if clicked is not None and clicked != st.session_state.get("steer_clicked"):
        st.session_state["steer_clicked"] = clicked
        choose(str(clicked["at"]))
        st.rerun()
    if not writing and st.session_state.pop("steer_follows", False):
        st.rerun()  # for what follows below


def outcome(number: int) -> None:
    """The texts, and what the recipe changed."""
    one = history()[number]
    texts(number)
    with messages.guarded():
        if one.error is not None:
            raise one.error
    st.caption(
        "Orange: not the token that the plain text has in this place; the strongest is the first that differs. Click a "
        "token, or go with ← and →, to see what it was chosen from."
    )
    if one.running or not any(each.steps for each in one.found.values()):
        return
    saved(number, one)
    if len(one.found) > 1:
        name = "steered"
        if "control" in one.found:
            name = st.segmented_control(
                "Plain against", ["steered", "control"], default="steered", required=True, key="steer_against",
                bind="query-params", format_func=lambda each: TITLES[each],
            )  # fmt: skip
        step(one, name)
        generated(one, name)


def saved(number: int, one: Steering) -> None:
    """The result as a file, and the command line that gives the same."""
    given = None if one.recipe is None else to_json(one.recipe)

    def file() -> bytes:
        found = continuations.result(one.model, one.prompt, one.settings, given, one.found)
        return json.dumps(found, indent=1).encode()

    with st.container(horizontal=True, vertical_alignment="center"):
        st.download_button(
            "Save the result", file, f"steer-{number}.json", "application/json", key="steer_result", type="tertiary",
            icon=":material/download:", on_click="ignore",
            help="Prompt, settings, recipe, texts and tokens: all that it takes to compute it again. “Open” reads it.",
        )  # fmt: skip
        with st.popover("Command line", icon=":material/terminal:", type="tertiary"):
            file_name = None if one.recipe is None else "recipe.json"
            if file_name:
                st.caption("With the recipe saved as recipe.json:")
            if len(one.prompt) <= LONG:
                control = one.control is not None
                line = continuations.command(one.model, one.prompt, one.settings, file_name, control=control)
                st.code(line, "sh", wrap_lines=True)
            else:
                st.caption("The prompt is too long for a command line; use the Python function `workbench.compare`.")


def step(one: Steering, name: str) -> None:
    """The next-token probabilities at a step that differ most, and the routing that they follow from."""
    at = step_of(one) or 0
    both = [one.found[each].steps for each in ("plain", name)]
    left, right = st.columns(2, gap="medium")
    with left, st.container(key="steer-probabilities"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.subheader(f"Next-token probabilities at token {at}", anchor=False, width="stretch")
            panel.definition(inspect.getdoc(continuations.probability_changes) or "")
        if all(at < len(steps) for steps in both):
            tokens = " and ".join(f"“{messages.text(steps[at].token)}”" for steps in both)
            mark = continuations.differences(one.found)[name]
            same = mark is None or at <= mark["at"]
            st.caption(
                f"Chosen: {tokens}. "
                + ("Both texts are the same up to here." if same else "The texts before it differ already.")
            )
            changes = continuations.probability_changes(both[0][at], both[1][at], ("plain", name))
            panel.table(
                changes.assign(token=changes["token"].map(plain)), f"probabilities-{name}-{at}", height=HEIGHT,
                column_config={
                    "token_id": None,
                    **{each: number_column(each, "%.4f") for each in ("plain", name)},
                    "difference": number_column("difference", "%+.4f"),
                    "log_ratio": number_column("log ratio", "%+.2f"),
                },
            )  # fmt: skip
        else:
            st.info("Only one of the two texts has a token here. Click an earlier one.", icon=":material/info:")
    with right, st.container(key="steer-routing-at"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.subheader(f"Experts behind token {at}", anchor=False, width="stretch")
            panel.definition(inspect.getdoc(continuations.routing_at) or "")
        st.caption("Of the token before it, layer by layer: each expert with its weight.")
        experts = continuations.routing_at({each: one.found[each] for each in ("plain", name)}, at)
        rows = continuations.beside(experts)
        panel.table(
            rows, f"experts-{name}-{at}", height=min(HEIGHT, 37 + 35 * len(rows)),
            column_order=["layer", f"changed_{name}", "plain", name],
            column_config={
                "layer": st.column_config.NumberColumn(width=50),
                f"changed_{name}": st.column_config.NumberColumn("changed", width=70),
            },
        )  # fmt: skip


def number_column(label: str, form: str) -> Any:
    return st.column_config.NumberColumn(label, format=form)


def generated(one: Steering, name: str) -> None:
    """The routing of all that was generated."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Routing of the generated text", anchor=False, width="stretch")
        panel.definition(f"{continuations.routing_changes.__doc__}\n\n{continuations.routing_shares.__doc__}")
    value = st.segmented_control(
        "Value", ["share", "weight"], default="share", required=True, key="steer_value", bind="query-params",
        label_visibility="collapsed",
        format_func=lambda each: {"share": "Share of selections", "weight": "Share of weight"}[each],
    )  # fmt: skip
    changes = continuations.routing_changes(one.found, one.n_experts, name=name, value=value)
    if changes["difference"].isna().all():
        st.info("Fewer than two tokens were generated: there is no routing to compare.", icon=":material/info:")
        return
    figure, table = st.tabs(["Figure", "Table"])
    with figure:
        panel.figure(continuations.figure(changes), f"routing-{name}")
    with table:
        order = changes["difference"].abs().sort_values(ascending=False, kind="stable").index
        panel.table(changes.loc[order], f"routing-{name}-table", column_config=shares(name))


def shares(name: str) -> dict[str, Any]:
    return {each: number_column(each, "%.4f") for each in ("plain", name)} | {
        "difference": number_column("difference", "%+.4f")
    }
