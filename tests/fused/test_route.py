"""`route` without a GPU: its reference against loops over tokens and experts, its record, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from fused.gatings import GATINGS, correction, logits, some

from workbench.scores import entropy, log_probabilities, margin
from workbench.transaction import to_fixed, to_float
from workbench_kernels.route import Gating, Record, route


def by_hand(
    z: list[float], k: int, g: Gating, bias: list[float], add: list[float], forced: set[int], masked: set[int]
) -> tuple[list[int], list[float]]:
    """ids and weights of one token, as the module's docstring has it."""
    experts = range(len(z))
    z = [x + a for x, a in zip(z, add, strict=True)]
    masked = (masked | {e for e in experts if add[e] == -math.inf}) - forced

    def scored(z: list[float]) -> list[float]:
        if g.scoring == "softmax":
            total = sum(math.exp(x) for x in z)
            return [math.exp(x) / total for x in z]
        if g.scoring == "sigmoid":
            return [0.0 if x == -math.inf else 1 / (1 + math.exp(-x)) for x in z]
        return [math.sqrt(math.log1p(math.exp(x))) for x in z]

    base = z if g.select == "logits" else scored(z)
    ranks = [b + c for b, c in zip(base, bias, strict=True)]
    size, large = len(z) // g.groups, 1e30
    seen = [large if e in forced else -large if e in masked else ranks[e] for e in experts]
    groups = [sorted(seen[i * size : (i + 1) * size])[-g.group_best :] for i in range(g.groups)]
    kept = sorted(range(g.groups), key=lambda i: -sum(groups[i]))[: g.kept_groups]
    inside = {e for e in experts if e // size in kept}
    free = [e for e in experts if e in forced or (e in inside and e not in masked)]
    tiers = [
        (3, 0.0) if e in forced else (0, 0.0) if e in masked
        else (2, ranks[e] if e in inside else g.outside) if e in inside or len(free) >= k
        else (1, ranks[e])
        for e in experts
    ]  # fmt: skip
    ids = sorted(experts, key=lambda e: tiers[e], reverse=True)[:k]
    weights = [base[e] for e in ids]
    if g.select == "logits":
        weights = scored(weights)
    if g.renormalise:
        total = max(sum(weights), g.at_least) + g.epsilon
        weights = [w / total for w in weights]
    return ids, [w * g.scale for w in weights]


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("name", GATINGS)
def test_the_reference_is_the_formulas(name: str, edited: bool) -> None:
    gating, n_experts, k = GATINGS[name], 24, 5
    z = logits(50, n_experts).double()
    bias = correction(name, n_experts)
    add = torch.zeros(n_experts)
    edits: dict[str, Any] = {}
    if edited:
        add[:4] = torch.tensor([1.0, -2.0, -torch.inf, 0.5])
        edits = {"add": add, "forced": some(n_experts, 9), "masked": some(n_experts, 0, 9, 13)}
        edits["rows"] = torch.arange(50) % 2 == 0
    made = route(z, k, gating, correction=bias, **edits)
    for token, row in enumerate(z.tolist()):
        on = edited and token % 2 == 0
        plain = [0.0] * n_experts
        ids, weights = by_hand(
            row,
            k,
            gating,
            plain if bias is None else bias.tolist(),
            add.tolist() if on else plain,
            {9} if on else set(),
            {0, 13} if on else set(),
        )
        assert (made.experts[token].tolist() if gating.ordered else sorted(made.experts[token].tolist())) == ids
        np.testing.assert_allclose(made.weights[token], weights, rtol=1e-9, atol=1e-12)
    shown = torch.where(edits["rows"][:, None], z + add, z) if edited else z
    log_p = log_probabilities(shown, gating.scoring)
    torch.testing.assert_close(made.entropy, entropy(log_p))
    torch.testing.assert_close(made.log_partition.exp(), _unnormalised(shown, gating.scoring).sum(-1))
    if not edited and gating.groups == 1:
        base = shown if gating.select == "logits" else _normalised(shown, gating.scoring)
        torch.testing.assert_close(made.margin, margin(base if bias is None else base + bias, k), check_dtype=False)


def _unnormalised(z: torch.Tensor, scoring: str) -> torch.Tensor:
    return z.exp() if scoring == "softmax" else _normalised(z, scoring)


def _normalised(z: torch.Tensor, scoring: str) -> torch.Tensor:
    if scoring == "softmax":
        return z.softmax(-1)
    return z.sigmoid() if scoring == "sigmoid" else torch.nn.functional.softplus(z).sqrt()


def test_ties_are_broken_as_torch_breaks_them() -> None:
    """On CPU that is no rule: the lowest ids for some sizes, others for others. The kernel takes the lowest."""
    for n_experts, first in ((8, [6, 5, 4]), (512, [0, 1, 2])):
        z = torch.zeros(2, n_experts)
        assert route(z, 3, Gating()).experts.tolist() == z.topk(3).indices.tolist() == [first, first]


def test_no_edit_is_the_plain_choice() -> None:
    z, none = logits(9, 12), torch.zeros(12, dtype=torch.bool)
    plain = route(z, 3, Gating())
    for edits in (
        {"add": torch.zeros(12)},
        {"forced": none, "masked": none},
        {"forced": ~none, "rows": torch.zeros(9, dtype=torch.bool)},
    ):
        made = route(z, 3, Gating(), **edits)
        assert all(
            torch.equal(one, other) for one, other in zip(vars(made).values(), vars(plain).values(), strict=True)
        )


def test_what_is_not_asked_for_is_left_out() -> None:
    z = logits(9, 12)
    made, whole = route(z, 3, Gating(), statistics=False), route(z, 3, Gating())
    assert torch.equal(made.experts, whole.experts) and torch.equal(made.weights, whole.weights)
    assert made.entropy.isnan().all() and made.log_partition.isnan().all() and made.margin.isnan().all()


def test_no_tokens() -> None:
    made = route(torch.zeros(0, 8), 3, Gating(), record=Record.empty(0, 3, 8))
    assert made.experts.shape == made.weights.shape == (0, 3) and made.entropy.shape == (0,)


@pytest.mark.parametrize("n_experts", [8, 300])
def test_the_record_is_what_a_trace_stores(n_experts: int) -> None:
    for scale in (1.0, 2.5, 16.0):
        record = Record.empty(40, 3, n_experts)
        made = route(logits(40, n_experts), 3, Gating("sigmoid", scale=scale), record=record)
        fixed, scales = to_fixed(made.weights.numpy())
        assert record.experts.dtype == (torch.uint8 if n_experts == 8 else torch.uint16)
        assert torch.equal(record.experts.long(), made.experts)
        assert (record.weights.numpy() == fixed).all() and (record.scale.numpy() == scales).all()
        back = to_float(record.weights.numpy(), record.scale.numpy()[:, None])
        assert np.abs(back - made.weights.numpy()).max() <= scales.max() / 131070 + 1e-6
        assert torch.equal(record.entropy, made.entropy) and torch.equal(record.margin, made.margin)


def test_gradients_flow_through_the_reference_only() -> None:
    z = logits(5, 8).requires_grad_()
    route(z, 3, Gating(renormalise=True)).weights[:, 0].sum().backward()
    assert z.grad is not None and z.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no gradients: pass backend='torch'"):
        route(z, 3, Gating(), backend="triton")


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ValueError, r"logits have shape \(8,\); expected \(tokens, experts\)", {"logits": torch.zeros(8)}),
        (TypeError, "logits are torch.int64; expected float32", {"logits": torch.zeros(2, 8, dtype=torch.int64)}),
        (ValueError, "k is 0; expected 1 to 8", {"k": 0}),
        (ValueError, "k is 9; expected 1 to 8", {"k": 9}),
        (ValueError, "k is 3; expected 1 to 2", {"gating": Gating(groups=4)}),
        (ValueError, "1 of 3 groups with 8 experts", {"gating": Gating(groups=3)}),
        (ValueError, "1 of 8 groups with 8 experts, by the best 2", {"gating": Gating(groups=8)}),
        (ValueError, r"add has shape \(7,\); expected \(8,\)", {"add": torch.zeros(7)}),
        (ValueError, r"rows has shape \(8,\); expected \(2,\)", {"rows": torch.ones(8, dtype=torch.bool)}),
        (TypeError, "forced is torch.float32; expected bool", {"forced": torch.zeros(8)}),
        (TypeError, "correction is torch.bool; expected floating point", {"correction": some(8, 1)}),
        (ValueError, "masked is on meta; expected cpu", {"masked": torch.zeros(8, dtype=torch.bool, device="meta")}),
        (ValueError, "record.experts is torch.uint8 .*; expected contiguous", {"record": Record.empty(3, 3, 8)}),
        (ValueError, "backend is 'cuda'; expected 'auto'", {"backend": "cuda"}),
        (
            ValueError,
            "the kernel takes .* not torch.float64",
            {"backend": "triton", "logits": torch.zeros(2, 8, dtype=torch.float64)},
        ),
        (ValueError, "at most 4096 experts", {"backend": "triton", "logits": torch.zeros(2, 5000)}),
    ],
)
def test_what_does_not_fit_is_refused(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    arguments = {"logits": torch.zeros(2, 8), "k": 3, "gating": Gating()} | changes
    with pytest.raises(error, match=message):
        route(**arguments)
