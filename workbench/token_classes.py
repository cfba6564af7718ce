"""What kind of text a token is, from its own text alone: one of CLASSES.

- **special**: a token of the tokenizer that stands for no text (`<eos>`, `<user>`)
- **byte**: a piece of a character
- **whitespace**: only spaces, line breaks and tabs, or nothing
- **digit**: only digits and other numerals (½, ²), with or without whitespace around them
- **punctuation**: only punctuation and symbols (`.`, `==`, `€`), with or without whitespace around them
- **word start**: anything else that begins with whitespace, as ` the` does
- **word part**: anything else: what continues a word, but also a word right after a line break or a bracket, and
  nearly every token of a script that is written without spaces
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

CLASSES = ("word start", "word part", "digit", "punctuation", "whitespace", "byte", "special")
SPACE = "▁"
"""What SentencePiece writes for a space; its tokens lose it when they are decoded one by one."""


def token_class(text: str) -> str:
    """The class of a token that isn't special, from its text.

    >>> [token_class(text) for text in (" the", "ing", " 12", "==", "\\n", "\\ufffd")]
    ['word start', 'word part', 'digit', 'punctuation', 'whitespace', 'byte']
    """
    bare = text.strip()
    kinds = {unicodedata.category(character)[0] for character in bare}
    if not bare:
        return "whitespace"
    if "\ufffd" in bare:
        return "byte"
    if kinds == {"N"}:
        return "digit"
    if kinds <= {"P", "S"}:
        return "punctuation"
    return "word start" if text[0].isspace() else "word part"


def token_classes(tokenizer: Any, token_ids: Sequence[int]) -> np.ndarray:
    """The class of each of the token ids, as places in CLASSES: int8 (n,)."""
    special = set(tokenizer.all_special_ids)
    entries = tokenizer.convert_ids_to_tokens(list(token_ids))
    found = np.empty(len(token_ids), np.int8)
    for place, (token_id, entry) in enumerate(zip(token_ids, entries, strict=True)):
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if (entry or "").startswith(SPACE) and not text[:1].isspace():
            text = " " + text
        found[place] = CLASSES.index("special" if token_id in special else token_class(text))
    return found
