"""What is said of continuations, against plain loops over what they are."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

import numpy as np
import pandas as pd
import pytest

from workbench.continuations import (
    beside,
    command,
    differences,
    differing,
    facts,
    figure,
    probability_changes,
    result,
    routing_at,
    routing_changes,
    routing_shares,
)
from workbench.generation import Candidate, Generated, Step
from workbench.routing import NO_EXPERT, Routing


def step(token_id: int, routing: Any = None, **candidates: float) -> Step:
    likely = tuple(Candidate(int(name[1:]), f"t{name[1:]}", p) for name, p in candidates.items())
    return Step(token_id, f"t{token_id}", f" t{token_id}", 0.5, likely, routing)


def made(*steps: Step | int) -> Generated:
    found = tuple(each if isinstance(each, Step) else step(each) for each in steps)
    return Generated((7, 8), found, "".join(each.text for each in found), "length")


def routed(rng: np.random.Generator, n: int, sizes: list[int], k: int = 3, weights: bool = True) -> tuple[Routing, ...]:
    """n tokens, k experts each, the last of them now and then missing."""
    layers = []
    for size in sizes:
        experts = np.array([rng.permutation(size)[:k] for _ in range(n)]).reshape(n, k).astype(np.uint16)
        own = rng.random((n, k)).astype(np.float32)
        none = rng.random(n) < 0.3
        experts[none, -1], own[none, -1] = NO_EXPERT, 0
        layers.append(Routing(experts, own if weights else None))
    return tuple(layers)


def continuations(seed: int, lengths: dict[str, int], sizes: list[int], **options: Any) -> dict[str, Generated]:
    rng = np.random.default_rng(seed)
    return {
        name: made(*(step(at, routed(rng, 1 if at else 5, sizes, **options)) for at in range(n)))
        for name, n in lengths.items()
    }


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ([], [], []),
        ([1, 2], [], []),
        ([], [1], [True]),
        ([1, 2, 3], [1, 5, 3, 4], [False, True, False, True]),
        ([1, 2], [1], [False]),
    ],
)
def test_differing(one: list[int], other: list[int], expected: list[bool]):
    found = differing(made(*one), made(*other))
    assert found.dtype == bool and found.tolist() == expected


# probabilities


def test_probability_changes():
    one, other = step(1, t1=0.5, t2=0.3, t3=0.1, t4=0.0, t9=0.1), step(2, t2=0.6, t1=0.2, t4=0.0, t3=0.0, t8=0.2)
    frame = probability_changes(one, other)
    assert frame.columns.tolist() == ["token_id", "token", "plain", "steered", "difference", "log_ratio"]
    assert frame["token_id"].tolist() == [1, 2, 3, 4] and frame["token"].tolist() == ["t1", "t2", "t3", "t4"]
    assert frame["difference"].tolist() == pytest.approx([-0.3, 0.3, -0.1, 0.0])
    assert frame["log_ratio"].tolist()[:3] == pytest.approx([math.log(0.4), math.log(2), -math.inf])
    assert math.isnan(frame["log_ratio"][3])
    named = probability_changes(other, one, ("steered", "control"))
    assert named["steered"].tolist() == pytest.approx([0.2, 0.6, 0.0, 0.0])
    assert named["log_ratio"][2] == math.inf


def test_no_candidates():
    frame = probability_changes(step(1), step(2))
    assert frame.empty and frame["difference"].dtype == float and frame["token_id"].dtype == np.int64


# routing


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("sizes", [[6, 6, 4], [300]])
def test_routing_shares(sizes: list[int], weights: bool):
    found = continuations(3, {"plain": 9, "steered": 6, "control": 1}, sizes, weights=weights)
    frame = routing_shares(found, sizes)
    assert len(frame) == 3 * sum(sizes)
    for row in frame.to_dict("records"):
        uses, all_uses, weight, all_weight, tokens = 0, 0, 0.0, 0.0, 0
        for each in found[row["name"]].steps[1:]:
            layer = each.routing[row["layer"]]
            for place in range(len(layer.experts)):
                tokens += 1
                for slot, expert in enumerate(layer.experts[place].tolist()):
                    if expert != NO_EXPERT:
                        mine = expert == row["expert"]
                        value = float(layer.weights[place, slot]) if weights else math.nan
                        uses, all_uses = uses + mine, all_uses + 1
                        weight, all_weight = weight + value * mine, all_weight + value
        assert (row["n_tokens"], row["n_selected"]) == (tokens, uses)
        assert row["share"] == pytest.approx(uses / all_uses if all_uses else math.nan, nan_ok=True)
        expected = weight / all_weight if all_weight and weights else math.nan
        assert row["weight"] == pytest.approx(expected, nan_ok=True)
    sums = frame[frame["name"] == "plain"].groupby("layer")["share"].sum()
    assert sums.tolist() == pytest.approx([1.0] * len(sizes))


@pytest.mark.parametrize("value", ["share", "weight"])
def test_routing_changes_and_their_figure(value: str):
    sizes = [6, 4]
    found = continuations(5, {"plain": 9, "steered": 6, "control": 4}, sizes)
    shares = routing_shares(found, sizes).set_index(["name", "layer", "expert"])
    frame = routing_changes(found, sizes, name="control", value=value)
    columns = ["layer", "expert", "plain", "control", "difference", "n_plain", "n_other"]
    assert frame.columns.tolist() == columns and len(frame) == 10
    for row in frame.to_dict("records"):
        plain, other = (shares.loc[name, row["layer"], row["expert"]][value] for name in ("plain", "control"))
        assert (row["plain"], row["control"], row["difference"]) == pytest.approx((plain, other, other - plain))
        assert (row["n_plain"], row["n_other"]) == (8, 3)
    drawn = figure(frame)
    z = np.array(drawn.data[0]["z"], float)
    assert z.shape == (2, 6) and np.isnan(z[1, 4:]).all()
    assert z[1, 2] == pytest.approx(frame.query("layer == 1 and expert == 2")["difference"].item())
    reach = drawn.layout["coloraxis"]["cmax"]
    assert reach == pytest.approx(frame["difference"].abs().max()) == -drawn.layout["coloraxis"]["cmin"]


def test_nothing_was_routed():
    found = {"plain": made(1, 2), "steered": made()}
    frame = routing_changes(found, [4, 4])
    assert len(frame) == 8 and frame[["plain", "steered", "difference"]].isna().all(axis=None)
    assert (frame["n_plain"] == 0).all() and figure(frame).layout["coloraxis"]["cmax"] == 1
    assert routing_at(found, 0).empty and beside(routing_at(found, 0)).empty


def test_routing_at():
    sizes = [6, 4]
    found = continuations(8, {"plain": 3, "steered": 2}, sizes)
    for at in range(4):
        expected = []
        for name, one in found.items():
            for layer in range(2) if at < len(one.steps) else ():
                seen = one.steps[at].routing[layer]
                for slot in range(3):
                    if seen.experts[-1][slot] != NO_EXPERT:
                        expected.append((name, layer, slot + 1, int(seen.experts[-1][slot]), seen.weights[-1][slot]))
        frame = routing_at(found, at)
        assert frame.columns.tolist() == ["name", "layer", "rank", "expert", "weight"]
        assert list(frame.itertuples(index=False, name=None)) == expected


def test_beside():
    rows = [
        ("plain", 0, 1, 5, 0.314), ("plain", 0, 2, 1, 0.2), ("plain", 1, 1, 0, np.nan),
        ("steered", 0, 1, 5, 0.5), ("steered", 0, 2, 7, 0.25), ("steered", 1, 1, 0, np.nan),
    ]  # fmt: skip
    frame = beside(pd.DataFrame(rows, columns=["name", "layer", "rank", "expert", "weight"]))
    assert frame.to_dict("records") == [
        {"layer": 0, "plain": "5 0.31, 1 0.20", "steered": "5 0.50, 7 0.25", "changed_steered": 1},
        {"layer": 1, "plain": "0", "steered": "0", "changed_steered": 0},
    ]
    alone = beside(pd.DataFrame([("steered", 2, 1, 5, 0.5)], columns=["name", "layer", "rank", "expert", "weight"]))
    assert alone.to_dict("records") == [{"layer": 2, "steered": "5 0.50"}]


# saved


def test_result_is_json_and_says_where_they_differ():
    found = {"plain": made(1, 2, 3), "steered": made(1, 9), "control": made(1, 2, 3)}
    settings = {"max_tokens": 3, "temperature": 0.0, "seed": 0, "chat": False}
    saved = json.loads(json.dumps(result("demo", "hi", settings, {"interventions": []}, found)))
    assert saved["prompt"] == "hi" and saved["max_tokens"] == 3 and saved["recipe"] == {"interventions": []}
    assert saved["differences"] == {"steered": {"at": 1, "plain": "t2", "token": "t9"}, "control": None}
    assert saved["plain"]["text"] == " t1 t2 t3" and saved["plain"]["prompt"] == [7, 8]
    assert saved["plain"]["tokens"][0] == {"token_id": 1, "token": "t1", "text": " t1", "probability": 0.5}
    assert facts(found["plain"])["ended"] == "length" and differences({"steered": made(1)}) == {"steered": None}
    shorter = {"plain": made(1, 2), "steered": made(1)}
    assert differences(shorter)["steered"] == {"at": 1, "plain": "t2", "token": None}


@pytest.mark.parametrize("prompt", ["It's", "--recipe", "a\n b", "$(rm)", "-"])
def test_command(prompt: str):
    settings = {"max_tokens": 8, "temperature": 0.7, "seed": 3, "chat": True}
    words = shlex.split(command("demo", prompt, settings, "my recipe.json", control=True))
    assert words[:6] == ["workbench", "generate", "--recipe", "my recipe.json", "--compare", "--control"]
    assert words[6:] == [
        "random", "--max-tokens", "8", "--temperature", "0.7", "--seed", "3", "--chat", "--", "demo", prompt
    ]  # fmt: skip
    plain = {"max_tokens": 8, "temperature": 0.0, "seed": 0, "chat": False}
    assert shlex.split(command("demo", prompt, plain)) == [
        "workbench", "generate", "--max-tokens", "8", "--", "demo", prompt
    ]  # fmt: skip


def test_the_command_computes_the_same(workbench, tmp_path):
    """What is saved is what `workbench generate --json` prints under the recipe."""
    from workbench.interventions import Ablate
    from workbench.models import load
    from workbench.recipe import Recipe, of_model, to_json, write_recipe
    from workbench.side_by_side import side_by_side

    model = load("demo")
    recipe = Recipe((Ablate(layer=[2, 3], experts=[1, 2, 3]),), of_model(model))
    write_recipe(recipe, tmp_path / "recipe.json")
    settings = {"max_tokens": 4, "temperature": 0.7, "seed": 3, "chat": False}
    found = side_by_side(model, "The treaty", recipe, control=3, **settings)
    saved = result("demo", "The treaty", settings, to_json(recipe), found)
    line = command("demo", "The treaty", settings, str(tmp_path / "recipe.json"), control=True)
    ran = workbench("generate", "--json", *shlex.split(line)[2:])
    assert ran.code == 0 and json.loads(ran.out) == json.loads(json.dumps(saved))
