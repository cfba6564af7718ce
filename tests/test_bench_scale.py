"""The benchmark of parts and of traces larger than memory: that it measures what it says, not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from workbench import connection
from workbench.bench import scale
from workbench.combine import merge
from workbench.tracefile import Trace
from workbench.validate import validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("scale") / "parts"
    token_layers, seconds = scale.write_parts(made, 4_000)
    assert token_layers == 4_000 * scale.N_LAYERS == Trace(made).n_tokens * Trace(made).n_layers and seconds > 0
    return made


def test_the_parts_are_a_trace(folder: Path):
    assert validate(folder).empty and Trace(folder).runs()["status"].tolist() == ["finished"]


def test_load(folder: Path):
    found = scale.load(folder, 1)
    assert found["million_token_layers_per_s"] > 0 and found["bytes"] > 10_000


def test_load_notices_a_file_that_is_not_the_parts(folder: Path, tmp_path: Path, monkeypatch):
    other = tmp_path / "parts"
    scale.write_parts(other, 8_000)
    wrong = merge([other], tmp_path / "other.duckdb").only(range(8))
    monkeypatch.setattr(scale, "merge", lambda *_, **__: wrong)
    with pytest.raises(AssertionError, match="layer 0 of the file is not that of the parts"):
        scale.load(folder, 1)


def test_out_of_core_asks_within_the_limit(folder: Path, monkeypatch):
    asked = []

    def ask(file: Path, question: str, memory: int | None):
        asked.append((question, memory))
        return {"seconds": 2.0 if memory else 1.0, "peak_bytes": 1, "answer": "same"}

    monkeypatch.setattr(scale, "_asked", ask)
    monkeypatch.setattr(scale, "LEAST_MEMORY", 1)
    found = scale.out_of_core(folder, 1)
    assert found["times_larger"] == 4 and {memory for _, memory in asked} == {None, found["memory"]}
    assert found["questions"].keys() == scale.QUESTIONS.keys()
    assert {one["ratio"] for one in found["questions"].values()} == {2}
    (folder.parent / "file.duckdb").unlink()
    monkeypatch.setattr(scale, "_asked", lambda *given: ask(*given) | {"answer": str(given[2])})
    with pytest.raises(AssertionError, match="another answer"):
        scale.out_of_core(folder, 1)


def test_every_question_has_an_answer(folder: Path, capsys, monkeypatch):
    monkeypatch.setenv(connection.MEMORY, "64MiB")
    for question, ask in scale.QUESTIONS.items():
        scale.answer(str(folder), question)
        said = json.loads(capsys.readouterr().out)
        assert said["seconds"] >= 0 and said["peak_bytes"] > 0 and len(said["answer"]) == 64
        assert isinstance(ask(Trace(folder)), pd.DataFrame)


def test_a_process_of_its_own_gets_the_limit(folder: Path, tmp_path: Path, monkeypatch):
    merge([folder], tmp_path / "t.duckdb")
    question = "sql: all rows sorted"
    plain, limited = (scale._asked(tmp_path / "t.duckdb", question, memory) for memory in (None, 64 << 20))
    assert plain["answer"] == limited["answer"]
