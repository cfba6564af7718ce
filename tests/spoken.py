"""A tiny model with a tokenizer of words w3 … w127, for what takes texts; and texts for it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workbench.models import Model
from workbench.prompt_pairs import Pair


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, tiny.VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def model(family: str, **changes: Any) -> Model:
    torch.set_num_threads(1)
    return replace(tiny.model(family, **changes), tokenizer=tokenizer())


def text(length: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(4, tiny.VOCABULARY, length))


def pair(length: int = 7, seed: int = 0, shared: int = 0) -> Pair:
    """Two random texts, the first `shared` words alike."""
    start = text(shared, 99)
    source, target = (f"{start} {text(length - shared, 2 * seed + i)}".strip() for i in (0, 1))
    return Pair(source, target, ("w5", "w9"))
