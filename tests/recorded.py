"""What the tests of the recorder share: the families it traces, a tiny model of each, one recorded forward pass."""

from __future__ import annotations

from functools import cache
from typing import Any

import tiny
import torch

from workbench.families import FAMILIES
from workbench.models import Model
from workbench.recorder import Recorder

TRACED = [name for name, family in FAMILIES.items() if not family.refused]


@cache
def model(family: str) -> Any:
    """A tiny Model that tests may run but not change."""
    torch.set_num_threads(1)
    return tiny.model(family)


def run(made: Model, record: Any = ("weights",), **inputs: Any) -> tuple[Any, list[Any]]:
    """The model's first output (logits or hidden states) and one pass' observations."""
    with torch.inference_mode(), Recorder(made, record) as recorder:
        out = made.module(**(inputs or tiny.inputs(made.module)))[0]
    (observed,) = recorder.take()
    return out, observed
