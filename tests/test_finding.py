"""From a trace to a recipe: scores and choice against loops, planted experts are found, noise gives none."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import choose, full_trace, random_trace, write

from workbench import analysis, finding
from workbench.analysis.resampling import q_values
from workbench.arrays import from_arrays
from workbench.errors import InputError, RunError
from workbench.finding import EDITS, find, scores
from workbench.interventions import Ablate, Bias, Forbid, Force, OnExperts, Scale
from workbench.recipe import Recipe, from_json, to_json, write_recipe
from workbench.tracefile import Trace

E, K, LAYERS = 8, 2, 3
QUICK = {"n_resamples": 20}
FEW = {"n_resamples": 20, "n_permutations": 99}
UNTESTED = {"n_resamples": 0, "n_permutations": 0}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Trace:
    """German prefers expert 3 of layer 1 and avoids expert 5 of layer 2; "x" takes expert 7 of layer 0; weights."""
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(80), 15)
    german, x = (seq % 2 == 0), random.random(len(seq)) < 0.2
    experts = []
    for layer in range(LAYERS):
        logits = np.zeros((len(seq), E))
        if layer == 0:
            logits[:, 7] = np.where(x, 5, -3)
        if layer == 1:
            logits[german, 3] = 3
        if layer == 2:
            logits[german, 5] = -4
        experts.append(choose(random, logits, K))
    sequences = pd.DataFrame({"lang": ["de", "en"] * 40, "domain": list("aabb") * 20})
    path = tmp_path_factory.mktemp("finding") / "t.duckdb"
    weights = random.random((len(seq), LAYERS, K))
    return full_trace(
        path, np.stack(experts, 1), n_experts=E, seq=seq, sequences=sequences, weights=weights,
        token_ids=x.astype(int), vocabulary={0: "o", 1: "x"},
    )  # fmt: skip


def chosen_of(table: pd.DataFrame) -> list[tuple[int, int]]:
    rows = table[table["chosen"]].sort_values("score", ascending=False)
    return [(int(row["layer"]), int(row["expert"])) for _, row in rows.iterrows()]


def edits_of(recipe: Recipe) -> list[OnExperts]:
    found = [edit for edit in recipe.interventions if isinstance(edit, OnExperts)]
    assert len(found) == len(recipe.interventions)
    return found


# scores


def test_scores_are_those_of_the_analyses(planted: Trace):
    """The columns of the analyses under common names, with the rates that they are made of."""
    sets = {"group": "lang=de & domain=a", "versus": "lang=en"}
    plain = analysis.contrast(planted, **sets, **FEW)
    risk, npmi = (scores(planted, method, **sets, **FEW) for method in ("risk_difference", "npmi"))
    for ours, names in ((risk, ("difference", "low", "high")), (npmi, ("npmi", "npmi_low", "npmi_high"))):
        assert list(ours) == list(finding.COLUMNS)
        assert np.array_equal(ours[["score", "low", "high"]], plain[list(names)])
        assert np.array_equal(ours[["value", "value_versus"]], plain[["rate", "rate_versus"]])
        assert np.array_equal(ours[["p", "q"]], plain[["p", "q"]])
    assert np.allclose(risk["value"] - risk["value_versus"], risk["score"])

    task = scores(planted, "rate_difference", group="domain=a", versus="domain=b", languages=["de"], **FEW)
    theirs = analysis.task_experts(planted, task="domain=a", general="domain=b", reference="de", **FEW)
    theirs = theirs[theirs["lang"] == "de"]
    assert np.allclose(task["score"], theirs["difference"]) and np.array_equal(task["p"], theirs["p"])
    assert np.allclose(task["q"], q_values(theirs["p"].to_numpy()))

    alone = scores(planted, "importance", group="lang=de", score="weighted_frequency", **FEW)
    by = analysis.importance(planted, by="lang", scores=("weighted_frequency",), **QUICK)
    assert np.allclose(alone["score"], by.loc[by["group"] == "de", "weighted_frequency"])
    assert alone[["p", "q", "value_versus"]].isna().all(axis=None)
    everything = scores(planted, "importance", **FEW)  # the first score there is: weighted_frequency
    assert np.allclose(everything["score"], analysis.importance(planted, **QUICK)["weighted_frequency"])
    two = scores(planted, "importance", group="lang=de", versus="rest", score="weighted_frequency", **FEW)
    other = by.loc[by["group"] == "en", "weighted_frequency"].to_numpy()
    assert np.allclose(two["score"], alone["score"] - other) and two["p"].notna().all()


def test_rest_is_every_other_token(planted: Trace):
    for method in ("risk_difference", "npmi", "rate_difference"):
        group = {"group": "domain=a"}
        one, two = (scores(planted, method, **group, versus=versus, **FEW) for versus in (None, "rest"))
        pd.testing.assert_frame_equal(one, two)


def test_task_experts_of_several_languages_against_loop(tmp_path):
    routed = random_trace(tmp_path / "t.duckdb", n_texts=18, languages=("en", "de", "fr"), strength=1.0, seed=3)
    found = scores(routed.trace, "rate_difference", group="domain=a", languages=["de", "en"], **FEW)
    theirs = analysis.task_experts(routed.trace, task="domain=a", **FEW).set_index(["lang", "layer", "expert"])
    mixed = 0
    for _, row in found.iterrows():
        both = [theirs.loc[(lang, row["layer"], row["expert"])] for lang in ("de", "en")]
        signs = {np.sign(one["difference"]) for one in both}
        least = min(both, key=lambda one: abs(one["difference"]))
        if len(signs) > 1:
            mixed += 1
            assert row["score"] == 0 and row["p"] == 1
            continue
        assert row["score"] == pytest.approx(least["difference"])
        assert row["p"] == pytest.approx(max(one["p"] for one in both))
        assert [row["value"], row["value_versus"]] == pytest.approx([least["rate"], least["rate_general"]])
        assert row["n_tokens"] == least["n_tokens"] and row["n_texts_versus"] == least["n_texts_general"]
    assert 0 < mixed < len(found)


def test_layers_are_all_that_is_compared(planted: Trace):
    """q is over the layers asked about, so that asking less finds more."""
    every, some = (scores(planted, "risk_difference", group="lang=de", layers=at, **FEW) for at in (None, [2, 1]))
    assert some["layer"].unique().tolist() == [1, 2]
    kept = every[every["layer"] > 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(some.drop(columns="q"), kept.drop(columns="q"))
    assert np.array_equal(some["q"], q_values(kept["p"].to_numpy()))


# planted and noise


@pytest.mark.parametrize(
    "method, sets",
    [
        ("risk_difference", {"group": "lang=de"}),
        ("npmi", {"group": "lang=de", "versus": "lang=en"}),
        ("rate_difference", {"group": "lang=de", "by": "domain", "languages": ("a", "b")}),
        ("importance", {"group": "lang=de", "versus": "lang=en", "score": "frequency"}),
        ("importance", {"group": "lang=de", "versus": "lang=en", "score": "weighted_frequency"}),
    ],
)
def test_planted_experts_are_found(planted: Trace, method: str, sets: dict):
    table, recipe = find(planted, method, **sets, top=1, **QUICK)
    assert chosen_of(table) == [(1, 3)]
    assert recipe.interventions == (Ablate(layer=1, experts=[3]),)
    row = table[table["chosen"]].iloc[0]
    assert 0 < row["low"] < row["score"] < row["high"] and row["q"] < 0.05
    table, recipe = find(planted, method, **sets, top=1, side="versus", edit="forbid", **QUICK)
    assert chosen_of(table) == [(2, 5)] and recipe.interventions == (Forbid(layer=2, experts=[5]),)


def test_planted_token_is_found(planted: Trace):
    for group in ("token=x", "text~x", "token~^x$"):
        table, _ = find(planted, "npmi", group=group, top=1, edit="scale", **QUICK)
        assert chosen_of(table) == [(0, 7)]


def test_noise_gives_nothing(tmp_path):
    """At a false-discovery rate of 5% where nothing is to be found, 5% of searches find something."""
    random = np.random.default_rng(1)
    seq = np.repeat(np.arange(24), 6)
    experts = choose(random, random.normal(size=(24, 10))[seq], 2)[:, None]
    labels = {f"coin{trial}": random.permutation(["head", "tail"] * 12) for trial in range(20)}
    trace = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame(labels), 10).trace
    asked = {"side": "both", "edit": "bias", "n_resamples": 0, "n_permutations": 399}
    found = 0
    for trial in range(20):
        try:
            find(trace, "risk_difference", group=f"coin{trial}=head", **asked)
            found += 1
        except RunError as error:
            assert "nothing found: for none of 10 experts risk_difference is beyond 0 at a false-disc" in str(error)
            assert "(12 and 12 texts). The best: layer 0 expert " in str(error)
    assert found <= 4  # 1 on average; more than 4 in 1 of 400 cases


# choice


def table_of(random: np.random.Generator, tested: bool) -> pd.DataFrame:
    rows = [(layer, expert) for layer in range(3) for expert in range(5)]
    frame = pd.DataFrame(rows, columns=["layer", "expert"])
    frame["score"] = random.integers(-4, 5, len(rows)) / 4  # equal scores occur
    frame["q"] = random.integers(0, 5, len(rows)) / 40 if tested else np.nan
    return frame


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.booleans(),
    st.sampled_from(["group", "versus"]),
    st.none() | st.integers(1, 9),
    st.none() | st.integers(1, 4),
    st.none() | st.sampled_from([0.0, 0.25, 0.8]),
    st.sampled_from([0.05, 1.0]),
)
def test_choice_against_loop(seed, tested, side, top, per_layer, threshold, fdr):
    table = table_of(np.random.default_rng(seed), tested)
    picked = finding.chosen(table, side, top, per_layer, threshold, fdr)
    rows = []
    for at, row in table.iterrows():
        score = row["score"] if side == "group" else -row["score"]
        if score > (threshold or 0) and (not tested or row["q"] <= fdr):
            rows.append((-score, row["layer"], row["expert"], at))
    rows.sort()
    if per_layer is not None:
        rows = [row for at, row in enumerate(rows) if sum(one[1] == row[1] for one in rows[:at]) < per_layer]
    if top is None and per_layer is None and threshold is None:
        top = 10
    assert picked.tolist() == [row[3] for row in rows][:top]


def test_the_ten_highest_by_default(planted: Trace):
    table, _ = find(planted, "npmi", group="lang=de", fdr=1, edit="bias", **FEW)
    assert table["chosen"].sum() == min(10, (table["score"] > 0).sum())
    every, _ = find(planted, "npmi", group="lang=de", fdr=1, threshold=0, edit="bias", **FEW)
    assert every["chosen"].tolist() == (every["score"] > 0).tolist()


def test_without_a_test_the_score_decides(planted: Trace):
    table, _ = find(planted, "risk_difference", group="lang=de", top=3, n_permutations=0, **QUICK)
    assert table["q"].isna().all() and table["chosen"].sum() == 3
    assert set(chosen_of(table)) == set(map(tuple, table.nlargest(3, "score")[["layer", "expert"]].to_numpy()))


# recipe


@pytest.mark.parametrize(
    "options, mine, theirs",
    [
        ({}, Ablate(layer=1, experts=[3]), Force(layer=2, experts=[5])),
        (
            {"edit": "ablate", "level": "selection", "scope": "phase=generated"},
            Ablate(layer=1, experts=[3], level="selection", scope="phase=generated"),
            Force(layer=2, experts=[5], level="selection", scope="phase=generated"),
        ),
        ({"edit": "forbid"}, Forbid(layer=1, experts=[3]), Force(layer=2, experts=[5])),
        ({"edit": "force"}, Force(layer=1, experts=[3]), Forbid(layer=2, experts=[5])),
        (
            {"edit": "force", "level": "selection"},
            Force(layer=1, experts=[3], level="selection"),
            Forbid(layer=2, experts=[5]),
        ),
        ({"edit": "bias"}, Bias(layer=1, experts=[3], strength=0.5), Bias(layer=2, experts=[5], strength=-0.5)),
        (
            {"edit": "bias", "strength": -1},
            Bias(layer=1, experts=[3], strength=-1),
            Bias(layer=2, experts=[5], strength=1),
        ),
        ({"edit": "scale"}, Scale(layer=1, experts=[3], factor=64), Scale(layer=2, experts=[5], factor=1 / 64)),
        (
            {"edit": "scale", "strength": 2.0},
            Scale(layer=1, experts=[3], factor=2),
            Scale(layer=2, experts=[5], factor=0.5),
        ),
    ],
)
def test_edits_of_both_sides(planted: Trace, options: dict, mine, theirs):
    asked = {"group": "lang=de", "versus": "lang=en", "top": 1, **options, **UNTESTED}
    table, recipe = find(planted, "risk_difference", side="both", **asked)
    assert recipe.interventions == (mine, theirs)
    assert table.loc[table["chosen"], "side"].tolist() == ["group", "versus"]
    assert (table.loc[~table["chosen"], "side"] == "").all()


def test_of_one_side_the_edit_is_the_one_asked_for(planted: Trace):
    for side, layer, expert in (("group", 1, 3), ("versus", 2, 5)):
        asked = {"group": "lang=de", "top": 1, "side": side, "edit": "force", **UNTESTED}
        _, recipe = find(planted, "risk_difference", **asked)
        assert recipe.interventions == (Force(layer=layer, experts=[expert]),)


def test_recipe_does_it(tmp_path):
    """A model is traced, its German experts are ablated, and traced again it never selects them."""
    from workbench.capture import trace
    from workbench.corpus import from_rows
    from workbench.intervening import intervene
    from workbench.models import load

    texts = {"de": "Jeder Mensch hat das Recht auf Leben und Freiheit.", "en": "Everyone has the right to liberty."}
    corpus = from_rows([{"text": text, "lang": lang} for lang, text in texts.items()])
    model, out = load("demo"), tmp_path / "t.duckdb"
    plain = trace(model, corpus, out, run="plain", progress=False)
    table, recipe = find(plain, "risk_difference", group="lang=de", top=6, fdr=1, **UNTESTED)
    write_recipe(recipe, tmp_path / "r.json")
    with intervene(model, tmp_path / "r.json") as applied:
        edited = trace(model, corpus, out, run="edited", mode="append", progress=False)
    assert min(applied.touched) >= plain.n_tokens
    for layer, expert in chosen_of(table):
        assert (plain.experts(layer) == expert).any() and not (edited.experts(layer) == expert).any()


def test_one_intervention_a_layer(planted: Trace):
    table, recipe = find(planted, "npmi", group="lang=de", per_layer=3, fdr=1, **FEW)
    assert [edit.layer for edit in edits_of(recipe)] == [0, 1, 2]
    for edit in edits_of(recipe):
        part = table[table["chosen"] & (table["layer"] == edit.layer)]
        assert list(edit.experts) == sorted(part["expert"]) and len(part) == min(
            3, (table["score"][table["layer"] == edit.layer] > 0).sum()
        )


@pytest.mark.parametrize(
    "method, options",
    [
        ("risk_difference", {"group": "lang=de", "layers": range(1, 3), "edit": "bias", "side": "both"}),
        ("npmi", {"group": "token=x", "versus": "rest", "top": 2, "scope": 'token="x"', "edit": "scale"}),
        ("rate_difference", {"group": "domain=a", "languages": ("en", "de"), "fdr": 1}),
        ("importance", {"score": "frequency", "threshold": 0.2}),
    ],
)
def test_source_makes_it_again(planted: Trace, method: str, options: dict):
    table, recipe = find(planted, method, **options, **FEW)
    again = from_json(json.loads(json.dumps(to_json(recipe), allow_nan=False)))
    source = dict(again.source)
    assert again.interventions == recipe.interventions
    same_table, same = find(Trace(source["trace"], source["run"]), source["method"], **source["options"])
    assert same == again and to_json(same) == to_json(again)
    pd.testing.assert_frame_equal(table, same_table)
    assert again.model == {"name": "tiny", "family": "test", "layers": [[E, K]] * LAYERS}
    assert source["n_compared"] == len(table) and source["n_tokens"] == table["n_tokens"].iloc[0]
    assert source["corpus"]["names"] == ["c"] and set(source["versions"]) >= {"moe-workbench", "numpy", "scipy"}
    shown = pd.DataFrame(source["experts"])
    rows = table[table["chosen"]].reset_index(drop=True)
    assert shown[["layer", "expert", "side"]].equals(rows[["layer", "expert", "side"]])
    assert np.allclose(shown["score"], rows["score"])


def test_a_model_that_is_not_known(tmp_path):
    experts = np.array([[[0]], [[0]], [[1]], [[1]]])
    trace = from_arrays(
        tmp_path / "t.duckdb", experts, n_experts=4, seq=[0, 0, 1, 1], sequences=pd.DataFrame({"lang": ["de", "en"]})
    )
    _, recipe = find(trace, "risk_difference", group="lang=de", fdr=1)
    assert recipe.model == {} and recipe.interventions == (Ablate(layer=0, experts=[0]),)


def test_same_seed_same_answer(planted: Trace):
    one, two = (find(planted, "npmi", group="lang=de", **FEW, fdr=0.5) for _ in range(2))
    pd.testing.assert_frame_equal(one[0], two[0])
    assert one[1] == two[1]


# errors


@pytest.mark.parametrize(
    "method, options, parts",
    [
        ("magic", {}, ("method is 'magic'; expected risk_difference, npmi, rate_difference, importance",)),
        ("npmi", {}, ("npmi asks about a set of tokens: give group",)),
        ("importance", {"versus": "lang=en"}, ("importance asks about a set of tokens: give group",)),
        ("importance", {"group": "lang=de", "score": "size"}, ("scores has 'size'", "frequency")),
        ("importance", {"group": "lang=de", "score": "reap"}, ("reap needs weights and norms", "--record")),
        ("importance", {"group": "lang=de", "side": "both"}, ("side is 'both', but importance", "give versus")),
        ("npmi", {"group": "lang=de", "score": "reap"}, ("score is 'reap', which only importance has",)),
        ("npmi", {"group": "lang=de", "languages": ["fr"]}, ("languages and by are for rate_difference",)),
        ("rate_difference", {"group": "domain=a", "languages": []}, ("languages is []",)),
        ("rate_difference", {"group": "domain=a", "languages": "en"}, ("languages is 'en'",)),
        ("rate_difference", {"group": "domain=a", "languages": ["xx"]}, ("no sequence has lang 'xx'",)),
        (
            "rate_difference",
            {"group": "lang=de", "versus": "lang=en", "by": "lang", "languages": ["de"]},
            ("no lang has both",),
        ),
        ("npmi", {"group": "lang=xx"}, ("no sequence has lang 'xx'; there is de, en",)),
        ("npmi", {"group": "lang=de", "versus": "domain=a"}, ("tokens are both",)),
        ("npmi", {"group": "lang=de", "layers": [1, 7]}, ("layer 7", "layers 0 to 2")),
        ("npmi", {"group": "lang=de", "layers": []}, ("layers is empty",)),
        ("npmi", {"group": "lang=de", "top": 0}, ("top is 0; expected a number of experts from 1",)),
        ("npmi", {"group": "lang=de", "per_layer": -1}, ("per_layer is -1",)),
        ("npmi", {"group": "lang=de", "threshold": -0.5}, ("threshold is -0.5",)),
        ("npmi", {"group": "lang=de", "threshold": math.nan}, ("threshold is nan",)),
        ("npmi", {"group": "lang=de", "fdr": 0}, ("fdr is 0",)),
        ("npmi", {"group": "lang=de", "side": "left"}, ("side is 'left'; expected group, versus, both",)),
        ("npmi", {"group": "lang=de", "edit": "kill"}, ("edit is 'kill'; expected ablate, forbid",)),
        ("npmi", {"group": "lang=de", "edit": "bias", "level": "logits"}, ("level is 'logits'; only ablate and",)),
        ("npmi", {"group": "lang=de", "edit": "force", "level": "output"}, ("Force: level is 'output'",)),
        ("npmi", {"group": "lang=de", "strength": 2.0}, ("strength is 2.0; only bias and scale",)),
        ("npmi", {"group": "lang=de", "edit": "scale", "strength": -1}, ("Scale: factor is -1",)),
        ("npmi", {"group": "lang=de", "edit": "bias", "strength": math.inf}, ("Bias: strength is inf",)),
        ("npmi", {"group": "lang=de", "edit": "scale", "strength": 0, "side": "both"}, ("0 has no opposite",)),
        ("npmi", {"group": "lang=de", "level": "output", "side": "both"}, ("has no opposite",)),
        ("npmi", {"group": "lang=de", "scope": "lang=de"}, ("scope 'lang=de'", "phase=generated")),
    ],
)
def test_bad_input(planted: Trace, method: str, options: dict, parts: tuple[str, ...]):
    with pytest.raises(InputError) as refused:
        find(planted, method, **options, **FEW)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("edit", EDITS)
def test_no_router_is_asked_for_the_impossible(planted: Trace, edit: str):
    """At most k forced and at least k + 1 left in a layer; weights and biases can be anything."""
    asked = {"edit": edit, "n_resamples": 0}
    most = {"force": K, "ablate": E - K - 1, "forbid": E - K - 1}.get(edit, E)
    _, recipe = find(planted, "importance", per_layer=most, **asked)
    assert all(len(one.experts) == most for one in edits_of(recipe))
    if most == E:
        return
    with pytest.raises(InputError) as refused:
        find(planted, "importance", per_layer=most + 1, **asked)
    assert "layer 0: " in str(refused.value) and "choose fewer in each layer (per_layer, top)" in str(refused.value)
    expected = "3 experts to force, but its router selects 2" if edit == "force" else "8 experts 2 are left"
    assert expected in str(refused.value) and ("at least 3" in str(refused.value) or edit == "force")


@pytest.mark.parametrize(
    "method, options, said",
    [
        ("risk_difference", {}, r"none risk_difference is above 0\.95\. The best: layer 1 expert 3 \(\+0\.\d+, q 0"),
        ("risk_difference", {"side": "versus"}, r"for none .* is below -0\.95\. The best: layer 2 expert 5 \(-0\.\d+,"),
        (
            "risk_difference",
            {"n_permutations": 39, "fdr": 0.01},
            r"false-discovery rate of 0\.01 \(40 and 40 texts\).*11 experts have the smallest p of 39 permutations: "
            r"take 219 of them\.",
        ),
        (
            "importance",
            {"group": None},
            r"24 of 24 experts pass, but for none importance is above 0\.95\. The best: layer 1 expert 3 \(\+0\.\d+\);"
            r".*lower the threshold",
        ),
    ],
)
def test_nothing_found_says_why(planted: Trace, method: str, options: dict, said: str):
    with pytest.raises(RunError, match=said):
        find(planted, method, **{"group": "lang=de", "threshold": 0.95, "n_resamples": 0, **options})


def test_nothing_to_find_at_all(tmp_path):
    """Every token takes the same expert: no difference, no p, no best."""
    trace = write(
        tmp_path / "t.duckdb", np.zeros((8, 1, 1), int), np.repeat(np.arange(4), 2),
        pd.DataFrame({"lang": ["de", "en"] * 2}), 4,
    ).trace  # fmt: skip
    with pytest.raises(RunError, match=r"^nothing found: for none of 4 experts npmi is above 0\. What helps"):
        find(trace, "npmi", group="lang=de", **FEW)
