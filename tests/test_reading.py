"""One text with its routing against the trace's own arrays; marks of what can't be seen; one token as a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import routed

from workbench import reading
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

SEQ = [0, 0, 0, 1, 1, 3, 3, 3, 3]
N = len(SEQ)
VOCABULARY = {1: "a", 2: " b", 3: "Ã", 4: "©", 5: "\n", 6: "<0xE2>"}
TOKENS = [1, 2, 3, 4, 5, -1, 6, 99, 1]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Trace:
    """Everything recorded, another k and E in each layer, dropped tokens, a sequence without tokens."""
    random = np.random.default_rng(0)
    experts = [np.stack([random.permutation(size)[:k] for _ in range(N)]) for size, k in ((6, 3), (300, 2), (4, 4))]
    experts[0][1] = -1
    experts[1][4, 1] = -1
    weights = [np.where(one < 0, 0, random.random(one.shape)).astype(np.float32) * 3 for one in experts]
    numbers = random.random((2, 3, N)).astype(np.float32)
    numbers[0, 2] = np.nan
    rows = pd.DataFrame(
        [{"lang": "en", "topic": "x"}, {"lang": "de", "topic": "y"}, {"lang": "fr"}, {"lang": None, "lang_": 1}]
    )
    nll = random.random(N).astype(np.float32)
    nll[0] = np.nan
    return routed.full_trace(
        tmp_path_factory.mktemp("full") / "full.duckdb", experts, n_experts=[6, 300, 4], seq=SEQ, sequences=rows,
        weights=weights, entropy=numbers[0], margin=numbers[1], token_ids=TOKENS, predictions=[2, -1, *TOKENS[2:]],
        nll=nll, phase=[0, 1, 1, 1, 1, 1, 2, 2, 2], vocabulary=VOCABULARY,
    )  # fmt: skip


@pytest.mark.parametrize("seqs", [0, 1, 3, [0, 3], [3, 1, 0, 1]])
def test_a_text_is_what_the_arrays_of_its_layers_hold(full: Trace, seqs):
    text = reading.read(full, seqs)
    wanted = sorted({seqs} if isinstance(seqs, int) else set(seqs))
    here = np.isin(SEQ, wanted)
    tokens = full.tokens()[here]
    assert len(text) == here.sum()
    assert text.sequences["seq"].tolist() == wanted
    np.testing.assert_array_equal(text.seq, tokens["seq"])
    np.testing.assert_array_equal(text.pos, tokens["pos"])
    np.testing.assert_array_equal(text.token_ids, tokens["token_id"])
    np.testing.assert_array_equal(text.nll, tokens["nll"])
    np.testing.assert_array_equal(text.phase, tokens["phase"].cat.codes)
    np.testing.assert_array_equal(text.predicted, full.predictions()[here])
    assert text.experts.shape == (3, len(text), 4) and text.experts.dtype == np.uint16
    for layer, k in enumerate((3, 2, 4)):
        np.testing.assert_array_equal(text.experts[layer, :, :k], full.experts(layer)[here])
        np.testing.assert_array_equal(text.weights[layer, :, :k], full.weights(layer)[here])
        assert (text.experts[layer, :, k:] == NO_EXPERT).all() and (text.weights[layer, :, k:] == 0).all()
        np.testing.assert_array_equal(text.entropy[layer], full.entropy(layer)[here])
        np.testing.assert_array_equal(text.margin[layer], full.margin(layer)[here])


def test_texts_are_spelled_within_each_sequence(full: Trace):
    first, second = reading.read(full, 0), reading.read(full, 1)
    assert first.texts == ["a", " b", "Ã"]  # the second byte stands in the next sequence: it isn't a character
    assert second.texts == ["©", "\n"]
    assert reading.read(full, [0, 1]).texts == [*first.texts, *second.texts]
    assert reading.read(full, 3).texts == ["", "�", "", "a"]
    assert reading.read(full, 0).predicted_texts == [" b", "", "Ã"]


def test_metadata_become_columns(full: Trace):
    rows = reading.read(full, [0, 1]).sequences
    assert rows["topic"].tolist() == ["x", "y"] and rows["lang"].tolist() == ["en", "de"]


def test_what_was_not_recorded_is_none(tmp_path: Path):
    trace = routed.random_trace(tmp_path / "ids.duckdb").trace
    text = reading.read(trace, 0)
    assert text.weights is text.entropy is text.margin is text.predicted is text.predicted_texts is None
    np.testing.assert_array_equal(text.experts[1], trace.experts(1)[: len(text)])


def test_a_file_of_the_first_format_is_read():
    """Without the columns of the predicted tokens, which came later."""
    path = Path(__file__).resolve().parent.parent / "demo.duckdb"
    if not path.exists():
        pytest.skip("make demo writes it")
    assert len(reading.read(Trace(path), 0)) > 0


def test_a_sequence_without_tokens_is_empty(full: Trace):
    text = reading.read(full, 2)
    assert len(text) == 0 and text.experts.shape == (3, 0, 4) and text.texts == []
    assert len(reading.table(text, 0)) == 0


@pytest.mark.parametrize(
    ("seqs", "message"), [(4, "no sequence 4"), ([0, 7], "no sequence 7"), ([], "expected at least one id")]
)
def test_refuses_what_the_run_does_not_have(full: Trace, seqs, message: str):
    with pytest.raises(InputError, match=message):
        reading.read(full, seqs)


def test_names_a_damaged_file(tmp_path: Path):
    import duckdb

    path = routed.random_trace(tmp_path / "cut.duckdb").trace.path
    with duckdb.connect(str(path)) as con:
        con.execute("DELETE FROM routing WHERE seq = 0 AND layer = 1")
    with pytest.raises(InputError, match=r"routing rows; expected .* × 2 layers. The file is damaged"):
        reading.read(Trace(path), 0)


def test_pieces_of_a_split_text_belong_together(tmp_path: Path):
    rows = [{"split_row": row, "split_part": part, "split_parts": 2} for row in (0, 1) for part in (0, 1)]
    trace = routed.write(
        tmp_path / "split.duckdb", np.zeros((5, 1, 1), int), [0, 1, 2, 3, 4],
        pd.DataFrame([*({"sha256": "aa", **row} for row in rows), {"sha256": "bb"}]), 2,
    ).trace  # fmt: skip
    assert [reading.pieces_of(trace, seq) for seq in range(5)] == [[0, 1], [0, 1], [2, 3], [2, 3], [4]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 日本 <b>", "plain ünï 日本 <b>"),
        ("a\nb\tc", "a↵\nb⇥\tc"),
        ("\x00\x1b\r\x7f", "␀␛␍␡"),
        ("\u200b\u200d\ufeff\u00ad", "⟨U+200B⟩⟨U+200D⟩⟨U+FEFF⟩⟨U+00AD⟩"),
        ("\u202e\u2066", "⟨U+202E⟩⟨U+2066⟩"),
        ("\u2028\u00a0", "⟨U+2028⟩⟨U+00A0⟩"),
        ("\ue000\ud800\U000e0041", "⟨U+E000⟩⟨U+D800⟩⟨U+E0041⟩"),
        ("😀\u3000", "😀\u3000"),
    ],
)
def test_every_character_can_be_seen(text: str, shown: str):
    assert reading.visible(text) == shown


def test_a_token_has_a_name(full: Trace):
    text = reading.read(full, [1, 3])
    assert [reading.named(text, at) for at in range(len(text))] == ["©", "↵", "unknown token", "�", "token 99", "a"]


def test_routing_of_one_token_is_a_row_a_choice(full: Trace):
    text = reading.read(full, 0)
    for at in range(len(text)):
        table = reading.routing(text, at)
        wanted = [
            (layer, rank, int(expert), float(full.weights(layer)[at, rank]))
            for layer in range(3)
            for rank, expert in enumerate(full.experts(layer)[at])
            if expert != NO_EXPERT
        ]
        assert list(table[["layer", "rank", "expert", "weight"]].itertuples(index=False, name=None)) == wanted
        np.testing.assert_array_equal(table["entropy"], [full.entropy(layer)[at] for layer, *_ in wanted])
    assert 0 not in reading.routing(text, 1)["layer"].tolist()  # it was dropped there


def test_table_has_a_row_a_token(full: Trace):
    text = reading.read(full, 1)
    table = reading.table(text, 1)
    assert table["text"].tolist() == ["©", "\n"] and table["phase"].tolist() == ["prompt", "prompt"]
    assert table["expert_1"].isna().tolist() == [False, True]
    assert table["expert_0"].tolist() == full.experts(1)[3:5, 0].tolist()
    assert "expert_2" not in table and "weight_1" in table
    with pytest.raises(InputError, match="layer 3: run 'full' has layers 0 to 2"):
        reading.table(text, 3)


def test_table_leaves_out_what_was_not_recorded(tmp_path: Path):
    text = reading.read(routed.random_trace(tmp_path / "ids.duckdb").trace, 0)
    assert not {"weight_0", "entropy", "predicted"} & set(reading.table(text, 0))
