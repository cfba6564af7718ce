"""Continue a prompt, plainly or under interventions, a token at a time, and compare what comes out.

    found = generate(model, "The treaty was", Ablate(layer=3, experts=[5]), on_step=lambda step: print(step.text))
    found.text                                         # the continuation, without the prompt
    both = compare(model, "The treaty was", recipe, control=0)
    first_difference(both["plain"], both["steered"])   # 4: the fifth token is the first that differs

Tokens are the most likely ones (greedy) at temperature 0; else they are drawn from softmax(z / temperature) with a
seed, the same random numbers with and without interventions, so that two texts differ only where the model does.
**probability** is softmax(z) at the token, z being the logits it was chosen by, with all interventions and before any
temperature.

`on_step` is called with each token as it is chosen, on the caller's thread; it stops the generation by returning True.
There is no iterator, on purpose: between its steps the model would stay intervened on for whoever uses it next.
`workbench.side_by_side` generates several continuations in turns, on modules of their own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.capture import embeddable
from workbench.corpus import from_rows
from workbench.errors import InputError, RunError, not_negative
from workbench.forward import pad_id, predicts_next, reads_twice, routing
from workbench.intervening import Given, intervene
from workbench.interventions import control as random_control
from workbench.models import Model, load
from workbench.recipe import Recipe, as_recipe
from workbench.recorder import Recorder
from workbench.routing import Routing
from workbench.tokenization import PROMPT, sequences, token_texts

CONTEXT = 8
"""Tokens of the prompt that the first ones after it are decoded with: some decoders look at the token before."""


@dataclass(frozen=True)
class Candidate:
    """A token that could have been next: token is its text as a vocabulary shows it, probability in [0, 1]."""

    token_id: int
    token: str
    probability: float


@dataclass(frozen=True)
class Step:
    """One generated token.

    token        its text as a vocabulary shows it, a piece of a character by its byte's name
    text         what it adds to the text: "" while a character lacks bytes, whole characters when it is complete; ""
                 for the token that ends the text
    probability  of the token, in [0, 1]
    candidates   the most likely tokens, likeliest first; as many as were asked for, or those that were asked for
    routing      if asked for, one a layer: of the n tokens that were read to choose this one, which are those of the
                 prompt at the first step and then the one chosen before
    """

    token_id: int
    token: str
    text: str
    probability: float
    candidates: tuple[Candidate, ...] = ()
    routing: tuple[Routing, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Generated:
    """A continuation.

    prompt   token ids of what was continued, the chat template's included
    text     the continuation; bytes that make no character are U+FFFD
    ended    "end": the model ended it; "length": max_tokens were there; "stopped": on_step asked for it
    touched  tokens × layers that each intervention acted on, in the order of the recipe
    """

    prompt: tuple[int, ...] = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    text: str
    ended: Literal["end", "length", "stopped"]
    touched: tuple[int, ...] = ()


def generate(
    model: Model | str,
    prompt: str | list[Mapping[str, Any]],
    interventions: Given | None = None,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    candidates: int | Callable[[Tensor], Tensor] = 0,
    record: Collection[str] | None = None,
    on_step: Callable[[Step], Any] | None = None,
) -> Generated:
    """Continue `prompt` under `interventions`.

    model          what `workbench.load` returns, or a name for it
    prompt         text, or a chat: messages such as {"role": "user", "content": "…"}, to which the template is applied
    interventions  a recipe, its file, or one or several interventions; None for the model as it is
    max_tokens     most tokens to generate; with the prompt no more than the model's positions
    temperature    0 takes the most likely token, else tokens are drawn
    seed           of drawing; the global random numbers are neither used nor changed
    chat           `prompt` is what a user says: apply the chat template
    candidates     how many of the likeliest tokens each step has; or which: a function of the probabilities, float32
                   (vocabulary,), that gives their ids
    record         what to record of the routing: weights, entropy, margin, logits, norms; () only the experts, None
                   nothing at all
    on_step        called with each Step; what it raises is passed on, and True stops

    InputError for a prompt without tokens or too long, a model that can't continue a text, and what `intervene`
    refuses; RunError if the model fails, its logits make no probabilities, or an intervention touched nothing (not when
    on_step stopped).
    """
    model = model if isinstance(model, Model) else load(model)
    not_negative(candidates=0 if callable(candidates) else candidates)
    ids = check_question(model, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat)
    recorder = None if record is None else Recorder(model, record)
    module: Any = model.module
    ends = end_ids(module)
    writing = _Writing(model.tokenizer, ids)
    dice = torch.Generator(model.device).manual_seed(seed)
    steps: list[Step] = []
    logits = torch.empty(0)
    ended: Literal["end", "length", "stopped"] = "length"

    def keep(_ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal logits
        logits = scores
        if logits.float().softmax(-1).isnan().any():  # some -inf are fine: tokens that Contrast makes impossible
            raise RunError(
                f"the logits are NaN or infinite after {len(steps)} tokens: take a weaker edit, or compute in float32."
            )
        if temperature:  # drawn here and not by transformers, whose random numbers belong to the whole process
            drawn = torch.multinomial((scores / temperature).softmax(-1), 1, generator=dice)
            return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0)
        return scores

    def see(so_far: Tensor, _scores: Any) -> Tensor:
        nonlocal ended
        done = torch.zeros(1, dtype=torch.bool, device=so_far.device)
        if ended == "end" or len(steps) == max_tokens:  # generation may go on for a step before it looks
            return ~done
        token_id = int(so_far[0, -1])
        ended = "end" if token_id in ends else "length"
        last = ended == "end" or len(steps) + 1 == max_tokens
        text = writing.rest() if ended == "end" else writing.add(token_id) + (writing.rest() if last else "")
        seen = None if recorder is None else tuple(routing(layer, None) for layer in recorder.take()[-1])
        steps.append(_step(model, token_id, text, logits[0], candidates, seen))
        if on_step is not None and on_step(steps[-1]) is True:
            raise Stopped
        return done

    applied = None
    try:
        with ExitStack() as stack:
            if interventions is not None:
                applied = stack.enter_context(intervene(model, interventions))
            if recorder is not None:
                stack.enter_context(recorder)
            stack.enter_context(torch.inference_mode())
            given = torch.tensor([ids], device=model.device)
            module.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=max_tokens,
                num_beams=1,
                do_sample=False,
                pad_token_id=pad_id(model),
                logits_processor=[keep],
                stopping_criteria=[see],
            )
    except Stopped:
        ended = "stopped"
    except (RunError, InputError):
        raise
    except (RuntimeError, MemoryError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"generation broke off after {len(steps)} tokens: {why}") from error
    touched = () if applied is None else tuple(applied.touched)
    text = "".join(step.text for step in steps) + writing.rest()
    return Generated(tuple(ids), tuple(steps), text, ended, touched)


def compare(
    model: Model | str,
    prompt: str | list[Mapping[str, Any]],
    interventions: Given,
    *,
    control: int | None = None,
    **options: Any,
) -> dict[str, Generated]:
    """The prompt continued without and with interventions: "plain" and "steered".

    control  a seed: also continue it under the same edits of random experts, as "control"
    options  further arguments of `generate`
    """
    recipes = compared(interventions, control)
    model = model if isinstance(model, Model) else load(model)
    return {name: generate(model, prompt, each, **options) for name, each in recipes.items()}


def compared(interventions: Given | None, control: int | None = None) -> dict[str, Recipe | None]:
    """What a prompt is continued under: "plain" (nothing) and, if there are interventions, "steered" and, with a seed,
    "control". InputError if there is no control of them.
    """
    not_negative(seed=control or 0)
    if interventions is None:
        if control is not None:
            raise InputError("there are no interventions, so there is no control of random experts.")
        return {"plain": None}
    recipe = as_recipe(interventions)
    recipes = {"plain": None, "steered": recipe}
    if control is not None:
        recipes["control"] = Recipe(random_control(recipe.interventions, control), recipe.model, recipe.source)
    return recipes


def first_difference(one: Generated, other: Generated) -> int | None:
    """The first place, from 0, where two continuations have different tokens, or only one has a token; None if none."""
    pairs = zip(one.steps, other.steps, strict=False)
    differ = (place for place, (a, b) in enumerate(pairs) if a.token_id != b.token_id)
    shorter, longer = sorted((len(one.steps), len(other.steps)))
    return next(differ, shorter if shorter < longer else None)


class Stopped(Exception):
    """Ends a generation as stopped, raised anywhere in it: then no intervention has to have touched something."""


class _Writing:
    """The text of tokens as they come: a character appears when all its bytes are there.

    Tokens are decoded together with the ones before them, since a token alone may lose its leading space.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = prompt[-CONTEXT:]
        self._written = len(self._ids)

    def add(self, token_id: int) -> str:
        """What there is to write when this token has come."""
        self._ids.append(token_id)
        new = self._new()
        return "" if new.endswith("\ufffd") else self._write(new)

    def rest(self) -> str:
        """What has not been written: bytes that no token will complete."""
        return self._write(self._new())

    def _new(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._written])) :]

    def _write(self, new: str) -> str:
        if new:
            self._ids = self._ids[max(0, min(self._written, len(self._ids) - CONTEXT)) :]
            self._written = len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _step(
    model: Model,
    token_id: int,
    text: str,
    logits: Tensor,
    wanted: int | Callable[[Tensor], Tensor],
    seen: tuple[Routing, ...] | None,
) -> Step:
    """A step; logits are float (vocabulary,), those that the token was chosen by."""
    p = logits.float().softmax(-1)
    likely = candidates_of(model, p, wanted(p) if callable(wanted) else likeliest(p, wanted))
    return Step(token_id, token_texts(model.tokenizer, [token_id])[token_id], text, float(p[token_id]), likely, seen)


def likeliest(p: Tensor, n: int) -> Tensor:
    """Ids of the n likeliest tokens, likeliest first; p is (vocabulary,)."""
    return p.topk(min(n, len(p))).indices


def candidates_of(model: Model, p: Tensor, ids: Tensor) -> tuple[Candidate, ...]:
    """Tokens with their probabilities, in the order of ids; p is (vocabulary,)."""
    known = ids.tolist()
    texts = token_texts(model.tokenizer, known)
    return tuple(Candidate(each, texts[each], found) for each, found in zip(known, p[ids].tolist(), strict=True))


def check_question(
    model: Model,
    prompt: str | list[Mapping[str, Any]],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> list[int]:
    """Token ids of the prompt. InputError for what `generate` refuses of it, of the model and of the settings."""
    if model.tokenizer is None:
        raise InputError(f"model {model.name} has no tokenizer: load it with `workbench.load(…, tokenizer=…)`")
    if reads_twice(model) or not predicts_next(model):
        raise InputError(f"{model.family} can't continue a text; expected a decoder that predicts the next token.")
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1 token to generate.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature is {temperature}; expected 0 (the most likely token) or a number above it.")
    not_negative(seed=seed)
    return prompt_ids(model, prompt, chat, max_tokens)


def prompt_ids(model: Model, prompt: str | list[Mapping[str, Any]], chat: bool, max_tokens: int) -> list[int]:
    """Token ids of the prompt: those the tokenizer puts before a text, but none that it puts behind it."""
    if isinstance(prompt, str) and not prompt.strip():
        raise InputError(f"the prompt is {prompt!r}; expected some text.")
    messages = [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
    row = {"text": messages} if isinstance(messages, str) else {"messages": [dict(each) for each in messages]}
    found = sequences(from_rows([row], name="prompt"), model.tokenizer, max_length=sys.maxsize, generation_prompt=True)
    (sequence,) = embeddable(found, model)
    ids = sequence.token_ids.tolist()
    if isinstance(messages, str):
        ids = ids[: int((sequence.phase == PROMPT).nonzero()[0][-1]) + 1]
    room = model.max_length
    if room is not None and len(ids) + max_tokens > room:
        raise InputError(
            f"the prompt has {len(ids):,} tokens, which with {max_tokens:,} more exceeds the {room:,} positions of "
            f"{model.name}; shorten the prompt, or generate fewer."
        )
    return ids


def end_ids(module: Any) -> set[int]:
    """Ids of the tokens that end a text."""
    end = module.generation_config.eos_token_id
    return set() if end is None else {int(each) for each in (end if isinstance(end, list | tuple) else [end])}
