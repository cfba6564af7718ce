"""The kernels: on a GPU against transformers' and plain torch; whole models' experts on the CPU; and what is counted.

The first part is `workbench_kernels.bench`, which is also `python kernels/bench.py`. The second is
`workbench.bench.experts`, for the demonstration model and the mid-size one of `bench trace`, in float32 and bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

from workbench.bench.experts import experts, show
from workbench.bench.trace import mid_size
from workbench.models import load
from workbench_kernels import bench


def run(quick: bool = False) -> dict[str, Any]:
    """Print tables, and return all figures. AssertionError if a kernel or an implementation computes something else."""
    result = bench.run(quick)
    result |= {"threads": torch.get_num_threads(), "cpu": {}}
    print(
        "\nExperts on the CPU, time over the faster of eager and grouped_mm, of a whole pass / of the experts alone:\n"
    )
    for dtype in ("float32", "bfloat16"):
        demo = load("demo", dtype=dtype)
        mid = load(mid_size(quick).to(getattr(torch, dtype)), tokenizer=demo.tokenizer)
        for name, model in {"mid-size": mid, **({} if quick else {"demo": demo})}.items():
            result["cpu"][f"{name}, {dtype}"] = experts(model, quick)
    show(result["cpu"])
    return result
