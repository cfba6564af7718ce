"""What evaluation says of a recipe, against one text at a time and plain loops."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.capture import trace
from workbench.conditions import conditions
from workbench.corpus import from_rows
from workbench.effects import divergence
from workbench.errors import InputError, RunError
from workbench.evaluation import evaluate, figure, findings, summary
from workbench.intervening import intervene
from workbench.interventions import (
    Ablate,
    AnyIntervention,
    Bias,
    Contrast,
    Force,
    RandomExperts,
    Replay,
    Scale,
    SetTopK,
    TopP,
    control,
)
from workbench.models import Model
from workbench.recipe import Recipe, of_model, write_recipe
from workbench.recorder import Recorder
from workbench.token_classes import token_class
from workbench.tokenization import Sequence, sequences

QUICK: dict[str, Any] = {"n_random": 2, "n_resamples": 50, "batch_tokens": 200}
STEERING = [Ablate(layer=1, experts=[2, 3]), Bias(layer=[0, 2], experts=[1], strength=0.8, scope="position=3+")]
ENDS = ("low", "high")


@cache
def model() -> Model:
    torch.set_num_threads(1)
    return checkpoint.olmoe()


def corpus() -> Any:
    return from_rows(checkpoint.rows(12, longest=40), "rows")


def texts() -> list[Sequence]:
    return list(sequences(corpus(), model().tokenizer, max_length=256))


@cache
def table() -> pd.DataFrame:
    return evaluate(model(), corpus(), STEERING, by="lang", **QUICK)


def cell(frame: pd.DataFrame, condition: str, measure: str, group: str = "all", kind: str = "all", layer: Any = None):
    at = frame["layer"].isna() if layer is None else frame["layer"] == layer
    rows = frame[
        (frame["condition"] == condition)
        & (frame["measure"] == measure)
        & (frame["group"] == group)
        & (frame["token_class"] == kind)
        & at
    ]
    assert len(rows) == 1, rows
    return rows.iloc[0]


# -- oracles -----------------------------------------------------------------------------------------------------------


def one_pass(text: Sequence, edits: Any) -> tuple[list[list[float]], list[list[set[int]]]]:
    """Log-probabilities of the next token at each place, and the set of experts of each layer and token."""
    ids = torch.tensor(text.token_ids, dtype=torch.long)[None]
    with intervene(model(), edits, idle=True) if edits else nullcontext(), torch.inference_mode():
        with Recorder(model()) as recorder:
            logits = model().module(ids).logits[0].double()
        (seen,) = recorder.take()
    sets = [
        [
            {int(e) for e, w in zip(experts, weights, strict=True) if e >= 0 and w != 0}
            for experts, weights in zip(layer.experts[0], layer.weights[0], strict=True)
        ]
        for layer in seen
    ]
    return logits.log_softmax(-1).tolist(), sets


def measured(edits: Any) -> dict[tuple[str, str, str, int | None], float]:
    """Mean of each measure by (measure, language, token class, layer), with plain loops."""
    values: dict[tuple[str, str, str, int | None], list[float]] = {}
    special = set(model().tokenizer.all_special_ids)
    for text in texts():
        before, sets_before = one_pass(text, ())
        after, sets_after = one_pass(text, edits)
        for place, token in enumerate(text.token_ids.tolist()):
            kind = "special" if token in special else token_class(model().tokenizer.decode([token]))
            if place:
                p, q = before[place - 1], after[place - 1]
                kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
                for name in (kind, "all"):
                    values.setdefault(("nll", str(text.lang), name, None), []).append(-q[token])
                    values.setdefault(("kl", str(text.lang), name, None), []).append(kl)
            for layer, (a, b) in enumerate(zip(sets_before, sets_after, strict=True)):
                overlap = len(a[place] & b[place]) / max(len(a[place]), len(b[place]))
                for name, at in ((kind, None), ("all", None), ("all", layer)):
                    values.setdefault(("overlap", str(text.lang), name, at), []).append(overlap)
    return {key: sum(found) / len(found) for key, found in values.items()}


def test_every_number_against_plain_loops():
    runs: dict[str, Any] = {"plain": (), "steered": STEERING}
    runs |= {f"random {seed}": control(STEERING, seed) for seed in (0, 1)}
    found = {name: measured(edits) for name, edits in runs.items()}
    found["random"] = {key: (found["random 0"][key] + found["random 1"][key]) / 2 for key in found["plain"]}
    keys = [table()[name] for name in ("condition", "measure", "group", "token_class", "layer")]
    rows = {
        (*key[:4], None if pd.isna(key[4]) else int(key[4])): row
        for key, row in zip(zip(*keys, strict=True), table().to_dict("records"), strict=True)
    }
    for (measure, lang, kind, layer), before in found["plain"].items():
        for name, mine in found.items():
            if name == "plain" and measure != "nll":
                continue
            row, expected = rows.pop((name, measure, lang, kind, layer)), mine[measure, lang, kind, layer]
            assert row["value"] == pytest.approx(expected, abs=2e-4)
            if measure == "nll":
                assert row["delta"] == pytest.approx(expected - before, abs=2e-4)
            else:
                assert np.isnan(row["delta"])
            if name != "steered":
                assert np.isnan(row["versus_random"]) and pd.isna(row["n_random_worse"])
                continue
            controls = [found[f"random {seed}"][measure, lang, kind, layer] for seed in (0, 1)]
            assert row["versus_random"] == pytest.approx(expected - sum(controls) / 2, abs=3e-4)
            sign = -1 if measure == "overlap" else 1
            assert row["n_random_worse"] == sum(sign * one >= sign * expected - 1e-9 for one in controls)
            assert row["n_random"] == 2
    assert not rows


def test_how_much_each_number_rests_on():
    frame = table()
    of_lang = [text for text in texts() if text.lang == "uk"]
    n_tokens = sum(len(text.token_ids) for text in of_lang)
    assert cell(frame, "plain", "nll", "uk")["n_compared"] == n_tokens - len(of_lang)
    assert cell(frame, "steered", "overlap", "uk")["n_compared"] == 3 * n_tokens
    assert cell(frame, "steered", "overlap", "uk", layer=1)["n_compared"] == n_tokens
    assert (frame.loc[frame["token_class"] == "all", "n_texts"] == 4).all()
    assert (frame["by"] == "lang").all() and set(frame["group"]) == {"en", "ja", "uk"}
    by_class = frame[(frame["token_class"] != "all") & (frame["measure"] == "nll") & (frame["condition"] == "plain")]
    whole = frame[(frame["token_class"] == "all") & (frame["measure"] == "nll") & (frame["condition"] == "plain")]
    assert by_class["n_compared"].sum() == whole["n_compared"].sum()


def test_the_identity_changes_nothing_at_all():
    same = [Scale(layer=None, experts=list(range(8)), factor=1.0)]
    frame = evaluate(model(), corpus(), same, by="lang", **QUICK)
    lost, moved, kept = (frame[frame["measure"] == name] for name in ("nll", "kl", "overlap"))
    assert (lost["delta"] == 0).all() and (lost[["delta_low", "delta_high"]].fillna(0) == 0).all(axis=None)
    assert (moved["value"] == 0).all() and (moved[["low", "high"]].fillna(0) == 0).all(axis=None)
    assert (kept["value"] == 1).all() and (kept[["low", "high"]].fillna(1) == 1).all(axis=None)
    steered = frame[frame["condition"] == "steered"]
    assert (steered["versus_random"] == 0).all() and steered["delta_low"].notna().any()
    assert (steered[["versus_random_low", "versus_random_high"]].fillna(0) == 0).all(axis=None)
    assert (steered["n_random_worse"] == 2).all()  # no control does less


def test_intervals_resample_texts_in_pairs():
    frame = evaluate(model(), corpus(), STEERING, n_random=2, n_resamples=2000)
    runs: dict[Any, Any] = {"plain": (), "steered": STEERING, 0: control(STEERING, 0), 1: control(STEERING, 1)}
    segments = sorted({str(text.segment_id) for text in texts()})
    sums = {name: np.zeros(len(segments)) for name in runs}
    n = np.zeros(len(segments))
    for text in texts():
        at = segments.index(str(text.segment_id))
        n[at] += len(text.token_ids) - 1
        for name, edits in runs.items():
            after, _ = one_pass(text, edits)
            sums[name][at] -= sum(after[place][token] for place, token in enumerate(text.token_ids[1:]))
    random = np.random.default_rng(7)
    drawn = [random.integers(len(n), size=len(n)) for _ in range(4000)]
    row = cell(frame, "steered", "nll")
    for column, apart in (
        ("", sums["steered"]),
        ("delta_", sums["steered"] - sums["plain"]),
        ("versus_random_", sums["steered"] - (sums[0] + sums[1]) / 2),
    ):
        low, high = np.percentile([apart[d].sum() / n[d].sum() for d in drawn], [2.5, 97.5])
        for end, expected in zip(ENDS, (low, high), strict=True):
            assert row[f"{column}{end}"] == pytest.approx(expected, abs=0.15 * (high - low))
    assert row["n_texts"] == len(segments)


def test_one_text_has_no_interval():
    frame = evaluate(model(), from_rows(["hello you"]), STEERING, **QUICK)
    assert frame[["low", "high", "delta_low", "versus_random_high"]].isna().all(axis=None)
    assert frame.loc[frame["measure"] == "nll", "value"].notna().all()
    none = evaluate(model(), corpus(), STEERING, n_random=0, n_resamples=0)
    assert none[["low", "high", "delta_low"]].isna().all(axis=None)


def test_pieces_of_a_text_are_resampled_together():
    frame = evaluate(model(), from_rows(["abcdefgh" * 5]), STEERING, long_texts="split", max_length=10, **QUICK)
    assert (frame["n_texts"] == 1).all() and cell(frame, "plain", "nll")["n_compared"] == 4 * 9


def test_texts_without_a_label_are_left_out():
    rows = [*checkpoint.rows(6, longest=30), {"text": "no language here"}]
    frame = evaluate(model(), from_rows(rows), STEERING, by="lang", **QUICK)
    with_label = evaluate(model(), from_rows(rows[:-1]), STEERING, by="lang", **QUICK)
    assert frame["n_compared"].sum() == with_label["n_compared"].sum()
    numbers = evaluate(model(), corpus(), STEERING, by="difficulty", **QUICK)
    assert set(numbers["group"]) == {"0", "1", "2", "3", "4"}


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_an_expert_without_weight_is_gone():
    gone = evaluate(model(), corpus(), Ablate(layer=0, experts=[0, 1, 2, 3], level="output"), n_random=0, **{
        "n_resamples": 0
    })  # fmt: skip
    value = cell(gone, "steered", "overlap", layer=0)["value"]
    shares = []
    for text in texts():
        _, sets = one_pass(text, ())
        shares += [len(one - {0, 1, 2, 3}) / 3 for one in sets[0]]
    assert value == pytest.approx(np.mean(shares), abs=1e-3) and value < 1


def test_a_loss_that_is_not_a_number_names_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    head: Any = model().module.lm_head  # type: ignore[union-attr]
    steered = Ablate(layer=1, experts=[2])
    calls = []

    def spoil(_module: Any, _given: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(out)
        return out * torch.nan if len(calls) == 2 else out

    handle = head.register_forward_hook(spoil)
    try:
        with pytest.raises(RunError, match="^steered: the loss is not a number, since logits are NaN or infinite"):
            evaluate(model(), corpus(), steered, **QUICK)
    finally:
        handle.remove()


@pytest.mark.parametrize("edit", [SetTopK(k=2), TopP(p=0.3)])
def test_recipes_that_name_no_experts_have_no_control(edit: AnyIntervention):
    frame = evaluate(model(), corpus(), edit, **QUICK)
    assert set(frame["condition"]) == {"plain", "steered"} and (frame["n_random"] == 0).all()
    assert frame["versus_random"].isna().all()
    assert findings(frame)[-1].startswith("There is no control")
    assert not any("random" in str(column) for column in summary(frame))
    if isinstance(edit, SetTopK):  # in the first layer, where the input is the same: the best 2 of the 3
        assert cell(frame, "steered", "overlap", layer=0)["value"] == pytest.approx(2 / 3)


def test_controls_are_named_after_their_seeds():
    runs = conditions(model(), [*STEERING, SetTopK(k=2)], 3, 5)
    assert list(runs) == ["plain", "steered", "random 5", "random 6", "random 7"]
    assert [type(one) for one in runs["random 6"]] == [RandomExperts, RandomExperts, SetTopK]
    assert all(one.seed == 6 for one in runs["random 6"] if isinstance(one, RandomExperts))


def test_a_scope_that_only_some_batches_have():
    edit = Force(layer=1, experts=[6], scope="token=x & position=0")
    rows = ["ab cd", "x" + "y" * 50, "abc"]
    frame = evaluate(model(), from_rows(rows), edit, n_random=1, n_resamples=0, batch_tokens=8)
    assert cell(frame, "steered", "nll")["delta"] != 0
    with pytest.raises(RunError, match="touched nothing"):
        evaluate(model(), from_rows(["ab cd", "abc"]), edit, **QUICK)


def test_an_idle_control_is_no_error():
    """Scaling touches only tokens that selected the expert: a control that draws others may touch none."""
    (text,) = sequences(from_rows(["xy"]), model().tokenizer, max_length=9)
    first, second = one_pass(text, ())[1][0]
    edit = Scale(layer=0, experts=[min(first)], factor=0.5)
    frame = evaluate(model(), from_rows(["xy"]), edit, n_random=8, n_resamples=0)
    still = frame[(frame["measure"] == "kl") & frame["condition"].str.startswith("random ")]
    assert (still["value"] == 0).any() and cell(frame, "steered", "kl")["value"] > 0
    with pytest.raises(RunError, match="touched nothing"):
        evaluate(
            model(), from_rows(["xy"]), Scale(layer=0, experts=[min({*range(8)} - first - second)], factor=0.5), **QUICK
        )


def test_replay(tmp_path: Path):
    """A record forced on the same model changes nothing; on another checkpoint it changes that one's own routing."""
    out = tmp_path / "t.duckdb"
    trace(model(), corpus(), out, batch_tokens=QUICK["batch_tokens"], progress=False)
    replay = Replay(trace=str(out))
    same = evaluate(model(), corpus(), replay, **QUICK)
    assert cell(same, "steered", "nll")["delta"] == pytest.approx(0, abs=1e-6)
    assert cell(same, "steered", "overlap")["value"] == 1
    other = checkpoint.olmoe()
    with torch.no_grad():
        for layer in other.layers:
            layer.router.weight += 0.1 * torch.randn(layer.router.weight.shape, generator=torch.manual_seed(0))
    frame = evaluate(other, corpus(), replay, **QUICK)
    row = cell(frame, "steered", "overlap")
    assert row["value"] < 1 and row["n_random"] == 0 and cell(frame, "steered", "nll")["delta"] != 0
    with intervene(other, replay), torch.inference_mode(), Recorder(other) as recorder:
        other.module(torch.tensor(texts()[1].token_ids, dtype=torch.long)[None])
    for layer, expected in zip(recorder.take()[0], one_pass(texts()[1], ())[1], strict=True):
        assert [set(one.tolist()) for one in layer.experts[0]] == expected
    with pytest.raises(RunError):  # other texts have no record
        evaluate(model(), from_rows(["something else"]), replay, **QUICK)


def test_the_model_is_left_as_it_was():
    before = one_pass(texts()[3], ())
    evaluate(model(), corpus(), STEERING, **QUICK)
    assert one_pass(texts()[3], ()) == before
    with pytest.raises(RunError):
        evaluate(model(), corpus(), Force(layer=0, experts=[1], scope="position=250"), **QUICK)
    assert one_pass(texts()[3], ()) == before
    with intervene(model(), STEERING), torch.inference_mode():
        model().module(torch.tensor([[5, 6, 7, 8, 9]]))


def test_recipe_files(tmp_path: Path):
    recipe = Recipe(tuple(STEERING), of_model(model()))
    write_recipe(recipe, tmp_path / "r.json")
    frame = evaluate(model(), corpus(), tmp_path / "r.json", by="lang", **QUICK)
    pd.testing.assert_frame_equal(frame, table())


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "llama4", "granitemoe"])
def test_other_families(family: str):
    made = checkpoint.model(family)
    edit = Ablate(layer=len(made.layers) - 1, experts=[1])
    frame = evaluate(made, from_rows(checkpoint.rows(4, longest=20)), edit, n_random=1, n_resamples=0)
    assert frame["value"].notna().all() and (frame.loc[frame["measure"] == "kl", "value"] >= 0).all()
    kept = frame[frame["measure"] == "overlap"]["value"]
    assert kept.between(0, 1).all()


# -- divergence --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 9))
def test_divergence_is_one_of_distributions(seed: int, length: int, n_words: int):
    made = torch.Generator().manual_seed(seed)
    p, q = (4 * torch.randn(2, length, n_words, generator=made) for _ in range(2))
    kl = divergence(p, q)
    assert (kl >= 0).all() and (kl[:, 0] == 0).all() and (divergence(p, p) == 0).all()
    by_hand = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p[:, :-1]), torch.distributions.Categorical(logits=q[:, :-1])
    )
    assert torch.allclose(kl[:, 1:], by_hand, atol=1e-4)
    assert torch.allclose(divergence(p + 3, q - 5), kl, atol=1e-4)  # logits have no zero


def test_divergence_where_tokens_are_impossible():
    p = torch.tensor([[[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]])
    assert divergence(p, torch.zeros(1, 2, 3))[0, 1] == pytest.approx(math.log(3 / 2))
    assert divergence(p, p)[0, 1] == 0
    assert divergence(torch.zeros(1, 2, 3), p)[0, 1] == math.inf
    broken = torch.full((1, 2, 3), torch.nan)
    assert divergence(p, broken)[0, 1].isnan()


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_summary_and_findings():
    short = summary(table())
    assert set(short["group"]) == {"en", "ja", "uk"} and short["steered − plain"].is_monotonic_decreasing
    row = short[short["group"] == "ja"].iloc[0]
    assert row["steered − plain"] == cell(table(), "steered", "nll", "ja")["delta"]
    assert row["kl random"] == cell(table(), "random", "kl", "ja")["value"]
    assert row["worse"] == f"{cell(table(), 'steered', 'nll', 'ja')['n_random_worse']}/2"
    sentences = findings(table())
    assert len(sentences) == 4 and sum("against random experts" in one for one in sentences) == 3
    assert "(KL)" in sentences[-1]
    assert "The other 1 groups" not in " ".join(sentences) and "other 2 groups" in " ".join(findings(table(), most=1))
    whole = evaluate(model(), corpus(), STEERING, **QUICK)
    assert set(summary(whole)["token_class"]) <= {"all", "byte", "word part", "whitespace"}
    assert findings(whole)[0].startswith("Steering changes the loss by ")


def test_figure():
    hostile = "<b>x</b>\u202e"
    rows = [row | {"lang": hostile if row["lang"] == "en" else row["lang"]} for row in checkpoint.rows(12, longest=40)]
    frame = evaluate(model(), from_rows(rows), STEERING, by="lang", **QUICK)
    drawn = figure(frame)
    labels = {str(label) for each in drawn.data for label in each.y}
    assert labels == {"ja", "uk", "&lt;b&gt;x&lt;/b&gt;\ufffd"}
    steered = [each for each in drawn.data if each.name == "steered"]
    assert len(steered) == 3 and sorted(steered[0].x) == sorted(summary(frame)["steered − plain"])
    alone = figure(evaluate(model(), corpus(), SetTopK(k=2), **QUICK))
    assert {each.name for each in alone.data if each.showlegend} == {"steered"}


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, options, message",
    [
        (STEERING, {"by": "colour"}, "the texts have no 'colour'; they have lang, domain, source, segment_id"),
        (STEERING, {"n_random": -1}, "n_random is -1"),
        (STEERING, {"max_tokens": 0}, "max_tokens is 0"),
        ([Contrast()], {}, "Contrast is for decoding.*a loss would be infinite"),
        (
            [Ablate(experts=[0], scope="phase=generated")],
            {},
            "acts on generated tokens only, and a loss is of texts that are given",
        ),
        (Ablate(layer=7, experts=[0]), {}, "7"),
        ([], {}, "no interventions"),
        ("nowhere.json", {}, "nowhere.json"),
    ],
)
def test_bad_requests(recipe: Any, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        evaluate(model(), corpus(), recipe, **(QUICK | options))


def test_bad_models_and_texts():
    with pytest.raises(InputError, match="has no tokenizer"):
        evaluate(tiny.model("olmoe"), corpus(), STEERING)
    with pytest.raises(InputError, match="doesn't predict the next token"):
        evaluate(checkpoint.model("switch_transformers"), corpus(), Scale(layer=0, experts=[0], factor=2.0))
    with pytest.raises(InputError, match="no text of the corpus has two tokens"):
        evaluate(model(), from_rows(["a"]), STEERING)
    many = [{"text": "ab", "name": str(number)} for number in range(300)]
    with pytest.raises(InputError, match="300 different values"):
        evaluate(model(), from_rows(many), STEERING, by="name")
    recipe = Recipe(tuple(STEERING), of_model(dataclasses.replace(model(), name="other")))
    with pytest.raises(InputError, match="the recipe is for other"):
        evaluate(model(), corpus(), recipe)
