"""The terms of a token add up to what the family's own experts return, in every family of the standard layout."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from recorded import TRACED, model

from workbench.contributions import contributions, filler
from workbench.families import FAMILIES

STANDARD = [name for name in TRACED if FAMILIES[name].layout == "standard"]


@pytest.mark.parametrize("family", STANDARD)
def test_terms_add_up(family: str) -> None:
    made = model(family)
    seen: list[tuple[Any, ...]] = []

    def note(module: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        seen.append((*(*args, *kwargs.values())[:3], out))

    handles = [layer.experts.register_forward_hook(note, with_kwargs=True) for layer in made.layers]
    with torch.inference_mode():
        made.module(**tiny.inputs(made.module))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(made.layers)
    for layer, (hidden, ids, weights, out) in zip(made.layers, seen, strict=True):
        terms = contributions(layer.experts.forward, hidden, ids, weights, filler(layer))
        assert terms.shape[:2] == ids.reshape(-1, ids.shape[-1]).shape
        torch.testing.assert_close(terms.sum(1), out.reshape(len(terms), -1), rtol=1e-3, atol=1e-4)
        assert layer.top_k == 1 or not torch.allclose(terms[:, 0], out.reshape(len(terms), -1), atol=1e-3)
