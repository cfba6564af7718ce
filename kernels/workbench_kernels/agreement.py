"""Do the kernels compute what they should? The gate before any of them is timed.

    check_route(shape, given)               each raises AssertionError with what is wrong,
    check_experts(module, given)            or returns by how much the results differ
    check_tally(shape.n_experts, given.ids)

Routing is compared with the formulas in float64 and with plain softmax and top-k; experts with float64 (some tokens:
all of them would take long) and with transformers' `grouped_mm` (every token); tallies with products of one-hot
matrices, exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench_kernels.baselines import grouped_mm, plain_statistics, ranked, weighted
from workbench_kernels.expert_weights import ExpertWeights, read
from workbench_kernels.experts import experts, reference
from workbench_kernels.experts_kernel import Config
from workbench_kernels.route import FULL_SCALE, Record, route
from workbench_kernels.route_kernel import TILES, Tile
from workbench_kernels.shapes import Inputs, Shape
from workbench_kernels.tallies import CONFIGS, tally
from workbench_kernels.tallies import Config as TallyConfig

Backend = Literal["auto", "torch", "triton"]
ERROR = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of an experts' output: largest ‖difference‖ / ‖output‖ of a token, by dtype. A few roundings, and room."""
REGRET = 3e-6
"""By how much a chosen expert may rank below the one that float64 chooses: exponentials of a GPU are that exact."""
TIED_GROUPS = 1e-3
"""Share of tokens that may choose other groups: sums of float32 that are equal up to rounding."""
SAMPLE = 8
"""Tokens for float64."""


def check_route(shape: Shape, given: Inputs, backend: Backend = "auto", tile: Tile = TILES[0]) -> dict[str, float]:
    """Ids, weights, statistics and the compact record. Returns the share of tokens with plain top-k's experts."""
    logits, k, gating = given.logits, shape.top_k, shape.gating
    record = Record.empty(len(logits), k, shape.n_experts, logits.device)
    found = route(logits, k, gating, correction=given.correction, record=record, backend=backend, tile=tile)
    ids = found.experts
    _expect(bool(((ids >= 0) & (ids < shape.n_experts)).all()), "ids of experts that there aren't")
    _expect(bool((ids.sort(-1).values.diff(dim=-1) > 0).all()), "an expert twice for a token")

    correction = None if given.correction is None else given.correction.double()
    scores, ranks = ranked(logits.double(), gating, correction)
    best = ranks.topk(k + 1, dim=-1).values
    regret = (best[:, :k] - ranks.gather(1, ids).sort(-1, descending=True).values).amax(-1)
    same = regret <= REGRET
    least = 1 - TIED_GROUPS if gating.groups > 1 else 1.0
    _expect(float(same.double().mean()) >= least, f"experts that rank {float(regret.max()):.1e} too low")

    weights = weighted(scores, ids, replace(gating, weights="float32"), torch.float64)
    rounding = torch.finfo(found.weights.dtype).eps + 1e-5
    _close(found.weights.double(), weights, rounding * weights.abs() + 1e-7, "weights")
    exact = route(logits.double(), k, gating, correction=correction, backend="torch")
    for name in ("entropy", "log_partition"):
        _close(getattr(found, name).double(), getattr(exact, name), 1e-4, name)
    _close(found.margin.double()[same], (best[:, k - 1] - best[:, k])[same], 2 * REGRET, "margin")

    _expect(torch.equal(record.experts.long(), ids), "other ids in the record")
    kept = record.weights.double() / FULL_SCALE * record.scale[:, None]
    _close(kept, found.weights.double(), record.scale[:, None] / FULL_SCALE, "weights of the record")
    _expect(torch.equal(record.entropy, found.entropy), "another entropy in the record")
    _expect(torch.equal(record.margin.nan_to_num(), found.margin.nan_to_num()), "another margin in the record")
    plain, _, entropy, log_partition, _ = plain_statistics(logits, k, gating, given.correction)
    _close(entropy.double(), exact.entropy, 1e-4, "plain entropy")
    _close(log_partition.double(), exact.log_partition, 1e-4, "plain log_partition")
    return {"same_as_plain": round(float((plain.sort(-1).values == ids.sort(-1).values).all(-1).double().mean()), 5)}


def check_experts(
    module: nn.Module, given: Inputs, backend: Backend = "auto", config: Config | None = None
) -> dict[str, float]:
    """Outputs and norms. Returns the largest relative errors, of ours and of grouped_mm on the same tokens."""
    weights = read(module)
    allowed = ERROR[given.hidden.dtype]
    out, norms = experts(weights, given.hidden, given.ids, given.gate, norms=True, backend=backend, config=config)
    without, _ = experts(weights, given.hidden, given.ids, given.gate, backend=backend, config=config)
    assert norms is not None
    theirs = grouped_mm(module, given.hidden, given.ids, given.gate)
    for name, compared in (("grouped_mm", theirs), ("what it gives without norms", without)):
        error = _error(out, compared)
        _expect(error <= 2 * allowed, f"outputs that differ by {error:.1e} from {name}")
    some = slice(None, None, max(1, -(-len(out) // SAMPLE)))
    exact, exact_norms = in_float64(weights, given.hidden[some], given.ids[some], given.gate[some])
    errors = {"error": _error(out[some], exact), "error_of_grouped_mm": _error(theirs[some], exact)}
    _expect(errors["error"] <= allowed, f"outputs that differ by {errors['error']:.1e} from float64")
    _close(norms[some].double(), exact_norms, allowed * exact_norms, "norms")
    return {name: float(f"{error:.2e}") for name, error in errors.items()}


def in_float64(weights: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The reference in float64, with one expert's matrices at a time: all of a large layer's wouldn't fit."""
    out, norms = torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(ids, dtype=torch.float64)
    for expert in ids.unique().tolist():
        one = replace(
            weights,
            gate_up_proj=weights.gate_up_proj[expert, None].double(),
            down_proj=weights.down_proj[expert, None].double(),
        )
        only = torch.where(ids == expert, 0, -1)
        part, sizes = reference(one, hidden.double(), only, gate.double(), norms=True)
        assert sizes is not None
        out, norms = out + part, norms + sizes
    return out, norms


def check_tally(
    n_experts: int, ids: Tensor, backend: Backend = "auto", config: TallyConfig = CONFIGS[0]
) -> dict[str, float]:
    """Load, co-activation and transitions (to the same ids in another order of tokens), exactly."""
    options: dict[str, Any] = {"backend": backend, "config": config}
    shown = torch.zeros(len(ids), n_experts + 1, dtype=torch.float64, device=ids.device).scatter_(1, ids, 1.0)
    shown[:, -1] = 1  # any expert
    after = ids.flip(0)
    found = {
        "load": tally(ids, n_experts, **options)[0],
        "co-activation": tally(ids, n_experts, other=ids, n_other=n_experts, **options)[0],
        "transitions": tally(ids, n_experts, other=after, n_other=n_experts, **options)[0],
    }
    expected = {"load": shown.sum(0), "co-activation": shown.T @ shown, "transitions": shown.T @ shown.flip(0)}
    for name, counts in found.items():
        _expect(torch.equal(counts, expected[name].long()), f"wrong counts of {name}")
    return {}


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest relative one of a token; NaN where anything is NaN."""
    difference = (found.double() - expected.double()).norm(dim=-1)
    return float((difference / expected.double().norm(dim=-1)).max())


def _close(found: Tensor, expected: Tensor, allowed: Tensor | float, what: str) -> None:
    difference = (found - expected).abs()
    if not bool((difference <= allowed).all()):  # so NaN fails, too
        raise AssertionError(f"{what} that differ by up to {float(difference.max()):.1e}")


def _expect(holds: bool, wrong: str) -> None:
    if not holds:
        raise AssertionError(wrong)
