"""The experts of all layers as cells: hovering tells a cell's number, a click or the arrow keys choose an expert."""

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st
import streamlit.components.v2 as components

from workbench import expert_grid, figures
from workbench.expert_grid import Metric

EMPTY, STEPS = 255, 254
"""Codes of colours: EMPTY where there is no value, else 0 to STEPS."""
here = Path(__file__).parent
_component = components.component(
    "workbench_expert_cells",
    html="""
<div class="cells"><div class="legend"><span class="unit"></span><span class="bar"></span></div>
<div class="pane" tabindex="0" role="application"><canvas></canvas><div class="frame"></div></div>
<div class="tip" popover="manual" role="tooltip"></div></div>""",
    css=(here / "expert_cells.css").read_text(encoding="utf-8"),
    js=(here / "expert_cells.js").read_text(encoding="utf-8"),
)


def expert_cells(
    frame: pd.DataFrame,
    metric: Metric,
    *,
    unit: str,
    by_value: bool,
    each_layer: bool,
    chosen: tuple[int, int],
    key: str,
    on_choose: Callable[[], None],
) -> None:
    """Show a number of every expert.

    frame      of workbench.expert_grid.values; unit: of its values, for the legend and tooltips
    by_value, each_layer   as in workbench.expert_grid
    chosen     (layer, expert) that has a frame
    on_choose  called when the user chose another: st.session_state[key]["choose"] is [layer, expert]
    """
    shown, experts = expert_grid.grid(frame, by_value=by_value)
    places, ticks = expert_grid.scaled(shown, metric.kind, each_layer=each_layer)
    codes = np.where(np.isfinite(places), np.rint(np.nan_to_num(places) * STEPS), EMPTY)
    dark = st.context.theme.type == "dark"
    scales = {
        ("ratio", False): figures.DIVERGING, ("ratio", True): figures.DIVERGING_DARK,
        ("amount", False): figures.SEQUENTIAL, ("amount", True): figures.SEQUENTIAL_DARK,
    }  # fmt: skip
    numbers = {name: expert_grid.grid(frame, name, by_value=by_value)[0] for name in ("low", "high", "count")}
    _component(
        key=key,
        data={
            "layers": np.sort(frame["layer"].unique()).tolist(),
            "columns": shown.shape[1],
            "codes": _packed(codes, "<u1"),
            "experts": _packed(experts, "<i2"),
            "value": _packed(shown, "<f4"),
            **{name: _packed(values, "<f4") for name, values in numbers.items()},
            "colours": scales[metric.kind, dark],
            "ticks": [[at, text] for at, text in ticks],
            "unit": unit,
            "byValue": by_value,
            "chosen": list(chosen),
        },
        on_choose_change=on_choose,
    )


def _packed(values: np.ndarray, kind: str) -> str:
    """Base64 of the values, row by row."""
    return base64.b64encode(np.ascontiguousarray(values.astype(kind)).tobytes()).decode()
