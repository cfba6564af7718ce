"""The recorder on a tiny model of every family: its promises, its life as a context manager, its refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from recorded import TRACED, model, run
from torch import nn

from workbench.errors import InputError, RunError
from workbench.families import FAMILIES
from workbench.recorder import FIELDS, Recorder


def hooks(module: nn.Module) -> int:
    """Hooks on any submodule, and forward methods replaced on an instance."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + sum(callable(v) for v in vars(m).values())
        for m in module.modules()
    )


# -- every family ------------------------------------------------------------------------------------------------------


def test_every_family_has_a_tiny_model() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)
    assert len(TRACED) == 71
    assert {name for name, family in FAMILIES.items() if family.refused} == {"nllb_moe"}


@pytest.mark.parametrize("family", TRACED)
def test_recording_changes_nothing_and_keeps_its_promises(family: str) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module)
    before = hooks(made.module)
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    recorded, observed = run(made, FIELDS, **inputs)
    assert torch.equal(plain, recorded)
    assert hooks(made.module) == before
    assert len(observed) == len(made.layers)
    for layer, seen in zip(made.layers, observed, strict=True):
        ids = inputs["decoder_input_ids" if layer.stack == "decoder" and len(inputs) > 1 else "input_ids"]
        b, s = ids.shape
        k, e = layer.top_k, layer.n_experts
        assert seen.experts.shape == seen.weights.shape == seen.norms.shape == (b, s, k)
        assert seen.entropy.shape == seen.margin.shape == (b, s)
        assert seen.logits.shape == seen.probabilities.shape == (b, s, e)
        assert seen.experts.dtype == torch.int64
        for name in FIELDS:
            assert getattr(seen, name).dtype == torch.float32, name
        assert int(seen.experts.min()) >= -1 and int(seen.experts.max()) < e
        assert all(len(set(row)) == k for row in seen.experts.reshape(-1, k).tolist())
        none = seen.experts < 0
        assert (seen.weights >= 0).all() and (seen.weights[none] == 0).all() and (seen.norms[none] == 0).all()
        assert (seen.weights[~none] > 0).all() and (seen.norms[~none] > 0).all()
        assert seen.logits.isfinite().all()
        if layer.scoring == "hash":
            assert seen.entropy.isnan().all() and seen.margin.isnan().all() and seen.probabilities.isnan().all()
            continue
        assert (seen.entropy >= 0).all() and (seen.entropy <= np.log(e + 1) + 1e-5).all()
        assert (seen.margin >= 0).all()
        total = seen.probabilities.sum(-1)
        assert (total <= 1 + 1e-5).all() and (family == "zaya" or (total >= 1 - 1e-5).all())
        named = {"softmax, top-k, renormalised", "top-k, softmax", "sigmoid + bias, top-k, renormalised"}
        if layer.gating in named and layer.family.caveat == "":
            torch.testing.assert_close(seen.weights.sum(-1), torch.ones(b, s))


@pytest.mark.parametrize("family", TRACED)
def test_bfloat16(family: str) -> None:
    made = tiny.model(family)
    made.module.to(dtype=torch.bfloat16)
    if family == "inkling2":  # keeps its routers in float32, as its checkpoints are loaded
        for layer in made.layers:
            layer.router.float()
    inputs = tiny.inputs(made.module)
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    recorded, observed = run(made, FIELDS, **inputs)
    assert torch.equal(plain, recorded)
    for seen in observed:
        assert seen.weights.dtype == seen.entropy.dtype == torch.float32


# -- the context manager -----------------------------------------------------------------------------------------------


def test_hooks_are_removed_after_exceptions() -> None:
    made = tiny.model("olmoe")
    before = hooks(made.module)
    with pytest.raises(ZeroDivisionError), Recorder(made, FIELDS):
        assert hooks(made.module) > before
        raise ZeroDivisionError
    assert hooks(made.module) == before

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = made.layers[1].experts.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(made, FIELDS)
    handle.remove()
    assert hooks(made.module) == before
    run(made, FIELDS)


def test_a_failed_forward_can_be_cleared_and_tried_again() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    _, expected = run(made, FIELDS, **inputs)
    with torch.inference_mode(), Recorder(made, FIELDS) as recorder:
        handle = made.layers[1].router.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.module(**inputs)
        handle.remove()
        recorder.clear()
        made.module(**inputs)
        (observed,) = recorder.take()
    for a, b in zip(expected, observed, strict=True):
        for name in ("experts", *FIELDS):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_nested_recorders() -> None:
    made = model("dbrx")
    inputs = tiny.inputs(made.module)
    with torch.inference_mode(), Recorder(made, FIELDS) as outer:
        with Recorder(made, FIELDS) as inner:
            made.module(**inputs)
        made.module(**inputs)
    assert len(outer.take()) == 2 and len(inner.take()) == 1


def test_several_forwards_and_takes() -> None:
    made = model("qwen3_moe")
    with torch.inference_mode(), Recorder(made) as recorder:
        for length in (3, 5):
            made.module(**tiny.inputs(made.module, 1, length))
        first = recorder.take()
        made.module(**tiny.inputs(made.module, 2, 4))
        second = recorder.take()
    assert [step[0].experts.shape[:2] for step in first] == [(1, 3), (1, 5)]
    assert [step[0].experts.shape[:2] for step in second] == [(2, 4)]


def test_gradients_flow_and_records_are_detached() -> None:
    made = tiny.model("mixtral")
    with Recorder(made, FIELDS) as recorder:
        made.module(**tiny.inputs(made.module))[0].sum().backward()
    (observed,) = recorder.take()
    assert made.layers[0].router.weight.grad is not None
    assert not any(getattr(seen, name).requires_grad for seen in observed for name in ("experts", *FIELDS))


def test_only_what_was_asked_for() -> None:
    made = model("olmoe")
    _, observed = run(made, ())
    assert all(getattr(observed[0], name) is None for name in FIELDS)
    for name in FIELDS:
        _, observed = run(made, [name])
        assert [field for field in FIELDS if getattr(observed[0], field) is not None] == [name]


def test_edited_routing_is_what_is_recorded() -> None:
    made = model("olmoe")

    def halve(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0], args[1], args[2] * 0.5

    _, plain = run(made)
    handle = made.layers[0].experts.register_forward_pre_hook(halve)
    _, edited = run(made)
    handle.remove()
    assert torch.equal(edited[0].weights, plain[0].weights * 0.5)


# -- what must not pass silently ---------------------------------------------------------------------------------------


def test_unknown_field() -> None:
    with pytest.raises(InputError, match="can't record colour: choose from ids, weights"):
        Recorder(model("olmoe"), ["colour"])


def test_nothing_seen() -> None:
    with Recorder(model("olmoe")) as recorder:
        pass
    with pytest.raises(RunError, match="no router was seen"):
        recorder.take()


def test_a_bypassed_layer() -> None:
    made = tiny.model("olmoe")
    experts: Any = made.layers[1].experts
    made.layers[1].block.forward = lambda x: x + experts.act_fn(x)
    with pytest.raises(RunError, match=r"1 of 3 routers saw nothing .* model.layers.1.mlp.gate"):
        run(made)


def test_repeated_ids() -> None:
    made = tiny.model("deepseek_v4")
    for layer in made.layers:
        if layer.scoring == "hash":
            layer.router.tid2eid.zero_()
    with pytest.raises(RunError, match="the same expert twice"):
        run(made)


def test_all_zero_weights() -> None:
    made = model("olmoe")
    handle = made.layers[0].experts.register_forward_pre_hook(lambda _m, a: (a[0], a[1], a[2] * 0))
    with pytest.raises(RunError, match="every expert the weight 0"):
        run(made)
    handle.remove()


def test_a_subset_of_tokens_is_refused() -> None:
    made = model("ernie4_5_vl_moe")
    inputs = tiny.inputs(made.module)
    image = torch.zeros_like(inputs["input_ids"])
    image[:, 2:5] = 1
    with pytest.raises(RunError, match=r"routed 12 of 18 tokens .* Trace text without images"):
        run(made, **inputs, moe_mm_token_type_ids=image)


def test_margin_without_a_visible_selection() -> None:
    made = tiny.model("olmoe")
    router: Any = made.layers[0].router

    def sorted_choice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = nn.functional.linear(x.reshape(-1, x.shape[-1]), router.weight)
        p, ids = z.softmax(-1).sort(-1, descending=True)
        return z, p[:, : router.top_k], ids[:, : router.top_k]

    router.forward = sorted_choice
    run(made)
    with pytest.raises(RunError, match="without a topk that can be seen"):
        run(made, ["margin"])


def test_unknown_scoring_function() -> None:
    made = tiny.model("deepseek_v4", scoring_func="gelu")
    run(made)
    with pytest.raises(InputError, match="'gelu', whose probabilities aren't known"):
        Recorder(made, ["entropy"])
