"""The component that shows continuations side by side: they grow, what differs is marked, a click chooses a token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit.components.v2 as components

from workbench.continuations import differences, differing
from workbench.reading import visible

if TYPE_CHECKING:
    from workbench.generation import Generated

HERE = Path(__file__).parent
TITLES = {"plain": "Plain", "steered": "Steered", "control": "Control: random experts"}
ENDS = {"end": "ended by the model", "length": "as long as asked for", "stopped": "stopped"}
_show = components.component(
    "workbench_streams",
    html='<div class="streams" role="group" aria-label="Continuations"></div>',
    css=(HERE / "streams.css").read_text(),
    js=(HERE / "streams.js").read_text(),
)


def streams(found: Mapping[str, Generated], *, name: str, running: bool, chosen: int | None) -> Any:
    """Show continuations; what was clicked last, if anything: {"at": place of the token, "when": tells clicks apart}.

    name     another one: other continuations, so that nothing of the last is kept
    running  they still grow: the fragment that this is in is run again and again until they don't
    chosen   the place of the token that is chosen
    """
    beat = time.monotonic() if running else 0.0  # other data each time, so that the component always hears of it
    data = {"name": name, "running": running, "beat": beat, "chosen": chosen, "panels": panels(found, running)}
    told = _show(key="steer_streams", data=data, on_chosen_change=_nothing, on_tick_change=_nothing)
    clicked = told.get("chosen")
    return clicked if clicked and clicked.get("name") == name else None


def _nothing() -> None:
    """The run that follows does what there is to do."""


def panels(found: Mapping[str, Generated], running: bool) -> list[dict[str, Any]]:
    """What the component draws of each continuation.

    texts: what each token adds, every character of it visible; first: the place where it first differs, of plain from
    steered; differ: places of tokens that aren't those of plain.
    """
    marks = differences(found)
    shown = []
    for name, one in found.items():
        mark = marks.get(name if name != "plain" else "steered")
        differ = [] if name == "plain" else differing(found["plain"], one).nonzero()[0].tolist()
        n = len(one.steps)
        state = ("reading the prompt" if not n else "writing") if running else ENDS[one.ended]
        touched = f" · touched {', '.join(f'{count:,}' for count in one.touched)}" if any(one.touched) else ""
        shown.append(
            {
                "name": name,
                "title": TITLES[name],
                "note": f"{n:,} token{'s' * (n != 1)} · {state}{touched}",
                "texts": [visible(step.text) for step in one.steps],
                "first": None if mark is None else mark["at"],
                "differ": differ,
            }
        )
    return shown
