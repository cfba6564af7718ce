"""Columns of a table about experts as grids, for heatmaps with a row a layer in which the order of experts is free."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def layer_rows(frame: pd.DataFrame, by: str, columns: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the rows, and a grid float (n_layers, most experts of a layer) of each column.

    frame  one row a layer × expert
    by     the column by which the experts of each layer are sorted, the largest first

    NaN fills the rows of layers with fewer experts.
    """
    parts = [part.sort_values(by, ascending=False) for _, part in frame.groupby("layer")]
    width = max(map(len, parts))
    names = [f"layer {part['layer'].iloc[0]}" for part in parts]
    grids = {
        name: np.array(
            [np.pad(part[name].to_numpy(float), (0, width - len(part)), constant_values=np.nan) for part in parts]
        )
        for name in columns
    }
    return names, grids
