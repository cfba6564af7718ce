"""A page on which something waits is drawn again when that is there, and now and then to show how far it is.

One timer for the page asks, in a fragment of its own. Timers of several fragments that tick at once would take each
other's turns, and a callback that asks for some fragments only would swallow a click that reaches the server with it.
"""

import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

import streamlit as st
import streamlit.components.v2 as components
from streamlit.delta_generator import DeltaGenerator

from workbench.background import Asked
from workbench_app import view

# The browser clicks a button where the fragment could call st.rerun. That goes on with the old page after a click on a
# link has stopped it, and the new page, should it call st.rerun itself, becomes the old one again. For the same reason
# nothing is asked between such a click and the new address: what is asked then names the old page.
JS = """
let asked = 0;
let left = { at: -Infinity, path: "" };
let stop = () => {};
document.addEventListener("click", ({ target }) => {
  if (target.closest?.("a")) left = { at: Date.now(), path: location.pathname };
}, true);
const leaving = () => location.pathname === left.path && Date.now() - left.at < 10000;

// Called again for each new `data`; what it returns is called when the component goes, and not before. Were the timer
// of the call before left running, it might always be the one that asks, and never know that something is due.
export default function ({ data, setTriggerValue }) {
  stop();
  const app = document.querySelector('[data-testid="stApp"]');
  const idle = () => app.dataset.testScriptState === "notRunning" && app.dataset.testConnectionState === "CONNECTED";
  const answered = new MutationObserver(() => { if (idle()) asked = 0; });
  answered.observe(app, { attributes: true, attributeFilter: ["data-test-script-state"] });
  const timer = setInterval(() => {
    const waiting = document.querySelector('[class*="st-key-waiting-"]');
    const again = document.querySelector(".st-key-poll-again button"); // its code may be loaded after ours
    // A tick would break off the drawing that the one before it asked for, on a server that is slow to begin it.
    if (!waiting || !again || !idle() || leaving() || Date.now() - asked < 5000) return;
    asked = Date.now();
    if (data.due) again.click();
    else setTriggerValue("tick", asked);
  }, 300);
  return stop = () => { clearInterval(timer); answered.disconnect(); };
}
"""
STYLE = '<style>[data-stale="true"] { opacity: 1 !important; } .st-key-poll-slot { display: none; }</style>'
"""What is drawn again stays as it is until then: Streamlit would dim the page at each tick. The timer takes no room."""
EACH = 1.5
"""Seconds after which a page that waits is drawn again, to show how far it is."""
_timer = components.component("workbench_poll", js=JS)


class Wait(NamedTuple):
    """What something on the page waits for; `asked` where `view.workers` are asked it."""

    ready: Callable[[], bool]
    asked: Asked | None


def begin() -> DeltaGenerator:
    """Nothing waits yet: called before a page is drawn.

    Returns where the timer goes, which is the same place on every page: a tick that was sent as another page was opened
    is answered on the new one, and would be drawn where that has nothing.
    """
    st.session_state["waiting"] = {}
    return st.container(key="poll-slot")


def end(slot: DeltaGenerator) -> None:
    """The page is drawn; the timer goes where `begin` said.

    What was waited for since the last page was drawn and isn't now, by any session, because this is another page, or
    about other texts, is not to keep what is asked now waiting.
    """
    st.session_state["drawn"] = time.monotonic()
    wanted, before = _wanted(), _mine()
    wanted[_session()] = {wait.asked for wait in st.session_state["waiting"].values() if wait.asked is not None}
    for asked in before.difference(*list(wanted.values())):
        view.workers().leave(asked)
    with slot:
        st.html(STYLE)
        st.button("Draw again", key="poll-again")
        _ask()


def waiting(name: str, ready: Callable[[], bool], asked: Asked | None = None) -> DeltaGenerator:
    """Says that what is called this waits until it is ready, and for which question.

    Returns a container for what it shows meanwhile. Something has to be in it: the timer looks for it on the page.
    """
    st.session_state["waiting"][name] = Wait(ready, asked)
    if asked is not None:
        _mine().add(asked)
    return st.container(key=f"waiting-{name}", horizontal=True, vertical_alignment="center")


def done(name: str) -> None:
    """Says that it no longer waits."""
    st.session_state["waiting"].pop(name, None)


@st.cache_resource(show_spinner=False)
def _wanted() -> dict[str, set[Asked]]:
    """What each session waits for, or has waited for since its page was last drawn to the end."""
    return {}


def _mine() -> set[Asked]:
    return _wanted().setdefault(_session(), set())


def _session() -> str:
    return st.session_state.setdefault("session", uuid.uuid4().hex)


@st.fragment
def _ask() -> None:
    """Tells the browser whether the page is due to be drawn again."""
    waits = st.session_state["waiting"].values()
    due = any(wait.ready() for wait in waits) or time.monotonic() - st.session_state["drawn"] > EACH
    _timer(key="poll", height="content", data={"due": due}, on_tick_change=lambda: None)
