"""Dropping experts: against one whole forward pass a text and expert, family by family; the model is left as it was."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from workbench import ablation
from workbench.ablation import ablate
from workbench.errors import InputError
from workbench.models import Model
from workbench.tokenization import Sequence

torch.set_num_threads(1)

LENGTHS = (9, 5, 7, 1, 12, 2)
# Tiny models of the other families are bare stacks of layers, without a head that predicts.
PREDICTING = [
    "afmoe", "aria", "axk1", "bailing_hybrid", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v4",
    "flex_olmo", "gemma4", "gpt_oss", "granitemoehybrid", "hy_v4", "inkling", "jamba", "kimi_linear", "lfm2_moe",
    "longcat_flash", "minimax", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    "qwen4_exp", "zaya",
]  # fmt: skip


def texts(lengths: Any = LENGTHS, seed: int = 0) -> list[Sequence]:
    random = np.random.default_rng(seed)
    return [
        Sequence(i, random.integers(3, 128, n).astype(np.int32), np.ones(n, np.uint8), None, None, None, None, {}, "")
        for i, n in enumerate(lengths)
    ]


def model(family: str, **changes: Any) -> Model:
    return replace(tiny.model(family, **changes), tokenizer=SimpleNamespace(pad_token_id=0, eos_token_id=2))


def losses(made: Model, ids: torch.Tensor, layer: int = -1, expert: int = -1, renormalise: bool = False) -> Any:
    """Loss at each prediction of one text, and who chose the expert, by a whole forward pass."""
    chose: list[torch.Tensor] = []

    def drop(_m: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden, index, weights = (*args, *kwargs.values())[:3]
        weights = weights.clone()
        chose.append((index == expert).any(-1))
        for token in range(len(index)):
            before = weights[token].sum()
            mine = index[token] == expert
            weights[token, mine] = 0
            if renormalise and mine.any() and weights[token].sum() > 0:
                weights[token] *= before / weights[token].sum()
        return (hidden, index, weights, *args[3:]), {}

    handles = []
    if expert >= 0:
        handles.append(made.layers[layer].experts.register_forward_pre_hook(drop, with_kwargs=True))
    with torch.inference_mode():
        logits = made.module(input_ids=ids[None]).logits[0].double()
    for handle in handles:
        handle.remove()
    nll = logits[:-1].logsumexp(-1) - logits[:-1].gather(1, ids[1:, None])[:, 0]
    return nll.numpy(), (chose[0].numpy() if chose else None)


def state(made: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.module.state_dict().items()}


def assert_untouched(made: Model, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.module.state_dict().items())
    for part in made.module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)


def gathered(made: Model, given: list[Sequence], **options: Any) -> tuple[Any, Any, dict]:
    """The plain loss, the predictions, and (layer, expert, text) -> change, change where used, tokens, predictions."""
    loss, predictions, drops = ablate(made, given, made.layers, **options)
    found: dict = {}
    for drop in drops:
        values = zip(drop.change, drop.change_used, drop.n_used, drop.n_used_predicting, strict=True)
        for place, row in zip(drop.places.tolist(), values, strict=True):
            assert (drop.layer, drop.expert, place) not in found
            found[drop.layer, drop.expert, place] = row
    return loss, predictions, found


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_against_whole_passes_text_by_text(family: str, renormalise: bool) -> None:
    made, given = model(family), texts()
    before = state(made)
    loss, predictions, found = gathered(made, given, renormalise=renormalise, batch_tokens=30)
    assert_untouched(made, before)
    assert predictions.tolist() == [n - 1 for n in LENGTHS]
    for place, text in enumerate(given):
        ids = torch.from_numpy(text.token_ids.astype(np.int64))
        plain, _ = losses(made, ids)
        assert loss[place] == pytest.approx(plain.sum(), rel=1e-4, abs=1e-4)
        for layer in made.layers:
            for expert in range(layer.n_experts):
                nll, chose = losses(made, ids, layer.index, expert, renormalise)
                if not chose.any():
                    assert (layer.index, expert, place) not in found
                    continue
                change, change_used, n_used, n_predicting = found.pop((layer.index, expert, place))
                assert n_used == chose.sum() and n_predicting == chose[:-1].sum()
                assert change == pytest.approx((nll - plain).sum(), rel=1e-3, abs=2e-3)
                assert change_used == pytest.approx((nll - plain)[chose[:-1]].sum(), rel=1e-3, abs=2e-3)
    assert not found


@pytest.mark.parametrize("family", PREDICTING)
def test_starting_in_the_middle_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = model(family), texts()
    restarted: list[bool] = []
    original = ablation._can_restart

    def noted(*args: Any) -> bool:
        restarted.append(original(*args))
        return restarted[-1]

    monkeypatch.setattr(ablation, "_can_restart", noted)
    _, _, fast = gathered(made, given, batch_tokens=30)
    monkeypatch.setattr(ablation, "_can_restart", lambda *_: False)
    _, _, slow = gathered(made, given, batch_tokens=30)
    assert restarted == [True]
    assert set(fast) == set(slow)
    assert np.allclose([fast[key] for key in fast], [slow[key] for key in fast], rtol=1e-4, atol=1e-3)
    assert np.abs([row[0] for row in fast.values()]).mean() > 1e-3


def test_layers_before_are_not_run() -> None:
    made, given = model("olmoe"), texts()
    calls = {layer.index: 0 for layer in made.layers}

    def count(index: int) -> Any:
        return lambda *_: calls.update({index: calls[index] + 1})

    handles = [layer.block.register_forward_pre_hook(count(layer.index)) for layer in made.layers]
    _, _, drops = ablate(made, given, [made.layers[2]], batch_tokens=1000)
    list(drops)
    for handle in handles:
        handle.remove()
    assert calls[0] == calls[1] == 1 and calls[2] > 2


def test_can_restart_sees_what_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose last layer uses what the first one leaves behind gives another loss from the middle on."""
    made, given = model("olmoe"), texts()
    first, last = made.layers[0].around, made.layers[2].around
    left: dict[str, torch.Tensor] = {}

    class Leaving(type(first)):
        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            left["x"] = hidden
            return super().forward(hidden, *args, **kwargs)

    def add_left(_m: nn.Module, _a: Any, out: torch.Tensor) -> torch.Tensor:
        return out + left.pop("x")

    monkeypatch.setattr(first, "__class__", Leaving)
    handles = [last.register_forward_hook(add_left)]
    with torch.inference_mode():
        plain = ablation._plain(made, given, made.layers)
        assert not ablation._can_restart(made, plain, made.layers[2])
    _, _, found = gathered(made, given)
    handles.pop().remove()
    handles.append(last.register_forward_hook(add_left))
    monkeypatch.setattr(ablation, "_can_restart", lambda *_: False)
    _, _, expected = gathered(made, given)
    handles.pop().remove()
    assert found == expected


def test_only_some_experts_and_layers() -> None:
    made, given = model("olmoe"), texts()
    _, _, whole = gathered(made, given)
    _, _, drops = ablate(made, given, [made.layers[1]], experts=[2, 5])
    found = {(drop.layer, drop.expert): drop for drop in drops}
    assert set(found) <= {(1, 2), (1, 5)} and found
    for (layer, expert), drop in found.items():
        for place, change in zip(drop.places.tolist(), drop.change, strict=True):
            assert change == pytest.approx(whole[layer, expert, place][0], abs=1e-4)


def test_a_head_that_is_not_called_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = model("olmoe"), texts()
    _, _, expected = gathered(made, given)
    monkeypatch.setattr(type(made.module), "get_output_embeddings", lambda _self: None)
    _, _, found = gathered(made, given)
    assert set(found) == set(expected)
    assert np.allclose([found[key] for key in found], [expected[key] for key in found], atol=1e-4)


@pytest.mark.parametrize("place", ["experts", "block", "head"])
def test_the_model_is_left_as_it_was_after_an_exception(place: str) -> None:
    made, given = model("olmoe"), texts()
    before = state(made)
    part: Any = made.module.lm_head if place == "head" else getattr(made.layers[2], place)
    calls = [0]

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise ZeroDivisionError

    handle = part.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        gathered(made, given, batch_tokens=30)
    handle.remove()
    assert_untouched(made, before)


def test_an_iterator_that_is_dropped_leaves_the_model_as_it_was() -> None:
    made, given = model("olmoe"), texts()
    before = state(made)
    _, _, drops = ablate(made, given, made.layers)
    next(drops)
    drops.close()  # type: ignore[attr-defined]
    assert_untouched(made, before)


@pytest.mark.parametrize("family", ["llama4", "jetmoe", "doge", "switch_transformers"])
def test_families_without_weights_as_an_argument_are_refused(family: str) -> None:
    with pytest.raises(InputError, match=f"experts of {family} can't be dropped: their gate weights"):
        ablation.check(tiny.model(family))


def test_models_that_predict_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="mistral4 doesn't predict the next token"):
        ablation.check(tiny.model("mistral4"))
