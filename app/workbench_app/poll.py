"""Draw a fragment again and again while it waits for something: only that fragment, and only while it shows this.

`st.fragment(run_every=…)` goes on until the whole page is drawn anew, which would dim the page each time that one of its
panels is done.
"""

import streamlit as st

JS = """
export default function ({ parentElement, setTriggerValue }) {
  const host = parentElement.host ?? parentElement;
  if (!host.timer) host.timer = setInterval(() => setTriggerValue("tick", Date.now()), 300);
  return () => { clearInterval(host.timer); host.timer = null; };
}
"""
_poll = st.components.v2.component("workbench_poll", js=JS)


def again(name: str) -> None:
    """Draw the fragment that this is in again, soon; unique names on a page."""
    _poll(key=f"poll-{name}", height="content", on_tick_change=lambda: None)
