"""The tokens of a text as they stand, coloured: hovering shows a token's routing, a click or the arrow keys pin it."""

import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import streamlit.components.v2 as components

from workbench.colouring import N_COLOURS, Coloured, Palette
from workbench.reading import Reading, visible
from workbench.schema import PHASES, UNKNOWN_TOKEN

PAGE = 1500
"""Tokens that are shown at a time: a text of any length stays quick."""
MOST_CHIPS = 28
"""Experts in the legend."""
PIECE = "·"
"""Stands for a token that goes on with a character that began before it."""
here = Path(__file__).parent
_component = components.component(
    "workbench_token_text",
    html="""
<div class="tokens"><style class="colours"></style><div class="legend"></div>
<div class="pane" tabindex="0" role="listbox" aria-label="Tokens of the text: arrow keys move the pinned one"></div>
<div class="hint">Hover for the experts of every layer. Click to pin a token, or move with the arrow keys; Esc unpins.
</div><div class="tip" popover="manual" role="tooltip"></div></div>""",
    css=(here / "token_text.css").read_text(encoding="utf-8"),
    js=(here / "token_text.js").read_text(encoding="utf-8"),
)


def token_text(
    text: Reading,
    values: np.ndarray,
    colours: Coloured,
    *,
    title: str,
    key: str,
    part: int = 0,
    layer: int | None = None,
    pin: int | None = None,
    only: int | None = None,
    numbers: bool = False,
    on_pin: Callable[[], None],
    on_only: Callable[[], None],
) -> None:
    """Show PAGE tokens of a text, from PAGE * part on.

    values, colours   of all its tokens (workbench.colouring); title: what they are, for the legend
    layer             whose row of the tooltip is marked
    pin               place of the pinned token in the text
    only              the expert that is put forward: tokens of others fade
    numbers           write the value of each token below it
    on_pin, on_only   called when the user chose another: st.session_state[key]["pin"]["at"] or ["only"]["at"], None for
                      none
    """
    first = PAGE * part
    shown = slice(first, min(first + PAGE, len(text)))
    _component(
        key=key,
        data={
            "key": f"{id(text)}-{first}",
            "start": first,
            "total": len(text),
            **_tokens(text, shown),
            **_colours(values, colours, shown),
            "title": title,
            "layer": layer,
            "pin": pin,
            "only": only,
            "numbers": _numbers(values[shown], colours) if numbers else None,
        },
        on_pin_change=on_pin,
        on_only_change=on_only,
    )


def _tokens(text: Reading, shown: slice) -> dict[str, Any]:
    """What the tokens are, whatever they are coloured by."""
    unknown = text.token_ids[shown] == UNKNOWN_TOKEN
    texts = [visible(one) for one in text.texts[shown]]
    pieces = [at for at, one in enumerate(texts) if not one and not unknown[at]]
    names = {at: _piece(text.entries[shown.start + at], int(text.token_ids[shown.start + at])) for at in pieces}
    for at in pieces:
        texts[at] = PIECE
    for at in np.flatnonzero(unknown).tolist():
        texts[at] = "⟨?⟩"
    begins = np.flatnonzero(np.diff(text.seq[shown], prepend=-1))
    places = {seq: place for place, seq in enumerate(text.sequences["seq"], 1)}
    predicted = text.predicted_texts
    return {
        "texts": texts,
        "names": names or None,
        "pieces": pieces,
        "unknown": np.flatnonzero(unknown).tolist(),
        "begins": [[int(at), f"piece {places[text.seq[shown][at]]}"] for at in begins] if len(places) > 1 else [],
        "ids": text.token_ids[shown].tolist(),
        "phases": [PHASES[code] for code in text.phase[shown]],
        "predicted": None if predicted is None else [visible(one) for one in predicted[shown]],
        "nll": _packed(text.nll[shown], "<f4"),
        "k": text.experts.shape[2],
        "top_k": text.layers["top_k"].tolist(),
        "experts": _packed(text.experts[:, shown], "<u2"),
        **{
            name: None if values is None else _packed(values[:, shown], "<f4")
            for name, values in (("weights", text.weights), ("entropy", text.entropy), ("margin", text.margin))
        },
    }


def _piece(entry: str, token_id: int) -> str:
    return f"piece of a character: {visible(entry)}" if entry else f"⟨token {token_id}⟩"


def _colours(values: np.ndarray, colours: Coloured, shown: slice) -> dict[str, Any]:
    unknown = int((colours.codes < 0).sum())
    legend: dict[str, Any] = {"none": unknown}
    experts = None
    if colours.low is None:
        counts = Counter(values[np.isfinite(values)].astype(int).tolist()).most_common()
        legend["experts"] = [[expert, expert % N_COLOURS, count] for expert, count in counts[:MOST_CHIPS]]
        legend["more"] = max(len(counts) - MOST_CHIPS, 0)
        experts = [int(value) if np.isfinite(value) else None for value in values[shown]]
    elif colours.high is not None:
        legend["low"] = f"{'≤ ' if colours.below else ''}{colours.low:.3g}"
        legend["high"] = f"{'≥ ' if colours.above else ''}{colours.high:.3g}"
    return {
        "codes": _packed(colours.codes[shown], "<i2"),
        "light": _palette(colours.light),
        "dark": _palette(colours.dark),
        "legend": legend,
        "experts_shown": experts,
    }


def _palette(palette: Palette) -> dict[str, list[str]]:
    return {"background": palette.background, "ink": palette.ink}


def _numbers(values: np.ndarray, colours: Coloured) -> list[str]:
    whole = colours.low is None
    return ["–" if not np.isfinite(value) else f"{value:.0f}" if whole else f"{value:.2g}" for value in values.tolist()]


def _packed(values: np.ndarray, kind: str) -> str:
    """Base64 of the values, row by row."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()
