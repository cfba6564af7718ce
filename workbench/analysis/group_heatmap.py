"""A number of many groups in every layer, as a heatmap: for more groups than lines can show."""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures


def group_heatmap(part: pd.DataFrame, title: str, *, ascending: bool = False, signed: bool = False) -> Figure:
    """A row a group, a column a layer.

    part       one row a group × layer: group, layer, value, low, high, and chance where there is such a level
    title      of the colour scale
    ascending  groups of the smallest mean value on top, instead of the largest
    signed     white is 0, and the colours differ on its two sides
    """
    order = part.groupby("group")["value"].mean().sort_values(ascending=ascending, na_position="last").index
    names = [name for name in ("value", "low", "high", "chance") if name in part]
    wide = {name: part.pivot(index="group", columns="layer", values=name).loc[order] for name in names}
    result = figures.panels([""], height=max(14 * len(order), 120))
    draw = figures.differences if signed else figures.amounts
    chance = "<br>by chance %{customdata[3]:.3f}" if "chance" in names else ""
    result.add_trace(
        draw(
            wide["value"].to_numpy(),
            x=[str(layer) for layer in wide["value"].columns],
            y=[figures.plain(group) for group in order],
            hover="%{y} · layer %{x}<br>%{customdata[0]:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}]"
            f"{chance}<extra></extra>",
            details=np.stack([values.to_numpy() for values in wide.values()], axis=-1),
        )
    )
    if signed:
        values = np.abs(wide["value"].to_numpy(float))
        figures.difference_scale(result, title, float(np.nanmax(values, initial=0)))
    else:
        figures.amount_scale(result, title)
    result.update_xaxes(title="layer", showgrid=False, type="category")
    result.update_yaxes(autorange="reversed", showgrid=False, ticks="", tickmode="linear", dtick=1)
    return result
