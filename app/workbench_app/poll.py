"""A page on which something waits is drawn again when that is there, and now and then to show how far it is.

One timer for the page asks, in a fragment of its own. Timers of several fragments that tick at once would take each
other's turns, and a callback that asks for some fragments only would swallow a click that reaches the server with it.
"""

import time
from collections.abc import Callable

import streamlit as st
import streamlit.components.v2 as components
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
  }, 300);
  return () => { clearInterval(timer); answered.disconnect(); };
}
"""
STYLE = '<style>[data-stale="true"] { opacity: 1 !important; } .st-key-poll-slot { display: none; }</style>'
"""What is drawn again stays as it is until then: Streamlit would dim the page at each tick. The timer takes no room."""
EACH = 1.5
"""Seconds after which a page that waits is drawn again, to show how far it is."""
_timer = components.component("workbench_poll", js=JS)


def begin() -> DeltaGenerator:
    """Nothing waits yet: called before a page is drawn.

    Returns where the timer goes, which is the same place on every page: a tick that was sent as another page was opened
    is answered on the new one, and would be drawn where that has nothing.
    """
    st.session_state["waiting"] = {}
    st.session_state["drawn"] = time.monotonic()
    return st.container(key="poll-slot")


def waiting(name: str, ready: Callable[[], bool]) -> DeltaGenerator:
    """Says that what is called this waits until it is ready.

    Returns a container for what it shows meanwhile. Something has to be in it: the timer looks for it on the page.
    """
    st.session_state["waiting"][name] = ready
    return st.container(key=f"waiting-{name}", horizontal=True, vertical_alignment="center")


def done(name: str) -> None:
    """Says that it no longer waits."""
    st.session_state["waiting"].pop(name, None)


@st.fragment
def timer() -> None:
    """The timer, drawn after the page."""
    st.html(STYLE)
    _timer(key="poll", height="content", on_tick_change=lambda: None)
    waits = st.session_state["waiting"].values()
    if waits and (any(ready() for ready in waits) or time.monotonic() - st.session_state["drawn"] > EACH):
        st.rerun()
