"""`intervene`: scopes token by token in batches and cached generation, order, refusals, and that it cleans up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from recorded import model
from test_intervening_families import run, stored
from test_recorder import hooks

import workbench as wb
from workbench.contrast_decoding import contrasted
from workbench.errors import InputError, RunError
from workbench.fitting import permutation
from workbench.intervening import check, effective_top_k
from workbench.interventions import control
from workbench.models import twin
from workbench.observation import Observation
from workbench.recorder import Recorder

FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "mixtral", "minimax_m2", "llama4", "jetmoe", "qwen3_next")


def padded(side: str) -> dict[str, torch.Tensor]:
    """Three texts of 9, 6 and 4 tokens, padded on one side."""
    ids = tiny.inputs(model("olmoe").module, 3, 9)["input_ids"]
    mask = torch.zeros_like(ids)
    for row, n in enumerate((9, 6, 4)):
        mask[row, slice(9 - n, None) if side == "left" else slice(n)] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def uses(seen: Observation, expert: int) -> torch.Tensor:
    return (seen.experts == expert).any(-1)


# -- scopes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_scope_is_respected_token_by_token_in_padded_batches(family: str, side: str) -> None:
    made = model(family)
    inputs = padded(side)
    mask = inputs["attention_mask"].bool()
    position = mask.cumsum(1) - 1
    with torch.inference_mode(), Recorder(made) as recorder:
        made.module(**inputs)
    (plain,) = recorder.take()
    inside = mask & (position >= 1) & (position <= 2)
    for edit in (
        wb.Force(layer=0, experts=[6], scope="position=1-2"),
        wb.Ablate(layer=0, experts=[1, 2], scope="position=1-2", level="selection"),
        wb.Scale(layer=0, experts=list(range(8)), factor=0.5, scope="position=1-2"),
    ):
        seen = run(made, edit, **inputs)[1][0]
        if isinstance(edit, wb.Scale):
            torch.testing.assert_close(seen.weights[inside], plain[0].weights[inside] / 2)
        elif isinstance(edit, wb.Force):
            assert uses(seen, 6)[inside].all()
        else:
            assert not (uses(seen, 1) | uses(seen, 2))[inside].any()
        assert torch.equal(seen.experts[~inside], plain[0].experts[~inside])
        assert torch.equal(seen.weights[~inside], plain[0].weights[~inside])


@pytest.mark.parametrize("family", FAMILIES)
def test_phases_are_told_apart_in_cached_generation(family: str) -> None:
    made = model(family)
    inputs = padded("left")
    for scope, in_prompt in (("phase=prompt", True), ("phase=generated", False)):
        edit = wb.Force(layer=0, experts=[6], scope=scope, level="selection")
        free = wb.Ablate(layer=0, experts=[6], scope="phase=" + ("generated" if in_prompt else "prompt"))
        with torch.inference_mode(), wb.intervene(made, [edit, free]), Recorder(made) as recorder:
            made.module.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        first, *steps = recorder.take()
        assert len(steps) == 3
        prompt = uses(first[0], 6)[inputs["attention_mask"].bool()]
        assert prompt.all() if in_prompt else not prompt.any()
        for step in steps:
            assert uses(step[0], 6).all() != in_prompt and uses(step[0], 6).any() != in_prompt


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_generation_without_a_cache_edits_the_same_tokens(family: str) -> None:
    made = model(family)
    inputs = padded("left")
    for scope in ("phase=generated", "position=7+", "phase=prompt"):
        texts = []
        for cached in (True, False):
            with torch.inference_mode(), wb.intervene(made, wb.Ablate(experts=[0, 1, 2], scope=scope)):
                texts.append(made.module.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cached))
        assert torch.equal(*texts), scope


def test_a_pattern_is_followed_through_generation() -> None:
    made = wb.load("demo")
    made.tokenizer.padding_side = "left"
    inputs = made.tokenizer(["One day", "Il était une fois une petite fille"], return_tensors="pt", padding=True)
    with torch.inference_mode():
        plain = made.module.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    scope = "token~[aeiou]$"
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.int64)], 1)
    with torch.inference_mode(), wb.intervene(made, wb.Force(layer=2, experts=[9], scope=scope)), Recorder(made) as r:
        out = made.module.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    seen = torch.cat([uses(step[2], 9) for step in r.take()], 1)
    for row in range(2):
        for column in range(seen.shape[1]):
            text = made.tokenizer.decode([int(out[row, column])])
            if mask[row, column] and text[-1:] in set("aeiou"):
                assert seen[row, column], text
    assert plain.shape == out.shape


# -- order -------------------------------------------------------------------------------------------------------------


def test_within_a_stage_the_later_wins_and_stages_have_their_order() -> None:
    made = model("olmoe")
    inputs = tiny.inputs(made.module)
    force, ablate = wb.Force(experts=[4]), wb.Ablate(experts=[4])
    assert all(uses(seen, 4).all() for seen in run(made, [ablate, force], **inputs)[1])
    assert not any(uses(seen, 4).any() for seen in run(made, [force, ablate], **inputs)[1])
    # Weights come after the selection, wherever they stand in the list.
    gone = wb.Ablate(experts=[4], level="output")
    for edits in ([gone, force], [force, gone]):
        assert not any(uses(seen, 4).any() for seen in run(made, edits, **inputs)[1])
    twice = [wb.Scale(experts=[4], factor=2.0), wb.Scale(experts=[4], factor=3.0)]
    one = run(made, [force, wb.Scale(experts=[4], factor=6.0)], **inputs)[0]
    torch.testing.assert_close(run(made, [force, *twice], **inputs)[0], one)
    # Remix before Delta before Bias, whatever the list says: the same logits in any order.
    n = made.layers[0].n_experts
    parts = [wb.Bias(experts=[1], strength=0.5), wb.Delta(values=[0.1] * (n - 1) + [1.0]), wb.Remix(target=[1.0] * n)]
    assert torch.equal(run(made, parts, **inputs)[0], run(made, parts[::-1], **inputs)[0])


def test_logit_level_and_selection_level_differ_where_weights_are_not_renormalised() -> None:
    made = model("olmoe")
    assert "renormalised" not in made.layers[0].gating
    inputs = tiny.inputs(made.module)
    with torch.inference_mode(), Recorder(made, ("weights", "logits", "probabilities")) as recorder:
        made.module(**inputs)
    plain: Any = recorder.take()[0][0]
    best = int(plain.experts[..., 0].flatten().mode().values)
    logits = plain.logits.clone()
    logits[..., best] = -torch.inf
    for level, scores in (("logits", logits.softmax(-1)), ("selection", plain.probabilities)):
        seen = run(made, wb.Ablate(layer=0, experts=[best], level=level), **inputs)[1][0]
        kept = scores.clone()
        kept[..., best] = -1
        wanted = kept.topk(made.layers[0].top_k, dim=-1)
        assert torch.equal(seen.experts, wanted.indices)
        torch.testing.assert_close(seen.weights, wanted.values)


@pytest.mark.parametrize("unit", ["std", "logits"])
def test_logit_edits_are_the_formulas(unit: Any) -> None:
    made = model("mixtral")
    inputs = tiny.inputs(made.module)

    def logits(*edits: Any) -> Any:
        with torch.inference_mode(), wb.intervene(made, edits), Recorder(made, ("logits",)) as recorder:
            made.module(**inputs)
        seen: Any = recorder.take()[0][0]
        return seen.logits.double()

    z = logits(wb.Bias(layer=0, experts=[0], strength=0.0))
    spread = z.std(-1, correction=0) if unit == "std" else torch.ones(z.shape[:-1], dtype=torch.float64)
    biased = logits(wb.Bias(layer=0, experts=[2, 5], strength=-0.4, unit=unit))
    wanted = z.clone()
    wanted[..., [2, 5]] -= 0.4 * spread[..., None]
    torch.testing.assert_close(biased, wanted, atol=1e-6, rtol=1e-5)
    forced = logits(wb.Force(layer=0, experts=[2], margin=0.25))
    torch.testing.assert_close(forced[..., 2], z.max(-1).values + 0.25, atol=1e-6, rtol=1e-5)
    forbidden = logits(wb.Forbid(layer=0, experts=[2]))
    torch.testing.assert_close(forbidden[..., 2], z.min(-1).values - 0.01, atol=1e-6, rtol=1e-5)
    target = torch.arange(1.0, 9.0, dtype=torch.float64)
    remixed = logits(wb.Remix(layer=0, target=target.tolist(), alpha=0.3))
    mixed = 0.3 * z.softmax(-1) + 0.7 * target / target.sum()
    torch.testing.assert_close(remixed.softmax(-1), mixed, atol=1e-6, rtol=1e-5)
    added = logits(wb.Delta(layer=0, values=target.tolist(), strength=-2.0))
    torch.testing.assert_close(added, z - 2 * target, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "inkling", "minimax_m2", "deepseek_v4", "olmoe"])
def test_a_remix_gives_the_mixed_probabilities(family: str) -> None:
    made = model(family)
    layer = made.layers[-1]
    inputs = tiny.inputs(made.module)

    def probabilities(*edits: Any) -> Any:
        with torch.inference_mode(), wb.intervene(made, edits), Recorder(made, ("probabilities", "logits")) as recorder:
            made.module(**inputs)
        return recorder.take()[0][-1]

    target = torch.arange(1.0, 9.0)
    plain = probabilities(wb.Bias(layer=layer.index, experts=[0], strength=0.0))
    seen = probabilities(wb.Remix(layer=layer.index, target=target.tolist(), alpha=0.6))
    wanted = 0.6 * plain.probabilities + 0.4 * target / target.sum()
    torch.testing.assert_close(seen.probabilities, wanted, atol=2e-5, rtol=1e-3)


def test_ranks_of_set_top_k_and_the_probability_of_top_p() -> None:
    made = model("qwen3_moe")
    inputs = tiny.inputs(made.module)
    with torch.inference_mode(), Recorder(made, ("weights", "probabilities")) as recorder:
        made.module(**inputs)
    plain: Any = recorder.take()[0][0]
    ranked = plain.probabilities.sort(-1, descending=True)
    seen = run(made, wb.SetTopK(layer=0, k=2, first=2), **inputs)[1][0]
    assert torch.equal(seen.experts, ranked.indices[..., 1:3])
    for p in (0.05, 0.4, 0.75, 1.0):
        seen = run(made, wb.TopP(layer=0, p=p), **inputs)[1][0]
        before = ranked.values.cumsum(-1) - ranked.values
        n = (before < p).sum(-1).clamp_min(1)
        assert torch.equal((seen.experts >= 0).sum(-1), n)
        kept = torch.arange(seen.experts.shape[-1]) < n[..., None]
        assert torch.equal(seen.experts, ranked.indices[..., : kept.shape[-1]].masked_fill(~kept, -1))
    assert (run(made, wb.TopP(layer=0, p=1.0, at_most=2), **inputs)[1][0].experts >= 0).sum(-1).eq(2).all()
    assert effective_top_k(made, [wb.SetTopK(layer=0, k=5), wb.TopP(layer=1, p=0.5)]) == [5, 8, 3]


def test_renormalised_families_keep_the_sum_of_their_weights_when_cut() -> None:
    made = model("mixtral")
    inputs = tiny.inputs(made.module)
    seen: Any = run(made, wb.TopP(layer=0, p=0.4), **inputs)[1][0]
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(seen.weights.shape[:-1]))
    dropped: Any = run(made, wb.Ablate(layer=0, experts=[0, 1, 2], level="output", renormalise=True), **inputs)[1][0]
    total = dropped.weights.sum(-1)
    assert ((total - 1).abs() < 1e-5).logical_or((dropped.experts < 0).all(-1)).all()


# -- cleaning up, and being alone --------------------------------------------------------------------------------------


def test_the_model_is_itself_again_after_an_exception() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    before, state = hooks(made.module), {name: x.clone() for name, x in made.module.state_dict().items()}
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    with pytest.raises(ZeroDivisionError), wb.intervene(made, [wb.Ablate(experts=[1]), wb.SetTopK(k=2)]):
        made.module(**inputs)
        raise ZeroDivisionError
    assert hooks(made.module) == before
    assert all(torch.equal(x, state[name]) for name, x in made.module.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(plain, made.module(**inputs)[0])
    with wb.intervene(made, wb.Ablate(experts=[1])):  # and can be intervened on again
        made.module(**inputs)


def test_nested_use_is_refused_and_leaves_the_outer_one_in_force() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    with wb.intervene(made, wb.Ablate(experts=[1])), Recorder(made) as recorder:
        with pytest.raises(InputError, match="already: put both lists"), wb.intervene(made, wb.Ablate(experts=[2])):
            pass
        made.module(**inputs)
    assert not any(uses(seen, 1).any() for seen in recorder.take()[0])


def test_a_recorder_that_is_active_already_is_refused() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    with Recorder(made) as recorder:
        with Recorder(made):
            pass
        with pytest.raises(InputError, match="enter it inside"), wb.intervene(made, wb.Ablate(experts=[1])):
            pass
        made.module(**inputs)
    assert recorder.take()
    with wb.intervene(made, wb.Ablate(experts=[1])):
        made.module(**inputs)


def test_another_thread_that_runs_the_model_is_told() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    found: list[BaseException] = []

    def other() -> None:
        try:
            made.module(**inputs)
        except RunError as error:
            found.append(error)

    with wb.intervene(made, wb.Ablate(experts=[1])):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        made.module(**inputs)
    assert len(found) == 1 and "another thread" in str(found[0])


def test_two_models_can_be_intervened_on_at_once() -> None:
    one, two = tiny.model("olmoe"), tiny.model("olmoe")
    inputs = tiny.inputs(one.module)
    with wb.intervene(one, wb.Ablate(experts=[1])), wb.intervene(two, wb.Ablate(experts=[2])):
        assert not torch.equal(one.module(**inputs)[0], two.module(**inputs)[0])


def test_an_intervention_that_touched_nothing_is_an_error() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    with pytest.raises(RunError, match="the model wasn't run"), wb.intervene(made, wb.Ablate(experts=[1])):
        pass
    for idle in (
        wb.Ablate(experts=[1], scope="phase=generated"),
        wb.Bias(experts=[1], strength=1.0, scope="position=500"),
        wb.Scale(experts=[1], factor=2.0, scope="position=500"),
        wb.SetTopK(k=2, scope="position=500"),
    ):
        with (
            pytest.raises(RunError, match="1 of 2 interventions touched nothing"),
            wb.intervene(made, [wb.Ablate(experts=[0]), idle]),
        ):
            made.module(**inputs)
    with (
        pytest.raises(RunError, match="selected the experts"),
        wb.intervene(made, [wb.Ablate(experts=[1]), wb.Scale(experts=[1], factor=2.0)]),
    ):
        made.module(**inputs)


def test_touched_counts_tokens_times_layers() -> None:
    made = tiny.model("olmoe")
    inputs = padded("left")
    with torch.inference_mode(), Recorder(made) as recorder:
        made.module(**inputs)
    plain = recorder.take()[0]
    used = int((uses(plain[0], 3) & inputs["attention_mask"].bool()).sum())
    edits = [
        wb.Delta(values=[0.0] * 8, scope="position=0-1"),
        wb.Scale(layer=0, experts=[3], factor=1.0),
        wb.Bias(layer=[0, 2], experts=[3], strength=0.0),
    ]
    with torch.inference_mode(), wb.intervene(made, edits) as applied:
        made.module(**inputs)
        assert applied.touched == [3 * 2 * 3, used, 2 * (9 + 6 + 4)]


def test_gradients_reach_a_vector_that_wants_them() -> None:
    made = tiny.model("mixtral")
    for parameter in made.module.parameters():
        parameter.requires_grad_(False)
    inputs = tiny.inputs(made.module)
    delta = torch.zeros(8, requires_grad=True)
    with wb.intervene(made, wb.Delta(layer=1, values=delta)):
        made.module(**inputs)[0].square().mean().backward()
    assert delta.grad is not None and delta.grad.abs().sum() > 0


# -- controls ----------------------------------------------------------------------------------------------------------


def test_a_control_is_the_same_edit_of_as_many_random_experts() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    edits = [
        wb.Ablate(layer=[0, 2], experts=[1, 5]),
        wb.Scale(layer=1, experts=[3], factor=0.0),
        wb.SetTopK(layer=1, k=3),
    ]
    for seed in range(3):
        observed = run(made, control(edits, seed), **inputs)[1]
        for layer, experts in ((0, (1, 5)), (2, (1, 5)), (1, (3,))):
            stands = permutation(made.layers[layer], seed)
            assert sorted(stands) == list(range(8))
            assert not any(uses(observed[layer], int(stands[expert])).any() for expert in experts)
    assert {tuple(permutation(made.layers[0], seed)) for seed in range(3)} != {tuple(range(8))}
    values = [float(i) for i in range(8)]
    moved = run(made, control([wb.Delta(layer=0, values=values)], 1), **inputs)[0]
    drawn = permutation(made.layers[0], 1)
    by_hand = [0.0] * 8
    for expert, value in enumerate(values):
        by_hand[drawn[expert]] = value
    assert torch.equal(moved, run(made, wb.Delta(layer=0, values=by_hand), **inputs)[0])
    with pytest.raises(InputError, match="names experts"):
        control([wb.SetTopK(k=2)], 0)


# -- replay and contrast -----------------------------------------------------------------------------------------------


def record(file: Path, made: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode(), Recorder(made) as recorder:
        made.module(input_ids=ids)
    stored(file, ids, recorder.take()[0], made)


def test_a_replay_finds_texts_in_any_batch_and_step_by_step(tmp_path: Path) -> None:
    made = tiny.model("olmoe")
    ids = tiny.inputs(made.module, 4, 20)["input_ids"]
    record(tmp_path / "t.duckdb", made, ids)
    other = tiny.model("olmoe", seed=3)
    replay = wb.Replay(trace=str(tmp_path / "t.duckdb"))
    with torch.inference_mode(), Recorder(made) as recorder:
        made.module(input_ids=ids)
    wanted = recorder.take()[0]
    shorter = torch.stack([torch.cat([torch.zeros(8, dtype=ids.dtype), ids[2, :12]]), ids[1]])
    mask = torch.ones_like(shorter)
    mask[0, :8] = 0
    seen = run(other, replay, input_ids=shorter, attention_mask=mask)[1]
    for mine, recorded in zip(seen, wanted, strict=True):
        assert torch.equal(mine.experts[0, 8:], recorded.experts[2, :12])
        assert torch.equal(mine.experts[1], recorded.experts[1])
    with torch.inference_mode(), wb.intervene(other, replay), Recorder(other) as recorder:
        cache = other.module(input_ids=ids[:2, :7], use_cache=True).past_key_values
        for place in range(7, 20):
            other.module(input_ids=ids[:2, place : place + 1], past_key_values=cache, use_cache=True)
    steps = recorder.take()
    for layer in range(3):
        assert torch.equal(torch.cat([step[layer].experts for step in steps], 1), wanted[layer].experts[:2])


def test_replayed_weights_are_the_models_own_or_the_recorded_ones(tmp_path: Path) -> None:
    made, other = tiny.model("mixtral"), tiny.model("mixtral", seed=3)
    ids = tiny.inputs(made.module)["input_ids"]
    record(tmp_path / "t.duckdb", made, ids)
    recorded = wb.Trace(tmp_path / "t.duckdb")
    file = str(tmp_path / "t.duckdb")
    with (
        torch.inference_mode(),
        wb.intervene(other, wb.Replay(trace=file)),
        Recorder(other, ("weights", "logits")) as r,
    ):
        other.module(input_ids=ids)
    seen: Any = r.take()[0][0]
    own = seen.logits.double().gather(-1, seen.experts).softmax(-1)  # R3: g_i = I_i exp(s_i) / sum_j I_j exp(s_j)
    torch.testing.assert_close(seen.weights.double(), own, atol=1e-6, rtol=1e-5)
    kept: Any = run(other, wb.Replay(trace=file, weights="recorded"), input_ids=ids)[1]
    for layer, mine in enumerate(kept):
        stored_weights = torch.from_numpy(recorded.weights(layer))
        torch.testing.assert_close(mine.weights.flatten(0, 1), stored_weights)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_replay_of_a_padded_batch_is_bit_identical(side: str, tmp_path: Path) -> None:
    made = tiny.model("mixtral")
    inputs = padded(side)
    kept = inputs["attention_mask"].bool()
    with torch.inference_mode(), Recorder(made) as recorder:
        plain = made.module(**inputs)[0]
    wb.from_arrays(
        tmp_path / "t.duckdb",
        torch.stack([seen.experts[kept] for seen in recorder.take()[0]], 1).numpy(),
        n_experts=8,
        seq=kept.nonzero()[:, 0].numpy(),
        token_ids=inputs["input_ids"][kept].numpy(),
    )
    assert torch.equal(run(made, wb.Replay(trace=str(tmp_path / "t.duckdb")), **inputs)[0], plain)


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    made = tiny.model("olmoe")
    ids = tiny.inputs(made.module)["input_ids"]
    file = str(tmp_path / "t.duckdb")
    record(Path(file), made, ids)
    with pytest.raises(RunError, match="has no text that is or begins with"), wb.intervene(made, wb.Replay(trace=file)):
        made.module(input_ids=ids.flip(1))
    with pytest.raises(RunError, match="has no text that is or begins with"), wb.intervene(made, wb.Replay(trace=file)):
        made.module(input_ids=torch.cat([ids, ids], 1))
    wider = tiny.model("olmoe", num_experts=16)
    with pytest.raises(InputError, match="only routing of the same shape"):
        check(wider, wb.Replay(trace=file))
    with pytest.raises(InputError, match="a replay alone says"):
        check(made, [wb.Replay(trace=file), wb.SetTopK(k=2)])
    with pytest.raises(InputError, match="missing.duckdb"):
        check(made, wb.Replay(trace=str(tmp_path / "missing.duckdb")))


def test_contrast_is_the_formula_and_its_weak_pass_is_seen_by_nobody() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    with torch.inference_mode():
        strong = made.module(**inputs).logits
    weak = run(made, wb.SetTopK(k=1, first=2), **inputs)[0]
    with torch.inference_mode(), wb.intervene(made, wb.Contrast(alpha=0.2, beta=0.7)) as applied, Recorder(made) as r:
        out = made.module(**inputs).logits
        assert applied.touched == [out.shape[0] * out.shape[1]]
    assert len(r.take()) == 1
    threshold = strong.max(-1, keepdim=True).values + torch.tensor(0.2).log()
    wanted = torch.where(strong >= threshold, 1.7 * strong - 0.7 * weak, -torch.inf)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(contrasted(strong, weak, 0.0, 0.5), 1.5 * strong - 0.5 * weak)
    copied = twin(made.module)
    own = {id(parameter) for parameter in made.module.parameters()}
    assert {id(parameter) for parameter in copied.parameters()} == own


def test_contrast_in_cached_generation_is_that_of_whole_passes() -> None:
    made = wb.load("demo")
    inputs = made.tokenizer(["The history of the"], return_tensors="pt")
    edits = [wb.Contrast(), wb.Ablate(layer=1, experts=[3])]
    with torch.inference_mode(), wb.intervene(made, edits):
        out = made.module.generate(**inputs, max_new_tokens=8, do_sample=False)
    ids = inputs["input_ids"]
    for _ in range(out.shape[1] - ids.shape[1]):
        with torch.inference_mode(), wb.intervene(made, edits):
            following = made.module(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
    assert torch.equal(out, ids)
    with pytest.raises(InputError, match="num_beams is 2"), wb.intervene(made, edits):
        made.module.generate(**inputs, max_new_tokens=2, num_beams=2)


# -- caches, masks and other things that pass by -----------------------------------------------------------------------


def test_a_static_cache_does_not_hide_the_padding() -> None:
    made = model("olmoe")
    inputs = padded("left")
    bias = wb.Bias(layer=0, experts=[6], strength=0.0)
    force = wb.Force(layer=0, experts=[6], scope="position=2", level="selection")
    with torch.inference_mode(), wb.intervene(made, [bias, force]) as applied, Recorder(made) as recorder:
        made.module.generate(
            **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, cache_implementation="static"
        )
    assert applied.touched == [9 + 6 + 4 + 3, 3]
    first = recorder.take()[0][0]
    position = inputs["attention_mask"].cumsum(1) - 1
    assert uses(first, 6)[(position == 2) & inputs["attention_mask"].bool()].all()


def test_a_decoder_is_not_given_the_encoders_mask() -> None:
    made = model("switch_transformers")
    decoder = next(layer.index for layer in made.layers if layer.stack == "decoder")
    inputs = tiny.inputs(made.module, 2, 9)
    inputs["decoder_input_ids"] = inputs["input_ids"]
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :5] = 0
    edits = [wb.Bias(layer=decoder, experts=[1], strength=0.0, scope=f"position={part}") for part in ("0", "1-99")]
    with torch.inference_mode(), wb.intervene(made, edits) as applied:
        made.module(**inputs, attention_mask=mask)
        assert applied.touched == [2, 16]
    with torch.inference_mode(), wb.intervene(made, edits) as applied:
        made.module.generate(
            input_ids=inputs["input_ids"], attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        assert applied.touched == [2, 6]


def test_two_caches_are_told_apart() -> None:
    made = wb.load("demo")
    one, two = (made.tokenizer(text, return_tensors="pt")["input_ids"] for text in ("One day", "The king of the"))
    edits = [wb.Ablate(layer=1, experts=[3], scope="text~(?s)One.*"), wb.Contrast(alpha=0)]
    with torch.inference_mode(), wb.intervene(made, edits) as applied:
        whole = made.module(input_ids=two).logits[:, -1]
        assert applied.touched[0] == 0
        caches = [made.module(input_ids=ids, use_cache=True).past_key_values for ids in (one, two[:, :-1])]
        touched = applied.touched[0]
        step = made.module(input_ids=two[:, -1:], past_key_values=caches[1], use_cache=True).logits[:, -1]
        assert applied.touched[0] == touched > 0
        torch.testing.assert_close(step.float(), whole.float(), atol=0.1, rtol=0.05)  # bfloat16
        caches[1].crop(-2)
        again = made.module(input_ids=two[:, -2:], past_key_values=caches[1], use_cache=True).logits[:, -1]
        torch.testing.assert_close(again.float(), whole.float(), atol=0.1, rtol=0.05)


def test_a_mask_of_an_earlier_pass_is_forgotten() -> None:
    made = model("olmoe")
    inputs = padded("left")
    with torch.inference_mode(), wb.intervene(made, wb.Bias(layer=0, experts=[1], strength=0.0)) as applied:
        made.module(**inputs)
        assert applied.touched == [19]
        made.module.model(input_ids=inputs["input_ids"])
        assert applied.touched == [19 + 27]


def test_beams_are_seen_wherever_they_are_asked_for() -> None:
    made = wb.load("demo")
    ids = made.tokenizer("The king", return_tensors="pt")["input_ids"]
    config = transformers.GenerationConfig(num_beams=2, max_new_tokens=2)
    edit = wb.Ablate(experts=[1], scope="text~king")
    with pytest.raises(InputError, match="num_beams is 2"), wb.intervene(made, edit):
        made.module.generate(ids, config)


def test_blocks_left_in_the_wrong_order_leave_no_edit_behind() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
        edited, recorder = wb.intervene(made, wb.Ablate(experts=[1])), Recorder(made, ("margin",))
        edited.__enter__()
        recorder.__enter__()
        made.module(**inputs)
        edited.__exit__(None, None, None)
        recorder.__exit__(None, None, None)
        assert torch.equal(made.module(**inputs)[0], plain)


def test_looking_ahead_counts_nothing_twice() -> None:
    made = model("olmoe")
    inputs = tiny.inputs(made.module)
    with torch.inference_mode(), wb.intervene(made, wb.Bias(experts=[1], strength=0.0)) as applied:
        with Recorder(made, ("lookahead",)):
            made.module(**inputs)
        assert applied.touched == [inputs["input_ids"].numel() * 3]


def test_a_replay_of_tokens_with_fewer_experts_is_normalised_over_those(tmp_path: Path) -> None:
    made = tiny.model("mixtral")
    ids = tiny.inputs(made.module)["input_ids"]
    with torch.inference_mode(), wb.intervene(made, wb.TopP(p=0.4, at_most=3)), Recorder(made) as recorder:
        out = made.module(input_ids=ids)[0]
    cut = recorder.take()[0]
    assert any((seen.experts < 0).any() for seen in cut)
    stored(tmp_path / "t.duckdb", ids, cut, made)
    again, seen = run(made, wb.Replay(trace=str(tmp_path / "t.duckdb")), input_ids=ids)
    assert seen[0].weights is not None and cut[0].weights is not None
    torch.testing.assert_close(seen[0].weights, cut[0].weights)
    torch.testing.assert_close(again, out, atol=1e-4, rtol=1e-4)


def test_groups_with_too_few_experts_are_filled_with_the_best_of_the_others() -> None:
    made = model("deepseek_v3")  # two groups of 4, one of which a token may use, and k = 3
    inputs = tiny.inputs(made.module)
    gone = [0, 1, 4, 5]
    seen: Any = run(made, wb.Ablate(layer=0, experts=gone, level="selection"), **inputs)[1][0]
    bias: Any = made.layers[0].router.e_score_correction_bias
    with torch.inference_mode(), Recorder(made, ("logits",)) as recorder:
        made.module(**inputs)
    whole: Any = recorder.take()[0][0]
    choice = whole.logits.sigmoid() + bias
    own = (seen.experts // 4).float().mean(-1).round().long()  # the group with two of the three
    for b, s in torch.cartesian_prod(torch.arange(choice.shape[0]), torch.arange(choice.shape[1])).tolist():
        group = int(own[b, s])
        live = [e for e in range(8) if e not in gone]
        inside = [e for e in live if e // 4 == group]
        outside = max((e for e in live if e // 4 != group), key=lambda e: float(choice[b, s, e]))
        assert set(seen.experts[b, s].tolist()) == {*inside, outside}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (wb.Ablate(layer=3, experts=[0]), "there is no layer 3; .* has layers 0 to 2"),
        (wb.Ablate(layer=-1, experts=[0]), "there is no layer -1"),
        (wb.Ablate(experts=[8]), "there is no expert 8; it has experts 0 to 7"),
        (wb.Force(experts=[0, 1, 2, 3]), r"4 experts are forced at layer 0 \(0, 1, 2, 3\), but a token has 3"),
        ([wb.Force(experts=[0, 1]), wb.Force(experts=[2, 3], scope="phase=prompt")], "4 experts are forced"),
        ([wb.Force(experts=[0, 1]), wb.SetTopK(k=1)], "2 experts are forced"),
        (wb.Ablate(experts=[0, 1, 2, 3, 4]), "5 of 8 experts are taken away at layer 0, which leaves 3"),
        ([wb.Ablate(experts=[0, 1, 2]), wb.Forbid(experts=[3, 4])], "take away 4 at most"),
        (
            [
                wb.Ablate(experts=[0, 1, 2], scope="phase=prompt"),
                wb.Ablate(experts=[3, 4, 5], scope="position=0-99"),
            ],
            "6 of 8 experts are taken away",
        ),
        ([wb.Ablate(experts=[4]), wb.Force(experts=[4], level="selection")], "selected with weight 0"),
        ([wb.Ablate(experts=[0, 1, 2]), wb.SetTopK(k=5)], "3 of 8 experts are taken away"),
        (wb.SetTopK(k=9), "rank 9 is asked for, but a token can select from 8"),
        (wb.SetTopK(k=4, first=6), "rank 9"),
        (wb.TopP(p=0.5, at_most=9), "rank 9"),
        (wb.Delta(values=[1.0] * 7), "the vector has 7 numbers"),
        (wb.Remix(target=[1.0] * 9), "the vector has 9 numbers"),
        ([wb.Contrast(), wb.Contrast()], "more than one Contrast"),
        (wb.Contrast(weak=[wb.SetTopK(k=9)]), "rank 9"),
        (wb.Ablate(experts=[0], scope="text~x"), "has no tokenizer"),
        (wb.Ablate(experts=[0], scope="lang=de"), "no condition"),
        ([], "no interventions"),
        (["ablate"], "is no intervention"),
        (wb.RandomExperts(edit=wb.Ablate(experts=[9])), "there is no expert 9"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(edits: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(model("olmoe"), edits)


def test_probabilities_that_do_not_follow_from_the_logits_are_not_edited() -> None:
    for family, why in (("laguna", "caps its logits"), ("muse_spark", "multiplies its logits")):
        for edit in (wb.Remix(target=[1.0] * 8), wb.TopP(p=0.5)):
            with pytest.raises(InputError, match=why):
                check(model(family), edit)


def test_groups_limit_how_many_can_be_selected() -> None:
    with pytest.raises(InputError, match="a token can select from 4 experts"):
        check(model("deepseek_v3"), wb.SetTopK(k=5))


def test_four_of_eight_can_be_taken_away_from_three() -> None:
    made = model("olmoe")
    for seen in run(made, wb.Ablate(experts=[0, 1, 2, 3]), **tiny.inputs(made.module))[1]:
        assert (seen.experts >= 4).all()
    for seen in run(made, wb.Ablate(experts=list(range(8)), level="output"), **tiny.inputs(made.module))[1]:
        assert (seen.experts < 0).all()
