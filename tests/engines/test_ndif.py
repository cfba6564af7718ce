"""The engine NDIF: the same requests run here, also by way of what would be sent; what is refused before a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint
import pandas as pd
import pytest
import tiny
from commandline import Command, refused

from workbench import corpus
from workbench.capture import trace as by_transformers
from workbench.engines import ndif
from workbench.errors import InputError, RunError
from workbench.models import load

TEXTS = ("All human beings are born free.", "x", "for i in range(10): print(i)")


@pytest.fixture
def texts() -> corpus.Corpus:
    return corpus.from_rows([{"text": text, "lang": "en", "mark": n} for n, text in enumerate(TEXTS)], "mine")


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", "a key")


@pytest.mark.parametrize("remote", [False, "local"])
def test_the_same_as_by_transformers(texts: corpus.Corpus, tmp_path: Path, remote: Any) -> None:
    """nnsight's "local" packs every request as for the network and unpacks it without this project's modules."""
    model = load("demo", dtype="float32")
    mine = ndif.trace(model, texts, tmp_path / "n.duckdb", remote=remote, progress=False)
    alone = {"batch_tokens": 1, "experts": "model", "progress": False}
    other = by_transformers(model, texts, tmp_path / "h.duckdb", **alone)
    for table in ("sequences", "tokens", "layers", "vocabulary", "routing"):
        query = f"select * exclude (run) from {table} order by all"
        pd.testing.assert_frame_equal(mine.sql(query), other.sql(query), rtol=1e-5)
    (run,) = mine.sql("select * from runs").to_dict("records")
    assert run["engine"] == "ndif" and list(run["recorded"]) == ["ids", "weights"] and run["status"] == "finished"


def test_a_request_that_fails(texts: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block, out, model = ndif._block, tmp_path / "t.duckdb", checkpoint.olmoe()

    def failing(traced: Any, paths: list[str], sequence: Any, remote: Any) -> Any:
        return block(traced, ["model.nowhere"] if sequence.seq == 2 else paths, sequence, remote)

    monkeypatch.setattr(ndif, "_block", failing)
    with pytest.raises(RunError, match="text 2 failed: .*Try again later, with --resume"):
        ndif.trace(model, texts, out, remote=False, progress=False)
    monkeypatch.undo()
    assert ndif.trace(model, texts, out, mode="resume", remote=False, progress=False).n_sequences == 3


def test_a_corpus_is_refused(tmp_path: Path) -> None:
    given = checkpoint.corpus(tmp_path / "texts.jsonl", n=17)
    with pytest.raises(InputError, match="17 texts; expected at most 16"):
        ndif.trace(checkpoint.olmoe(), given, tmp_path / "t.duckdb", remote=False, progress=False)
    assert not (tmp_path / "t.duckdb").exists()


def test_without_a_key(workbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    asked = ("trace", "someone/model", "--corpus", "udhr", "--out", tmp_path / "t.duckdb", "--engine", "ndif")
    refused(workbench(*asked), "set NDIF_API_KEY")
    refused(workbench(*asked, "--record", "ids,logits"), "leave out logits")
    refused(workbench(*asked, "--generate", 3, "--counts-by", "lang"), "leave out counts_by, generate")
    refused(workbench(*asked, "--dtype", "float32"), "Leave out --dtype")
    refused(workbench(*asked, "--revision", "step1000"), "'step1000'", "Leave out --revision")
    refused(workbench(*asked, "--experts", "model"), "--experts is about transformers")


def test_without_a_network(
    key: None, texts: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from nnsight.schema.config import CONFIG

    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="NDIF can't be reached: is there a network"):
        ndif.trace("someone/model", texts, tmp_path / "t.duckdb")
    assert capsys.readouterr().err == ""


def test_a_model_that_it_does_not_run(
    key: None, texts: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nnsight

    monkeypatch.setattr(nnsight, "status", lambda raw: {"deployments": {"a": {"repo_id": "their/model"}}})
    with pytest.raises(InputError, match="NDIF isn't running 'demo'; of the Hub it runs their/model"):
        ndif.trace("demo", texts, tmp_path / "t.duckdb")


def test_families_whose_experts_are_given_no_ids(texts: corpus.Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="jetmoe: NDIF can trace decoders whose experts are given ids and weights"):
        ndif.trace(tiny.model("jetmoe"), texts, tmp_path / "t.duckdb", remote=False)


def test_a_run_there_is_asked_for_there(
    key: None, texts: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nnsight
    from nnsight.modeling.mixins.remotable import Remotable

    model = checkpoint.olmoe()
    config: Any = model.module.config
    config.name_or_path = "someone/model"
    monkeypatch.setattr(nnsight, "status", lambda raw: {"deployments": {"a": {"repo_id": model.name}}})
    asked: list[Any] = []
    monkeypatch.setattr(Remotable, "_remote_backend", lambda _self, remote, *_: asked.append(remote))  # None: run here
    ndif.trace(model, texts, tmp_path / "t.duckdb", progress=False)
    assert asked == [True, True, True]
