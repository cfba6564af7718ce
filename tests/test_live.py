"""A typed text traced at once: the same routing as a trace of a file, watched, cancelled, and nothing left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import spoken

from workbench import live, reading
from workbench.capture import trace as capture
from workbench.corpus import from_rows
from workbench.errors import InputError
from workbench.hooked import RECORDED
from workbench.interventions import Ablate
from workbench.models import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return spoken.model("olmoe")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """Where temporary files go: empty before and after."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.glob("workbench-live-*")) == []


class Cancelled(BaseException):
    """As Streamlit interrupts a script."""


def test_is_the_routing_of_a_traced_file(model: Model, tmp_path: Path):
    text = spoken.text(40, 1)
    wanted = capture(
        model, from_rows([text]), tmp_path / "w.duckdb", record=live.recorded(model), max_length=256, progress=False
    )
    with live.traced(model, text) as trace:
        assert trace.path.exists() and trace.run == "typed"
        found = reading.read(trace, 0)
    same = reading.read(wanted, 0)
    assert not trace.path.parent.exists()
    for name in ("token_ids", "experts", "weights", "entropy", "margin", "nll", "predicted"):
        np.testing.assert_array_equal(getattr(found, name), getattr(same, name))
    assert " ".join(found.texts) == text


def test_a_long_text_is_traced_in_pieces_and_watched(model: Model, monkeypatch):
    monkeypatch.setattr(live, "BATCH_TOKENS", 32)
    told = []
    with live.traced(model, spoken.text(100, 2), max_length=16, progress=lambda *at: told.append(at)) as trace:
        lengths = trace.sequences()["n_tokens"].tolist()
    assert lengths == [16] * 6 + [4]
    done = [at for at, _ in told]
    assert done[0] == 0 and done[-1] == 100 and done == sorted(set(done)) and {total for _, total in told} == {100}
    assert len(told) == 5  # a piece of 4, then two of 16 at a time


@pytest.mark.parametrize("stop", [Cancelled, InputError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 30])
def test_can_be_cancelled(model: Model, monkeypatch, stop: type[BaseException], after: int):
    monkeypatch.setattr(live, "BATCH_TOKENS", 16)
    seen = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if done >= after:
            raise stop

    with pytest.raises(stop), live.traced(model, spoken.text(100, 3), max_length=16, progress=progress):
        raise AssertionError("it went on")
    assert seen[-1] < 100 and not RECORDED.get(model.module)
    with live.traced(model, spoken.text(5, 3)) as trace:  # the model can be used again
        assert trace.n_tokens == 5


def test_what_fails_inside_deletes_the_file(model: Model):
    with pytest.raises(ZeroDivisionError), live.traced(model, "w5 w6"):
        raise ZeroDivisionError


def test_takes_a_recipe(model: Model):
    edit = Ablate(layer=0, experts=[0, 1, 2])
    with live.traced(model, spoken.text(30, 4), recipe=edit) as trace:
        assert not np.isin(trace.experts(0), [0, 1, 2]).any()


def test_can_be_asked_twice_at_once(model: Model):
    """The model itself stays free: each run has modules of its own."""
    with live.traced(model, "w5 w6 w7") as first, live.traced(model, "w8 w9") as second:
        assert (first.n_tokens, second.n_tokens) == (3, 2)
    inside = []

    def progress(done: int, total: int) -> None:
        if not inside:
            inside.append(done)
            with live.traced(model, "w8 w9") as other:
                inside.append(other.n_tokens)

    with live.traced(model, "w5 w6 w7", progress=progress) as first:
        assert first.n_tokens == 3
    assert inside == [0, 2]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "no text to trace"),
        (" \n\t", {}, "no text to trace"),
        ("w5 \ud800 w6", {}, r"character 3 of the text, U\+D800, is half of a pair"),
        ("w5", {"max_length": 100_000}, "exceed the 256 positions"),
        ("w5", {"max_length": -1}, "at least 1 token"),
    ],
)
def test_refuses(model: Model, text: str, options: dict, message: str):
    with pytest.raises(InputError, match=message), live.traced(model, text, **options):
        pass


def test_needs_a_tokenizer(model: Model):
    with pytest.raises(InputError, match="no tokenizer"), live.traced(replace(model, tokenizer=None), "w5"):
        pass


def test_length_is_what_the_model_was_trained_for_or_allows(model: Model, monkeypatch):
    assert live.length(model) == 256
    monkeypatch.setitem(live.CONTEXT, model.name, 100)
    assert live.length(model) == 100
    monkeypatch.setitem(live.CONTEXT, model.name, 1000)
    assert live.length(model) == 256
