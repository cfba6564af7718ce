"""What `workbench trace` says of a run that Ctrl-C or an error ended: how to go on, if there is anything to do."""

from __future__ import annotations

from pathlib import Path

import checkpoint
import pytest
from commandline import Command

from workbench import capture
from workbench.errors import RunError
from workbench.models import load
from workbench.tracefile import Trace


@pytest.fixture
def asked(tmp_path: Path) -> tuple[object, ...]:
    """A command that traces 24 texts, a few a batch, into the file `t.duckdb`, which has an unfinished run `old`."""
    model, texts, out = (
        checkpoint.folder(tmp_path / "model"),
        checkpoint.corpus(tmp_path / "t.jsonl"),
        tmp_path / "t.duckdb",
    )
    with pytest.raises(KeyboardInterrupt):
        capture.trace(load(model), texts, out, run="old", batch_tokens=200, progress=ending(KeyboardInterrupt()))
    return "trace", model, "--corpus", texts, "--out", out, "--batch-tokens", 200


def ending(error: BaseException):
    """What, as `progress`, ends a run in its middle."""

    def tell(done: int, total: int) -> None:
        if done > total / 2:
            raise error

    return tell


@pytest.mark.parametrize("mode", ["--append", "--overwrite"])
def test_nothing_is_resumed_that_was_not_begun(workbench: Command, asked, monkeypatch, mode: str):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.models.load", interrupt)
    ended = workbench(*asked, mode)
    assert ended.code == 130 and ended.err == "interrupted: the same command finishes it\n"
    ended = workbench(*asked, "--run", "old", "--resume")
    assert ended.err == f"interrupted: what {asked[5]} holds is whole; the same command finishes it\n"


@pytest.mark.parametrize("mode", ["--append", "--overwrite"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("no room")])
def test_a_run_that_was_begun_is_resumed(workbench: Command, asked, monkeypatch, mode: str, error: BaseException):
    real = capture.trace
    monkeypatch.setattr("workbench.capture.trace", lambda *a, **k: real(*a, **k, progress=ending(error)))
    ended = workbench(*asked, "--run", "new", mode)
    again = f"hat {asked[5]} holds is whole; the same command with --resume in place of {mode}"
    assert again in ended.err and ended.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert Trace(asked[5], "new").n_sequences < 24
    monkeypatch.setattr("workbench.capture.trace", real)
    assert workbench(*asked, "--run", "new", "--resume").code == 0
    assert Trace(asked[5], "new").n_sequences == 24
