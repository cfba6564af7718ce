"""The recipe that is being built: interventions in their order, each of which can be switched off.

It belongs to the session, so that any page can add to it, and stands in the URL of the Steer page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import streamlit as st

from workbench.errors import InputError
from workbench.interventions import AnyIntervention
from workbench.recipe import FORMAT, VERSION, brief, from_json

PARAMETER = "steer_recipe"
"""Of the URL: a list of interventions as JSON; those that are switched off have "on": false."""
IN_LINK = 4000
"""Characters of a recipe that still fit into the link."""


@dataclass
class Entry:
    """An intervention of the draft; number is its own as long as the session lasts."""

    number: int
    intervention: AnyIntervention
    on: bool = True


def entries() -> list[Entry]:
    """All of them, in their order."""
    return st.session_state.setdefault("draft", [])


def interventions() -> tuple[AnyIntervention, ...]:
    """Those that are switched on, in their order."""
    return tuple(entry.intervention for entry in entries() if entry.on)


def add(intervention: AnyIntervention, *, on: bool = True) -> None:
    """Put one behind the others."""
    number = st.session_state.get("draft_number", 0) + 1
    st.session_state["draft_number"] = number
    entries().append(Entry(number, intervention, on))


def remove(at: int) -> None:
    """Take away the one at this place, from 0."""
    del entries()[at]


def clear() -> None:
    """Take away all."""
    entries().clear()


def replace(new: Iterable[AnyIntervention]) -> None:
    """Take away all, and put these in their place."""
    clear()
    for intervention in new:
        add(intervention)


def written() -> str:
    """The draft as the URL has it; "" for an empty one."""
    values = [brief(entry.intervention) | ({} if entry.on else {"on": False}) for entry in entries()]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")) if values else ""


def follow_link() -> None:
    """Take the draft from the URL if it has one that this session didn't put there. InputError if it is none."""
    given = st.query_params.get(PARAMETER, "")
    if not given or given == st.session_state.get("draft_link"):
        return
    st.session_state["draft_link"] = given
    read = _read(given)
    clear()
    for intervention, on in read:
        add(intervention, on=on)


def write_link() -> bool:
    """Put the draft into the URL; False where it is too long for that."""
    link = written()
    fits = len(link) <= IN_LINK
    st.session_state["draft_link"] = link if fits else ""
    if link and fits:
        if st.query_params.get(PARAMETER) != link:
            st.query_params[PARAMETER] = link
    elif PARAMETER in st.query_params:
        del st.query_params[PARAMETER]
    return fits


def _read(given: str) -> list[tuple[AnyIntervention, bool]]:
    try:
        values: Any = json.loads(given)
        json.dumps(values, ensure_ascii=False).encode()  # half of a pair of characters can't be shown
        switched = [bool(value.pop("on", True)) for value in values]
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{PARAMETER} in the link is {given[:80]!r}; expected a list of interventions.") from None
    found = from_json({"format": FORMAT, "version": VERSION, "interventions": values})
    return list(zip(found.interventions, switched, strict=True))
