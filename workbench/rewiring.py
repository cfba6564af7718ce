"""Rewiring: vectors added to router logits, learned from the text so far while a model reads or writes it.

    rewired = rewire(model, token_ids)
    with workbench.intervene(model, rewired.deltas): ...

"Rewiring Experts on the Fly" (Su et al. 2025, arXiv 2510.14853, section 3): the logits z of a chosen layer become
z + delta for every token. The deltas start from zero and take a few steps down the cross-entropy of the context, which
is its own supervision: the prompt before anything is generated, then prompt and generated text again every so many
tokens, from the deltas as they are (`generate`). Nothing but the deltas is learned.

**Layers.** By default those with the highest confidence on the context, as the paper has it:

    C = -1/k · sum over the k selected experts of ln p        mean over the tokens of the context

p being the router's probabilities. The paper calls a higher C more decisive, which is half of the truth: it is lowest,
ln k, where the k share all of the mass evenly, and higher both where a router gives nearly all of it to its first
choice and where it can't choose at all (ln E). With k = 1 only the latter is left.

**What is whose.** Steps (5), learning rate (0.05) and tokens between two learnings (128) are the paper's. Its share of
layers and its optimiser aren't stated in what could be read of it, nor is there public code: half of the layers, and
Adam, are choices made here. (`optimiser="sgd"` is the plain rule delta - rate · gradient; the gradient of a mean loss
to a logit is so small that at this rate it hardly moves.) The paper's soft variant, which weights layers by confidence
instead of choosing some, isn't built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from workbench import learning
from workbench.errors import InputError
from workbench.forward import pad_id
from workbench.generation import end_ids
from workbench.intervening import intervene
from workbench.interventions import Delta
from workbench.models import Model
from workbench.recorder import Recorder

_OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Rewired:
    """What was learned from a context.

    deltas      one Delta a layer, (E,) floats, ascending layers
    losses      nats a token of the context: before the first step, then after each; steps + 1 of them
    layers      those that were learned now; a delta of another layer was there before and stayed
    confidence  C of each layer of the model before learning; NaN for a layer without scores. () where layers were given
    n_context   tokens of the context
    """

    deltas: tuple[Delta, ...]
    losses: tuple[float, ...]
    layers: tuple[int, ...]
    confidence: tuple[float, ...]
    n_context: int


@dataclass(frozen=True)
class Stretch:
    """Tokens generated in one go, and what had been learned before."""

    rewired: Rewired
    token_ids: tuple[int, ...]


def rewire(
    model: Model,
    token_ids: Sequence[int] | np.ndarray | Tensor,
    *,
    layers: Sequence[int] | None = None,
    share: float = 0.5,
    steps: int = 5,
    learning_rate: float = 0.05,
    optimiser: Literal["adam", "sgd"] = "adam",
    start: Sequence[Delta] = (),
) -> Rewired:
    """Learn deltas from a context.

    token_ids      (n,) whole numbers, n >= 2: the context
    layers         which layers to learn; None for the most confident ones
    share          of the layers to learn where none are given, in (0, 1]; at least one is
    steps          of the optimiser, each over the whole context; 0 leaves the deltas as they start
    learning_rate  in the unit of the logits: a step of Adam moves a delta by up to about this much
    start          deltas to go on from, each of one layer; layers that have none start from zero

    The model's parameters get no gradients and don't change.
    InputError for a context, layers or numbers that can't be, and a model without a next-token loss or with a family
    that can't be intervened on; RunError where no gradient reaches the deltas.
    """
    _check(share, steps, learning_rate, optimiser)
    ids = learning.as_ids(model, token_ids)
    certainty = () if layers is not None else confidence(model, token_ids, start)
    chosen = _most(certainty, share) if layers is None else learning.some_layers(model, layers)
    losses = []
    with learning.gradients(model):
        vectors = {_layer(delta): _values(delta, model) for delta in start}
        for layer in chosen:
            vectors.setdefault(layer, torch.zeros(model.layers[layer].n_experts, device=model.device))
        learned = [vectors[layer].requires_grad_() for layer in chosen]
        optimise = _OPTIMISERS[optimiser](learned, lr=learning_rate)
        for step in range(steps + 1):
            # Entered anew for each step: the engine may have made something of the vectors that a step outdates.
            with intervene(model, _deltas(vectors)), torch.set_grad_enabled(step < steps):
                loss = learning.loss(model, ids)
            losses.append(float(loss.detach()))
            if step < steps:
                learning.gradient(loss, learned)
                optimise.step()
    deltas = tuple(Delta(layer=layer, values=vectors[layer].tolist()) for layer in sorted(vectors))
    return Rewired(deltas, tuple(losses), tuple(chosen), certainty, ids.shape[1])


def generate(
    model: Model,
    token_ids: Sequence[int] | np.ndarray | Tensor,
    *,
    max_new_tokens: int,
    every: int = 128,
    restart: bool = False,
    sampling: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Stretch]:
    """Generate with deltas that are learned anew from all of the text so far, first from the prompt.

    every     tokens to generate between two learnings
    restart   learn each time from zero, not from the deltas as they are
    sampling  arguments of transformers' `generate`, such as {"do_sample": True, "temperature": 0.7}; default: greedy
    options   those of `rewire`, but for `start`

    Yields a Stretch of at most `every` tokens after each learning, `max_new_tokens` together or until the model ends
    the text. The text so far is read again with the new deltas, so that its keys and values are those of one model.
    InputError as `rewire` has it, before the first token.
    """
    learning.whole(max_new_tokens, "max_new_tokens", 1)
    learning.whole(every, "every", 1)
    context = learning.as_ids(model, token_ids)
    limit = model.max_length
    if limit is not None and context.shape[1] + max_new_tokens > limit:
        raise InputError(
            f"a prompt of {context.shape[1]} tokens and {max_new_tokens} new ones exceed the {limit} positions of "
            f"{model.name}."
        )
    return _stretches(model, context, max_new_tokens, every, restart, sampling or {"do_sample": False}, options)


def _stretches(
    model: Model, context: Tensor, left: int, every: int, restart: bool, sampling: dict[str, Any], options: dict
) -> Iterator[Stretch]:
    module: Any = model.module
    pad = 0 if model.tokenizer is None else pad_id(model)
    ends = end_ids(module)
    deltas: tuple[Delta, ...] = ()
    while left:
        rewired = rewire(model, context[0], start=() if restart else deltas, **options)
        deltas = rewired.deltas
        with intervene(model, deltas), torch.inference_mode():
            whole = module.generate(
                input_ids=context,
                attention_mask=torch.ones_like(context),
                max_new_tokens=min(every, left),
                pad_token_id=pad,
                **sampling,
            )
        new = whole[0, context.shape[1] :].tolist()
        yield Stretch(rewired, tuple(new))
        left = 0 if new[-1] in ends else left - len(new)
        context = whole.clone()


def confidence(
    model: Model, token_ids: Sequence[int] | np.ndarray | Tensor, start: Sequence[Delta] = ()
) -> tuple[float, ...]:
    """C of each layer on a text, >= 0, NaN for a layer without scores; start: deltas to read it with."""
    ids = learning.as_ids(model, token_ids)
    module: Any = model.module
    edits = intervene(model, tuple(start)) if start else nullcontext()
    with edits, Recorder(model, ["probabilities"]) as recorder, torch.no_grad():
        module(input_ids=ids, use_cache=False)
    (seen,) = recorder.take()
    found = []
    for layer in seen:
        experts, probabilities = layer.experts[0], layer.probabilities
        assert probabilities is not None
        taken = probabilities[0].double().gather(-1, experts.clamp_min(0)).log().masked_fill(experts < 0, torch.nan)
        found.append(-float(taken.nanmean()))
    return tuple(found)


def _most(certainty: Sequence[float], share: float) -> list[int]:
    """The layers with the highest confidence, ascending."""
    known = [layer for layer, value in enumerate(certainty) if not math.isnan(value)]
    if not known:
        raise InputError("no layer of this model has router scores: there is nothing to add a delta to.")
    best = sorted(known, key=lambda layer: (-certainty[layer], layer))
    return sorted(best[: max(1, round(share * len(known)))])


def _deltas(vectors: dict[int, Tensor]) -> tuple[Delta, ...]:
    return tuple(Delta(layer=layer, values=vectors[layer]) for layer in sorted(vectors))


def _layer(delta: Delta) -> int:
    if not isinstance(delta, Delta) or not isinstance(delta.layer, int) or delta.scope != "all":
        raise InputError("start: expected Deltas of one layer each for all tokens, as rewire returns them.")
    return delta.layer


def _values(delta: Delta, model: Model) -> Tensor:
    values = torch.as_tensor(delta.values, dtype=torch.float32, device=model.device).detach()
    return values.clone() * delta.strength


def _check(share: float, steps: int, learning_rate: float, optimiser: str) -> None:
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; expected a part of the layers, above 0 and at most 1.")
    learning.whole(steps, "steps", 0)
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"learning_rate is {learning_rate}; expected a number above 0.")
    if optimiser not in _OPTIMISERS:
        raise InputError(f"optimiser is {optimiser!r}; expected {', '.join(_OPTIMISERS)}.")
