"""How often each expert was chosen, as the file that KTransformers and SGLang start from.

Source: kvcache-ai/ktransformers, doc/en/kt-kernel/experts-sched-Tutorial.md (commit 15c624d), and in its fork of SGLang
the reader `_init_kt_gpu_experts_masks`; written by SGLang's recorder (sgl-project/sglang,
python/sglang/srt/eplb/expert_distribution.py, commit 02295fe). With `--kt-expert-placement-strategy frequency
--init-expert-location FILE.pt` the experts that were chosen most often are put on the GPU.

The file is a torch archive of {"rank": 0, "logical_count": int32 (1, layers, E),
"average_utilization_rate_over_window": None}. Its layers are those of the model: dense ones are rows of zeros.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from workbench.errors import InputError
from workbench.output import new_file
from workbench.tracefile import Trace


def activation_counts(trace: Trace) -> np.ndarray:
    """int64 (layers of the model, E): tokens that chose each expert.

    The model is taken to end with its last router. InputError if routers differ in their number of experts, or two lie
    in one layer.
    """
    from workbench.analysis.counting import count, sort_into_cells
    from workbench.analysis.placement import model_layers

    numbers = model_layers(trace)
    if numbers != sorted(set(numbers)):
        raise InputError(f"the routers lie in layers {numbers} of the model; expected one router a layer, in order.")
    sizes = trace.layers["n_experts"].unique().tolist()
    if len(sizes) > 1:
        raise InputError(f"layers have {', '.join(map(str, sizes))} experts; expected the same number in each.")
    cells = sort_into_cells(trace, by=None)
    counts = np.zeros((numbers[-1] + 1, sizes[0]), np.int64)
    for layer, number in enumerate(numbers):
        counts[number] = count(trace, layer, cells).sum(axis=0)
    return counts


def export_counts(
    path: str | os.PathLike, out: str | os.PathLike, *, run: str | None = None, overwrite: bool = False
) -> tuple[int, ...]:
    """Write the `activation_counts` of a run of the trace at `path` to `out`, a .pt file; returns (1, layers, E).

    InputError if the request can't be met, or `out` exists and `overwrite` isn't given.
    """
    import torch

    if Path(out).suffix != ".pt":
        raise InputError(f"{out}: KTransformers reads counts from a file that ends in .pt.")
    with new_file(out, overwrite) as partial:
        counts = activation_counts(Trace(path, run))[None]
        if counts.max(initial=0) > np.iinfo(np.int32).max:
            raise InputError(f"an expert was chosen {counts.max():,} times; the file holds numbers up to 2147483647.")
        held = {"rank": 0, "logical_count": torch.from_numpy(counts.astype(np.int32))}
        torch.save({**held, "average_utilization_rate_over_window": None}, partial)
    return counts.shape
