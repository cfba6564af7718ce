"""The figure of one token: every choice is in it, and what was not recorded is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import routed

from workbench import reading
from workbench.errors import InputError
from workbench.token_figure import token_figure


def drawn(figure: Any) -> set[tuple[int, int]]:
    return {(int(x), int(y)) for one in figure.data if one.mode == "markers" for x, y in zip(one.x, one.y, strict=True)}


def test_every_choice_is_drawn(tmp_path: Path):
    random = np.random.default_rng(0)
    experts = np.stack([[random.permutation(6)[:3] for _ in range(4)] for _ in range(5)])
    experts[2, 1], experts[3] = -1, -1
    text = reading.read(
        routed.full_trace(
            tmp_path / "f.duckdb", experts, n_experts=6, seq=[0] * 5, sequences=pd.DataFrame([{}]),
            weights=np.where(experts < 0, 0, random.random(experts.shape)).astype(np.float32),
            entropy=random.random((4, 5)).astype(np.float32),
        ), 0,
    )  # fmt: skip
    for at in range(5):
        chosen = {(layer, int(e)) for layer in range(4) for e in experts[at, layer] if e >= 0}
        assert drawn(token_figure(text, at)) == chosen
    lines: Any = token_figure(text, 1).data
    token = next(one for one in lines if one.name == "this token")
    np.testing.assert_array_equal(token.y, text.entropy[:, 1].astype(float))
    for at in (-1, 5):
        with pytest.raises(InputError, match="tokens 0 to 4"):
            token_figure(text, at)


def test_ids_are_enough(tmp_path: Path):
    text = reading.read(routed.random_trace(tmp_path / "ids.duckdb", dropped=0).trace, 0)
    figure: Any = token_figure(text, 0)
    assert drawn(figure) and "this token" not in {one.name for one in figure.data}
