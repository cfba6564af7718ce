"""Pairs of prompts: what is read from files, what becomes of them as tokens, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import spoken

from workbench.errors import InputError
from workbench.models import load
from workbench.prompt_pairs import Pair, encoded, read_pairs

PAIRS = [Pair("a b", "c d", (" e", " f")), Pair("g, h", "i", (" j", " k"))]


def test_files(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"source": p.source, "target": p.target, "answers": list(p.answers)} for p in PAIRS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flat = [{"source": p.source, "target": p.target, "answer_1": p.answers[0], "answer_2": p.answers[1]} for p in PAIRS]
    pd.DataFrame(flat).to_csv(tmp_path / "b.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        assert read_pairs(tmp_path / name) == PAIRS, name


@pytest.mark.parametrize(
    "row",
    [
        '{"source": "a", "target": "b"}',
        '{"source": "a", "answers": ["c", "d"]}',
        '{"source": "a", "target": "b", "answers": ["c"]}',
        '{"source": "a", "target": "b", "answers": ["c", "d", "e"]}',
        '{"source": "a", "target": "b", "answers": "cd"}',
        '{"source": "a", "target": 1, "answers": ["c", "d"]}',
        '{"source": "", "target": "b", "answers": ["c", "d"]}',
    ],
)
def test_rows_that_are_no_pair(tmp_path: Path, row: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a", "target": "b", "answers": ["c", "d"]}\n' + row + "\n")
    with pytest.raises(InputError, match=r"pairs.jsonl:2: not a pair of prompts; expected the texts `source` and"):
        read_pairs(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match="unknown kind of file"):
        read_pairs(tmp_path / "pairs.docx")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="has no rows; expected at least one pair"):
        read_pairs(tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="broken.jsonl:1"):
        read_pairs(tmp_path / "broken.jsonl")


def test_tokens() -> None:
    made = spoken.model("olmoe")
    assert encoded(Pair("w7 w8", "w9 w7", ("w10", "w11")), made) == ([7, 8], [9, 7], (10, 11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "w7"}, "the source 'w7 w8' is 2 tokens long and the target 'w7' 1; expected equally many"),
        ({"source": "", "target": ""}, "the prompts have no tokens"),
        ({"source": "w7 " * 300, "target": "w8 " * 300}, "the prompts have 300 tokens; .* takes 256"),
        ({"answers": ("w10 w11", "w12")}, r"'w10 w11' is 2 tokens \('w10', 'w11'\); expected exactly one"),
        ({"answers": ("w10", "")}, r"the answer '' is 0 tokens \(none\)"),
        ({"answers": ("w10", "zebra")}, "the answer 'zebra' isn't in the vocabulary"),
        ({"answers": ("w10", " w10")}, "'w10' and ' w10' are the same token"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    made = spoken.model("olmoe")
    with pytest.raises(InputError, match=message):
        encoded(replace(Pair("w7 w8", "w8 w7", ("w10", "w11")), **change), made)


def test_the_demonstration_model_has_no_single_token_for_a_longer_word() -> None:
    with pytest.raises(InputError, match=r"' Paris' is 2 tokens \(' Par', 'is'\)"):
        encoded(Pair("The", "A", (" Paris", " the")), load("demo"))
