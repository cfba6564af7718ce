"""A comparison in the background: looked at while it runs, stopped, broken off, wanted by nobody."""

from __future__ import annotations

import threading
import time
from typing import Any

import checkpoint
import pytest
import torch

from workbench import steering
from workbench.errors import InputError, RunError
from workbench.generation import compare
from workbench.interventions import Ablate, SetTopK
from workbench.models import Model
from workbench.recorder import Recorder
from workbench.steering import Steering

EDIT = Ablate(experts=[1, 2])


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return checkpoint.olmoe()


def until(true: Any) -> None:
    patience = time.monotonic() + 30
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.01)


def test_what_comes_out(model: Model):
    settings = {"max_tokens": 6, "temperature": 0.8, "seed": 4, "chat": False}
    running = Steering(model, "abc", EDIT, control=4, **settings)
    assert running.wait(60) and not running.running and running.error is None
    assert running.found == compare(model, "abc", EDIT, control=4, **settings)
    assert running.settings == settings and running.model == model.name and running.n_experts == [8] * 3
    assert running.recipe is not None and running.recipe.interventions == (EDIT,) and running.control == 4
    plain = Steering(model, "abc", None, max_tokens=2)
    assert plain.wait(60) and list(plain.found) == ["plain"] and plain.recipe is None


def test_it_grows_and_can_be_stopped(model: Model):
    running = Steering(model, "abc", EDIT, max_tokens=250, candidates=3, record=("weights",))
    until(lambda: len(running.found["steered"].steps) >= 3)
    seen = running.found["plain"]
    assert running.running and seen.text == "".join(step.text for step in seen.steps)
    running.stop()
    assert running.wait(30) and running.error is None
    found = running.found
    assert {one.ended for one in found.values()} == {"stopped"}
    assert found["plain"].steps[: len(seen.steps)] == seen.steps and len(found["plain"].steps) < 250
    assert found["plain"].prompt and found["plain"].steps[0].routing is not None
    assert len(found["plain"].steps[0].candidates) >= 3


def test_nobody_wants_it(model: Model):
    wanted = threading.Event()
    wanted.set()
    running = Steering(model, "abc", EDIT, max_tokens=250, wanted=wanted.is_set)
    until(lambda: running.found["steered"].steps)
    wanted.clear()
    assert running.wait(30) and running.found["plain"].ended == "stopped"


def test_errors(model: Model):
    with pytest.raises(InputError, match="names experts"):
        Steering(model, "abc", SetTopK(k=2), control=1)
    for prompt, edit, settings, message in (
        (" ", EDIT, {}, "expected some text"),
        ("abc", EDIT, {"max_tokens": 0}, "max_tokens is 0"),
        ("abc", EDIT, {"seed": -1}, "seed is -1"),
        ("abc", Ablate(layer=7, experts=[1]), {}, "layer 7"),
    ):
        with pytest.raises(InputError, match=message):
            Steering(model, prompt, edit, **settings)
    other = checkpoint.olmoe()
    with Recorder(other):
        busy = Steering(other, "abc", EDIT)
        assert busy.wait(30) and isinstance(busy.error, InputError) and "being recorded" in str(busy.error)
        assert not busy.found["plain"].steps
    idle = Steering(model, "abc", Ablate(experts=[1], scope="text~zzzz"), max_tokens=3)
    assert idle.wait(30) and isinstance(idle.error, RunError) and "touched nothing" in str(idle.error)
    assert len(idle.found["plain"].steps) == len(idle.found["steered"].steps) == 3  # what was written is kept


def test_what_nobody_expected(model: Model, monkeypatch, caplog):
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("one by zero")

    monkeypatch.setattr(steering, "side_by_side", fail)
    running = Steering(model, "abc", EDIT)
    assert running.wait(30) and isinstance(running.error, RunError)
    assert str(running.error) == "the generation failed (ZeroDivisionError: one by zero)."
    assert "a generation failed" in caplog.text
