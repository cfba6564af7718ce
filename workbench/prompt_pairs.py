"""Pairs of prompts for patching: equal in length, with two tokens whose logits after them are compared.

    {"source": "The capital of France is", "target": "The capital of Spain is", "answers": [" Paris", " Madrid"]}

is a row of a file of them (.jsonl, .csv or .parquet; in .csv the answers are `answer_1` and `answer_2`, which the
others may have, too).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import files
from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.models import Model


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts of equal length in tokens, and two different tokens whose logits after them are compared.

    answers  texts of one token each, mostly with a leading space: that which the source calls for, and the target's
    """

    source: str
    target: str
    answers: tuple[str, str]


def read_pairs(path: str | os.PathLike) -> list[Pair]:
    """The pairs of a file. InputError names the first row that isn't one."""
    path = Path(path)
    files.check_format(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file. Expected rows with source, target and answers.")
    pairs = []
    for where, record in files.records(path):
        if isinstance(record, InputError):
            raise record
        pairs.append(_pair(where, record))
    if not pairs:
        raise InputError(f"{path} has no rows; expected at least one pair.")
    return pairs


def _pair(where: str, record: Any) -> Pair:
    record = record if isinstance(record, Mapping) else {}
    answers = record.get("answers")
    answers = [record.get("answer_1"), record.get("answer_2")] if answers is None else answers
    parts = [record.get("source"), record.get("target"), *(answers if isinstance(answers, list | tuple) else ())]
    if len(parts) != 4 or not all(isinstance(part, str) and part for part in parts):
        raise InputError(
            f"{where}: not a pair of prompts; expected the texts `source` and `target`, and `answers`, two texts."
        )
    source, target, first, second = parts
    return Pair(source, target, (first, second))


def encoded(pair: Pair, model: Model) -> tuple[list[int], list[int], tuple[int, int]]:
    """Token ids of source and target, as many of both, and those of the answers.

    InputError if the prompts differ in length, are empty or too long for the model, or an answer isn't exactly one
    token of the model's vocabulary, or both are the same.
    """
    source, target = (list(model.tokenizer(text)["input_ids"]) for text in (pair.source, pair.target))
    if len(source) != len(target):
        raise InputError(
            f"the source {pair.source!r} is {len(source)} tokens long and the target {pair.target!r} {len(target)}; "
            "expected equally many, so that every position has its counterpart. Reword one of them."
        )
    if not source:
        raise InputError("the prompts have no tokens; expected at least one.")
    if model.max_length is not None and len(source) > model.max_length:
        raise InputError(f"the prompts have {len(source):,} tokens; {model.name} takes {model.max_length:,}.")
    first, second = (_answer(text, model) for text in pair.answers)
    if first == second:
        raise InputError(f"the answers {pair.answers[0]!r} and {pair.answers[1]!r} are the same token; expected two.")
    return source, target, (first, second)


def _answer(text: str, model: Model) -> int:
    tokenizer = model.tokenizer
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([one])) for one in ids) or "none"
        raise InputError(
            f"the answer {text!r} is {len(ids)} tokens ({pieces}); expected exactly one. Take the token in which the "
            "answers first differ; a word that follows another mostly begins with a space."
        )
    if ids[0] == tokenizer.unk_token_id:
        raise InputError(f"the answer {text!r} isn't in the vocabulary of {model.name}.")
    return ids[0]
