"""Remixed pathways: neighbours, kernel mean and alpha, the gradient, what a reference takes, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import recorded
import routed
import tiny
import torch

import workbench
from workbench import learning, remixing
from workbench.capture import trace
from workbench.corpus import from_rows
from workbench.errors import InputError
from workbench.forward import next_token_nll
from workbench.intervening import intervene
from workbench.interventions import Remix
from workbench.models import Model
from workbench.recorder import Recorder
from workbench.remixing import ALPHAS, Reference, default_layers, reference, remix
from workbench.tracefile import Trace

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "deepseek_v4", "granitemoe")
"""Softmax before and after the selection, sigmoid with groups and a bias, sqrt-softplus with hash layers, sorted."""
WORDS = (
    "the",
    "right",
    "to",
    "life",
    "liberty",
    "security",
    "of",
    "person",
    "no",
    "one",
    "shall",
    "be",
    "held",
    "slave",
)
TEXTS = [" ".join(np.random.default_rng(number).permutation(WORDS)) for number in range(12)]


@pytest.fixture(scope="module")
def demo() -> Model:
    torch.set_num_threads(1)
    return workbench.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def run(demo: Model, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    rows = [{"text": text, "good": number % 3 == 0, "note": f"n{number}"} for number, text in enumerate(TEXTS)]
    out = tmp_path_factory.mktemp("remixing") / "reference.duckdb"
    return trace(demo, from_rows(rows), out, record=["logits"], progress=False)


@pytest.fixture(scope="module")
def known(demo: Model, run: Trace) -> Reference:
    return reference(demo, run, success=100.0, embeddings="profile")


@pytest.fixture(scope="module")
def prompt(demo: Model) -> list[int]:
    return demo.tokenizer("no one shall be subjected to torture or the")["input_ids"]


def probabilities(model: Model, ids: Any) -> list[np.ndarray]:
    """float (n, E) a layer, from the recorder."""
    with torch.inference_mode(), Recorder(model, ["probabilities"]) as recorder:
        model.module(torch.tensor([list(map(int, ids))]), use_cache=False)
    return [seen.probabilities[0].double().numpy() for seen in recorder.take()[0]]


def loss_after(model: Model, ids: Any, at: int, pathway: dict[int, Any]) -> float:
    """Mean nats of the tokens after `at` with a pathway put there."""
    given = torch.tensor([list(map(int, ids))])
    edits = [Remix(layer=layer, target=target, alpha=0.0, scope=f"position={at}") for layer, target in pathway.items()]
    with torch.inference_mode(), intervene(model, edits):
        return float(next_token_nll(model.module(given, use_cache=False).logits, given)[0, at + 1 :].mean())


def made_up(family: str, n: int = 4, length: int = 10, **changes: Any) -> tuple[Model, Reference, np.ndarray]:
    """A tiny model, a reference of random texts, a prompt."""
    model = tiny.model(family, **changes) if changes else recorded.model(family)
    texts = tiny.inputs(model.module, batch=n + 1, length=length)["input_ids"].numpy()
    layers = default_layers(model)
    seen = [probabilities(model, text[:-1]) for text in texts[1:]]
    pathways = {layer: np.stack([one[layer][-1] for one in seen]).astype(np.float32) for layer in layers}
    scored = [layer.index for layer in learning.scored(model)]
    profile = np.stack([np.concatenate([one[layer].mean(0) for layer in scored]) for one in seen]).astype(np.float32)
    position = np.full(n, length - 2)
    return model, Reference(np.arange(n), tuple(texts[1:]), position, pathways, profile, "profile", {}), texts[0]


# -- the reference ---------------------------------------------------------------------------------------------------


def test_a_reference_holds_the_pathways_of_last_prompt_tokens(demo: Model, run: Trace, known: Reference):
    assert known.seq.tolist() == list(range(12)) and list(known.pathways) == [1, 2, 3, 4, 5]
    tokens = run.tokens()
    for row, text in enumerate(TEXTS):
        ids = demo.tokenizer(text)["input_ids"]
        assert known.token_ids[row].tolist() == ids == tokens["token_id"][tokens["seq"] == row].tolist()
        assert known.position[row] == len(ids) - 2
        brute = probabilities(demo, ids)
        for layer, pathways in known.pathways.items():
            np.testing.assert_allclose(pathways[row], brute[layer][-2], atol=1e-5)
        profile = np.concatenate([layer[:-1].mean(0) for layer in brute])
        np.testing.assert_allclose(known.embeddings[row], profile, atol=1e-5)
    assert known.embedding == "profile" and known.source["run"] == run.run


def test_success_is_a_threshold_a_column_or_given(demo: Model, run: Trace):
    nll = run.tokens().groupby("seq")["nll"].mean().to_numpy()
    limit = float(np.sort(nll)[4])
    assert reference(demo, run, success=limit).seq.tolist() == np.flatnonzero(nll <= limit).tolist()
    assert reference(demo, run).seq.tolist() == np.flatnonzero(nll <= np.median(nll)).tolist()
    assert reference(demo, run, success="good").seq.tolist() == [0, 3, 6, 9]
    assert reference(demo, run, success=[number == 7 for number in range(12)]).seq.tolist() == [7]


def test_a_text_with_an_answer_is_read_from_the_end_of_its_prompt(demo: Model, tmp_path: Path):
    made = trace(demo, from_rows(TEXTS[:4]), tmp_path / "t.duckdb", record=["logits"], generate=3, progress=False)
    known = reference(demo, made, success=100.0)
    lengths = [len(demo.tokenizer(text)["input_ids"]) for text in TEXTS[:4]]
    assert known.position.tolist() == [length - 1 for length in lengths]
    assert [len(ids) for ids in known.token_ids] == [length + 3 for length in lengths]
    pathway = {layer: torch.from_numpy(rows[0]) for layer, rows in known.pathways.items()}
    with torch.no_grad():
        found = remixing._surrogate(demo, known, np.array([0]), np.array([1.0]), pathway)
    assert float(found) == pytest.approx(loss_after(demo, known.token_ids[0], lengths[0] - 1, pathway), abs=1e-5)


def test_texts_of_one_token_are_left_out(demo: Model, tmp_path: Path):
    made = trace(demo, from_rows(["a", "the right"]), tmp_path / "t.duckdb", record=["logits"], progress=False)
    assert reference(demo, made, success=[True, True]).seq.tolist() == [1]
    with pytest.raises(InputError, match="no text of run .* has two tokens and been named as successful"):
        reference(demo, made, success=[True, False])


# -- neighbours and the kernel mean ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", [None, 0.02, 3.0])
def test_the_kernel_mean_is_the_brute_force_formula(
    demo: Model, known: Reference, prompt: list[int], bandwidth: float | None
):
    found = remix(demo, prompt, known, alpha=0.3, n_neighbours=4, n_experts=7, bandwidth=bandwidth)
    own = probabilities(demo, prompt)
    embedding = np.concatenate([layer.mean(0) for layer in own])
    distance = np.sqrt(((known.embeddings - embedding) ** 2).sum(1))
    nearest = sorted(range(12), key=lambda row: distance[row])[:4]
    sigma = bandwidth or np.median(distance[nearest])
    kernel = {row: np.exp(-(distance[row] ** 2) / (2 * sigma**2)) for row in nearest}
    assert found.neighbours["seq"].tolist() == nearest
    np.testing.assert_allclose(found.neighbours["distance"], distance[nearest], rtol=1e-4)
    total = sum(kernel.values())
    np.testing.assert_allclose(found.neighbours["weight"], [kernel[row] / total for row in nearest], rtol=1e-2)
    assert [edit.layer for edit in found.interventions] == [1, 2, 3, 4, 5] and found.alpha == 0.3
    for edit in found.interventions:
        assert edit.alpha == 0.0 and edit.scope == f"position={len(prompt) - 1}"
        expected = own[edit.layer][-1].copy()
        for expert in np.argsort(-expected)[:7]:
            mean = sum(kernel[row] * known.pathways[edit.layer][row, expert] for row in nearest) / total
            expected[expert] = 0.3 * own[edit.layer][-1, expert] + 0.7 * mean
        np.testing.assert_allclose(edit.target, expected / expected.sum(), atol=2e-5)


def test_a_small_bandwidth_leaves_the_nearest_and_a_large_one_all_alike(
    demo: Model, known: Reference, prompt: list[int]
):
    np.testing.assert_allclose(remix(demo, prompt, known, alpha=0, bandwidth=1e-4).neighbours["weight"], [1, 0, 0])
    weights = remix(demo, prompt, known, alpha=0, bandwidth=1e4).neighbours["weight"]
    np.testing.assert_allclose(weights, [1 / 3] * 3, rtol=1e-4)


def test_alpha_is_the_one_with_the_lowest_surrogate(demo: Model, known: Reference, prompt: list[int]):
    found = remix(demo, prompt, known)
    brute = []
    for alpha in ALPHAS:
        pathway = {edit.layer: edit.target for edit in remix(demo, prompt, known, alpha=alpha).interventions}
        losses = [
            loss_after(demo, known.token_ids[seq], known.position[seq], pathway) for seq in found.neighbours["seq"]
        ]
        brute.append(float(np.dot(losses, found.neighbours["weight"])))
    np.testing.assert_allclose(found.losses, brute, atol=2e-5)
    assert found.alpha == ALPHAS[int(np.argmin(found.losses))]
    assert found.interventions == remix(demo, prompt, known, alpha=found.alpha).interventions


def test_the_prompt_itself_is_no_neighbour(demo: Model, known: Reference):
    own = known.token_ids[5][:-1]
    assert 5 not in remix(demo, own, known, alpha=0, n_neighbours=11).neighbours["seq"].tolist()
    assert 5 in remix(demo, own[:-1], known, alpha=0, n_neighbours=12).neighbours["seq"].tolist()


def test_embeddings_may_be_given(demo: Model, run: Trace, prompt: list[int]):
    places = np.random.default_rng(0).permutation(12)
    embeddings = np.stack([places, np.zeros(12)], axis=1)
    known = reference(demo, run, success=100.0, embeddings=embeddings)
    assert known.embedding == "given"
    found = remix(demo, prompt, known, alpha=0.5, embedding=np.array([4.2, 0.0])).neighbours
    assert [int(places[seq]) for seq in found["seq"]] == [4, 5, 3]
    np.testing.assert_allclose(found["distance"], [0.2, 0.8, 1.2], rtol=1e-5)


def test_by_default_texts_are_near_whose_last_hidden_states_are(demo: Model, run: Trace, prompt: list[int]):
    known = reference(demo, run, success="good")

    def state(ids: Any) -> np.ndarray:
        with torch.inference_mode():
            out = demo.module(torch.tensor([list(map(int, ids))]), output_hidden_states=True, use_cache=False)
        last = out.hidden_states[-1][0, -1]
        return (last / last.norm()).numpy()

    states = np.stack([state(ids[:-1]) for ids in known.token_ids])
    np.testing.assert_allclose(known.embeddings, states, atol=1e-5)
    distance = np.linalg.norm(states - state(prompt), axis=1)
    found = remix(demo, prompt, known, alpha=0).neighbours
    assert known.embedding == "hidden" and found["seq"].tolist() == known.seq[np.argsort(distance)[:3]].tolist()
    np.testing.assert_allclose(found["distance"], np.sort(distance)[:3], atol=1e-5)


# -- pathways in force -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ones_own_pathway_changes_nothing_and_others_only_what_follows(family: str):
    model, known, prompt = made_up(family)
    ids = torch.from_numpy(prompt[None])
    with torch.inference_mode():
        plain = model.module(ids, use_cache=False).logits[0]
        with intervene(model, remix(model, prompt, known, alpha=1.0).interventions):
            same = model.module(ids, use_cache=False).logits[0]
        with intervene(model, remix(model, prompt, known, alpha=0.0, n_experts=8).interventions):
            other = model.module(ids, use_cache=False).logits[0]
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other[:-1], plain[:-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other[-1], plain[-1], atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_lowers_the_surrogate_and_touches_no_parameter(family: str, monkeypatch: pytest.MonkeyPatch):
    # The weights of tiny models are so large that another choice of experts outweighs a step: smaller ones.
    monkeypatch.setattr(remixing, "RATES", (1e-3, 1e-4))
    model, known, prompt = made_up(family)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = remix(model, prompt, known, method="gradient", steps=6)
    assert len(found.losses) == 7 and min(found.losses[1:]) < found.losses[0] and found.alpha is None
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
    for edit in found.interventions:
        assert min(edit.target) > 0 and sum(edit.target) == pytest.approx(1, abs=1e-5)
    pathway = {edit.layer: edit.target for edit in found.interventions}
    rows, weights = found.neighbours["seq"], found.neighbours["weight"]
    after = [loss_after(model, known.token_ids[row], known.position[row], pathway) for row in rows]
    assert found.losses[-1] == pytest.approx(float(np.dot(after, weights)), abs=1e-4)


def test_the_gradient_on_the_demonstration_model(demo: Model, known: Reference, prompt: list[int]):
    losses = remix(demo, prompt, known, method="gradient").losses
    assert len(losses) == 11 and losses[-1] < losses[0] - 0.01


def test_without_steps_the_gradient_leaves_the_pathway(demo: Model, known: Reference, prompt: list[int]):
    still = remix(demo, prompt, known, method="gradient", steps=0)
    assert still.interventions == remix(demo, prompt, known, alpha=1.0).interventions and len(still.losses) == 1


def test_the_gradient_of_the_surrogate_is_that_of_finite_differences():
    # All experts are selected: nothing jumps.
    model, known, _ = made_up("olmoe", num_experts_per_tok=tiny.EXPERTS)
    rows, weights = np.array([0, 2]), np.array([0.7, 0.3])
    start = torch.linspace(1, 2, tiny.EXPERTS) / 12
    values = start.clone().requires_grad_()
    with learning.gradients(model):
        learning.gradient(remixing._surrogate(model, known, rows, weights, {1: values}), [values])
    assert values.grad is not None and float(values.grad.abs().max()) > 1e-2
    step = 2.0**-8
    for expert in range(tiny.EXPERTS):
        apart = []
        for sign in (1, -1):
            moved = start.clone()
            moved[expert] += sign * step
            with torch.no_grad():
                apart.append(float(remixing._surrogate(model, known, rows, weights, {1: moved})))
        expected = (apart[0] - apart[1]) / (2 * step)
        assert float(values.grad[expert]) == pytest.approx(expected, rel=0.03, abs=2e-3)


@pytest.mark.parametrize("method", ["kernel", "gradient"])
def test_experts_outside_of_the_core_keep_their_share(method: Any):
    model, known, prompt = made_up("olmoe")
    own = probabilities(model, prompt)
    for edit in remix(model, prompt, known, method=method, n_experts=3, steps=3).interventions:
        before = own[edit.layer][-1]
        outside = np.argsort(-before)[3:]
        ratio = np.array(edit.target)[outside] / before[outside]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_layers_that_select_by_token_are_left_alone():
    model = recorded.model("deepseek_v4")
    assert model.layers[0].scoring == "hash"
    assert default_layers(model) == [1, 2]


def test_remixing_works_within_inference_mode(demo: Model, known: Reference, prompt: list[int]):
    outside = remix(demo, prompt, known, method="gradient", steps=1)
    with torch.inference_mode():
        inside = remix(demo, torch.tensor(prompt), known, method="gradient", steps=1)
    assert inside.interventions == outside.interventions


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_run_of_another_model_is_refused(run: Trace):
    with pytest.raises(InputError, match="is no reference for .*expert numbers mean nothing in another model"):
        reference(recorded.model("olmoe"), run)


def test_a_run_without_logits_is_refused(demo: Model, tmp_path: Path):
    made = trace(demo, from_rows(TEXTS[:2]), tmp_path / "t.duckdb", progress=False)
    with pytest.raises(InputError, match="logits were not recorded .*trace again with --record ids,weights,logits"):
        reference(demo, made)


def test_runs_that_cannot_be_judged_or_read_again_are_refused(tmp_path: Path):
    model = recorded.model("olmoe")
    made_with: dict[str, Any] = {
        "experts": np.tile(np.arange(3), (4, 3, 1)),
        "n_experts": 8,
        "seq": [0, 0, 1, 1],
        "sequences": pd.DataFrame({"good": [True, False]}),
        "logits": np.zeros((3, 4, 8)),
    }
    made = routed.full_trace(tmp_path / "a.duckdb", **made_with, token_ids=[3, 4, 5, 6])
    # A made-up trace names a made-up model.
    model = replace(model, name="tiny", family="test")
    with pytest.raises(InputError, match="has no nll to tell success by; give the name of a column"):
        reference(model, made)
    assert reference(model, made, success="good").seq.tolist() == [0]
    made = routed.full_trace(tmp_path / "b.duckdb", **made_with, token_ids=[3, 4, 5, -1])
    with pytest.raises(InputError, match="has unknown token ids, so its texts can't be read again"):
        reference(model, made, success="good")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"success": 1e-9},
            r"no text of run .* has two tokens and a mean nll of at most 1e-09 nats \(the lowest is \d",
        ),
        ({"success": "fine"}, r"success is 'fine'; the texts have no such column, but seq, .*good"),
        ({"success": "note"}, r"column 'note' holds 'n0'; expected true and false"),
        ({"success": [True]}, r"success has shape \(1,\) of bool; expected 12 true or false"),
        ({"layers": [6]}, r"layer 6: demo has layers 0 to 5"),
        ({"embeddings": "words"}, r"embeddings is 'words'; expected hidden, profile, or an array"),
        ({"embeddings": np.zeros((3, 2))}, r"embeddings have shape \(3, 2\); expected \(12, d\)"),
        ({"embeddings": np.full((12, 2), np.nan)}, r"expected \(12, d\) finite numbers"),
    ],
)
def test_bad_references_are_named(demo: Model, run: Trace, arguments: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        reference(demo, run, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mode"}, r"method is 'mode'; expected kernel, gradient"),
        ({"alpha": 1.5}, r"alpha is 1.5; expected a number from 0 to 1"),
        ({"alpha": 0.5, "method": "gradient"}, r"alpha is 0.5; .*with the method kernel"),
        ({"n_neighbours": 0}, r"n_neighbours is 0"),
        ({"n_neighbours": 13}, r"has 12 successful texts besides the prompt; 13 neighbours need that many"),
        ({"n_experts": 0}, r"n_experts is 0"),
        ({"bandwidth": 0}, r"bandwidth is 0; expected a number above 0"),
        ({"steps": -1, "method": "gradient"}, r"steps is -1"),
        ({"embedding": np.zeros(3)}, r"embedding: the reference has none like it"),
    ],
)
def test_bad_arguments_are_named(
    demo: Model, known: Reference, prompt: list[int], arguments: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message):
        remix(demo, prompt, known, **arguments)


def test_bad_prompts_and_missing_embeddings_are_named(demo: Model, known: Reference, prompt: list[int]):
    with pytest.raises(InputError, match=r"the prompt is empty; expected at least 1 token"):
        remix(demo, [], known)
    given = replace(known, embedding="given")
    with pytest.raises(InputError, match=r"embedding: none; expected \(192,\), made as the reference's"):
        remix(demo, prompt, given)
    with pytest.raises(InputError, match=r"embedding: \(2,\); expected \(192,\)"):
        remix(demo, prompt, given, embedding=np.zeros(2))
