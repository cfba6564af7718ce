"""A whole model routed by the kernel, in the interpreter: recorded and edited as by its own code and hooks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from recorded import model

import workbench as wb
from workbench.fused_routing import fused_routing
from workbench.observation import Observation
from workbench.recorder import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EDITS: list[Any] = [
    None,
    [wb.Ablate(experts=[1, 2])],
    [wb.Force(experts=[3], level="selection", scope="position=2+"), wb.Bias(experts=[0], strength=0.5)],
]


def run(made: Any, edits: Any, kernel: bool) -> tuple[torch.Tensor, list[Observation]]:
    with (
        torch.inference_mode(),
        fused_routing(made, backend="triton") if kernel else nullcontext(),
        nullcontext() if edits is None else wb.intervene(made, edits),
        Recorder(made, ["weights", "entropy", "margin", "logits"]) as recorder,
    ):
        out = made.module(**tiny.inputs(made.module, 2, 5))[0]
    (observed,) = recorder.take()
    return out, observed


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "deepseek_v4", "mistral_large4"])
def test_records_are_those_of_the_hook_path(family: str, edits: Any) -> None:
    made = model(family)
    plain, theirs = run(made, edits, kernel=False)
    out, mine = run(made, edits, kernel=True)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        order, own = one.experts.argsort(-1), other.experts.argsort(-1)  # some families leave their choice unordered
        assert one.weights is not None and other.weights is not None
        assert torch.equal(one.experts.gather(-1, order), other.experts.gather(-1, own))
        torch.testing.assert_close(one.weights.gather(-1, order), other.weights.gather(-1, own), atol=1e-5, rtol=1e-5)
        for name in ("entropy", "margin", "logits"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=1e-5, equal_nan=True)
