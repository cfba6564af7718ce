"""The benchmark's gate with the Triton kernels themselves, in the interpreter and on small shapes."""

from __future__ import annotations

import pytest
import torch

from workbench_kernels import agreement, timing
from workbench_kernels.shapes import SMALL_SHAPES, experts_module, inputs


@pytest.mark.parametrize("tokens", [13, 1])
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_every_case_passes_in_every_configuration(name: str, tokens: int):
    shape = SMALL_SHAPES[name]
    given = inputs(shape, tokens, dtype=torch.float16)
    cases = timing.cases(shape, given, experts_module(shape, "cpu", torch.float16), "triton")
    for case in cases:
        timing.check(case)
        case.run(case.configs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype):
    shape = SMALL_SHAPES["softmax"]
    found = agreement.check_experts(experts_module(shape, "cpu", dtype), inputs(shape, 13, dtype=dtype), "triton")
    assert found["error"] < agreement.ERROR[dtype]
