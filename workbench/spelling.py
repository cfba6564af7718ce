"""The text and the bytes that the tokens of a trace stand for, from the texts in its vocabulary.

A token that is a piece of a character has no text of its own: its vocabulary entry is kept instead, one character a
byte (`Ã`, as byte-level BPE writes it) or a name (`<0xE2>`, as SentencePiece does). Alone such an entry looks like
text; beside its neighbours it doesn't: entries are bytes where the bytes of consecutive ones make whole characters.

Tokens spell the text exactly with byte-level BPE. A tokenizer whose single tokens lose their leading space when they
are decoded (SentencePiece) spells it without those spaces.
"""

import codecs
import re
from collections.abc import Iterator, Sequence

import numpy as np

from workbench.tracefile import Trace

BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BROKEN = "\ufffd"
"""Stands for a byte that is no part of a whole character."""


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def pieces(text: str) -> bytes | None:
    """The bytes a vocabulary entry may stand for if it is not text; None where it can only be text.

    What is not text begins or ends inside a character, and is whole characters in between.
    """
    named = BYTE_NAME.fullmatch(text)
    if named:
        return bytes([int(named[1], 16)])
    if not all(character in ALPHABET for character in text):
        return None
    raw = bytes(ALPHABET[character] for character in text)
    inside = raw.lstrip(bytes(range(0x80, 0xC0)))
    if len(raw) - len(inside) > 3:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(inside)
    except UnicodeDecodeError:
        return None
    return raw if len(inside) < len(raw) or decoder.getstate()[0] else None


def spell(entries: Sequence[str], broken: Sequence[bytes | None]) -> tuple[list[str], list[int]]:
    """Characters that begin in each token, and the bytes of each token.

    entries  the tokens' texts in the vocabulary; broken  `pieces` of each. A character made of several tokens belongs
    to the first of them; the others have an empty text, and all have their own bytes.
    """
    texts = list(entries)
    sizes = [len(entry.encode()) for entry in entries]
    at = 0
    while at < len(entries):
        if broken[at] is None:
            at += 1
            continue
        run = whole_run(broken, at)
        if run is None:
            if BYTE_NAME.fullmatch(entries[at]):
                texts[at], sizes[at] = BROKEN, 1
            at += 1
            continue
        decoder = codecs.getincrementaldecoder("utf-8")()
        begun = at  # the token in which the character that is being decoded began
        for token in range(at, run):
            raw = broken[token] or b""
            texts[token], sizes[token] = "", len(raw)
            for place in range(len(raw)):
                if not decoder.getstate()[0]:
                    begun = token
                texts[begun] += decoder.decode(raw[place : place + 1])
        at = run
    return texts, sizes


def whole_run(broken: Sequence[bytes | None], start: int) -> int | None:
    """End of the shortest run of pieces from `start` on that makes whole characters; None if none does."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for token in range(start, len(broken)):
        raw = broken[token]
        if raw is None:
            return None
        try:
            decoder.decode(raw)
        except UnicodeDecodeError:
            return None
        if not decoder.getstate()[0]:
            return token + 1
    return None


def texts(trace: Trace) -> Iterator[tuple[int, list[str]]]:
    """First token and the texts of the tokens of each sequence, in order; see `spell`. An unknown id spells nothing."""
    for start, entries, broken in _sequences(trace):
        yield start, spell(entries, broken)[0] if any(raw is not None for raw in broken) else entries


def n_bytes(trace: Trace) -> np.ndarray:
    """int64 (n_tokens,): bytes of text (UTF-8) that each token stands for, 0 where its id is unknown."""
    sizes = [spell(entries, broken)[1] for _, entries, broken in _sequences(trace)]
    return np.array([size for each in sizes for size in each], np.int64)


def _sequences(trace: Trace) -> Iterator[tuple[int, list[str], list[bytes | None]]]:
    """First token, vocabulary entries and their `pieces`, sequence by sequence."""
    vocabulary = trace.vocabulary()
    known = dict(zip(vocabulary["token_id"].tolist(), vocabulary["text"].tolist(), strict=True))
    ids, of_token = np.unique(trace.tokens()["token_id"].to_numpy(), return_inverse=True)
    entries = [known.get(token_id) or "" for token_id in ids.tolist()]
    broken = [pieces(entry) for entry in entries]
    ends = np.cumsum(np.bincount(trace.sequence_index(), minlength=trace.n_sequences)).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        codes = of_token[start:end].tolist()
        yield start, [entries[code] for code in codes], [broken[code] for code in codes]
