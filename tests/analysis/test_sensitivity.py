"""Sensitivity against loops over whole forward passes, exact sign flips, and a planted expert that matters."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import checkpoint
import numpy as np
import pandas as pd
import pytest
import torch

from workbench.analysis import arguments
from workbench.analysis.sensitivity import _effect, _flip, figure, findings, sensitivity
from workbench.corpus import from_rows
from workbench.errors import InputError
from workbench.models import Model

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"n_resamples": 200, "n_permutations": 500, "progress": False}


@pytest.fixture(scope="module")
def model() -> Model:
    return checkpoint.olmoe()


@pytest.fixture(scope="module")
def texts() -> Any:
    return from_rows(checkpoint.rows(12, longest=40), "texts")


@pytest.fixture(scope="module")
def frame(model: Model, texts: Any) -> pd.DataFrame:
    return sensitivity(model, corpus=texts, max_length=20, **OPTIONS)


def by_loops(model: Model, rows: list[dict[str, Any]], layer: int, expert: int, length: int) -> dict[str, Any]:
    """One row of the table, text by text with whole passes."""
    total = used_total = 0.0
    predictions = used_predictions = n_used = n_texts_used = 0
    plain_total = 0.0
    by_segment: dict[str, float] = {}
    for row in rows:
        ids = torch.tensor(model.tokenizer(row["text"])["input_ids"][:length])
        weight = torch.zeros(0)

        def drop(_m: Any, args: Any) -> Any:
            nonlocal weight
            weight = (args[1] == expert).any(-1)
            return args[0], args[1], args[2].masked_fill(args[1] == expert, 0)

        results = []
        for hooked in (False, True):
            handle = model.layers[layer].experts.register_forward_pre_hook(drop) if hooked else None
            with torch.inference_mode():
                logits = model.module(input_ids=ids[None]).logits[0].double()
            if handle is not None:
                handle.remove()
            results.append((logits[:-1].logsumexp(-1) - logits[:-1].gather(1, ids[1:, None])[:, 0]).numpy())
        plain, without = results
        chose = weight.numpy()
        total += (without - plain).sum()
        used_total += (without - plain)[chose[:-1]].sum()
        plain_total += plain.sum()
        predictions += len(plain)
        used_predictions += int(chose[:-1].sum())
        n_used += int(chose.sum())
        by_segment[row["segment_id"]] = by_segment.get(row["segment_id"], 0) + int(chose.any())
    n_texts_used = sum(count > 0 for count in by_segment.values())
    return {
        "delta": total / predictions,
        "delta_used": used_total / used_predictions if used_predictions else np.nan,
        "n_used": n_used,
        "n_texts_used": n_texts_used,
        "nll": plain_total / predictions,
        "n_predictions": predictions,
    }


def test_against_loops(model: Model, frame: pd.DataFrame) -> None:
    rows = checkpoint.rows(12, longest=40)
    assert len(frame) == 3 * 8 and (frame["n_texts"] == 4).all() and not frame["renormalised"].any()
    for layer, expert in ((0, 0), (0, 5), (1, 3), (2, 7)):
        (found,) = frame[(frame["layer"] == layer) & (frame["expert"] == expert)].to_dict("records")
        for name, value in by_loops(model, rows, layer, expert, 20).items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    interval = frame[frame["n_texts_used"] > 1]
    assert (interval["low"] <= interval["delta"] + 1e-9).all() and (interval["delta"] <= interval["high"] + 1e-9).all()
    assert (frame["q"] >= frame["p"] - 1e-12).all()
    assert frame["n_used"].sum() == 3 * 3 * frame["n_tokens"].iloc[0]  # top-3 in three layers


def test_the_same_again_and_only_some(model: Model, texts: Any, frame: pd.DataFrame) -> None:
    again = sensitivity(model, corpus=texts, max_length=20, batch_tokens=60, **OPTIONS)
    pd.testing.assert_frame_equal(frame, again, atol=1e-4, rtol=1e-3, check_exact=False)
    some = sensitivity(model, corpus=texts, layers=(1,), experts=(3, 6), max_length=20, **OPTIONS)
    assert some[["layer", "expert"]].to_numpy().tolist() == [[1, 3], [1, 6]]
    whole = frame[(frame["layer"] == 1) & frame["expert"].isin([3, 6])]
    assert np.allclose(some["delta"], whole["delta"], atol=1e-5) and np.allclose(some["p"], whole["p"])


def test_a_planted_expert_is_found(texts: Any) -> None:
    """The outputs of all experts of the last layer are 0, but that of one, which writes the right answer."""
    made = checkpoint.olmoe()
    part: Any = made.layers[2].experts
    with torch.no_grad():
        part.down_proj[:] *= 0
    many = from_rows([{"text": "ab" * 12} for _ in range(30)])
    plain = sensitivity(made, corpus=many, layers=(2,), **OPTIONS)
    assert np.allclose(plain["delta"], 0) and plain["p"].isna().all()
    # The expert that the texts use most is made to raise the logits of both letters.
    head: Any = made.module.get_output_embeddings()
    letters = made.tokenizer("ab")["input_ids"]
    expert = int(plain["n_used"].argmax())
    toward = head.weight[letters].mean(0).detach()

    def aimed(_m: Any, args: Any, out: torch.Tensor) -> torch.Tensor:  # whatever comes in
        weight = (args[2] * (args[1] == expert)).sum(-1, keepdim=True)
        return weight * toward * 5

    handle = part.register_forward_hook(aimed)
    found = sensitivity(made, corpus=many, layers=(2,), **OPTIONS)
    handle.remove()
    assert int(found["delta"].argmax()) == expert
    assert found["q"][expert] < 0.05 and found["low"][expert] > 0
    others = found.drop(index=expert)
    assert np.allclose(others["delta"], 0, atol=1e-6)
    assert f"Expert {expert} of layer 2 is missed most" in findings(found)[0]
    assert "1 of 8 experts measurably help on 30 texts" in findings(found)[1]


def test_renormalising_is_another_question(model: Model, texts: Any, frame: pd.DataFrame) -> None:
    found = sensitivity(model, corpus=texts, max_length=20, renormalise=True, **OPTIONS)
    assert found["renormalised"].all() and np.array_equal(found["n_used"], frame["n_used"])
    assert np.abs(found["delta"] - frame["delta"]).max() > 1e-3


def test_sign_flips_against_all_of_them() -> None:
    random = np.random.default_rng(0)
    change = random.normal(0.5, 1, size=(5, 9))
    change[3] = 0
    change[4, 1:] = 0
    found = _flip(change, 20000, 1)
    signs = np.array(list(itertools.product([-1, 1], repeat=9)))
    exact = (np.abs(signs @ change.T) >= np.abs(change.sum(1)) - 1e-9).mean(0)
    assert np.allclose(found[[0, 1, 2]], exact[[0, 1, 2]], atol=0.01)
    assert np.isnan(found[3]) and found[4] == 1
    assert np.isnan(_flip(change, 0, 1)).all()


def test_noise_is_not_found() -> None:
    """p of experts without an effect is uniform enough: at most about 5% lie below 0.05."""
    random = np.random.default_rng(0)
    p = _flip(random.standard_t(4, size=(2000, 25)), 2000, 0)
    assert abs((p < 0.05).mean() - 0.05) < 0.015


def test_intervals_against_loops() -> None:
    random = np.random.default_rng(0)
    change, used = random.normal(1, 1, (3, 6)), random.integers(0, 4, (3, 6)).astype(float)
    used[2] = 0
    predicted = random.integers(1, 9, 6).astype(float)
    found = _effect(change, change * (used > 0), used, predicted, 4000, 0)
    assert np.allclose(found["delta"], change.sum(1) / predicted.sum())
    draws = random.integers(6, size=(4000, 6))
    for expert in range(2):
        ratios = [change[expert, draw].sum() / predicted[draw].sum() for draw in draws]
        low, high = np.percentile(ratios, [2.5, 97.5])
        assert found["low"][expert] == pytest.approx(low, abs=0.05)
        assert found["high"][expert] == pytest.approx(high, abs=0.05)
    assert np.isnan(found["delta_used"][2]) and np.isnan(found["low_used"][2])


def test_one_text_and_nothing_to_predict(model: Model) -> None:
    one = sensitivity(model, corpus=from_rows(["abc def"]), layers=(0,), **OPTIONS)
    assert one[["low", "high"]].isna().all(axis=None) and (one["p"].dropna() == 1).all()
    assert (one.loc[one["n_used"] == 0, "delta"] == 0).all() and one.loc[one["n_used"] == 0, "delta_used"].isna().all()
    assert figure(one).data and findings(one)
    with pytest.raises(InputError, match="no text of .* has a second token to predict"):
        sensitivity(model, corpus=from_rows(["x", "y"]), **OPTIONS)


def test_bad_input(model: Model, texts: Any) -> None:
    for options, message in (
        ({"layers": (3,)}, "layer 3 doesn't exist"),
        ({"layers": ()}, "no layer or no expert"),
        ({"experts": ()}, "no layer or no expert"),
        ({"experts": (1, 8)}, "expert 8 doesn't exist in layer 0, which has 0 to 7"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"batch_tokens": 0}, "batch_tokens 0"),
    ):
        with pytest.raises(InputError, match=message):
            sensitivity(model, corpus=texts, **(OPTIONS | options))
    with pytest.raises(InputError, match="experts of llama4 can't be dropped"):
        sensitivity(checkpoint.model("llama4"), corpus=texts, **OPTIONS)
    with pytest.raises(InputError, match="no tokenizer"):
        sensitivity(replace(model, tokenizer=None), corpus=texts, **OPTIONS)


def test_options_from_the_command_line() -> None:
    given = {"corpus": "udhr", "layers": "0,2", "experts": "1", "renormalise": "true", "max_tokens": "100"}
    assert arguments(sensitivity, given | {"max_length": "30"}) == {
        "corpus": "udhr", "layers": (0, 2), "experts": (1,), "renormalise": True, "max_tokens": 100, "max_length": 30,
    }  # fmt: skip


def test_figure_and_findings(frame: pd.DataFrame) -> None:
    drawn: Any = figure(frame)
    assert drawn.data[0].z.shape == (3, 8) and np.isfinite(drawn.data[0].z).all()
    assert (np.diff(drawn.data[0].z, axis=1) <= 1e-12).all()  # the most needed first
    certain = frame.assign(q=np.where(frame["expert"] == 3, 0.01, 0.9))
    marked: Any = figure(certain)
    assert len(marked.data[1].x) == 3
    assert len(figure(frame.assign(delta=0.0)).data) == 2
    wide = pd.concat([frame, frame.assign(layer=7, expert=frame["expert"] + 8)])
    drawn = figure(wide)
    assert drawn.data[0].z.shape[0] == 4
    sentences = findings(certain.assign(delta=np.where(certain["expert"] == 3, -0.1, certain["delta"])))
    assert "3 measurably hurt" in sentences[1] and "An expert is worth most in layer" in sentences[2]
    assert findings(frame.assign(n_used=0)) == ["No text used any of these experts."]
    assert len(findings(frame.assign(q=np.nan, low=np.nan))) == 2
