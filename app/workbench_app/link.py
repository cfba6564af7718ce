"""The link to what is shown: the state of every widget is in the URL, and a button copies it."""

import math
import re

import streamlit as st
import streamlit.components.v2 as components

TEXTS = ("tokens_search", "tokens_text", "steer_prompt")
"""Parameters that may be any words."""
NUMBER = re.compile(r"[-+]?(\d[\d.]*(e[-+]?\d+)?|inf|infinity)", re.IGNORECASE | re.ASCII)

JS = """
export default function ({ parentElement }) {
  const button = parentElement.querySelector("button");
  button.onclick = async () => {
    await navigator.clipboard.writeText(window.location.href);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy link"; }, 1500);
  };
}
"""
CSS = """
button {
  font: inherit; font-size: 0.875rem; width: 100%; padding: 0.4rem 0.75rem; cursor: pointer;
  color: var(--st-text-color); background: transparent;
  border: 1px solid var(--st-border-color); border-radius: var(--st-button-radius);
}
button:hover, button:focus-visible { border-color: var(--st-primary-color); color: var(--st-primary-color); }
"""
_copy = components.component(
    "workbench_copy_link",
    html='<button type="button" title="Copy the address of this view">Copy link</button>',
    css=CSS,
    js=JS,
)


def follow() -> None:
    """When a link is opened, take from it what no widget can hold: Streamlit fails on an empty choice and on infinity.

    Whatever else is wrong, Streamlit and the pages leave aside.
    """
    if st.session_state.setdefault("link_followed", False):
        return
    st.session_state["link_followed"] = True
    given = st.query_params.to_dict()
    wrong = [name for name, value in given.items() if not value or (name not in TEXTS and infinite(value))]
    if wrong:
        for name in wrong:
            del st.query_params[name]
        st.rerun()  # widgets take their values from the parameters that a run began with


def infinite(text: str) -> bool:
    """Whether a text is a number, and one that is too large."""
    try:
        return NUMBER.fullmatch(text.strip()) is not None and math.isinf(float(text))
    except ValueError:
        return False


def copy_button() -> None:
    """Copies the address of the page as it stands."""
    _copy(key="copy_link", height="content")
