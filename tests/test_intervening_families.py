"""Interventions on a tiny random model of every family: what each promises holds in the family's own gating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from recorded import TRACED, model
from test_recorder import hooks

import workbench as wb
from workbench.errors import InputError
from workbench.fitting import NO_INTERVENTION, TRANSFORMED
from workbench.models import Model
from workbench.observation import Observation
from workbench.recorder import Recorder
from workbench.weights import SUMS

EDITED = [name for name in TRACED if name != "doge"]
FIXED_K = {"jetmoe", "switch_transformers", "phimoe", "zaya", "deepseek_v4"}


def run(made: Model, edits: Any, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[Observation]]:
    """The model's first output and the observations of one pass under interventions."""
    with torch.inference_mode(), wb.intervene(made, edits) as applied, Recorder(made) as recorder:
        out = made.module(**inputs)[0]
    assert all(applied.touched)
    (observed,) = recorder.take()
    return out, observed


@pytest.mark.parametrize("family", EDITED)
def test_experts_that_are_taken_away_are_gone_and_forced_ones_are_there(family: str) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module, 3, 9)
    before = hooks(made.module)
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    away = [wb.Ablate(experts=[1, 2], level=level) for level in ("logits", "selection", "output")]
    for edit in (*away, wb.Forbid(experts=[1, 2]), wb.Ablate(experts=[1, 2], level="output", renormalise=True)):
        for seen in run(made, edit, **inputs)[1]:
            assert not ((seen.experts == 1) | (seen.experts == 2)).any(), edit
            if getattr(edit, "level", "") != "output" and family != "switch_transformers" and family != "zaya":
                assert (
                    (seen.experts >= 0).all() and seen.weights is not None and (seen.weights > 0).all()
                )  # others took their place
    forced = list(range(min(layer.top_k for layer in made.layers)))
    for level in ("logits", "selection"):
        for seen in run(made, wb.Force(experts=forced, level=level), **inputs)[1]:
            there = torch.stack([(seen.experts == expert).any(-1) for expert in forced]).all(0)
            if family == "switch_transformers":  # beyond an expert's capacity
                there |= (seen.experts < 0).all(-1)
            assert there.all(), level
    with torch.inference_mode():
        assert torch.equal(plain, made.module(**inputs)[0])
    assert hooks(made.module) == before


@pytest.mark.parametrize("family", EDITED)
def test_edits_that_say_nothing_new_are_bit_identical(family: str) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module)
    everybody = list(range(made.layers[0].n_experts))
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    for edit in (wb.Scale(experts=everybody, factor=1), wb.Bias(experts=everybody, strength=0.0)):
        assert torch.equal(run(made, edit, **inputs)[0], plain), edit


@pytest.mark.parametrize("family", EDITED)
def test_a_replay_of_its_own_routing_is_bit_identical(family: str, tmp_path: Path) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.inference_mode(), Recorder(made) as recorder:
        plain = made.module(**inputs)[0]
    (observed,) = recorder.take()
    file = tmp_path / "own.duckdb"
    stored(file, inputs["input_ids"], observed, made)
    again, seen = run(made, wb.Replay(trace=str(file)), **inputs)
    assert torch.equal(plain, again)
    assert all(torch.equal(one.experts, other.experts) for one, other in zip(observed, seen, strict=True))
    other = tiny.model(family, seed=5)
    replayed = run(other, wb.Replay(trace=str(file)), **inputs)[1]
    for mine, recorded in zip(replayed, observed, strict=True):
        same = mine.experts.sort(-1).values == recorded.experts.sort(-1).values
        if family == "switch_transformers":  # its own capacity drops tokens, too
            same |= mine.experts < 0
        if family == "zaya":  # where the record has no expert, the model's own choice gets weight 0
            same |= recorded.experts < 0
        assert same.all()


def stored(file: Path, ids: torch.Tensor, observed: list[Observation], made: Model) -> None:
    """Write one pass as a trace."""
    experts = torch.stack([seen.experts.flatten(0, 1) for seen in observed], 1).numpy()
    weights = torch.stack([seen.weights.flatten(0, 1) for seen in observed], 1).numpy()  # type: ignore[union-attr]
    rows, length = ids.shape
    wb.from_arrays(
        file,
        experts,
        weights,
        n_experts=[layer.n_experts for layer in made.layers],
        seq=np.repeat(np.arange(rows), length),
        token_ids=ids.flatten().numpy(),
    )


@pytest.mark.parametrize("family", EDITED)
def test_the_number_of_experts_can_be_set(family: str) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module)
    if family in FIXED_K:
        with pytest.raises(InputError, match="the number of experts can't be changed there"):
            run(made, wb.SetTopK(k=2), **inputs)
        return
    for k in (2, 4):
        for seen in run(made, wb.SetTopK(k=k), **inputs)[1]:
            assert (seen.experts >= 0).sum(-1).eq(k).all()
            assert seen.experts.shape[-1] == k
    if family in SUMS or family in TRANSFORMED:
        with pytest.raises(InputError, match="tokens can't differ in their number|its logits after"):
            run(made, wb.TopP(p=0.5), **inputs)
        return
    last = len(made.layers) - 1  # nothing after it changes what it is given
    for edit in ({"k": 1 + made.layers[0].family.two_ranks}, {"k": 2, "first": 2}, {"k": 4}):
        whole = run(made, wb.SetTopK(layer=last, **edit), **inputs)[1][last]
        part = run(made, wb.SetTopK(layer=last, scope="position=0+", **edit), **inputs)[1][last]
        torch.testing.assert_close(by_expert(whole, 16), by_expert(part, 16), atol=1e-5, rtol=1e-4)
    early = run(made, wb.SetTopK(k=2, scope="position=0-3"), **inputs)[1]
    for layer, seen in zip(made.layers, early, strict=True):
        n = (seen.experts >= 0).sum(-1)
        assert n[:, :4].eq(2).all() and n[:, 4:].eq(layer.top_k).all()
    for seen in run(made, wb.TopP(p=0.3), **inputs)[1]:
        assert (seen.experts[..., 0] >= 0).all()


def by_expert(seen: Observation, n_experts: int) -> torch.Tensor:
    """Weights (B, S, E), whatever the order of the experts."""
    assert seen.weights is not None
    empty = torch.zeros(*seen.experts.shape[:2], n_experts + 1)
    return empty.scatter(-1, torch.where(seen.experts < 0, n_experts, seen.experts), seen.weights)[..., :-1]


@pytest.mark.parametrize("family", EDITED)
def test_logits_can_be_moved(family: str) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module)
    n = made.layers[0].n_experts
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    moved = [wb.Delta(values=[0.3 * i for i in range(n)]), wb.Bias(experts=[0], strength=1.0)]
    if family != "deepseek_v4" and family not in TRANSFORMED:
        moved.append(wb.Remix(target=[1.0] * (n - 1) + [5.0], alpha=0.2))
    for edit in moved:
        out = run(made, edit, **inputs)[0]
        assert out.isfinite().all() and not torch.equal(out, plain), edit


def generates(family: str) -> bool:
    return family != "switch_transformers" and getattr(model(family).module, "can_generate", lambda: False)()


@pytest.mark.parametrize("family", [name for name in EDITED if generates(name)])
def test_what_is_generated_is_told_from_the_prompt_in_cached_generation(family: str) -> None:
    made = model(family)
    ids = tiny.inputs(made.module, 2, 6)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    edits = [wb.Force(layer=0, experts=[6], scope="phase=generated", level="selection")]
    edits.append(wb.Forbid(layer=0, experts=[5], scope="phase=prompt"))
    with torch.inference_mode(), wb.intervene(made, edits) as applied, Recorder(made) as recorder:
        made.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert applied.touched[0] == 2 * 2
    prompt, *steps = recorder.take()
    assert len(steps) == 2
    assert all((step[0].experts == 6).any(-1).all() for step in steps)
    assert not ((prompt[0].experts == 5).any(-1) & mask.bool()).any()


def test_a_family_without_a_place_to_edit_is_refused() -> None:
    with (
        pytest.raises(InputError, match="doge can't be intervened on: one module"),
        wb.intervene(model("doge"), wb.Ablate(experts=[1])),
    ):
        pass
    assert NO_INTERVENTION
