"""Tiny checkpoints with a tokenizer, so that text can be traced: random weights, no network, the same on every run.

`olmoe()` is a loaded model, `folder(path)` the same as files, `corpus(path)` a JSON-lines file of texts in three
languages.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from workbench.models import Model, load

PAD, END, USER, ASSISTANT = range(4)
SPECIAL = ("<pad>", "<end>", "<user>", "<assistant>")
VOCABULARY = len(SPECIAL) + 256
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(end_behind: bool = False) -> PreTrainedTokenizerFast:
    """A token a byte; with `end_behind` every text gets <end> as its last token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate((*SPECIAL, *alphabet))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    if end_behind:
        made.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", chat_template=CHAT, model_max_length=512
    )


def model(family: str, **changes: Any) -> Model:
    """A tiny model of the family that knows the tokenizer's ids."""
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None}
    return load(tiny.module(family, **(sizes | changes)), tokenizer=tokenizer())


def olmoe(**changes: Any) -> Model:
    """hidden 64, 3 layers, 8 experts, top-3, 256 positions."""
    return model("olmoe", **({"max_position_embeddings": 256} | changes))


def folder(path: Path, **changes: Any) -> Path:
    """The checkpoint of `olmoe` as a folder."""
    made = olmoe(**changes)
    made.module.save_pretrained(path)  # type: ignore[operator]
    made.tokenizer.save_pretrained(path)
    return path


def rows(n: int = 24, longest: int = 90, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 1 to `longest` characters in three languages and two domains; every third row is aligned."""
    dice = random.Random(seed)
    letters = {"en": "abcdefghij ", "uk": "абвгґдеєжз ", "ja": "あいうえおかきくけこ"}
    made = []
    for number in range(n):
        lang = list(letters)[number % 3]
        made.append(
            {
                "text": "x"
                + "".join(dice.choices(letters[lang], k=dice.randrange(longest) // (1 if lang == "en" else 3))),
                "lang": lang,
                "domain": "news" if number % 2 else "law",
                "segment_id": f"s{number // 3}",
                "difficulty": number % 5,
            }
        )
    return made


def corpus(path: Path, n: int = 24, longest: int = 90, seed: int = 0) -> Path:
    """`rows` as a file of JSON lines."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows(n, longest, seed))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
