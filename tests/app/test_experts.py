"""The Experts page, run as a script: the grid, the expert that is chosen, what it fires on, what goes into a recipe."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import routed
from pages import answered, opened, said
from streamlit.testing.v1 import AppTest

from workbench import expert_profile, slicing
from workbench.expert_grid import METRICS
from workbench.interventions import Ablate, Bias, Forbid, Force, Scale
from workbench.tracefile import Trace
from workbench_app import view

HOSTILE = {
    0: "<script>alert(1)</script>", 1: "مرحبا", 2: "\u202e", 3: "\u200b", 4: "😀", 5: "**b** [l](x) $x$", 6: "=1+1",
    7: "\n",
}  # fmt: skip


def sent(page: AppTest, name: str) -> dict[str, Any]:
    """What a component got: "cells" or "contexts"."""
    key = {"cells": "codes", "contexts": "lines"}[name]
    (found,) = [data for one in page.get("bidi_component") if key in (data := json.loads(one.proto.json or "{}"))]
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two layers of 6 and 300 experts; texts that no page should believe; expert 5 of layer 0 is never chosen."""
    path = tmp_path_factory.mktemp("experts") / "hostile.duckdb"
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(20), 15)
    ids = random.integers(0, 8, 300)
    first = np.stack([random.permutation(5)[:2] for _ in seq])
    second = np.stack([[299, *random.permutation(299)[:1]] for _ in seq])
    gates = [random.random((300, 2)).astype(np.float32) for _ in range(2)]
    sequences = pd.DataFrame({
        "lang": ["en", "de"] * 10, "domain": [f"<b>{'ab'[text % 2]}</b>" for text in range(20)],
        "segment_id": [f"s{text // 2}" for text in range(20)],
    })  # fmt: skip
    routed.full_trace(path, [first, second], n_experts=[6, 300], seq=seq, sequences=sequences, token_ids=ids,
                      weights=gates, vocabulary=HOSTILE)  # fmt: skip
    return path


def test_the_grid_and_one_expert(monkeypatch, small):
    page = opened(monkeypatch, small, "experts", experts_layer="0", experts_expert="3")
    assert page.header[0].value == "Layer 0 · expert 3"
    cells = sent(page, "cells")
    assert cells["layers"] == [0, 1] and cells["columns"] == 300 and cells["chosen"] == [0, 3]
    trace = Trace(small)
    fired = expert_profile.firings(trace, 0, 3)
    assert page.metric[0].value == f"{len(fired):,}" and page.metric[0].delta == "of 300"
    facts = expert_profile.summary(expert_profile.token_index(trace), fired, trace.experts(0), 6)
    assert page.metric[2].value == f"{facts['load']:.2f}" and page.metric[3].value == f"{facts['mean_weight']:.3f}"
    lines = sent(page, "contexts")["lines"]
    assert len(lines) == 10 and lines[0]["weight"] == pytest.approx(fired["weight"].max(), abs=1e-6)
    table = page.dataframe[0].value
    expected = expert_profile.token_table(expert_profile.token_index(trace), fired)
    assert table["count"].tolist() == expected["count"].tolist() and "⟨U+200B⟩" in set(table["text"])


def test_a_link_to_an_expert_that_is_not_there(monkeypatch, small):
    assert opened(monkeypatch, small, "experts", experts_layer="99", experts_expert="299").header[0].value
    page = opened(monkeypatch, small, "experts", experts_layer="x", experts_expert="-4")
    assert page.header[0].value == "Layer 0 · expert 0"


def test_another_layer_has_fewer_experts(monkeypatch, small):
    page = opened(monkeypatch, small, "experts", experts_layer="1", experts_expert="299")
    assert page.header[0].value == "Layer 1 · expert 299" and page.metric[0].value == "300"
    page.number_input("experts_layer").set_value(0)
    answered(page)
    assert page.header[0].value == "Layer 0 · expert 5"
    assert page.query_params["experts_expert"] in ("5", ["5"])


def test_an_expert_that_was_never_chosen(monkeypatch, small):
    page = opened(monkeypatch, small, "experts", experts_layer="0", experts_expert="5")
    assert "None of the 300 tokens" in said(page) and page.metric[0].value == "0" and page.metric[3].value == "–"
    assert not page.dataframe or all("text" not in one.value for one in page.dataframe)


@pytest.mark.parametrize(
    ("metric", "more"),
    [
        ("lift", {"experts_by": "domain"}),
        ("divergence", {}),
        ("information", {"experts_by": "position"}),
        ("mean_weight", {"experts_sorted": "true"}),
        ("weighted_frequency", {"experts_each": "true"}),
        ("favourites", {}),
    ],
)
def test_metrics(monkeypatch, small, metric, more):
    page = opened(monkeypatch, small, "experts", experts_metric=METRICS[metric].title, **more)
    assert page.selectbox("experts_metric").value == metric
    cells = sent(page, "cells")
    assert cells["byValue"] == ("experts_sorted" in more) and len(cells["layers"]) == 2
    if metric == "lift":
        assert page.selectbox("experts_group").options == ["<b>a</b>", "<b>b</b>"]
    if "experts_each" in more:
        assert cells["ticks"][0][1] == "least of the layer"


def test_only_what_was_recorded_is_offered(monkeypatch, small):
    page = opened(monkeypatch, small, "experts")
    offered = page.selectbox("experts_metric").options
    assert "Mean gate weight" in offered and not {"REAP", "Output norm", "EASY-EP"} & set(offered)


def test_edits_go_into_the_recipe(monkeypatch, small):
    page = opened(monkeypatch, small, "experts", experts_layer="0", experts_expert="3")
    page.button("experts_ablate").click()
    answered(page)
    assert "Ablate" in page.success[0].value
    page.button("experts_force").click()
    answered(page)
    page.slider("experts_strength").set_value(-0.5)
    answered(page)
    page.button("experts_bias").click()
    answered(page)
    page.number_input("experts_factor").set_value(4.0)
    answered(page)
    page.button("experts_scale").click()
    answered(page)
    page.selectbox("experts_kind").set_value("Forbid")
    page.text_input("experts_others").set_value("1, 3 2")
    page.text_input("experts_scope").set_value("phase=generated")
    answered(page)
    page.button("experts_add").click()
    answered(page)
    this: dict[str, Any] = {"layer": 0, "experts": [3]}
    assert [entry.intervention for entry in page.session_state["draft"]] == [
        Ablate(**this), Force(**this), Bias(**this, strength=-0.5), Scale(**this, factor=4.0),
        Forbid(layer=0, experts=[3, 1, 2], scope="phase=generated"),
    ]  # fmt: skip
    page.text_input("experts_others").set_value("77")
    answered(page)
    assert "expected numbers from 0 to 5" in said(page).replace("\\", "")


def test_one_token_id(monkeypatch, small):
    page = opened(
        monkeypatch, small, "experts", experts_layer="1", experts_expert="299", experts_token="4", experts_per_text="5"
    )
    lines = sent(page, "contexts")["lines"]
    here = [next(part for part in line["parts"] if part[3]) for line in lines]
    assert lines and all(part[0] == "😀" for part in here)
    assert any("😀" in button.label for button in page.button)
    page.button("experts_all").click()
    answered(page)
    assert len({next(part for part in line["parts"] if part[3])[0] for line in sent(page, "contexts")["lines"]}) > 1
    page = opened(monkeypatch, small, "experts", experts_token="99")
    assert "No token that chose this expert" in said(page)


def test_contexts_of_one_language_at_random(monkeypatch, small):
    page = opened(monkeypatch, small, "experts", experts_layer="0", experts_lang="de", experts_which="drawn at random")
    assert {line["tags"][0] for line in sent(page, "contexts")["lines"]} == {"de"}


@pytest.mark.parametrize(
    "tab", ["Partners", "Similar experts", "Importance", "Vocabulary", "Other groups", "Likeness of weights"]
)
def test_more_about_it(monkeypatch, demo_trace, tab):
    page = opened(monkeypatch, demo_trace, "experts", experts_layer="2", experts_expert="7", experts_more=tab)
    columns = [set(one.value.columns) for one in page.dataframe]
    if tab == "Likeness of weights":
        page.button("experts_weights").click()
        answered(page)
        columns = [set(one.value.columns) for one in page.dataframe]
    wanted = {
        "Partners": "probability", "Similar experts": "other_layer", "Importance": "score", "Vocabulary": "chance",
        "Other groups": "overall", "Likeness of weights": "router_cosine",
    }[tab]  # fmt: skip
    assert any(wanted in one for one in columns), columns


def test_a_slice(monkeypatch, demo_trace):
    page = opened(monkeypatch, demo_trace, "experts", where="lang=de", experts_layer="1", experts_expert="4")
    part = slicing.where(Trace(demo_trace), "lang=de")
    assert page.metric[0].value == f"{len(expert_profile.firings(part, 1, 4)):,}"
    page = opened(monkeypatch, demo_trace, "experts", where="lang=xx")
    assert "no sequence has lang" in said(page).replace("\\", "")


def test_nothing_but_ids(monkeypatch, tmp_path):
    experts = np.array([[[0, 1]], [[1, 2]], [[2, 0]], [[1, 0]]])
    routed.write(tmp_path / "t.duckdb", experts, [0, 0, 1, 1], pd.DataFrame({"lang": ["a", "b"]}), 3)
    page = opened(monkeypatch, tmp_path / "t.duckdb", "experts")
    assert page.metric[3].value == "–" and "made without their ids" in said(page)
    assert sent(page, "cells")["columns"] == 3


def test_no_groups_and_one_choice_a_token(monkeypatch, tmp_path):
    routed.full_trace(tmp_path / "t.duckdb", np.zeros((3, 1, 1), int), n_experts=1, seq=[0, 0, 0], token_ids=[1, 2, 1],
                      sequences=pd.DataFrame({"segment_id": ["s"]}), vocabulary={})  # fmt: skip
    page = opened(monkeypatch, tmp_path / "t.duckdb", "experts", experts_minimum="1")
    assert "chooses a single expert" in said(page) and "no vocabulary" in said(page)


@pytest.mark.parametrize("wrong", ["", "1e400", "-inf", "9" * 5000, "²", "nan"])
def test_a_link_with_nonsense(monkeypatch, tmp_path, wrong):
    routed.random_trace(tmp_path / "t.duckdb")
    names = ("layer", "expert", "minimum", "more", "which", "metric", "by", "group", "most", "token", "lang")
    page = opened(monkeypatch, tmp_path / "t.duckdb", "experts", **{f"experts_{name}": wrong for name in names})
    assert page.header[0].value == "Layer 0 · expert 0"


def test_a_run_that_took_the_place_of_another(monkeypatch, tmp_path):
    path = tmp_path / "t.duckdb"
    for experts, expected in (([0, 0, 1], "2"), ([1, 1, 0], "1")):
        path.unlink(missing_ok=True)
        routed.write(path, np.array(experts)[:, None, None], [0, 0, 1], pd.DataFrame({"lang": ["a", "b"]}), 2)
        view._info.clear()  # it is looked at once a second
        page = opened(monkeypatch, path, "experts")
        assert page.metric[0].value == expected
        count = np.frombuffer(base64.b64decode(sent(page, "cells")["count"]), "<f4")
        assert count[0] == int(expected)


def test_without_a_trace(monkeypatch):
    assert "No trace is open" in said(opened(monkeypatch, None, "experts"))
