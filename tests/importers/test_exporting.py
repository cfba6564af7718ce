"""What is exported for other tools is what the trace holds, and comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commandline import Command, refused

from workbench import dataset_folder
from workbench.activation_counts import activation_counts, export_counts
from workbench.arrays import from_arrays
from workbench.dataset_folder import export_dataset
from workbench.errors import InputError
from workbench.importers import import_routing
from workbench.routing import NO_EXPERT, Routing
from workbench.store import Writer
from workbench.tracefile import Trace
from workbench.transaction import Block

datasets = pytest.importorskip("datasets")

HOSTILE = "```\n# <script>alert(1)</script>"


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    """Ten texts, one of them empty, at three routers; some tokens lack an expert, some texts a language."""
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((40, 3, 8)), axis=2)[:, :, :2]
    experts[4, 1, 1:] = -1
    experts[5, 0] = -1
    lang = ["en", None, "de", HOSTILE, *["fr"] * 6]
    return from_arrays(
        tmp_path_factory.mktemp("exporting") / "t'race.duckdb",
        experts,
        random.random(experts.shape),
        n_experts=8,
        seq=np.sort(np.r_[np.arange(9), random.integers(0, 9, 31)]),
        sequences=pd.DataFrame({"lang": lang, "note": range(10)}),
        token_ids=np.arange(40) % 7,
        vocabulary={**{i: f"w{i}" for i in range(6)}, 6: HOSTILE},
        run=HOSTILE,
    )


def rows_of(folder: Path, cache: Path, name: str = "default") -> list[dict]:
    return list(datasets.load_dataset(str(folder), name, cache_dir=str(cache), split="train"))


@pytest.mark.parametrize("file_size", [1 << 20, 20])
def test_datasets_reads_the_folder(trace: Trace, tmp_path: Path, monkeypatch, file_size: int):
    monkeypatch.setattr(dataset_folder, "PART_TOKEN_LAYERS", file_size)
    out = tmp_path / "data set"
    assert export_dataset(trace.path, out) == 10
    assert (len(list((out / "data").iterdir())) > 1) == (file_size == 20)
    rows = rows_of(out, tmp_path / "cache")
    frame = trace.sequences()
    assert [row["seq"] for row in rows] == frame["seq"].tolist()
    assert [row["lang"] for row in rows] == frame["lang"].astype(object).where(frame["lang"].notna(), None).tolist()
    assert [json.loads(row["metadata"])["note"] for row in rows] == list(range(10))
    ends = frame["n_tokens"].cumsum()
    words = trace.vocabulary().set_index("token_id")["text"]
    ids = trace.tokens()["token_id"].to_numpy()
    for row, end, n in zip(rows, ends, frame["n_tokens"], strict=True):
        if not n:
            assert row["experts"] is None and row["token_ids"] is None
            continue
        here = slice(end - n, end)
        assert row["token_ids"] == ids[here].tolist() and row["tokens"] == words[ids[here]].tolist()
        for layer in range(3):
            wanted = [[e for e in one if e != NO_EXPERT] for one in trace.experts(layer)[here].tolist()]
            assert row["experts"][layer] == wanted
            known = trace.experts(layer)[here] != NO_EXPERT
            assert np.array_equal(np.concatenate(row["weights"][layer]), trace.weights(layer)[here][known])
    layers = rows_of(out, tmp_path / "cache", "layers")
    assert [row["n_experts"] for row in layers] == [8] * 3


def test_the_card_holds_what_is_hostile(trace: Trace, tmp_path: Path):
    export_dataset(trace.path, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    (told,) = card.split("```")[1:-1]
    assert json.loads(told.removeprefix("json"))["run"] == HOSTILE


def test_a_data_set_is_written_whole_or_not_at_all(trace: Trace, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists"):
        export_dataset(trace.path, out)
    (out / "README.md").write_text("of my project")
    with pytest.raises(InputError, match="layers/train.parquet"):
        export_dataset(trace.path, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "mine.txt"]
    export_dataset(trace.path, tmp_path / "set")
    export_dataset(trace.path, tmp_path / "set", overwrite=True)
    (tmp_path / "set" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="mine.txt, too"):
        export_dataset(trace.path, tmp_path / "set", overwrite=True)

    def broken(_: Trace) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset_folder, "_card", broken)
    with pytest.raises(KeyboardInterrupt):
        export_dataset(trace.path, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


def test_activation_counts_are_those_of_the_model(tmp_path: Path):
    """The second layer of the model is dense; the tensor is what KTransformers' reader checks for."""
    experts = np.array([[[0, 1], [2, 3]], [[0, 3], [1, 2]], [[-1, -1], [3, 0]]], np.int64)
    path = tmp_path / "t.duckdb"
    layers = [{"name": f"model.layers.{i}.mlp", "n_experts": 4, "top_k": 2} for i in (0, 2)]
    made = from_arrays(tmp_path / "plain.duckdb", experts, n_experts=4)
    tokens = {
        "seq": np.zeros(3, np.int32), "pos": np.arange(3, dtype=np.int32), "token_id": np.full(3, -1, np.int32),
        "phase": np.ones(3, np.uint8), "nll": np.full(3, np.nan, np.float32),
    }  # fmt: skip
    row = {"seq": 0, "n_prompt": 3, "n_tokens": 3, "metadata": {}}
    with Writer(path, {"run": "r"}, layers) as writer:
        writer.append(Block([row], tokens, [Routing(made.experts(0)), Routing(made.experts(1))]))
    assert export_counts(path, tmp_path / "s.pt") == (1, 3, 4)
    held = torch.load(tmp_path / "s.pt", weights_only=True)
    counts = held["logical_count"]
    assert counts.dtype == torch.int32 and counts.shape == (1, 3, 4)
    assert counts[0].tolist() == [[2, 1, 0, 1], [0, 0, 0, 0], [1, 1, 2, 2]]


def test_counts_come_back(demo_trace: Path, tmp_path: Path):
    """Export for KTransformers, import as SGLang's recorder wrote it: the same counts."""
    export_counts(demo_trace, tmp_path / "s.pt")
    back = import_routing("sglang-recorder", [tmp_path / "s.pt"], tmp_path / "b.duckdb", model="demo", top_k=4)
    assert np.array_equal(activation_counts(back), activation_counts(Trace(demo_trace)))
    assert back.n_tokens == Trace(demo_trace).n_tokens


def test_the_command(workbench: Command, trace: Trace, tmp_path: Path):
    out = tmp_path / "folder"
    result = workbench("export", trace.path, "--format", "hf", "--out", out)
    assert result.code == 0 and "10 texts" in result.out
    refused(workbench("export", trace.path, "--format", "hf", "--out", out), "exists")
    assert workbench("export", trace.path, "--format", "hf", "--out", out, "--overwrite").code == 0
    result = workbench("export", trace.path, "--format", "ktransformers", "--out", tmp_path / "s.pt")
    assert result.code == 0 and "3 layers of 8 experts" in result.out
    refused(workbench("export", trace.path, "--format", "ktransformers", "--out", tmp_path / "s.csv"), ".pt")
    refused(workbench("export", trace.path, "--out", tmp_path / "s.csv"), "--table")
    refused(workbench("export", trace.path, "--format", "hf", "--table", "runs", "--out", out), "--table")
    refused(workbench("export", trace.path, "--format", "hf", "--unnest", "--out", tmp_path / "n"), "--unnest")


def test_counts_are_no_data_set(tmp_path: Path):
    torch.save({"logical_count": torch.ones(1, 2, 4, dtype=torch.int32)}, tmp_path / "s.pt")
    made = import_routing("sglang-recorder", [tmp_path / "s.pt"], tmp_path / "c.duckdb", model="m", top_k=2)
    with pytest.raises(InputError, match="counts"):
        export_dataset(made.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
