"""Interventions as data and recipes as files: what they hold comes back, and what is wrong is named."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import random_trace

import workbench as wb
from workbench.errors import InputError
from workbench.intervening import check, interventions_of
from workbench.interventions import KINDS
from workbench.recipe import (
    FORMAT,
    VERSION,
    Recipe,
    brief,
    check_model,
    from_json,
    of_model,
    of_trace,
    read_recipe,
    to_json,
    write_recipe,
)

EVERY = (
    wb.Ablate(layer=3, experts=[5]),
    wb.Force(layer=[0, 2], experts=[1, 2], level="selection", scope="phase=prompt"),
    wb.Forbid(experts=[0], margin=0.5),
    wb.Bias(layer=range(2), experts=np.array([3]), strength=-0.5),
    wb.Scale(experts=[4], factor=64),
    wb.SetTopK(k=2, first=2),
    wb.TopP(p=0.5, at_most=3),
    wb.Delta(layer=0, values=[0.5, -1.0]),
    wb.Remix(layer=1, target=[0.2, 0.8], alpha=0.25, scope='token=" é"'),
    wb.Replay(trace="a.duckdb", run="plain", weights="recorded"),
    wb.RandomExperts(edit=wb.Ablate(experts=[1], level="output", renormalise=True), seed=7),
    wb.Contrast(weak=[wb.SetTopK(k=1)], alpha=0.2, beta=1),
)


def test_every_kind_comes_back_from_a_file(tmp_path: Path) -> None:
    assert {type(one) for one in EVERY} == set(KINDS)
    recipe = Recipe(EVERY, of_model(tiny.model("olmoe")), {"method": "by hand", "grüße": [1, 2.5, None]})
    write_recipe(recipe, tmp_path / "r.json")
    assert read_recipe(tmp_path / "r.json") == recipe
    assert interventions_of(tmp_path / "r.json") == EVERY
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["version"] == 1 and written["interventions"][0]["kind"] == "Ablate"
    with pytest.raises(InputError, match="exists"):
        write_recipe(recipe, tmp_path / "r.json")
    write_recipe(recipe, tmp_path / "r.json", overwrite=True)


def test_in_brief_is_what_is_not_by_default() -> None:
    brief_ones = [brief(one) for one in EVERY]
    assert from_json({"format": FORMAT, "version": VERSION, "interventions": brief_ones}).interventions == EVERY
    assert brief_ones[0] == {"kind": "Ablate", "layer": 3, "experts": [5]}
    assert brief(wb.Contrast()) == {"kind": "Contrast"}
    assert brief(wb.Delta(values=torch.tensor([1.0, 2.0]))) == {"kind": "Delta", "values": [1.0, 2.0]}
    assert json.loads(json.dumps(brief_ones)) == brief_ones


def test_a_tensor_is_written_as_numbers() -> None:
    plain = to_json(Recipe((wb.Delta(values=torch.tensor([0.5, 1.0], requires_grad=True)),)))
    assert plain["interventions"][0]["values"] == [0.5, 1.0]
    assert from_json(plain).interventions == (wb.Delta(values=[0.5, 1.0]),)


def good() -> dict[str, Any]:
    return to_json(Recipe((wb.Ablate(layer=3, experts=[5]),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "not a recipe; expected"),
        ({"version": 2}, "version is 2; this version of the workbench reads 1"),
        ({"colour": 1}, "a recipe has no key 'colour'; it has format, version, model"),
        ({"interventions": []}, r"interventions is \[\]; expected a list"),
        ({"interventions": [5]}, r"interventions\[0\] is 5; expected an object"),
        ({"interventions": [{"kind": "Melt"}]}, "kind is 'Melt'; expected Ablate, Force"),
        ({"interventions": [{"kind": "Ablate", "expert": [1]}]}, r"interventions\[0\] \(Ablate\) has no key 'expert'"),
        ({"interventions": [{"kind": "Ablate"}]}, "experts is missing"),
        ({"interventions": [{"kind": "Ablate", "experts": [1, 1]}]}, "experts has 1 twice"),
        ({"interventions": [{"kind": "Ablate", "experts": "12"}]}, "expected whole numbers"),
        ({"interventions": [{"kind": "Ablate", "experts": [float("inf")]}]}, "expected whole numbers"),
        ({"interventions": [{"kind": "Bias", "experts": [1], "strength": 10**400}]}, "expected a number"),
        ({"interventions": [{"kind": "Ablate", "experts": [1], "scope": 5}]}, "scope is 5; expected text"),
        ({"interventions": [{"kind": "Ablate", "experts": [1], "layer": "3"}]}, "layer is '3'; expected whole numbers"),
        ({"interventions": [{"kind": "Ablate", "experts": [1], "layer": 1.5}]}, "layer is 1.5; expected whole numbers"),
        ({"interventions": [{"kind": "Ablate", "experts": [1], "level": "x"}]}, "level is 'x'; expected logits"),
        ({"interventions": [{"kind": "RandomExperts", "edit": {"kind": "SetTopK", "k": 2}}]}, "names no experts"),
        ({"interventions": [{"kind": "RandomExperts", "edit": {"kind": "Ablate"}}]}, r"\.edit \(Ablate\): experts is"),
        ({"interventions": [{"kind": "Contrast", "weak": []}]}, r"weak is \[\]"),
        ({"model": {"name": "x"}}, 'expected "name", "family" and "layers"'),
        ({"model": []}, "model is"),
        ({"source": 5}, "source is 5; expected an object"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(good() | change))
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_recipe(tmp_path / "missing.json")
    for text in ("{", "[" * 100_000, "5", "null", "[]", '"x"', "\x00"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(InputError, match="not JSON|not a recipe"):
            read_recipe(tmp_path / "r.json")
    (tmp_path / "r.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="not JSON"):
        read_recipe(tmp_path / "r.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([kind.__name__ for kind in KINDS]), st.data())
def test_any_value_of_a_key_is_an_input_error_or_comes_back(kind: str, data: st.DataObject) -> None:
    keys = ("layer", "experts", "scope", "level", "strength", "factor", "k", "p", "values", "target", "edit", "weak")
    item = {"kind": kind} | data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=4))
    try:
        recipe = from_json(good() | {"interventions": [item]})
    except InputError:
        return
    assert from_json(to_json(recipe)) == recipe
    with suppress(InputError):
        check(tiny_olmoe(), recipe)


_MADE: list[Any] = []


def tiny_olmoe() -> Any:
    if not _MADE:
        _MADE.append(tiny.model("olmoe"))
    return _MADE[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wb.Ablate(experts=[]), "experts is empty"),
        (lambda: wb.Ablate(experts=[1], renormalise=True), 'goes with level="output"'),
        (lambda: wb.Force(experts=[1], level="output"), "level is 'output'"),  # type: ignore[arg-type]
        (lambda: wb.Force(experts=[1], margin=float("nan")), "margin is nan"),
        (lambda: wb.Bias(experts=[1], strength=float("inf")), "strength is inf"),
        (lambda: wb.Bias(experts=[1], strength=1.0, unit="nats"), "unit is 'nats'"),  # type: ignore[arg-type]
        (lambda: wb.Scale(experts=[1], factor=-1), "factor is -1; expected 0 or more"),
        (lambda: wb.SetTopK(k=0), "k is 0; expected a whole number from 1"),
        (lambda: wb.SetTopK(k=1, first=0), "first is 0"),
        (lambda: wb.TopP(p=0), "p is 0; expected a probability above 0"),
        (lambda: wb.TopP(p=1.5), "p is 1.5"),
        (lambda: wb.TopP(p=0.5, at_most=0), "at_most is 0"),
        (lambda: wb.Delta(values=5), "values is 5"),  # type: ignore[arg-type]
        (lambda: wb.Delta(values=[float("nan")]), "values is nan"),
        (lambda: wb.Remix(target=[0.5, -0.5]), "negative"),
        (lambda: wb.Remix(target=[0.0, 0.0]), "only zeros"),
        (lambda: wb.Remix(target=[1.0], alpha=2.0), "alpha is 2.0"),
        (lambda: wb.Replay(trace="x", weights="both"), "weights is 'both'"),  # type: ignore[arg-type]
        (lambda: wb.Contrast(alpha=2.0), "alpha is 2.0"),
        (lambda: wb.Contrast(beta=-1.0), "beta is -1.0"),
        (lambda: wb.Contrast(weak=[]), "weak is empty"),
        (lambda: wb.RandomExperts(edit=wb.TopP(p=0.5)), "TopP names no experts"),
    ],
)
def test_values_that_no_model_could_have_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_recipe_of_another_model_is_refused(tmp_path: Path) -> None:
    made = tiny.model("olmoe")
    edits = (wb.Ablate(layer=0, experts=[5]),)
    check(made, Recipe(edits, of_model(made)))
    check(made, Recipe(edits))
    for other in (tiny.model("mixtral"), tiny.model("olmoe", num_experts=16)):
        with pytest.raises(InputError, match="the recipe is for .* expert numbers mean nothing in another model"):
            check(other, Recipe(edits, of_model(made)))
    moved = of_model(made) | {"name": f"/somewhere/else/{made.name}"}
    check_model(Recipe(edits, moved), made)
    check_model(Recipe(edits, moved), of_model(made))  # one that isn't loaded
    with pytest.raises(InputError, match="the recipe is for"):
        check_model(Recipe(edits, moved), of_model(tiny.model("mixtral")))
    for wrong in ({"layers": 5}, {"layers": [[1]]}, {"name": None}):
        with pytest.raises(InputError):
            check(made, from_json(good() | {"model": of_model(made) | wrong}))


def test_a_trace_names_its_model(tmp_path: Path) -> None:
    assert of_trace(random_trace(tmp_path / "arrays.duckdb").trace) == {}
    made = wb.load("demo")
    text = tmp_path / "one.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.")
    trace = wb.trace(made, text, tmp_path / "demo.duckdb", progress=False)
    assert of_trace(trace) == of_model(made)
    assert from_json(to_json(Recipe(EVERY[:1], of_trace(trace)))).model == of_model(made)
