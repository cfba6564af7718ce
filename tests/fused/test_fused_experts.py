"""A model with fused experts gives the records and logits of its own code, and its own code again afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from workbench.capture import trace
from workbench.corpus import from_rows
from workbench.errors import InputError
from workbench.fused_experts import NAME, fused_experts, which
from workbench.intervening import intervene
from workbench.interventions import Ablate, Bias, Scale, SetTopK
from workbench.models import Model
from workbench.observation import Observation
from workbench.recorder import Recorder
from workbench.tracefile import info

NOT_COVERED = {"dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
COVERED = [family for family in tiny.FAMILIES if family not in NOT_COVERED]
RECORD = ("weights", "entropy", "margin", "norms")


def run(model: Model, edits=None, record=RECORD) -> tuple[torch.Tensor, list[Observation]]:
    inputs = tiny.inputs(model.module)
    with torch.inference_mode():
        if edits is None:
            with Recorder(model, record) as recorder:
                logits = model.module(**inputs)[0]
        else:
            with intervene(model, edits), Recorder(model, record) as recorder:
                logits = model.module(**inputs)[0]
    (taken,) = recorder.take()
    return logits, taken


def same(found: tuple[torch.Tensor, list[Observation]], expected: tuple[torch.Tensor, list[Observation]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-5 * max(1.0, float(expected[0].abs().max())))
    for one, other in zip(found[1], expected[1], strict=True):
        assert torch.equal(one.experts, other.experts)
        for name in RECORD:
            values = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("family", COVERED)
def test_every_covered_family_gives_the_same(family: str):
    model = tiny.model(family)
    expected = run(model)
    with fused_experts(model, "fused") as used:
        assert used == "fused"
        found = run(model)
        assert {layer.experts.config._experts_implementation for layer in model.layers} == {NAME}
    same(found, expected)
    again = run(model)
    assert torch.equal(again[0], expected[0])
    assert NAME not in {layer.experts.config._experts_implementation for layer in model.layers}


@pytest.mark.parametrize(
    "edits",
    [
        Ablate(layer=1, experts=[0, 3]),
        Ablate(layer=1, experts=[0, 3], level="output"),
        [Bias(layer=0, experts=[2], strength=1.0), Scale(layer=1, experts=[1, 2, 4], factor=0.5)],
        SetTopK(k=2),
    ],
    ids=["ablate", "ablate at the output", "bias and scale", "top-k"],
)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_edited_routing_gives_the_same(family: str, edits):
    model = tiny.model(family)
    expected = run(model, edits)
    with fused_experts(model, "fused"):
        found = run(model, edits)
    same(found, expected)


def test_nested_recorders_have_the_norms_both():
    model = tiny.model("olmoe")
    with fused_experts(model, "fused"), torch.inference_mode(), Recorder(model, {"norms"}) as outer:
        with Recorder(model, {"norms"}) as inner:
            model.module(**tiny.inputs(model.module))
        for one, other in zip(outer.take()[0], inner.take()[0], strict=True):
            assert one.norms is not None and other.norms is not None and torch.equal(one.norms, other.norms)


def test_gradients_come_from_the_reference():
    model = tiny.model("olmoe")
    inputs = tiny.inputs(model.module)
    weight = model.layers[0].experts.down_proj
    gradients = []
    for experts in ("model", "fused"):
        with fused_experts(model, experts):
            model.module.zero_grad()
            model.module(**inputs).logits.square().mean().backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", sorted(NOT_COVERED - {"nllb_moe"}))
def test_other_families_keep_their_own_code(family: str):
    model = tiny.model(family)
    with fused_experts(model, "auto") as used:
        assert used == "model"
    with pytest.raises(InputError, match=r"can't be fused: .*Take --experts model"), fused_experts(model, "fused"):
        pass


def test_a_run_says_which_experts_it_used(tmp_path):
    """And is the same run either way, but for the last bits; it can't be resumed with others."""
    texts = from_rows([{"text": f"Article {n}. Everyone has the right to life."} for n in range(6)], "texts")
    runs = {}
    for experts, used in {"auto": "fused", "model": "model", "fused": "fused"}.items():
        found = runs[experts] = trace("demo", texts, tmp_path / f"{experts}.duckdb", experts=experts, progress=False)
        assert info(found.path)["runs"][0]["corpus"]["experts"] == used
    for layer in range(runs["model"].n_layers):
        assert (runs["model"].experts(layer) == runs["fused"].experts(layer)).mean() > 0.95  # bfloat16
        assert np.array_equal(runs["auto"].experts(layer), runs["fused"].experts(layer))
    with pytest.raises(InputError, match='resumed: its corpus is .*"experts": "model"'):
        trace("demo", texts, tmp_path / "model.duckdb", mode="resume", progress=False)


def test_what_is_asked_for():
    model = tiny.model("olmoe")
    assert [which(model, one) for one in ("auto", "model", "fused")] == ["fused", "model", "fused"]
    with pytest.raises(InputError, match="experts is 'fast': expected one of auto, model, fused"):
        which(model, "fast")


def test_the_models_own_code_comes_back_after_an_error():
    model = tiny.model("olmoe")
    before = model.module.get_experts_implementation()
    with pytest.raises(KeyError), fused_experts(model, "fused"):
        raise KeyError
    assert model.module.get_experts_implementation() == before
