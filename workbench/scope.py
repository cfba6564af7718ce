"""Which tokens of a forward pass an intervention is about: `all`, or conditions such as `phase=prompt & token~[0-9]`.

The conditions are those of `workbench.analysis.filters` that a model knows about while it runs:

- `phase=prompt`, `phase=generated`: inside `generate`, what was given and what came; outside of it, tokens of a pass
  with a cache that holds earlier ones count as generated.
- `position=0`, `position=4-15`, `position=256+`: place in the own text, from 0; padding isn't counted.
- `token=" the"`, `token~pattern`: the text of the token, or a regular expression found in it.
- `text~pattern`: a match of the regular expression in the text up to and including the token ends in the token. Where
  a character is made of several tokens, it belongs to the last of them.

None of them looks ahead, so that a text is treated alike in one pass and in cached generation.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from workbench.analysis import filters
from workbench.errors import InputError
from workbench.spelling import pieces
from workbench.tokenization import token_texts

ALL = "all"
_NAMES = ("phase", "position", "token", "text")


@dataclass(eq=False)
class Pass:
    """One pass of a stack of layers, as its inputs say: B rows, S new places after `past` earlier ones.

    shape    (B, S)
    new      int64 (B, S): the new token ids; None where the model was given embeddings
    ids      int64 (B, past + S): the token ids so far, padding included; None where they aren't all known
    real     bool (B, past + S): not padding
    past     places that a cache holds
    prompt   places that belong to the prompt
    """

    shape: tuple[int, int]
    past: int
    prompt: int
    new: Tensor | None
    ids: Tensor | None
    real: Tensor
    found: dict[str, Tensor | None] = field(default_factory=dict)
    counted: set[int] = field(default_factory=set)  # layers whose edits were counted: a router may be asked twice


Condition = Callable[[Pass], Tensor]
"""A pass -> bool (B, S)."""


def where(scope: str, now: Pass, tokenizer: Any) -> Tensor | None:
    """bool (B · S,): the tokens in the scope, none of them padding; None for all. Found once a pass."""
    if scope not in now.found:
        now.found[scope] = None if scope == ALL else _tokens(scope, now, tokenizer)
    return now.found[scope]


def _tokens(scope: str, now: Pass, tokenizer: Any) -> Tensor:
    chosen = now.real[:, now.past :].clone()
    for name, sign, given in conditions(scope):
        if name == "phase":
            columns = torch.arange(now.past, now.past + now.shape[1], device=chosen.device)
            wanted = torch.zeros_like(columns, dtype=torch.bool)
            for value in filters.values(name, given):
                wanted |= columns < now.prompt if value == "prompt" else columns >= now.prompt
            chosen &= wanted
        elif name == "position":
            position = now.real.cumsum(1)[:, now.past :] - 1
            wanted = torch.zeros_like(chosen)
            for value in filters.values(name, given):
                first, last = filters.bounds(value)
                wanted |= (position >= first) & (position <= last)
            chosen &= wanted
        elif name == "token":
            chosen &= _by_token(now, tokenizer, sign, given)
        else:
            chosen &= _in_text(now, tokenizer, filters.pattern(name, given))
    return chosen.flatten()


@lru_cache
def conditions(scope: str) -> tuple[tuple[str, str, str], ...]:
    """(name, sign, value) of each condition. InputError says what a scope is, if this is none."""
    found = []
    for part in filters.NEXT.split(scope.strip()):
        condition = filters.CONDITION.fullmatch(part)
        name, sign, given = condition.groups() if condition else ("", "", "")
        if name not in _NAMES:
            raise InputError(
                f"scope {scope!r}: {part!r} is no condition on the tokens of a forward pass; expected all, "
                'phase=prompt, phase=generated, position=4-15, token=" the", token~pattern or text~pattern, '
                "joined by ' & '."
            )
        if (name in ("phase", "position") and sign != "=") or (name == "text" and sign != "~"):
            raise InputError(f"scope {scope!r}: write {name}{'~' if name == 'text' else '='}… .")
        if sign == "~":
            filters.pattern(name, given)
        for value in filters.values(name, given) if sign == "=" else ():
            if name == "phase" and value not in ("prompt", "generated"):
                raise InputError(f"scope {scope!r}: phase is {value!r}; a running model knows prompt and generated.")
            if name == "position":
                filters.bounds(value)
        found.append((name, sign, given))
    return tuple(found)


def generated_only(scope: str) -> bool:
    """Whether the scope means tokens that a model generates, and none of a text that it is given."""
    asked = [] if scope == ALL else conditions(scope)
    return any(name == "phase" and "prompt" not in filters.values(name, given) for name, _, given in asked)


def apart(one: str, other: str) -> bool:
    """Whether no token can be in both scopes, as far as their phases and positions say."""
    if ALL in (one, other):
        return False
    phases, positions = [], []
    for text in (one, other):
        asked = {name: filters.values(name, given) for name, sign, given in conditions(text) if sign == "="}
        phases.append(set(asked.get("phase", ("prompt", "generated"))))
        positions.append([filters.bounds(value) for value in asked.get("position", ("0+",))])
    meet = any(a[0] <= b[1] and b[0] <= a[1] for a in positions[0] for b in positions[1])
    return not phases[0] & phases[1] or not meet


def check(scope: str, tokenizer: Any) -> None:
    """InputError if this is no scope, or one about text for a model without a tokenizer."""
    if scope == ALL:
        return
    named = {name for name, _, _ in conditions(scope)}
    if tokenizer is None and named & {"token", "text"}:
        raise InputError(f"scope {scope!r} is about text, but the model has no tokenizer: load it with one.")


def _by_token(now: Pass, tokenizer: Any, sign: str, given: str) -> Tensor:
    ids = now.new
    if ids is None:
        raise InputError("a scope about tokens needs their ids, but the model was given embeddings.")
    texts = token_texts(tokenizer, torch.unique(ids).tolist())
    if sign == "~":
        wanted = filters.pattern("token", given)
        meant = [token for token, text in texts.items() if wanted.search(text)]
    else:
        meant = [token for token, text in texts.items() if text in filters.values("token", given)]
    return torch.isin(ids, torch.tensor(meant, dtype=ids.dtype, device=ids.device))


def _in_text(now: Pass, tokenizer: Any, wanted: re.Pattern) -> Tensor:
    ids = now.ids
    if ids is None:
        raise InputError(
            "a scope about text needs all token ids of the text, but the model was given embeddings, or a cache that "
            "was filled before the interventions began."
        )
    chosen = torch.zeros_like(now.real)
    known = torch.unique(ids).tolist()
    entries = token_texts(tokenizer, known)
    broken = {token for token in known if "\ufffd" in tokenizer.decode([token])}
    for row in range(len(ids)):
        places = now.real[row].nonzero().squeeze(1)
        texts = spelled(ids[row, places].tolist(), entries, broken)
        ends = list(accumulate(map(len, texts)))
        text = "".join(texts)
        for place, size, end in zip(places.tolist(), map(len, texts), ends, strict=True):
            if place >= now.past and size:
                chosen[row, place] = any(match.end() > end - size for match in wanted.finditer(text, 0, end))
    return chosen[:, now.past :]


def spelled(token_ids: list[int], texts: dict[int, str], broken: set[int]) -> list[str]:
    """Characters that end in each token: what follows a token changes nothing here.

    texts: the entries of the vocabulary; broken: ids whose entry is bytes of a longer character, not text.
    """
    decoder, spelled = codecs.getincrementaldecoder("utf-8")(), []
    for token in token_ids:
        raw = pieces(texts[token]) if token in broken else None
        if raw is None:
            decoder.reset()
            spelled.append(texts[token])
            continue
        try:
            spelled.append(decoder.decode(raw))
        except UnicodeDecodeError:  # the character before it was never finished
            decoder.reset()
            spelled.append("")
    return spelled
