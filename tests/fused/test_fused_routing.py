"""Fused routers against the families' own: on a tiny model of every family that is covered, edited or not."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from recorded import TRACED, model
from test_recorder import hooks

import workbench as wb
from workbench.errors import InputError
from workbench.fused_routing import RULES, fused_routing, gating_of
from workbench.hooked import FUSED
from workbench.layers import Layer, family_of
from workbench.models import Model
from workbench.observation import Observation
from workbench.recorder import FIELDS, Recorder

COVERED = [name for name in TRACED if name in RULES]


def run(made: Model, edits: Any = None, fused: bool = True) -> tuple[torch.Tensor, list[Observation]]:
    """Output and observations of one pass over a padded batch."""
    inputs = tiny.inputs(made.module, 3, 9)
    inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.int64)
    inputs["attention_mask"][1, :4] = 0
    with (
        torch.inference_mode(),
        fused_routing(made) if fused else nullcontext(),
        nullcontext() if edits is None else wb.intervene(made, edits) as applied,
        Recorder(made, FIELDS) as recorder,
    ):
        out = made.module(**inputs)[0]
    if applied is not None:
        assert all(applied.touched)
    (observed,) = recorder.take()
    return out, observed


def agree(one: list[Observation], other: list[Observation]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine.experts, theirs.experts)
        for name in FIELDS:
            given, wanted = getattr(mine, name), getattr(theirs, name)
            torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_what_is_covered() -> None:
    assert set(RULES) <= set(TRACED)
    assert len(COVERED) == 61
    for family in TRACED:
        for layer in model(family).layers:
            assert (gating_of(layer) is not None) == (family in RULES and layer.scoring != "hash"), family


@pytest.mark.parametrize("family", COVERED)
def test_routers_return_what_their_own_code_does(family: str) -> None:
    made = model(family)
    for layer in made.layers:
        if layer.scoring == "hash":
            continue
        hidden = torch.randn(1, 40, _width(layer), generator=torch.Generator().manual_seed(layer.index))
        with torch.inference_mode():
            own = layer.router(*_arguments(layer, hidden))
            with fused_routing(made) as covered:
                assert layer in covered
                new = layer.router(*_arguments(layer, hidden))
        assert len(own) == len(new) == 3
        assert torch.equal(own[0], new[0]) and torch.equal(own[2], new[2])
        assert own[1].dtype == new[1].dtype
        torch.testing.assert_close(own[1], new[1], atol=1e-6, rtol=1e-6)


def _width(layer: Layer) -> int:
    return next(p.shape[1] for p in layer.router.parameters() if p.dim() == 2 and p.shape[0] == layer.n_experts)


def _arguments(layer: Layer, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    family = family_of(layer.router)
    found = gating_of(layer)
    assert found is not None
    if family == "afmoe":  # wants (B, S, H)
        return hidden, found[1]  # type: ignore[return-value]
    passed = family in ("minimax_m2", "hy_v3", "lfm2_moe")
    return (hidden[0], found[1]) if passed else (hidden[0],)  # type: ignore[return-value]


# -- recorded and edited -----------------------------------------------------------------------------------------------

SOME = ("olmoe", "mixtral", "gpt_oss", "deepseek_v3", "mistral4", "lfm2_moe", "ernie4_5_moe", "deepseek_v4", "laguna")
EDITS: dict[str, list[Any]] = {
    "ablate logits": [wb.Ablate(experts=[1, 2])],
    "ablate selection": [wb.Ablate(experts=[1, 2], level="selection")],
    "force logits": [wb.Force(experts=[0, 5])],
    "force selection": [wb.Force(experts=[3], level="selection")],
    "forbid": [wb.Forbid(experts=[4])],
    "bias": [wb.Bias(experts=[1, 6], strength=0.7), wb.Bias(experts=[2], strength=-0.5, unit="logits")],
    "bias in one scope, force in another": [
        wb.Bias(experts=[1, 6], strength=0.7, scope="position=0-3"),
        wb.Force(experts=[3], scope="position=2+"),
    ],
    "the later wins": [wb.Force(experts=[2, 3]), wb.Ablate(experts=[3, 4]), wb.Scale(experts=[2], factor=0.5)],
    "delta": [wb.Delta(values=[0.3 * (i - 4) for i in range(8)], scope="position=3+")],
    "output": [wb.Ablate(experts=[1, 2], level="output", renormalise=True)],
}
HOOKED: dict[str, list[Any]] = {
    "another k": [wb.SetTopK(k=2)],
    "top-p": [wb.TopP(p=0.5)],
    "two scopes": [wb.Force(experts=[3], scope="position=2+"), wb.Forbid(experts=[1], scope="position=0-4")],
}


@pytest.mark.parametrize("family", COVERED)
def test_records_are_those_of_the_hook_path(family: str) -> None:
    made = model(family)
    before = hooks(made.module)
    plain, theirs = run(made, fused=False)
    out, mine = run(made)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    agree(mine, theirs)
    assert hooks(made.module) == before and not any(layer.router in FUSED for layer in made.layers)


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("family", SOME)
def test_interventions_are_those_of_the_hook_path(family: str, edits: str) -> None:
    made = model(family)
    plain, theirs = run(made, EDITS[edits], fused=False)
    out, mine = run(made, EDITS[edits])
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    agree(mine, theirs)


@pytest.mark.parametrize("family", ["deepseek_v3", "axk2", "mistral_large4", "deepseek_v2"])
@pytest.mark.parametrize("experts", [(0, 1, 4), (0, 1, 2, 4)])
def test_groups_that_run_out_of_experts_do_so_alike(family: str, experts: tuple[int, ...]) -> None:
    made = model(family)
    edits = [wb.Ablate(experts=experts, level="selection", scope="position=1+")]
    plain, theirs = run(made, edits, fused=False)
    out, mine = run(made, edits)
    torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
    agree(mine, theirs)


@pytest.mark.parametrize("edits", HOOKED)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_what_fused_code_cannot_say_is_left_to_the_family_layer_by_layer(family: str, edits: str) -> None:
    made = model(family)
    everywhere = [*HOOKED[edits], wb.Bias(experts=[2], strength=0.3)]
    first = [dataclasses.replace(edit, layer=0) for edit in HOOKED[edits]]
    for given in (everywhere, first):
        plain, theirs = run(made, given, fused=False)
        out, mine = run(made, given)
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)
        agree(mine, theirs)
    with torch.inference_mode(), fused_routing(made), wb.intervene(made, first):
        made.module(**tiny.inputs(made.module))
        assert [FUSED[layer.router].routed is None for layer in made.layers] == [
            True, *[False] * (len(made.layers) - 1)
        ]  # fmt: skip


def test_gradients_reach_a_vector_that_wants_them() -> None:
    made = model("qwen3_moe")
    inputs = tiny.inputs(made.module)
    found = []
    for context in (nullcontext(), fused_routing(made)):
        values = torch.zeros(made.layers[0].n_experts, requires_grad=True)
        with context, wb.intervene(made, wb.Delta(values=values)):
            made.module(**inputs)[0].float().logsumexp(-1).sum().backward()
        found.append(values.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_generation_and_looking_ahead() -> None:
    made = model("mixtral")
    inputs = tiny.inputs(made.module)
    taken = []
    for context in (nullcontext(), fused_routing(made)):
        with torch.inference_mode(), context, Recorder(made, ["entropy", "margin", "lookahead"]) as recorder:
            made.module.generate(**inputs, max_new_tokens=4, do_sample=False)
        taken.append(recorder.take())
    assert len(taken[0]) == len(taken[1])
    for theirs, mine in zip(*taken, strict=True):
        for one, other in zip(theirs, mine, strict=True):
            assert torch.equal(one.experts, other.experts)
            torch.testing.assert_close(one.margin, other.margin, atol=1e-6, rtol=0)
            if one.lookahead is not None:
                assert torch.equal(one.lookahead, other.lookahead)


def test_the_weak_pass_of_a_contrast_runs_the_family_code() -> None:
    made = model("mixtral")
    inputs = tiny.inputs(made.module)
    found = []
    for context in (nullcontext(), fused_routing(made)):
        with torch.inference_mode(), context, wb.intervene(made, [wb.Contrast(), wb.Forbid(experts=[1])]):
            found.append(made.module(**inputs).logits)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-5)


def test_a_forward_that_was_replaced_already_is_left_alone() -> None:
    made = tiny.model("olmoe")
    router: Any = made.layers[1].router
    router.forward = own = router.forward
    with fused_routing(made) as covered:
        assert [layer.index for layer in covered] == [0, 2] and router.forward is own


@pytest.mark.parametrize("family", SOME)
def test_bfloat16(family: str) -> None:
    """Choices are the same; weights and what is said of the scores differ by the rounding of the family's own steps."""
    made = tiny.model(family)
    made.module.to(dtype=torch.bfloat16)
    for layer in made.layers:
        if layer.scoring == "hash":
            continue
        found = gating_of(layer)
        assert found is not None
        hidden = torch.randn(40, _width(layer), generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.inference_mode():
            own = layer.router(hidden, *([found[1]] if family == "lfm2_moe" else []))
            with fused_routing(made):
                new = layer.router(hidden)
        assert torch.equal(own[0], new[0]) and torch.equal(own[2], new[2]) and own[1].dtype == new[1].dtype
        torch.testing.assert_close(own[1], new[1], atol=0, rtol=2 * torch.finfo(own[1].dtype).eps + 2e-6)


def test_entropy_is_computed_while_somebody_records_it() -> None:
    made = model("olmoe")
    inputs = tiny.inputs(made.module)
    with torch.inference_mode(), fused_routing(made):
        fused = FUSED[made.layers[0].router]
        with Recorder(made, ["margin"]), Recorder(made):
            made.module(**inputs)
            assert fused.routed.entropy.isfinite().all()
        with Recorder(made):
            made.module(**inputs)
            assert fused.routed.entropy.isnan().all()


# -- a context manager -------------------------------------------------------------------------------------------------


def test_the_family_code_is_back_after_an_exception() -> None:
    made = model("olmoe")
    before = hooks(made.module)
    with pytest.raises(ZeroDivisionError), fused_routing(made):
        assert hooks(made.module) > before
        raise ZeroDivisionError
    assert hooks(made.module) == before and not any(layer.router in FUSED for layer in made.layers)


def test_it_has_to_be_entered_first_and_once() -> None:
    made = model("olmoe")
    for outer in (Recorder(made), wb.intervene(made, wb.Bias(experts=[1], strength=1.0), idle=True)):
        with outer, pytest.raises(InputError, match="enter fused_routing first"), fused_routing(made):
            pass
    with fused_routing(made), pytest.raises(InputError, match="by fused code already"), fused_routing(made):
        pass


def test_a_family_that_is_not_covered_runs_as_ever() -> None:
    made = model("phimoe")
    with torch.inference_mode(), fused_routing(made) as covered, Recorder(made, FIELDS) as recorder:
        made.module(**tiny.inputs(made.module))
    assert covered == () and recorder.take()
