"""Fragments that wait for something are drawn again and again, and only they, until they no longer wait.

One timer for the page does it. `st.fragment(run_every=…)` would go on until the whole page is drawn anew, and timers of
several fragments that tick at once would take each other's turns.
"""

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

JS = """
export default function ({ setTriggerValue }) {
  const app = document.querySelector('[data-testid="stApp"]');
  const idle = () => app.dataset.testScriptState === "notRunning";
  let asked = 0;
  const answered = new MutationObserver(() => { if (idle()) asked = 0; });
  answered.observe(app, { attributes: true, attributeFilter: ["data-test-script-state"] });
  const timer = setInterval(() => {
    const waiting = document.querySelector('[class*="st-key-waiting-"]');
    // A tick would break off the drawing that the one before it asked for, on a server that is slow to begin it.
    if (waiting && idle() && Date.now() - asked > 5000) {
      asked = Date.now();
      setTriggerValue("tick", asked);
    }
  }, 400);
  return () => { clearInterval(timer); answered.disconnect(); };
}
"""
STYLE = '<style>[data-stale="true"] { opacity: 1 !important; }</style>'
"""What is drawn again stays as it is until then: Streamlit would dim the page at each tick."""
_timer = st.components.v2.component("workbench_poll", js=JS)


def begin() -> None:
    """Nothing waits yet: called before a page is drawn."""
    st.session_state["waiting"] = set()


def waiting(fragment: str) -> DeltaGenerator:
    """Says that the fragment of this key, which calls it, has to be drawn again; a container for what it shows till then.

    What is in the container isn't empty: the timer looks for it on the page.
    """
    st.session_state["waiting"].add(fragment)
    return st.container(key=f"waiting-{fragment}", horizontal=True, vertical_alignment="center")


def done(fragment: str) -> None:
    """Says that the fragment of this key no longer waits."""
    st.session_state["waiting"].discard(fragment)


def timer() -> None:
    """The timer, drawn after the page."""
    st.html(STYLE)
    _timer(key="poll", height="content", on_tick_change=_tick)


def _tick() -> None:
    waiting = st.session_state.get("waiting")
    if waiting:
        st.rerun(sorted(waiting))
