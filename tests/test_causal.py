"""Patching through nnsight against edits by hand, one at a time with plain hooks; its laws; its refusals."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spoken
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench import causal, remote
from workbench.bench.causal import by_hooks
from workbench.causal import patch
from workbench.errors import InputError, RunError
from workbench.families import FAMILIES
from workbench.interventions import Ablate
from workbench.models import Model, load
from workbench.prompt_pairs import Pair, encoded
from workbench.recorder import Recorder

# Tiny models of the other families are bare stacks of layers, without a head that predicts.
PREDICTING = [
    "afmoe", "aria", "axk1", "bailing_hybrid", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v4",
    "flex_olmo", "gemma4", "gpt_oss", "granitemoehybrid", "hy_v4", "inkling", "jamba", "kimi_linear", "lfm2_moe",
    "longcat_flash", "minimax", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "qwen4_exp", "zaya",
]  # fmt: skip

Consumed = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def prompts(made: Model, of: Pair) -> tuple[list[torch.Tensor], tuple[int, int]]:
    source, target, answers = encoded(of, made)
    return [torch.tensor([ids]) for ids in (source, target)], answers


def difference(made: Model, ids: torch.Tensor, answers: tuple[int, int]) -> float:
    with torch.no_grad():
        logits = made.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].double()
    return float(logits[answers[0]] - logits[answers[1]])


def consumed(made: Model, ids: torch.Tensor) -> Consumed:
    """What the experts of each layer are given."""
    seen: Consumed = {}

    def note(index: int) -> Callable[..., None]:
        def hook(_m: nn.Module, args: Any, kwargs: Any) -> None:
            seen[index] = tuple(part.detach().clone() for part in (*args, *kwargs.values())[:3])  # type: ignore

        return hook

    handles = [layer.experts.register_forward_pre_hook(note(layer.index), with_kwargs=True) for layer in made.layers]
    difference(made, ids, (0, 1))
    for handle in handles:
        handle.remove()
    return seen


def contribution(made: Model, seen: Consumed, layer: int, expert: int) -> torch.Tensor:
    """(S, H): the family's own sum over experts, with the weights of all others 0."""
    hidden, ids, weights = seen[layer]
    with torch.no_grad():
        out = made.layers[layer].experts.forward(hidden, ids, weights * (ids == expert))
    return out.reshape(-1, out.shape[-1])


def by_hand(made: Model, of: Pair) -> Callable[[int, int, int], float]:
    """The effect of a patch (layer, expert, position): one run with one plain hook. -1: the router, all positions."""
    (source, target), answers = prompts(made, of)
    theirs, own = consumed(made, source), consumed(made, target)
    plain, length = difference(made, target, answers), target.shape[1]

    def effect(layer: int, expert: int, position: int) -> float:
        where = torch.arange(length) == position if position >= 0 else torch.ones(length, dtype=torch.bool)

        def change(_m: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
            rows = out.clone().reshape(length, -1)
            apart = contribution(made, theirs, layer, expert) - contribution(made, own, layer, expert)
            rows[where] += apart[where]
            return rows.reshape(out.shape)

        def reroute(_m: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden, *routed = (*args, *kwargs.values())[:3]
            masks = (where.reshape(*part.shape[:-1], 1) for part in routed)
            return (hidden, *map(torch.where, masks, theirs[layer][1:], routed)), {}

        experts = made.layers[layer].experts
        if expert >= 0:
            handle = experts.register_forward_hook(change)
        else:
            handle = experts.register_forward_pre_hook(reroute, with_kwargs=True)
        try:
            return difference(made, target, answers) - plain
        finally:
            handle.remove()

    return effect


def known(value: Any) -> int:
    return -1 if pd.isna(value) else int(value)


def assert_by_hand(made: Model, of: Pair, rows: pd.DataFrame) -> None:
    effect = by_hand(made, of)
    for row in rows.to_dict("records"):
        expected = effect(row["layer"], known(row["expert"]), known(row["position"]))
        assert row["effect"] == pytest.approx(expected, rel=1e-3, abs=1e-3), row


# -- exact effects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["experts", "routers"])
def test_every_patch_by_hand(what: Any) -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    frame = patch(made, [of], what=what, batch_tokens=40)  # three patches a pass
    assert list(frame.columns) == list(causal.COLUMNS)
    assert len(frame) == len(made.layers) * (tiny.EXPERTS if what == "experts" else 1)
    assert_by_hand(made, of, frame)
    assert frame["effect"].abs().max() > 0.05
    assert frame["expert"].isna().all() == (what == "routers") and frame["position"].isna().all()


@pytest.mark.parametrize("what", ["experts", "routers"])
def test_every_patch_of_one_position_by_hand(what: Any) -> None:
    made, of = spoken.model("mixtral"), spoken.pair(4)
    frame = patch(made, [of], what=what, each_position=True)
    assert_by_hand(made, of, frame)
    assert set(frame["position"]) == {0, 1, 2, 3}
    last = frame[(frame["layer"] == len(made.layers) - 1) & (frame["position"] < 3)]
    assert len(last) and (last["effect"].abs() < 1e-5).all()  # no later layer carries it to the last position


@pytest.mark.parametrize("family", PREDICTING)
def test_families_by_hand(family: str) -> None:
    made, of = spoken.model(family), spoken.pair(6, seed=3)
    frame = patch(made, [of])
    assert_by_hand(made, of, frame[frame["n_changed"] > 0].sample(3, random_state=0))
    assert_by_hand(made, of, patch(made, [of], what="routers").sample(1, random_state=0))
    assert frame["effect"].abs().max() > 0


def test_counts() -> None:
    made, of = spoken.model("olmoe"), spoken.pair(8, shared=3)
    (source, target), answers = prompts(made, of)
    theirs, own = consumed(made, source), consumed(made, target)
    frame = patch(made, [of])
    for row in frame.to_dict("records"):
        chose = [(seen[row["layer"]][1] == row["expert"]).any(-1) for seen in (theirs, own)]
        source_term, target_term = (contribution(made, seen, row["layer"], row["expert"]) for seen in (theirs, own))
        changed = (source_term - target_term).abs().amax(-1) > 1e-4
        assert row["n_source"] == int(chose[0].sum()) and row["n_target"] == int(chose[1].sum())
        assert row["n_changed"] == int(changed.sum())
        assert (row["effect"] == 0) or row["n_changed"]
    assert (frame["n_changed"] == 0).any() and (frame["n_changed"] <= 5).all()
    assert frame["source"].unique() == pytest.approx(difference(made, source, answers), abs=1e-4)
    assert frame["target"].unique() == pytest.approx(difference(made, target, answers), abs=1e-4)
    gap = frame["source"] - frame["target"]
    assert np.allclose(frame["recovered"] * gap, frame["effect"])


def test_a_row_for_each_selected_expert_and_position() -> None:
    made, of = spoken.model("olmoe"), spoken.pair(5)
    frame = patch(made, [of], each_position=True, exact=False)
    (source, target), _ = prompts(made, of)
    expected = {
        (layer, int(expert), position)
        for seen in (consumed(made, source), consumed(made, target))
        for layer in range(len(made.layers))
        for position, ids in enumerate(seen[layer][1])
        for expert in ids
    }
    assert set(frame[["layer", "expert", "position"]].itertuples(index=False, name=None)) == expected
    assert len(frame) == len(expected) and frame["effect"].isna().all() and frame["recovered"].isna().all()


def test_several_pairs_of_different_lengths() -> None:
    made, of = spoken.model("olmoe"), [spoken.pair(5), spoken.pair(9, seed=1)]
    frame = patch(made, of)
    for number, one in enumerate(of):
        alone = patch(made, [one]).drop(columns="pair")
        part = frame[frame["pair"] == number].drop(columns="pair").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, alone, check_exact=False, atol=1e-5)


def test_only_some_layers() -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    whole, part = patch(made, [of]), patch(made, [of], layers=[2, 0])
    expected = whole[whole["layer"] != 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected, check_exact=False, atol=1e-5)


def test_patching_a_run_into_itself_has_no_effect_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    monkeypatch.setattr(causal, "_patched", None)
    for what in causal.WHAT:
        frame = patch(made, [replace(of, target=of.source)], what=what)
        assert (frame["effect"] == 0).all() and (frame["estimate"] == 0).all() and (frame["n_changed"] == 0).all()
        assert frame["recovered"].isna().all()


# -- the estimate ------------------------------------------------------------------------------------------------------


def linear() -> Model:
    """One layer, nothing but linear maps after the experts."""
    made = spoken.model("olmoe", num_hidden_layers=1)
    made.module.model.norm = nn.Identity()  # type: ignore[union-attr]
    return made


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(1, 9))
def test_the_estimate_is_exact_where_all_that_follows_is_linear(seed: int, length: int) -> None:
    made, of = linear(), spoken.pair(length, seed)
    frames = [patch(made, [of], what=what) for what in causal.WHAT]
    for frame in frames:
        assert np.allclose(frame["effect"], frame["estimate"], atol=1e-4)
    # All experts' contributions together are all that the experts return.
    (source, target), answers = prompts(made, of)
    theirs = consumed(made, source)
    experts = made.layers[0].experts
    whole = experts.forward(*theirs[0])
    handle = experts.register_forward_hook(lambda _m, _a, _out: whole)
    patched = difference(made, target, answers)
    handle.remove()
    assert frames[0]["effect"].sum() == pytest.approx(patched - difference(made, target, answers), abs=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "nemotron_h", "longcat_flash", "zaya"])
def test_estimates_are_the_slope_of_small_patches(family: str) -> None:
    """The change is added and taken away in small part; half the difference, scaled up, is the estimate."""
    made, of = spoken.model(family), spoken.pair(5, seed=7)
    frame = patch(made, [of], exact=False)
    (source, target), answers = prompts(made, of)
    theirs, own = consumed(made, source), consumed(made, target)
    step = 0.01
    for row in frame[frame["n_changed"] > 0].sample(4, random_state=1).to_dict("records"):
        layer, expert = row["layer"], row["expert"]
        apart = contribution(made, theirs, layer, expert) - contribution(made, own, layer, expert)
        sides = []
        for part in (step, -step):
            added = part * apart
            handle = made.layers[layer].experts.register_forward_hook(
                lambda _m, _a, out, added=added: out + added.reshape(out.shape)
            )
            sides.append(difference(made, target, answers))
            handle.remove()
        slope = (sides[0] - sides[1]) / (2 * step)
        assert row["estimate"] == pytest.approx(slope, rel=2e-2, abs=5e-3)


@pytest.mark.parametrize("what", ["experts", "routers"])
def test_estimates_of_positions_add_up(what: Any) -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    whole = patch(made, [of], what=what, exact=False)
    parts = patch(made, [of], what=what, exact=False, each_position=True)
    summed = parts.groupby(["layer", "expert"], dropna=False)["estimate"].sum()
    whole = whole.set_index(["layer", "expert"])["estimate"]
    assert np.allclose(whole, summed.reindex(whole.index).fillna(0), atol=1e-6)


def test_frozen_weights_and_inference_mode_make_no_difference() -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    expected = patch(made, [of])
    made.module.requires_grad_(False)
    with torch.inference_mode():
        found = patch(made, [of])
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-3, atol=1e-4)


# -- the model, and nnsight --------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    made = spoken.model("olmoe")
    made.tokenizer.padding_side = "right"
    before = {name: tensor.clone() for name, tensor in made.module.state_dict().items()}
    patch(made, [spoken.pair()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.module.state_dict().items())
    assert made.tokenizer.padding_side == "right"
    for part in made.module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
    assert all(parameter.grad is None for parameter in made.module.parameters())


def test_nnsight_gets_the_weights_themselves() -> None:
    made = spoken.model("olmoe")
    theirs = remote.wrapped(made)._module
    assert theirs is not made.module
    shared = zip(made.module.parameters(), theirs.parameters(), strict=True)
    assert all(mine.data_ptr() == their.data_ptr() for mine, their in shared)


def ours(made: Model, ids: torch.Tensor, edit: Ablate) -> torch.Tensor:
    with torch.no_grad(), wb.intervene(made, edit):
        return made.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("level", ["logits", "selection", "output"])
def test_nnsight_and_our_interventions_give_the_same_logits(family: str, level: Any) -> None:
    import nnsight

    made = spoken.model(family)
    ids = tiny.inputs(made.module)["input_ids"]
    layer, expert = 1, 2
    selection = {"gpt_oss": "torch_topk_0", "deepseek_v3": "scores_for_choice_0"}.get(family, "torch_topk_0")
    names = {id(module): name for name, module in made.module.named_modules()}
    traced = remote.wrapped(made)
    with torch.no_grad(), traced.trace(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False):
        router = traced.get(names[id(made.layers[layer].router)])
        if level == "logits":
            logits = router.source.F_linear_0.output.clone()
            logits[:, expert] = -1e9
            router.source.F_linear_0.output = logits
        if level == "selection" or (level == "logits" and family == "deepseek_v3"):
            if family == "deepseek_v3":  # its selection bias would still lift the expert, with weight 0
                scores = router.source.scores_for_choice_0.output.clone()
                scores[:, expert] = -torch.inf
                router.source.scores_for_choice_0.output = scores
            else:
                args, kwargs = getattr(router.source, selection).inputs
                scores = args[0].clone()
                scores[:, expert] = -torch.inf
                getattr(router.source, selection).inputs = ((scores, *args[1:]), kwargs)
        if level == "output":
            logits, weights, chosen = router.output
            router.output = (logits, weights.masked_fill(chosen == expert, 0.0), chosen)
        theirs = nnsight.save(traced.output.logits)
    with torch.no_grad():
        plain = made.module(input_ids=ids).logits
    mine = ours(made, ids, Ablate(layer=layer, experts=[expert], level=level))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert (mine - plain).abs().max() > 1e-3


def test_plain_hooks_of_the_benchmark_agree() -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    frame = patch(made, [of])
    jobs = list(zip(frame["layer"].tolist(), frame["expert"].tolist(), strict=True))
    assert np.allclose(by_hooks(made, of, jobs, batch_tokens=40), frame["effect"], atol=1e-4)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["experts", "routers"])
def test_a_dry_run_of_what_would_be_sent_gives_the_same(what: Any) -> None:
    """nnsight's "local" packs every trace as for the network and unpacks it without this project's modules."""
    made, of = spoken.model("olmoe"), spoken.pair()
    pd.testing.assert_frame_equal(patch(made, [of], what=what, remote="local"), patch(made, [of], what=what))


def test_remote_reaches_every_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.modeling.mixins.remotable import Remotable
    from nnsight.schema.config import CONFIG

    made, of = spoken.model("olmoe"), spoken.pair()
    config: Any = made.module.config
    config.name_or_path = "someone/model"
    monkeypatch.setattr(CONFIG.API, "APIKEY", "a key")
    asked: list[Any] = []
    monkeypatch.setattr(Remotable, "_remote_backend", lambda _self, remote, *_: asked.append(remote))  # None: run here
    patch(made, [of], batch_tokens=200, remote=True)
    assert asked and all(remote is True for remote in asked)
    n_passes = len(asked)
    patch(made, [of], batch_tokens=200, remote="https://elsewhere.example")
    assert asked[n_passes:] == ["https://elsewhere.example"] * n_passes
    patch(made, [of], batch_tokens=200)
    assert len(asked) == 2 * n_passes


def test_remote_is_refused_without_a_key_or_a_model_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from nnsight.schema.config import CONFIG

    made = spoken.model("olmoe")
    config: Any = made.module.config
    config.name_or_path = "someone/model"
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(InputError, match="NDIF takes an API key, and there is none: set NDIF_API_KEY"):
        patch(made, [spoken.pair()], remote=True)
    monkeypatch.setattr(CONFIG.API, "APIKEY", "a key")
    for name in ("", str(tmp_path)):
        config.name_or_path = name
        with pytest.raises(InputError, match="NDIF runs models of the Hub"):
            patch(made, [spoken.pair()], remote=True)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_without_nnsight(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = spoken.model("olmoe"), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "nnsight":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"takes the package nnsight: pip install 'moe-workbench\[causal\]'"):
        patch(made, [spoken.pair()])


NOT_STANDARD = sorted(name for name, family in FAMILIES.items() if family.layout != "standard" and not family.refused)


@pytest.mark.parametrize("family", NOT_STANDARD)
def test_families_whose_experts_are_not_given_weights_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=f"experts of {family} can't be patched: .* layout is 'standard' can"):
        causal.check(spoken.model(family))


def test_models_that_predict_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="mistral4 doesn't predict the next token"):
        causal.check(spoken.model("mistral4"))


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        causal.check(tiny.model("olmoe"))


def test_a_model_that_is_recorded_or_intervened_on_is_refused() -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    with Recorder(made), pytest.raises(InputError, match=r"leave the block of intervene\(\) or of the Recorder"):
        patch(made, [of])
    with wb.intervene(made, Ablate(layer=0, experts=[1])):
        with pytest.raises(InputError, match=r"leave the block of intervene\(\) or of the Recorder"):
            patch(made, [of])
        made.module(**tiny.inputs(made.module))
    patch(made, [of], exact=False)


def test_wrong_arguments() -> None:
    made, of = spoken.model("olmoe"), spoken.pair()
    with pytest.raises(InputError, match="layer 3: .* has the layers 0 to 2"):
        patch(made, [of], layers=[0, 3])
    with pytest.raises(InputError, match="layers is empty"):
        patch(made, [of], layers=[])
    with pytest.raises(InputError, match="what is 'heads'; expected 'experts' or 'routers'"):
        patch(made, [of], what="heads")
    with pytest.raises(InputError, match="no pair of prompts"):
        patch(made, [])


def test_a_model_whose_logits_are_nan() -> None:
    made = spoken.model("olmoe")
    head: Any = made.module.lm_head
    with torch.no_grad():
        head.weight[5] = torch.nan
    with pytest.raises(RunError, match="NaN or infinite in a plain run"):
        patch(made, [spoken.pair()])


# -- the demonstration model -------------------------------------------------------------------------------------------


def test_the_demonstration_model_by_hand() -> None:
    made = load("demo", dtype="float32")
    of = Pair("The dog and the", "The dog und der", (" and", " und"))
    frame = patch(made, [of])
    assert_by_hand(made, of, frame[frame["n_changed"] > 0].sample(5, random_state=0))
    changing = frame[frame["n_changed"] > 0]
    assert changing["effect"].corr(changing["estimate"]) > 0.8
