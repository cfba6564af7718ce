"""Continuations in turns are those of `generate` alone, bit for bit, and leave nothing behind however they end."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import checkpoint
import pytest
import torch

from workbench.errors import InputError, RunError
from workbench.generation import Generated, Step, compare, generate
from workbench.hooked import INTERVENED, RECORDED
from workbench.intervening import intervene
from workbench.interventions import Ablate, Bias, Contrast, Force, Scale, SetTopK, TopP
from workbench.models import Model, load
from workbench.recorder import Recorder
from workbench.side_by_side import _FREE, side_by_side, twins

PROMPT = "The treaty was signed"
ENDING, ENDS = Ablate(experts=[1, 2]), {"max_tokens": 60, "temperature": 2.0, "seed": 7, "chat": True}
"""Under these the tiny model ends both texts, the steered one first."""
EDITS = [Ablate(layer=range(1, 4), experts=[0, 1, 2, 3, 4, 5]), Bias(layer=4, experts=[7], strength=1.0)]


@pytest.fixture(scope="module")
def demo() -> Model:
    torch.set_num_threads(1)
    return load("demo")


@pytest.fixture
def model() -> Model:
    torch.set_num_threads(1)
    return checkpoint.olmoe()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread, no hook, no model in use, and the random numbers of the process where they were."""
    state, threads = torch.random.get_rng_state(), set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    for module, free in list(_FREE.items()):
        for one in (module, *(each.module for each in free)):
            assert one not in INTERVENED and not RECORDED.get(one)
            assert not any(child._forward_pre_hooks or child._forward_hooks for child in one.modules())
            assert not any("forward" in vars(child) or "generate" in vars(child) for child in one.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def unrouted(found: dict[str, Generated]) -> dict[str, Generated]:
    """Without the arrays, which can't be compared by ==."""
    return {
        name: replace(one, steps=tuple(replace(step, routing=None) for step in one.steps))
        for name, one in found.items()
    }


# what comes out


@pytest.mark.parametrize(
    "edits",
    [
        EDITS,
        Force(layer=2, experts=[9], scope="phase=generated"),
        [SetTopK(k=2), Scale(experts=[1, 2, 3, 4, 5, 6], factor=0.0)],
        TopP(p=0.3),
        Contrast(beta=0.7, alpha=0.05),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_as_alone(edits: Any, temperature: float, demo: Model):
    options = {"max_tokens": 7, "temperature": temperature, "seed": 5, "record": ("weights",)}
    control = None if isinstance(edits, TopP | Contrast) else 3
    expected = compare(demo, PROMPT, edits, control=control, **options)
    found = side_by_side(demo, PROMPT, edits, control=control, **options)
    assert unrouted(found) == unrouted(expected) and list(found) == list(expected)
    for name, one in expected.items():
        for a, b in zip(one.steps, found[name].steps, strict=True):
            for mine, other in zip(a.routing or (), b.routing or (), strict=True):
                assert (mine.experts == other.experts).all() and (mine.weights == other.weights).all()


def test_without_interventions(demo: Model):
    found = side_by_side(demo, PROMPT, None, max_tokens=4)
    assert found == {"plain": generate(demo, PROMPT, max_tokens=4)}
    with pytest.raises(InputError, match="there are no interventions, so there is no control"):
        side_by_side(demo, PROMPT, None, control=1)


def test_a_text_that_ends_early_and_a_chat(model: Model):
    expected = compare(model, "abc", ENDING, **ENDS)
    lengths = {name: len(one.steps) for name, one in expected.items()}
    assert lengths["steered"] < lengths["plain"] < ENDS["max_tokens"]
    assert side_by_side(model, "abc", ENDING, **ENDS) == expected
    found = side_by_side(model, "abc", ENDING, candidates=3, **ENDS)["plain"].steps
    assert all(len(step.candidates) == 3 for step in found[lengths["steered"] :])  # those of the only one left


def test_the_order_of_steps_and_the_thread(demo: Model):
    told: list[tuple[str, Step]] = []

    def show(name: str, step: Step) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((name, step))

    found = side_by_side(demo, PROMPT, EDITS, control=1, max_tokens=3, on_step=show)
    assert [name for name, _ in told] == ["plain", "steered", "control"] * 3
    for name, one in found.items():
        assert [step for each, step in told if each == name] == list(one.steps)


def test_candidates_are_those_of_all(demo: Model):
    n = 4
    found = side_by_side(demo, PROMPT, EDITS, control=1, max_tokens=6, candidates=n)
    alone = compare(demo, PROMPT, EDITS, control=1, max_tokens=6, candidates=10**6)
    for at in range(6):
        whole = {name: {each.token_id: each for each in one.steps[at].candidates} for name, one in alone.items()}
        wanted = {each.token_id for one in alone.values() for each in one.steps[at].candidates[:n]}
        for name, one in found.items():
            mine = one.steps[at].candidates
            assert {each.token_id for each in mine} == wanted
            assert all(each == whole[name][each.token_id] for each in mine)
            probabilities = [each.probability for each in mine]
            assert probabilities == sorted(probabilities, reverse=True)
    assert all(not step.candidates for step in side_by_side(demo, PROMPT, EDITS, max_tokens=2)["plain"].steps)
    with pytest.raises(InputError, match="candidates is -1"):
        side_by_side(demo, PROMPT, EDITS, candidates=-1)


# twins


def test_twins_are_made_once_and_share_the_weights(model: Model):
    side_by_side(model, "abc", Ablate(experts=[1]), max_tokens=2)
    first = list(_FREE[model.module])
    side_by_side(model, "abc", Bias(experts=[1], strength=1.0), max_tokens=2)
    assert len(first) == 2 and {id(one) for one in _FREE[model.module]} == {id(one) for one in first}
    own = [*model.module.parameters(), *model.module.buffers()]
    for one in first:
        assert all(a is b for a, b in zip(own, [*one.module.parameters(), *one.module.buffers()], strict=True))
        assert not {id(child) for child in one.module.modules()} & {id(child) for child in model.module.modules()}
        assert (one.name, one.family, one.dtype, one.tokenizer) == (
            model.name, model.family, model.dtype, model.tokenizer
        )  # fmt: skip
    with twins(model, 3) as three, twins(model, 1) as one:
        assert len({id(each) for each in (*three, *one)}) == 4 and not _FREE[model.module]
    assert len(_FREE[model.module]) == 4


def test_a_model_that_moved_gets_new_twins(model: Model):
    with twins(model, 1) as (before,):
        pass
    model.module.double()
    model.module.lm_head.weight = torch.nn.Parameter(model.module.lm_head.weight.clone())  # type: ignore[union-attr]
    with twins(model, 1) as (after,):
        assert after is not before


def test_twins_go_with_their_model():
    model = checkpoint.olmoe()
    with twins(model, 2):
        pass
    gc.collect()  # models of other tests
    n = len(_FREE)
    del model
    gc.collect()
    assert len(_FREE) == n - 1


def test_a_model_in_use_is_refused_while_a_twin_has_to_be_made(model: Model):
    with intervene(model, Ablate(experts=[1]), idle=True), pytest.raises(InputError, match="can't be used a second"):
        side_by_side(model, "abc", Ablate(experts=[2]), max_tokens=2)
    with Recorder(model), pytest.raises(InputError, match="being recorded"):
        side_by_side(model, "abc", Ablate(experts=[2]), max_tokens=2)
    expected = side_by_side(model, "abc", Ablate(experts=[2]), max_tokens=2)
    with Recorder(model) as recorder:  # now there are twins, and the recorder sees nothing of them
        assert side_by_side(model, "abc", Ablate(experts=[2]), max_tokens=2) == expected
        with pytest.raises(RunError, match="no router was seen"):
            recorder.take()


# stopping


def test_on_step_stops(demo: Model):
    told: list[str] = []

    def stop(name: str, _step: Step) -> bool:
        told.append(name)
        return told.count("steered") == 3

    late = [*EDITS, Ablate(layer=0, experts=[0], scope="position=200+")]  # has touched nothing by then
    found = side_by_side(demo, PROMPT, late, control=0, max_tokens=20, on_step=stop)
    whole = compare(demo, PROMPT, EDITS, control=0, max_tokens=3)
    assert told == ["plain", "steered", "control"] * 2 + ["plain", "steered"]
    for name, one in found.items():
        assert one.ended == "stopped" and one.steps == whole[name].steps and one.text == whole[name].text


def test_on_wait_stops_within_a_token(model: Model):
    """A layer that takes long is not waited for, if another comes after it."""
    waited: list[float] = []

    def slow(*_: Any) -> None:
        time.sleep(0.25)

    def stop() -> bool:
        waited.append(time.monotonic())
        return len(waited) == 2

    with twins(model, 2) as made:
        handles = [one.layers[0].block.register_forward_pre_hook(slow) for one in made]
    seen: list[str] = []
    found = side_by_side(
        model, "abc", Ablate(experts=[2]), max_tokens=50, on_wait=stop, on_step=lambda name, _: seen.append(name)
    )
    for handle in handles:
        handle.remove()
    assert {one.ended for one in found.values()} == {"stopped"} and not seen
    assert not found["plain"].steps and found["plain"].text == ""


def test_those_that_ended_before_a_stop_keep_how(model: Model):
    told: list[str] = []

    def stop(name: str, _step: Step) -> bool:
        told.append(name)
        return told.count("plain") == told.count("steered") + 3

    found = side_by_side(model, "abc", ENDING, on_step=stop, **ENDS)
    assert {name: one.ended for name, one in found.items()} == {"plain": "stopped", "steered": "end"}
    assert len(found["plain"].steps) == len(found["steered"].steps) + 3


@pytest.mark.parametrize("place", ["on_step", "on_wait"])
def test_what_a_callback_raises_is_passed_on(place: str, demo: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workbench.side_by_side.PAUSE", 0.001)  # a token takes longer on any machine

    def fail(*_: Any) -> None:
        raise KeyError("mine")

    long = "the treaty " * 200
    with pytest.raises(KeyError, match="mine"):
        side_by_side(demo, long, EDITS, control=0, max_tokens=50, record=("weights",), **{place: fail})


# errors


def test_an_error_in_one_stops_all(model: Model):
    with twins(model, 3) as made:
        twin = made[1]

    def spoil(_module: Any, _given: Any, out: Any) -> None:
        if len(told) >= 6:
            out.logits[:] = torch.nan

    told: list[str] = []
    handle = twin.module.register_forward_hook(spoil)
    with pytest.raises(RunError, match="the logits are NaN or infinite after 2 tokens"):
        side_by_side(
            model, "abc", Ablate(experts=[1]), control=0, max_tokens=9, on_step=lambda name, _: told.append(name)
        )
    handle.remove()
    assert told == ["plain", "steered", "control"] * 2


@pytest.mark.parametrize(
    "prompt, edits, options, message",
    [
        ("  ", EDITS[:1], {}, "expected some text"),
        ("x" * 2000, EDITS[:1], {}, "exceeds the 1,024 positions"),
        (PROMPT, Ablate(layer=9, experts=[1]), {}, "layer 9"),
        (PROMPT, SetTopK(k=2), {"control": 0}, "names experts"),
        (PROMPT, EDITS, {"control": -1}, "seed is -1"),
        (PROMPT, EDITS, {"temperature": -1.0}, "temperature is -1"),
        (PROMPT, EDITS, {"record": ["planets"]}, "can't record planets"),
    ],
)
def test_bad_input(prompt: str, edits: Any, options: dict[str, Any], message: str, demo: Model):
    told: list[str] = []
    with pytest.raises(InputError, match=message):
        side_by_side(demo, prompt, edits, on_step=lambda name, _: told.append(name), **options)
    assert not told


def test_an_intervention_that_touches_nothing(demo: Model):
    told: list[str] = []
    with pytest.raises(RunError, match="touched nothing"):
        side_by_side(
            demo,
            PROMPT,
            Ablate(experts=[1], scope="text~zzzz"),
            max_tokens=2,
            on_step=lambda name, _: told.append(name),
        )
    assert told == ["plain", "steered"] * 2


# several at once


def test_two_callers_at_once(demo: Model):
    """Each gets what it would get alone, while a third uses the model itself."""
    jobs = [(EDITS, 1), (Force(layer=2, experts=[9]), 2)]
    options = {"max_tokens": 12, "temperature": 1.0, "control": 0}
    expected = [compare(demo, PROMPT, edits, seed=seed, **options) for edits, seed in jobs]
    with twins(demo, 6):
        pass
    found: list[Any] = [None, None]
    begun = threading.Barrier(3)

    def run(place: int) -> None:
        begun.wait()
        edits, seed = jobs[place]
        found[place] = side_by_side(demo, PROMPT, edits, seed=seed, **options)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    begun.wait()
    assert generate(demo, PROMPT, EDITS, seed=1, max_tokens=12, temperature=1.0) == expected[0]["steered"]
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "jamba", "granitemoehybrid", "llama4"])
def test_families(family: str):
    made = checkpoint.model(family)
    edit = Ablate(experts=[0], level="output") if made.layers[0].top_k == 1 else Ablate(experts=[0])
    expected = compare(made, "abcdef", edit, max_tokens=5)
    assert side_by_side(made, "abcdef", edit, max_tokens=5) == expected
    assert side_by_side(made, "abcdef", edit, max_tokens=5) == expected
