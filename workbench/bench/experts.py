"""The experts of a model by each implementation there is, on the CPU: whole passes and the experts alone, in turns.

Shapes are those of tracing and of generation: prefill of 8 texts of 256 tokens and of one of 32, and one more token for
1 and for 8 texts of 64. Every round has new random tokens, as a corpus has: experts then get other numbers of rows each
time, and what is compiled for a number of rows is compiled again. Implementations take turns within a round, and
nothing is timed before they gave the same logits. `ratio` is the median over rounds of the time over that of the faster
of transformers' two, `eager` and `grouped_mm`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from workbench.fused_experts import NAME, fused_experts, listen
from workbench.models import Model
from workbench.recorder import Recorder

SHAPES = {"prefill 8×256": (8, 256), "prefill 1×32": (1, 32), "decode B=1": (1, 1), "decode B=8": (8, 1)}
"""Texts and tokens of a pass; a single token follows 64 others."""
ROUNDS = {"prefill 8×256": 5, "prefill 1×32": 25, "decode B=1": 60, "decode B=8": 40}
BASE = ("eager", "grouped_mm")
BEFORE = 64
MOST_BYTES = 2 << 30
"""batched_mm copies the matrices of every token's experts; it is left out where a layer's copies exceed this, and takes
part in the first rounds only, being up to 25 times slower."""
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest root mean square of the differences of logits, over that of the logits: a last bit can flip a choice."""
Pass = Callable[[], Tensor]


def experts(model: Model, quick: bool = False) -> dict[str, Any]:
    """Ratios by shape, of `pass` and of `experts`, with the milliseconds of the faster of BASE; and `differs`, by way:
    the largest difference of logits from those of eager, over the largest logit, and the share of (token, layer)s with
    the same set of experts, over 8 texts of 256 tokens.

    AssertionError if an implementation gives other logits.
    """
    found: dict[str, Any] = {}
    for shape, (texts, tokens) in SHAPES.items():
        ways = [*BASE, "fused", "fused, norms"]
        layer, pairs = model.layers[0], texts * tokens * model.layers[0].top_k
        matrices = sum(p.numel() * p.element_size() for p in layer.experts.parameters()) // layer.n_experts
        if pairs * matrices <= MOST_BYTES:
            ways.append("batched_mm")
        with torch.inference_mode():
            found[shape] = _compare(model, ways, texts, tokens, 2 if quick else ROUNDS[shape])
    return {"ratio": found, "differs": _differences(model)}


def show(measured: dict[str, dict[str, Any]]) -> None:
    """Print what `experts` gave for some models, by name, as Markdown: whole pass / experts alone."""
    print("| model | shape | faster of two, ms | fused | fused, with norms | batched_mm |")
    print("|---|---|---:|---:|---:|---:|")
    for name, one in measured.items():
        for shape, timed in one["ratio"].items():
            cells = [
                f"{timed['pass'][way]:.2f} / {timed['experts'][way]:.2f}" if way in timed["pass"] else ""
                for way in ("fused", "fused, norms", "batched_mm")
            ]
            milliseconds = f"{timed['pass_ms']:.1f} / {timed['experts_ms']:.1f}"
            print(f"| {name} | {shape} | {milliseconds} | {' | '.join(cells)} |")
    print("\n| model | implementation | logits within, of the largest | the same experts |")
    print("|---|---|---:|---:|")
    for name, one in measured.items():
        for way, differs in one["differs"].items():
            print(f"| {name} | {way} | {differs['logits']:.1e} | {differs['experts']:.2%} |")


def _compare(model: Model, ways: list[str], texts: int, tokens: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in ways} for kind in ("pass", "experts")}
    for number in range(rounds + 1):
        run = _pass(model, torch.randint(4, 8000, (texts, BEFORE + 1 if tokens == 1 else tokens), generator=generator))
        given = _given(model, run)
        if number == 0:
            _check(model, ways, run)
        for at in range(len(ways)):
            way = ways[(at + number) % len(ways)]
            if way == "batched_mm" and number > 2:
                continue
            with _by(model, way):
                started = time.perf_counter()
                run()
                between = time.perf_counter()
                for layer, inputs in zip(model.layers, given, strict=True):
                    layer.experts(*inputs)
                ended = time.perf_counter()
            if number:
                seconds["pass"][way].append(between - started)
                seconds["experts"][way].append(ended - between)
    result: dict[str, Any] = {"rounds": rounds}
    for kind, by_way in seconds.items():
        base = min(median(by_way[way]) for way in BASE)
        result[kind] = {way: round(median(times) / base, 3) for way, times in by_way.items()}
        result[f"{kind}_ms"] = round(base * 1e3, 3)
    return result


def _pass(model: Model, ids: Tensor) -> Pass:
    """What is timed: the tokens, or the last of them after the others."""
    module: Any = model.module
    if ids.shape[1] != BEFORE + 1:
        return lambda: module(input_ids=ids, use_cache=False).logits
    cache = module(input_ids=ids[:, :BEFORE], use_cache=True).past_key_values

    def one_more() -> Tensor:
        logits = module(input_ids=ids[:, BEFORE:], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return one_more


def _given(model: Model, run: Pass) -> list[tuple[Tensor, ...]]:
    """What the experts of each layer are called with in a pass."""
    given: list[tuple[Tensor, ...]] = []
    hooks = [layer.experts.register_forward_pre_hook(lambda _m, args: given.append(args)) for layer in model.layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _differences(model: Model) -> dict[str, dict[str, float]]:
    ids = torch.randint(4, 8000, (8, 256), generator=torch.Generator().manual_seed(1))
    seen = {}
    for way in (*BASE, "fused"):
        with torch.inference_mode(), _by(model, way), Recorder(model, set()) as recorder:
            logits = model.module(input_ids=ids, use_cache=False).logits.float()
            seen[way] = logits, torch.stack([one.experts.sort(-1).values for one in recorder.take()[0]])
    logits, experts = seen.pop("eager")
    return {
        way: {
            "logits": float((found - logits).abs().max() / logits.abs().max()),
            "experts": float((chosen == experts).all(-1).float().mean()),
        }
        for way, (found, chosen) in seen.items()
    }


def _check(model: Model, ways: list[str], run: Pass) -> None:
    logits = {}
    for way in ways:
        with _by(model, way):
            logits[way] = run().float()
    most = AGREE[getattr(torch, model.dtype)] * float(logits["eager"].square().mean().sqrt())
    for way, found in logits.items():
        if not (found - logits["eager"]).square().mean().sqrt() <= most:
            raise AssertionError(f"{way} gave other logits than eager on {model.name}: nothing was measured.")


@contextmanager
def _by(model: Model, way: str) -> Iterator[None]:
    """The model's experts by one implementation."""
    module: Any = model.module
    before = module.get_experts_implementation()
    with ExitStack() as held:
        if way.startswith("fused"):
            held.enter_context(fused_experts(model, "fused"))
            assert module.config._experts_implementation == NAME
        else:
            module.set_experts_implementation(way)
            held.callback(module.set_experts_implementation, before)
        if way == "fused, norms":
            for layer in model.layers:
                held.callback(listen(layer.experts, lambda _norms: None))
        yield
