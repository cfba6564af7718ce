"""Deltas learned from a context: gradients, what they leave alone, which layers, the schedule, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import recorded
import tiny
import torch

import workbench
from workbench import learning
from workbench.errors import InputError, RunError
from workbench.forward import next_token_nll
from workbench.intervening import intervene
from workbench.interventions import Delta
from workbench.models import Model
from workbench.recorder import Recorder
from workbench.rewiring import confidence, generate, rewire
from workbench.scores import log_probabilities

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "deepseek_v4", "granitemoe")
"""Softmax before and after the selection, sigmoid with groups and a bias, sqrt-softplus with hash layers, sorted."""
TEXT = list(range(3, 60, 2)) + list(range(4, 60, 3))


@pytest.fixture(scope="module")
def demo() -> Model:
    torch.set_num_threads(1)
    return workbench.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def text(demo: Model) -> list[int]:
    words = "All human beings are born free and equal in dignity and rights. They are endowed with reason. " * 2
    return demo.tokenizer(words)["input_ids"][:40]


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def unchanged(model: Model, before: dict[str, torch.Tensor]) -> bool:
    same = all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    return same and all(p.grad is None and p.requires_grad for p in model.module.parameters())


def context_loss(model: Model, ids: Any, deltas: Any = ()) -> float:
    """Mean nll of a context, by the recorder's own loss."""
    given = torch.tensor([list(ids)])
    with torch.no_grad():
        if not deltas:
            return float(next_token_nll(model.module(given, use_cache=False).logits, given)[0, 1:].mean())
        with intervene(model, deltas):
            return float(next_token_nll(model.module(given, use_cache=False).logits, given)[0, 1:].mean())


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "granitemoe"])
def test_the_gradient_is_that_of_finite_differences(family: str):
    # All experts are selected: nothing jumps.
    groups = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    counts = {"num_experts_per_tok": tiny.EXPERTS, **groups}
    model = tiny.model(family, **counts)
    layer, ids = 1, learning.as_ids(model, TEXT)
    values = torch.linspace(-0.5, 0.5, tiny.EXPERTS).requires_grad_()
    with learning.gradients(model):
        with intervene(model, [Delta(layer=layer, values=values)]):
            loss = learning.loss(model, ids)
        learning.gradient(loss, [values])
    step = 2.0**-5
    for expert in range(tiny.EXPERTS):
        apart = []
        for sign in (1, -1):
            moved = values.detach().clone()
            moved[expert] += sign * step
            apart.append(context_loss(model, TEXT, [Delta(layer=layer, values=moved)]))
        assert values.grad is not None
        assert float(values.grad[expert]) == pytest.approx((apart[0] - apart[1]) / (2 * step), rel=0.03, abs=1e-3)
    assert values.grad is not None and float(values.grad.abs().max()) > 2e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_learning_lowers_the_loss_of_the_context_and_changes_nothing_else(family: str):
    model = recorded.model(family)
    before = state(model)
    found = rewire(model, TEXT, steps=5, learning_rate=0.01)
    assert len(found.losses) == 6 and found.losses[-1] < found.losses[0]
    assert unchanged(model, before)
    assert found.losses[0] == pytest.approx(context_loss(model, TEXT), abs=1e-5)
    assert found.losses[-1] == pytest.approx(context_loss(model, TEXT, found.deltas), abs=1e-5)
    assert all(isinstance(delta.values, tuple) and delta.scope == "all" for delta in found.deltas)
    assert found.n_context == len(TEXT)


def test_the_first_step_of_adam_goes_against_the_gradient(demo: Model, text: list[int]):
    """Its size is the learning rate, whatever the gradient's."""
    layer, ids = 2, learning.as_ids(demo, text)
    values = torch.zeros(32, requires_grad=True)
    with learning.gradients(demo):
        with intervene(demo, Delta(layer=layer, values=values)):
            loss = learning.loss(demo, ids)
        learning.gradient(loss, [values])
    assert values.grad is not None
    (delta,) = rewire(demo, text, layers=[layer], steps=1, learning_rate=0.05).deltas
    clear = values.grad.abs() > 1e-5
    assert clear.any()
    np.testing.assert_allclose(torch.tensor(delta.values)[clear], -0.05 * values.grad[clear].sign(), rtol=1e-2)
    (plain,) = rewire(demo, text, layers=[layer], steps=1, learning_rate=0.5, optimiser="sgd").deltas
    np.testing.assert_allclose(plain.values, -0.5 * values.grad, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_steps_are_zero_vectors_and_bit_identical(family: str):
    model = recorded.model(family)
    found = rewire(model, TEXT, steps=0)
    assert found.losses == (found.losses[0],)
    assert all(set(delta.values) == {0.0} for delta in found.deltas)
    ids = torch.tensor([TEXT])
    with torch.inference_mode():
        plain = model.module(ids, use_cache=False).logits
        with intervene(model, found.deltas):
            edited = model.module(ids, use_cache=False).logits
    assert torch.equal(plain, edited)


def test_learning_works_within_inference_mode_and_leaves_it_on(demo: Model, text: list[int]):
    with torch.inference_mode():
        found = rewire(demo, torch.tensor(text), layers=[0], steps=1)
        assert torch.is_inference_mode_enabled()
    assert found == rewire(demo, text, layers=[0], steps=1)


def test_parameters_that_needed_no_gradient_still_need_none(demo: Model, text: list[int]):
    frozen = next(demo.module.parameters())
    frozen.requires_grad_(False)
    try:
        rewire(demo, text, layers=[0], steps=1)
        assert not frozen.requires_grad
    finally:
        frozen.requires_grad_(True)
    with pytest.raises(ZeroDivisionError), learning.gradients(demo):
        _ = 1 / 0
    assert all(p.requires_grad for p in demo.module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_confidence_is_the_mean_log_probability_of_the_selected(family: str):
    model = recorded.model(family)
    ids = torch.tensor([TEXT])
    with torch.inference_mode(), Recorder(model, ["logits"]) as recorder:
        model.module(ids, use_cache=False)
    (seen,) = recorder.take()
    for layer, observed, found in zip(model.layers, seen, confidence(model, TEXT), strict=True):
        if layer.scoring == "hash":
            assert math.isnan(found)
            continue
        p = log_probabilities(observed.logits, layer.scoring).exp()[0].double().numpy()
        chosen = observed.experts[0].numpy()
        brute = -np.mean([np.mean([math.log(p[t, e]) for e in chosen[t]]) for t in range(len(TEXT))])
        assert found == pytest.approx(brute, rel=1e-5)
        assert found >= 0


def test_the_most_confident_layers_are_learned(demo: Model, text: list[int]):
    certainty = confidence(demo, text)
    for share, n in ((0.5, 3), (0.01, 1), (1.0, 6)):
        found = rewire(demo, text, share=share, steps=0)
        assert found.layers == tuple(sorted(np.argsort(certainty)[::-1][:n].tolist()))
        assert tuple(delta.layer for delta in found.deltas) == found.layers
        assert found.confidence == certainty
    assert rewire(demo, text, layers=[5, 1], steps=0).layers == (1, 5)


def test_layers_that_select_by_token_are_never_learned():
    model = recorded.model("deepseek_v4")
    hashed = [layer.index for layer in model.layers if layer.scoring == "hash"]
    assert hashed
    assert not set(hashed) & set(rewire(model, TEXT, share=1.0, steps=0).layers)
    with pytest.raises(InputError, match=r"layer 0 .*selects by token id: .*Layers that do: 1, 2"):
        rewire(model, TEXT, layers=[0])


def test_learning_goes_on_from_a_start_and_keeps_what_it_does_not_learn(demo: Model, text: list[int]):
    first = rewire(demo, text, layers=[0, 1], steps=2)
    second = rewire(demo, text, layers=[1, 4], steps=2, start=first.deltas)
    assert [delta.layer for delta in second.deltas] == [0, 1, 4] and second.layers == (1, 4)
    assert second.deltas[0] == first.deltas[0] and second.deltas[1] != first.deltas[1]
    assert second.losses[0] == pytest.approx(first.losses[-1], abs=1e-6)
    doubled = [Delta(layer=0, values=first.deltas[0].values, strength=2.0)]
    kept = rewire(demo, text, layers=[1], steps=0, start=doubled).deltas[0]
    np.testing.assert_allclose(kept.values, 2 * np.array(first.deltas[0].values), rtol=1e-6)


def test_generation_learns_on_schedule_from_all_of_the_text(demo: Model, text: list[int]):
    options: dict[str, Any] = {"layers": [0, 3], "steps": 2}
    stretches = list(generate(demo, text, max_new_tokens=20, every=8, **options))
    assert [len(one.token_ids) for one in stretches] == [8, 8, 4]
    so_far, deltas = list(text), ()
    for one in stretches:
        assert one.rewired.n_context == len(so_far)
        assert one.rewired == rewire(demo, so_far, start=deltas, **options)
        with intervene(demo, one.rewired.deltas), torch.inference_mode():
            ids = torch.tensor([so_far])
            out = demo.module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(one.token_ids), do_sample=False
            )
        assert tuple(out[0, len(so_far) :].tolist()) == one.token_ids
        so_far, deltas = so_far + list(one.token_ids), one.rewired.deltas


def test_generation_can_learn_each_time_from_zero(demo: Model, text: list[int]):
    first, second = generate(demo, text, max_new_tokens=8, every=4, restart=True, layers=[2], steps=2)
    assert second.rewired == rewire(demo, [*text, *first.token_ids], layers=[2], steps=2)


def test_generation_without_steps_is_the_plain_one_and_ends_with_the_text(demo: Model, text: list[int]):
    ids = torch.tensor([text])
    plain = demo.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    new = plain[0, len(text) :].tolist()
    found = [token for one in generate(demo, text, max_new_tokens=10, every=3, steps=0) for token in one.token_ids]
    assert found == new
    config: Any = demo.module.generation_config
    ends, config.eos_token_id = config.eos_token_id, new[4]
    try:
        found = [token for one in generate(demo, text, max_new_tokens=10, every=3, steps=0) for token in one.token_ids]
    finally:
        config.eos_token_id = ends
    assert found == new[: new.index(new[4]) + 1]


def test_between_stretches_the_model_is_as_it_was(demo: Model, text: list[int]):
    before, ids = state(demo), torch.tensor([text])
    plain = demo.module(ids).logits
    for _ in generate(demo, text, max_new_tokens=4, every=2, layers=[0], steps=1):
        assert torch.equal(demo.module(ids).logits, plain)
    assert unchanged(demo, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [6]}, r"layer 6: demo has layers 0 to 5"),
        ({"layers": []}, r"layers is empty"),
        ({"share": 0}, r"share is 0; expected a part of the layers"),
        ({"steps": -1}, r"steps is -1; expected a whole number from 0"),
        ({"steps": 1.5}, r"steps is 1.5"),
        ({"learning_rate": 0.0}, r"learning_rate is 0.0; expected a number above 0"),
        ({"learning_rate": math.nan}, r"learning_rate is nan"),
        ({"optimiser": "lbfgs"}, r"optimiser is 'lbfgs'; expected adam, sgd"),
        ({"start": [Delta(values=[0.0] * 32)]}, r"start: expected Deltas of one layer each"),
    ],
)
def test_bad_arguments_are_named(demo: Model, text: list[int], arguments: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        rewire(demo, text, **arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5], r"the prompt is one token; expected at least 2 tokens"),
        ([], r"the prompt is empty; expected at least 2 tokens"),
        ([0.5, 1.5], r"the prompt is numbers of torch.float64; expected token ids"),
        ([5, 8192], r"token id 8192; demo knows ids from 0 to 8191"),
        ([-1, 3], r"token id -1"),
        ([5] * 1025, r"1025 tokens; demo is made for at most 1024"),
    ],
)
def test_bad_contexts_are_named(demo: Model, ids: list, message: str):
    with pytest.raises(InputError, match=message):
        rewire(demo, ids)


def test_bad_schedules_are_named_before_anything_runs(demo: Model, text: list[int]):
    with pytest.raises(InputError, match="every is 0"):
        generate(demo, text, max_new_tokens=4, every=0)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        generate(demo, text, max_new_tokens=0)
    with pytest.raises(InputError, match=r"a prompt of 40 tokens and 1000 new ones exceed the 1024 positions of demo"):
        generate(demo, text, max_new_tokens=1000)


def test_models_without_a_next_token_are_refused():
    with pytest.raises(InputError, match="switch_transformers doesn't predict the next token"):
        rewire(recorded.model("switch_transformers"), TEXT)


def test_a_loss_that_does_not_depend_on_the_edit_is_an_error():
    with pytest.raises(RunError, match="no gradient reaches the router"):
        learning.gradient(torch.zeros(()), [torch.zeros(3, requires_grad=True)])
