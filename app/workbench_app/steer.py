"""A prompt continued plainly and under a recipe of interventions, side by side, and what the recipe changed."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

from workbench.errors import InputError
from workbench.recipe import Recipe, check_model, described, from_json, of_trace, to_json
from workbench_app import builder, draft, messages, steered, view

PROMPT = "The treaty was signed"
IN_LINK = 2000
"""Characters of a prompt that still fit into the link."""
LARGEST_SEED = 2**31 - 1
"""Of the seeds that the page takes."""
CANDIDATES = 30
"""Likeliest tokens of each continuation whose probabilities are kept at every step."""


# --- what is asked for


def model_name() -> str:
    """The model that is steered."""
    default = str(view.model_name() or "demo")
    return (st.session_state.get("steer_model") or st.query_params.get("steer_model") or default).strip()


def facts(name: str) -> dict[str, Any]:
    """The model as a recipe names it, without loading it. InputError if there is none, or it can't be traced."""
    known = view.runs()
    if known and known[view.run()]["model"] == name and (found := of_trace(view.whole())):
        return found
    found = _described(name)
    if isinstance(found, str):
        raise InputError(found)
    return found


@st.cache_data(max_entries=16, ttl=600, show_spinner="Reading the model's configuration …")
def _described(name: str) -> dict[str, Any] | str:
    """`facts` from the configuration; an error's text, which is kept as well: to look for a model may take long."""
    from workbench.models import describe

    try:
        found = describe(name)
    except InputError as error:
        return str(error)
    layers = [[layer["n_experts"], layer["top_k"]] for layer in found["layers"]]
    return {"name": name, "family": found["family"], "layers": layers}


def question() -> None:
    """Widgets for the prompt and the settings."""
    st.session_state.setdefault("steer_text", st.query_params.get("steer_prompt", PROMPT))
    prompt = st.text_area("Prompt", key="steer_text", height=130, persist_state="session")
    remember("steer_prompt", prompt if prompt != PROMPT and len(prompt) <= IN_LINK else "")
    st.text_input(
        "Model", str(view.model_name() or "demo"), key="steer_model", bind="query-params",
        help="A Hub id, a folder, or `demo`. Another model is loaded when you generate; editing the recipe loads none.",
    )  # fmt: skip
    most, temperature, seed = st.columns(3, gap="small")
    most.number_input(
        "Most tokens", 1, 4096, 64, key="steer_max", bind="query-params", help="The model may end its text before."
    )
    temperature.number_input(
        "Temperature", 0.0, 10.0, 0.0, 0.1, key="steer_temperature", bind="query-params",
        help="0 takes the likeliest token, else tokens are drawn, with the same random numbers in all texts.",
    )  # fmt: skip
    seed.number_input(
        "Seed", 0, LARGEST_SEED, 0, key="steer_seed", bind="query-params",
        help="Of drawn tokens, and of the control's experts.",
    )  # fmt: skip
    with st.container(horizontal=True, gap="medium"):
        st.toggle(
            "Chat", key="steer_chat", bind="query-params",
            help="The prompt is what a user says: the model's chat template is applied.",
        )  # fmt: skip
        st.toggle(
            "Control: random experts", key="steer_control", bind="query-params",
            help="Also continue the prompt under the same edits of as many experts drawn at random. Where that changes "
            "the text as much as your recipe does, the change isn't about the experts that you chose.",
        )  # fmt: skip


def settings() -> dict[str, Any]:
    """What `generate` takes beside prompt and recipe."""
    state = st.session_state
    return {
        "max_tokens": int(state["steer_max"]),
        "temperature": float(state["steer_temperature"]),
        "seed": int(state["steer_seed"]),
        "chat": bool(state["steer_chat"]),
    }


def remember(parameter: str, value: str) -> None:
    """A parameter of the URL that is no widget's; "" for none."""
    if value and st.query_params.get(parameter) != value:
        st.query_params[parameter] = value
    elif not value and parameter in st.query_params:
        del st.query_params[parameter]


# --- the recipe


def recipe(model: dict[str, Any] | None) -> None:
    """The recipe that is being built: what is in it, widgets that add to it, files."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Recipe", anchor=False, width="stretch")
        with st.popover("Open", icon=":material/upload_file:", type="tertiary"):
            number = st.session_state.get("steer_uploads", 0)
            st.file_uploader(
                "A recipe, or a saved result", type="json", key=f"steer_file_{number}", on_change=upload,
                args=(f"steer_file_{number}", model),
            )  # fmt: skip
        st.download_button(
            "Save", recipe_file(model), "recipe.json", "application/json", type="tertiary", key="steer_save",
            icon=":material/download:", disabled=not draft.interventions(), on_click="ignore",
            help="The recipe as a file, for `workbench generate --recipe`. What is switched off isn't in it.",
        )  # fmt: skip
        st.button(
            "Clear", key="steer_clear", type="tertiary", icon=":material/delete_sweep:", on_click=draft.clear,
            disabled=not draft.entries(),
        )  # fmt: skip
    if (said := st.session_state.pop("steer_upload_error", None)) is not None:
        st.warning(messages.text(said), icon=":material/info:")
    if not draft.entries():
        st.caption("Nothing is edited yet. Add an edit below, or on the Experts page: “add to recipe”.")
    for at, entry in enumerate(draft.entries()):
        with st.container(horizontal=True, vertical_alignment="center", key=f"steer-entry-{entry.number}"):
            on = st.toggle(
                messages.text(described(entry.intervention)), entry.on, key=f"steer_on_{entry.number}", width="stretch"
            )
            entry.on = on
            st.button(
                "Remove", key=f"steer_remove_{entry.number}", icon=":material/close:", type="tertiary",
                on_click=draft.remove, args=(at,),
            )  # fmt: skip
    if model is not None:
        with st.container(border=True), messages.guarded():
            made = builder.build([(size, k) for size, k in model["layers"]])
            if made is not None:
                draft.add(made)
                st.rerun()


def current(model: dict[str, Any] | None) -> Recipe | None:
    """The recipe of what is switched on; None if nothing is."""
    edits = draft.interventions()
    return Recipe(edits, model or {}, {"method": "built on the Steer page"}) if edits else None


def recipe_file(model: dict[str, Any] | None) -> str:
    """The current recipe as its file has it; "" if there is none."""
    made = current(model)
    return "" if made is None else json.dumps(to_json(made), indent=1, ensure_ascii=False) + "\n"


def upload(key: str, model: dict[str, Any] | None) -> None:
    """Take the recipe of a file, or the recipe, prompt and settings of a saved result."""
    file = st.session_state.get(key)
    if file is None:
        return
    st.session_state["steer_uploads"] = st.session_state.get("steer_uploads", 0) + 1
    try:
        found = _json(file.getvalue(), file.name)
        saved = isinstance(found, dict) and "recipe" in found and isinstance(found.get("prompt"), str)
        values = found["recipe"] if saved else found
        read = Recipe(()) if saved and values is None else from_json(values)
        if model is not None and not saved:
            check_model(read, model)
        if saved:
            _restore(found)
        draft.replace(read.interventions)
    except InputError as error:
        st.session_state["steer_upload_error"] = f"{file.name}: {error}"


def _json(raw: bytes, name: str) -> Any:
    try:
        found = json.loads(raw.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half of a pair of characters can't be shown
        return found
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}); expected a recipe, as `workbench find` writes it.") from error


def _restore(found: dict[str, Any]) -> None:
    """Prompt, model and settings of a saved result."""
    wanted = {
        "steer_text": ("prompt", str), "steer_model": ("model", str), "steer_max": ("max_tokens", int),
        "steer_temperature": ("temperature", float), "steer_seed": ("seed", int), "steer_chat": ("chat", bool),
    }  # fmt: skip
    try:
        values = {key: kind(found[name]) for key, (name, kind) in wanted.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"the result has no usable {error}; expected what the Steer page saves.") from None
    most, temperature, seed = (values[key] for key in ("steer_max", "steer_temperature", "steer_seed"))
    if not (1 <= most <= 4096 and 0 <= temperature <= 10 and 0 <= seed <= LARGEST_SEED):
        raise InputError("the result's settings are out of range; expected what the Steer page saves.")
    st.session_state.update(values, steer_control="control" in found)


# --- generating


def start() -> None:
    """Begin to generate what is asked for. InputError if it can't be."""
    steered.stop()
    name = model_name()
    loaded = view.model(name)
    from workbench.steering import Steering

    prompt, asked, made = st.session_state["steer_text"], settings(), current(facts(name))
    control = asked["seed"] if st.session_state["steer_control"] and made is not None else None
    options = {"control": control, "candidates": CANDIDATES, "record": ("weights",), "wanted": steered.wanted()}
    steered.begin(Steering(loaded, prompt, made, **options, **asked))


def from_link() -> bool:
    """Whether a copied link asks for its continuations: once a session, and only from the server's own model."""
    first = "steer_opened" not in st.session_state
    st.session_state["steer_opened"] = True
    return first and "steer_generated" in st.query_params and model_name() == str(view.model_name() or "demo")


def controls() -> None:
    """Generate and Stop."""
    running = steered.running()
    with st.container(horizontal=True):
        go = st.button(
            "Generate", key="steer_go", type="primary", icon=":material/play_arrow:", disabled=running, width="stretch"
        )
        st.button(
            "Stop", key="steer_stop", icon=":material/stop:", disabled=not running, on_click=steered.stop,
            width="stretch",
        )  # fmt: skip
    with messages.guarded():
        linked = from_link()
        if linked:
            steered.choose(st.query_params.get("steer_step", ""))
        if go or linked:
            start()
            st.rerun()


def page() -> None:
    st.title("Steer", anchor=False)
    with messages.guarded():
        draft.follow_link()
    left, right = st.columns([5, 6], gap="large")
    model = None
    with left:
        question()
        with messages.guarded():
            model = facts(model_name())
    with right:
        recipe(model)
    with left:
        controls()
    if not draft.write_link():
        st.caption("The recipe is too long for the link: save it as a file to pass it on.")
    number = steered.shown()
    remember("steer_generated", "" if number is None else "1")
    remember("steer_step", steered.chosen())
    if number is None:
        st.info("Write a prompt, build a recipe, and generate: the texts appear here.", icon=":material/tune:")
    else:
        steered.outcome(number)


page()
