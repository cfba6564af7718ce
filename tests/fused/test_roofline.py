"""Counts of `roofline` against scalar programs that count what they touch and compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch

from workbench_kernels.roofline import Roof, Work, down, gate_up, route, tally
from workbench_kernels.route import Gating

DEEPSEEK = Gating("sigmoid", renormalise=True, scale=2.5, groups=4, kept_groups=2, weights="float32")
SIZES = {"logits": 2, "hidden": 2, "weights": 2, "inner": 2, "ids": 8, "order": 8, "counts": 8}
"""Bytes of an element; what isn't here has 4."""


@dataclass
class Counter:
    """Distinct elements that were read and written, as tuples that begin with a name; operations."""

    read: set[tuple] = field(default_factory=set)
    written: set[tuple] = field(default_factory=set)
    products: int = 0
    others: int = 0

    def work(self, **sizes: int) -> Work:
        moved = [sum((SIZES | sizes).get(at[0], 4) for at in touched) for touched in (self.read, self.written)]
        return Work(*moved, self.products, self.others)

    def fold(self, values: list[float], by=max, start: float = -math.inf) -> float:
        for value in values:
            self.others += 1
            start = by(start, value)
        return start

    def each(self, values: list[float], *steps) -> list[float]:
        for step in steps:
            self.others += len(values)
            values = [step(value) for value in values]
        return values


def add(x: float, y: float) -> float:
    return x + y


def scalar_route(
    count: Counter, token: int, z: list[float], k: int, gating: Gating, bias: list[float] | None, recorded: bool
) -> list[int]:
    """The module's formulas on one token, an operation at a time."""
    n = len(z)
    count.read |= {("logits", token, e) for e in range(n)}
    log_scores = z
    if gating.scoring == "sigmoid":  # min(z, 0) − ln(1 + exp(−|z|))
        inner = count.each(z, abs, lambda x: -x, math.exp, lambda x: 1 + x, math.log)
        low = count.each(z, lambda x: min(x, 0.0))
        log_scores = count.each(list(range(n)), lambda e: low[e] - inner[e])
    top = count.fold(log_scores)
    down_by = count.each(log_scores, lambda x: x - top)
    raised = count.each(down_by, math.exp)
    total = count.fold(raised, add, 0.0)
    p = count.each(raised, lambda x: x / total)
    [log_total] = count.each([total], math.log)
    log_p = count.each(down_by, lambda x: x - log_total)
    terms = count.each(list(range(n)), lambda e: p[e] * log_p[e])
    count.fold(terms, add, 0.0)
    count.others += 1  # log-partition: top + log_total
    base = z
    if gating.select == "scores":
        base = p
        if gating.scoring == "sigmoid":
            base = count.each(z, lambda x: -x, math.exp, lambda x: 1 + x, lambda x: 1 / x)
    ranks = list(base)
    if bias is not None:
        count.read |= {("correction", e) for e in range(n)}
        ranks = count.each(list(range(n)), lambda e: base[e] + bias[e])
    if gating.groups > 1:
        size = n // gating.groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(gating.groups)]
        best = []
        for group in groups:
            left = list(group)
            found = 0.0
            for place in range(gating.group_best):
                count.others += size  # comparisons, the element that was taken included
                first = max(left, key=ranks.__getitem__)
                left.remove(first)
                count.others += place > 0
                found += ranks[first]
            best.append(found)
        kept: set[int] = set()
        for _ in range(gating.kept_groups):
            count.others += gating.groups
            kept.add(max(set(range(gating.groups)) - kept, key=best.__getitem__))
        ranks = [ranks[e] if e // size in kept else -math.inf for e in range(n)]
    ids: list[int] = []
    for _ in range(k):
        count.others += n
        ids.append(max(set(range(n)) - set(ids), key=ranks.__getitem__))
    if k < n:
        count.others += n + 1
    weights = [base[e] for e in ids]
    if gating.select == "logits" and gating.scoring == "softmax":
        highest = count.fold(weights)
        weights = count.each(weights, lambda x: x - highest, math.exp)
        together = count.fold(weights, add, 0.0)
        weights = count.each(weights, lambda x: x / together)
    elif gating.select == "logits":
        weights = count.each(weights, lambda x: -x, math.exp, lambda x: 1 + x, lambda x: 1 / x)
    if gating.renormalise:
        together = count.fold(weights, add, 0.0)
        count.others += 2
        weights = count.each(weights, lambda x: x / together)
    weights = count.each(weights, lambda x: x * gating.scale)
    count.written |= {(name, token, rank) for name in ("ids", "gate") for rank in range(k)}
    count.written |= {(name, token) for name in ("entropy", "log-partition", "margin")}
    if recorded:
        count.fold(weights)
        count.others += 1
        count.each(weights, lambda x: x / 1, lambda x: x * 65535, round)
        count.written |= {(name, token, rank) for name in ("compact ids", "compact weights") for rank in range(k)}
        count.written.add(("compact scale", token))
    return ids


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("gating", "corrected"),
    [
        (Gating(), False),
        (Gating(renormalise=True, weights="float32"), True),
        (Gating(select="logits"), False),
        (Gating("sigmoid", select="logits", renormalise=True), False),
        (DEEPSEEK, True),
    ],
)
@pytest.mark.parametrize(("tokens", "n_experts", "k"), [(3, 12, 2), (1, 8, 4), (2, 4, 1), (1, 300, 3)])
def test_route(tokens: int, n_experts: int, k: int, gating: Gating, corrected: bool, recorded: bool):
    count = Counter()
    logits = torch.randn(tokens, n_experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = torch.linspace(0, 1, n_experts).tolist() if corrected else None
    if gating.groups > 1 and n_experts // gating.groups < gating.group_best:
        gating = Gating("sigmoid", renormalise=True, scale=2.5, weights="float32")
    for token in range(tokens):
        ids = scalar_route(count, token, logits[token].tolist(), k, gating, bias, recorded)
        assert len(set(ids)) == k
    sizes = {"gate": 4 if gating.weights == "float32" else 2, "compact weights": 2}
    sizes["compact ids"] = 1 if n_experts <= 256 else 2
    assert route(tokens, n_experts, k, gating, corrected=corrected, recorded=recorded) == count.work(**sizes)


def test_every_expert_has_no_margin():
    full, less = (route(1, 8, k, Gating()).others for k in (8, 7))
    assert full - less == 8 + 1 - (8 + 1)  # a maximum and a factor more, a maximum and a difference less


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gate_up(gated: bool, biased: bool):
    count, chosen, width, neurons = Counter(), [[0, 2], [2, 4], [4, 0]], 5, 3
    for token, ids in enumerate(chosen):
        for rank, expert in enumerate(ids):
            count.read.add(("order", token, rank))
            for neuron, half in product(range(neurons), range(2 if gated else 1)):
                for column in range(width):
                    count.read |= {("hidden", token, column), ("weights", expert, half, neuron, column)}
                    count.products += 2
                if biased:
                    count.read.add(("weights", "bias", expert, half, neuron))
                    count.others += 1
                count.others += 4 if half == 0 else 1  # −, exp, +, ÷ and the product with up
                count.written.add(("inner", token, rank, neuron))
    assert gate_up(3, 2, 3, width, neurons, gated=gated, biased=biased) == count.work()


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_down(biased: bool, stored: bool, parts: int):
    count, chosen, width, neurons = Counter(), [[0, 2], [2, 4], [4, 0]], 6, 3
    for token, ids in enumerate(chosen):
        for rank, expert in enumerate(ids):
            count.read |= {("order", token, rank), ("gate", token, rank)}
            for column in range(width):
                for neuron in range(neurons):
                    count.read |= {("inner", token, rank, neuron), ("weights", expert, column, neuron)}
                    count.products += 2
                if biased:
                    count.read.add(("weights", "bias", expert, column))
                    count.others += 1
                count.others += 1 if stored else 2  # weighted, added
                to = ("sum", token, rank, column) if stored else ("sum", token, column)
                count.written.add(to)
                count.read |= set() if stored else {to}
                count.others += 2 * (parts > 0)
                count.written |= {("squares", token, rank, column * parts // width)} if parts else set()
    assert down(3, 2, 3, width, neurons, biased=biased, stored=stored, parts=parts) == count.work()


@pytest.mark.parametrize("side", ["load", "same", "other"])
def test_tally(side: str):
    count, ids, other = Counter(), [[0, 2], [2, 3], [3, 0]], [[1], [0], [1]]
    beside = {"load": [[]] * 3, "same": ids, "other": other}[side]
    for token, (left, right) in enumerate(zip(ids, beside, strict=True)):
        count.read |= {("ids", token, rank) for rank in range(len(left))}
        count.read |= {("ids", "other", token, rank) for rank in range(len(right))} if side == "other" else set()
        for i, j in product([*left, "any"], [*right, "any"]):
            count.read.add(("counts", i, j))
            count.written.add(("counts", i, j))
            count.others += 1
    found = tally(3, 2, len(count.written), len(beside[0]), same=side == "same")
    assert found == count.work()


def test_the_roof():
    work = Work(read=600, written=400, products=5_000, others=1_000)
    assert (work.moved, work.operations, work.intensity) == (1_000, 6_000, 6.0)
    wide, narrow = Roof(bandwidth=1e3, peak=1e3), Roof(bandwidth=1e2, peak=1e4)
    assert wide.seconds(work) == 5.0 and narrow.seconds(work) == 10.0  # products limit one, bytes the other
    assert narrow.fraction(work, 20.0) == 0.5
    assert work + work == Work(1_200, 800, 10_000, 2_000)
