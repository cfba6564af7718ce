"""Grids of columns, a row a layer, against loops."""

import math

import pandas as pd

from workbench.analysis.layer_rows import layer_rows


def test_rows_are_sorted_and_filled_up():
    frame = pd.DataFrame(
        {"layer": [0, 0, 0, 2, 2], "expert": [0, 1, 2, 0, 1], "gain": [0.1, 0.5, -0.2, 0.0, 0.3], "n": [1, 2, 3, 4, 5]}
    )
    names, grids = layer_rows(frame, "gain", ("gain", "expert", "n"))
    assert names == ["layer 0", "layer 2"]
    assert grids["expert"][0].tolist() == [1, 0, 2] and grids["gain"][0].tolist() == [0.5, 0.1, -0.2]
    for name, grid in grids.items():
        assert grid.shape == (2, 3) and math.isnan(grid[1, 2]), name
        for row, layer in zip(grid, (0, 2), strict=True):
            of_layer = frame[frame["layer"] == layer].sort_values("gain", ascending=False)
            assert row[: len(of_layer)].tolist() == of_layer[name].tolist()


def test_one_expert():
    names, grids = layer_rows(pd.DataFrame({"layer": [4], "gain": [1.0]}), "gain", ["gain"])
    assert names == ["layer 4"] and grids["gain"].tolist() == [[1.0]]
