"""The button that copies the link to what is shown: the state of every widget is in the URL."""

import streamlit as st

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
_copy = st.components.v2.component(
    "workbench_copy_link",
    html='<button type="button" title="Copy the address of this view">Copy link</button>',
    css=CSS,
    js=JS,
)


def copy_button() -> None:
    """Copies the address of the page as it stands."""
    _copy(key="copy_link", height="content")
