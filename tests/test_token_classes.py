"""The classes of tokens: by hand, and for every token of two tokenizers."""

from __future__ import annotations

import checkpoint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.token_classes import CLASSES, token_class, token_classes


@pytest.mark.parametrize(
    "text, expected",
    [
        (" the", "word start"),
        ("\nThe", "word start"),
        (" 3D", "word start"),
        ("ing", "word part"),
        ("語", "word part"),
        ("don't", "word part"),
        ("e\u0301", "word part"),
        ("7", "digit"),
        (" 12", "digit"),
        ("½²", "digit"),
        ("٣", "digit"),
        (".", "punctuation"),
        (" ==\n", "punctuation"),
        ("€", "punctuation"),
        ("。", "punctuation"),
        (" ", "whitespace"),
        ("\n\t", "whitespace"),
        ("", "whitespace"),
        ("\ufffd", "byte"),
        (" \ufffd", "byte"),
    ],
)
def test_classes_by_hand(text: str, expected: str):
    assert token_class(text) == expected


@settings(max_examples=50)
@given(st.text())
def test_every_text_has_a_class(text: str):
    found = token_class(text)
    assert found in CLASSES and found != "special"
    if text.strip():
        assert found == token_class(text + " ")  # whitespace behind it changes nothing
    if found in ("digit", "punctuation", "byte"):
        assert found == token_class(" " + text)


def test_bytes_and_special_tokens():
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer("x 7é")["input_ids"]
    found = [CLASSES[place] for place in token_classes(tokenizer, [*ids, checkpoint.PAD, checkpoint.END])]
    assert found == ["word part", "whitespace", "digit", "byte", "byte", "special", "special"]


def test_the_space_that_sentencepiece_writes():
    class Pieces:
        all_special_ids = (0,)
        entries = ("<s>", "▁the", "the", "▁", "▁7", "<0xE2>")
        texts = ("<s>", "the", "the", "", "7", "\ufffd")

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.entries[one] for one in ids]

        def decode(self, ids: list[int], **_: object) -> str:
            return self.texts[ids[0]]

    found = [CLASSES[place] for place in token_classes(Pieces(), range(6))]
    assert found == ["special", "word start", "word part", "whitespace", "digit", "byte"]
