"""The text of a trace from the texts of its tokens: whole characters out of pieces, and the bytes of each token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas import DataFrame
from routed import full_trace

from workbench.spelling import ALPHABET, n_bytes, pieces, spell, texts

WRITTEN = {byte: character for character, byte in ALPHABET.items()}


def entry(raw: bytes) -> str:
    """What a tracer keeps of a token of byte-level BPE: its text, or where it has none its vocabulary entry."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "".join(WRITTEN[byte] for byte in raw)


def test_alphabet_is_that_of_gpt2():
    assert len(ALPHABET) == 256 and set(ALPHABET.values()) == set(range(256))
    assert ALPHABET["Ġ"] == 0x20 and ALPHABET["Ċ"] == 0x0A and ALPHABET["A"] == 65 and ALPHABET["Ã"] == 0xC3


def test_pieces():
    assert pieces("Ã") == b"\xc3" and pieces("<0xE2>") == b"\xe2" and pieces("Ġå") == b" \xe5"
    assert pieces("for") is None and pieces("für") is None and pieces(" é") is None and pieces("ไ") is None
    assert pieces("é") == b"\xe9"  # a byte or a letter: only its neighbours tell


@pytest.mark.parametrize("text, cuts", [("año €5", [1, 3, 6]), ("日本", [1, 2, 4, 5]), ("a😀b", [2, 3, 4]), ("é", [])])
def test_pieces_of_characters_become_text(text, cuts):
    raw = text.encode()
    bounds = [0, *cuts, len(raw)]
    entries = [entry(raw[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    found, sizes = spell(entries, [pieces(one) for one in entries])
    assert "".join(found) == text
    assert sizes == [b - a for a, b in zip(bounds, bounds[1:], strict=False)]


letters = st.text(st.sampled_from("aZ .éñ日本ไ😀ж"), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(letters, st.data())
def test_any_cut_is_mended(text, data):
    """Tokens cut anywhere spell the text, unless a letter alone looks like a byte beside other bytes."""
    raw = text.encode()
    bounds = [0, *sorted(data.draw(st.sets(st.integers(1, len(raw) - 1))) if len(raw) > 1 else []), len(raw)]
    entries = [entry(raw[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    found, sizes = spell(entries, [pieces(one) for one in entries])
    assert "".join(found) == text and sum(sizes) == len(raw)


def test_bytes_that_make_no_character():
    found, sizes = spell(["a", "<0xFF>", "b"], [None, b"\xff", None])
    assert found == ["a", "\ufffd", "b"] and sizes == [1, 1, 1]
    assert spell(["é", "t"], [b"\xe9", None]) == (["é", "t"], [2, 1])


def test_texts_of_a_trace(tmp_path):
    raw = "Ça 日!".encode()
    parts = [raw[:1], raw[1:3], raw[3:6], raw[6:7], raw[7:]]
    entries = {number: entry(part) for number, part in enumerate(parts)}
    ids = [0, 1, 2, 3, 4, 2, -1, 4]
    sequences = DataFrame({"lang": ["fr", "fr"]})
    trace = full_trace(
        tmp_path / "t.duckdb", np.zeros((8, 1, 1), int), n_experts=2, seq=[0] * 5 + [1] * 3, sequences=sequences,
        token_ids=ids, vocabulary=entries,
    )  # fmt: skip
    (first, whole), (second, _) = texts(trace)
    assert (first, second) == (0, 5) and "".join(whole) == "Ça 日!"
    sizes = n_bytes(trace)
    assert sizes[:5].tolist() == [len(part) for part in parts] and sizes[6] == 0 and sizes.dtype == np.int64
