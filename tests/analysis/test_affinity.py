"""Transitions between layers and their mutual information against loops over tokens and real shuffles."""

import math
from collections import Counter
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from routed import Routed, random_trace, write

from workbench.analysis.affinity import affinity
from workbench.analysis.layer_links import layer_links
from workbench.analysis.mutual_information import nats
from workbench.errors import InputError

file = import_module("workbench.analysis.affinity")
links_file = import_module("workbench.analysis.layer_links")


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("affinity") / "t.duckdb", n_layers=3, k=2, n_texts=10)


def looped(routed: Routed, layer: int, other: int) -> tuple[Counter, Counter, Counter, int, list[tuple[int, int]]]:
    """Pairs, choices in both layers, tokens, and (k, k') of each token, by a loop."""
    pairs, left, right, tokens, sizes = Counter(), Counter(), Counter(), 0, []
    for row in routed.experts:
        before = [int(expert) for expert in row[layer] if expert >= 0]
        after = [int(expert) for expert in row[other] if expert >= 0]
        if before and after:
            tokens += 1
            sizes.append((len(before), len(after)))
            left.update(before)
            right.update(after)
            pairs.update((i, j) for i in before for j in after)
    return pairs, left, right, tokens, sizes


@pytest.mark.parametrize("gap", [1, 2])
def test_affinity_against_loop(routed, gap):
    frame = affinity(routed.trace, gap=gap, n_resamples=50)
    assert len(frame) == (3 - gap) * 36
    for layer in range(3 - gap):
        pairs, left, right, tokens, _ = looped(routed, layer, layer + gap)
        for _, row in frame[frame["layer"] == layer].iterrows():
            i, j = row["expert"], row["next_expert"]
            assert row["next_layer"] == layer + gap and row["n_tokens"] == tokens
            assert row["count"] == pairs[i, j] and row["n_expert"] == left[i]
            assert row["probability"] == pytest.approx(pairs[i, j] / left[i])
            assert row["expected"] == pytest.approx(left[i] * right[j] / tokens)
            assert row["lift"] == pytest.approx(pairs[i, j] * tokens / (left[i] * right[j]))
    assert (frame["low"] <= frame["probability"] + 1e-9).all() and (frame["lift"] <= frame["lift_high"] + 1e-9).all()
    assert (frame["q"] >= frame["p"] - 1e-12).all()
    pd.testing.assert_frame_equal(frame, affinity(routed.trace, gap=gap, n_resamples=50))


def information(pairs: Counter) -> tuple[float, float, float]:
    """Mutual information, and the entropy of both sides, of a table of pairs."""
    total = sum(pairs.values())
    left, right = Counter(), Counter()
    for (i, j), n in pairs.items():
        left[i] += n
        right[j] += n
    value = sum(n / total * math.log(n * total / (left[i] * right[j])) for (i, j), n in pairs.items() if n)
    of_left, of_right = (-sum(n / total * math.log(n / total) for n in side.values()) for side in (left, right))
    return value, of_left, of_right


def test_links_against_loop(routed):
    frame = layer_links(routed.trace, n_resamples=50)
    assert list(zip(frame["layer"], frame["other"], strict=True)) == [(0, 1), (0, 2), (1, 2)]
    for _, row in frame.iterrows():
        pairs, _, _, tokens, sizes = looped(routed, int(row["layer"]), int(row["other"]))
        value, of_left, of_right = information(pairs)
        weight = sum(a * b for a, b in sizes)
        most = min(
            of_left - sum(a * b * math.log(a) for a, b in sizes) / weight,
            of_right - sum(a * b * math.log(b) for a, b in sizes) / weight,
        )
        assert row["mutual_information"] == pytest.approx(value) and row["n_tokens"] == tokens
        assert row["most"] == pytest.approx(most) and row["normalised"] == pytest.approx(value / most)
        assert row["excess"] == pytest.approx(row["mutual_information"] - row["within_text"])
        assert row["low"] <= value <= row["high"] and row["excess_low"] <= row["excess"] <= row["excess_high"]
    assert layer_links(routed.trace, gap=2, n_resamples=0)["layer"].tolist() == [0]


def shuffled(routed: Routed, random: np.random.Generator, text: np.ndarray) -> float:
    """Mutual information of layers 0 and 1 after shuffling the tokens of layer 1 inside each text."""
    order = np.arange(len(text))
    for name in np.unique(text):
        inside = np.flatnonzero(text == name)
        order[inside] = random.permutation(inside)
    before, after = routed.experts[:, 0], routed.experts[order, 1]
    table = np.zeros((1, 6, 6))
    for i in range(before.shape[1]):
        for j in range(after.shape[1]):
            np.add.at(table[0], (before[:, i], after[:, j]), 1)
    return float(nats(table[0]))


def test_nulls_are_the_mean_over_shuffles(tmp_path):
    routed = random_trace(tmp_path / "t.duckdb", n_texts=30, n_layers=2, dropped=0.0, strength=1.5)
    row = layer_links(routed.trace, n_resamples=0).iloc[0]
    random = np.random.default_rng(0)
    text = np.unique(routed.sequences["segment_id"], return_inverse=True)[1][routed.seq]
    inside = np.mean([shuffled(routed, random, text) for _ in range(200)])
    anywhere = np.mean([shuffled(routed, random, np.zeros(len(text))) for _ in range(200)])
    assert row["within_text"] == pytest.approx(inside, rel=0.06)
    assert row["chance"] == pytest.approx(anywhere, rel=0.1)
    n = len(text)
    assert row["chance"] == pytest.approx((6 - 2) * (6 - 2) / (2 * 4 * (n - 1)), rel=1e-6)


def test_planted_links_are_found_and_noise_is_not(tmp_path):
    """Layer 1 follows layer 0 expert by expert; layer 2 only follows the text; layer 3 nothing."""
    random = np.random.default_rng(1)
    seq = np.repeat(np.arange(60), 30)
    first = random.integers(6, size=len(seq))
    follows = np.where(random.random(len(seq)) < 0.5, (first + 1) % 6, random.integers(6, size=len(seq)))
    topic = random.integers(6, size=60)[seq]
    of_text = np.where(random.random(len(seq)) < 0.5, topic, random.integers(6, size=len(seq)))
    noise = random.integers(6, size=len(seq))
    experts = np.stack([first, follows, of_text, noise, of_text[::-1]], axis=1)[:, :, None]
    trace = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame({"lang": ["en"] * 60}), 6).trace
    frame = affinity(trace, n_resamples=100).set_index(["layer", "expert", "next_expert"])
    for expert in range(6):
        row = frame.loc[(0, expert, (expert + 1) % 6)]
        assert row["q"] < 1e-6 and row["lift"] > 2 and row["lift_low"] > 1.5
    assert (frame.loc[2]["p"] < 0.05).mean() < 0.15 and (frame.loc[2]["q"] < 0.05).sum() <= 1
    links = layer_links(trace, n_resamples=200).set_index(["layer", "other"]).to_dict("index")
    assert links[0, 1]["excess_low"] > 0.1 and links[0, 1]["within_text"] < 0.05
    assert abs(links[2, 3]["excess"]) < 0.02 and links[2, 3]["mutual_information"] < 0.03
    same = layer_links(
        write(tmp_path / "u.duckdb", experts[:, [2, 2]], seq, pd.DataFrame({"lang": ["en"] * 60}), 6).trace,
        n_resamples=0,
    ).iloc[0]
    assert same["normalised"] == pytest.approx(1) and same["mutual_information"] == pytest.approx(same["most"])


def test_what_the_text_explains_is_not_excess(tmp_path):
    """Two layers that each follow the text's topic and nothing else."""
    random = np.random.default_rng(2)
    seq = np.repeat(np.arange(80), 40)
    topic = random.integers(4, size=80)[seq]
    layers = [np.where(random.random(len(seq)) < 0.7, topic, random.integers(4, size=len(seq))) for _ in range(2)]
    experts = np.stack(layers, axis=1)[:, :, None]
    trace = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame({"lang": ["en"] * 80}), 4).trace
    row = layer_links(trace, n_resamples=200).iloc[0]
    assert row["mutual_information"] > 0.1 and abs(row["excess"]) < 0.01
    assert row["excess_low"] < 0 < row["excess_high"]


def test_experts_and_k_that_differ_between_layers(tmp_path):
    from routed import full_trace

    random = np.random.default_rng(0)
    experts = [random.integers(3, size=(40, 1)), np.argsort(random.random((40, 5)), axis=1)[:, :2]]
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=[3, 5], seq=np.repeat([0, 1, 2, 3], 10),
        sequences=pd.DataFrame({"lang": ["en"] * 4}),
    )  # fmt: skip
    frame = affinity(trace, n_resamples=10)
    assert len(frame) == 15 and frame["count"].sum() == 80
    assert np.allclose(frame.groupby("expert")["probability"].sum(), 2)
    links = layer_links(trace, n_resamples=10)
    assert links["n_experts"].tolist() == [3] and links["n_other_experts"].tolist() == [5]
    file.figure(frame)
    links_file.figure(links)


def test_degenerate(tmp_path):
    one = write(tmp_path / "one.duckdb", np.zeros((1, 2, 1), int), [0], pd.DataFrame({"lang": ["en"]}), 1).trace
    frame, links = affinity(one, n_resamples=5), layer_links(one, n_resamples=5)
    assert frame["lift"].tolist() == [1] and frame["p"].isna().all()
    assert links["mutual_information"].tolist() == [0] and links["normalised"].isna().all()
    empty = np.array([[[0], [-1]], [[1], [-1]]])
    none = write(tmp_path / "none.duckdb", empty, [0, 1], pd.DataFrame({"lang": ["en", "de"]}), 2).trace
    for name, ask in (("affinity", affinity), ("links", layer_links)):
        frame = ask(none, n_resamples=5)
        module = {"affinity": file, "links": links_file}[name]
        assert (frame["n_tokens"] == 0).all() and module.findings(frame)[0].startswith("No token")
        module.figure(frame)
    assert layer_links(none)["mutual_information"].isna().all()
    single = write(tmp_path / "single.duckdb", np.zeros((3, 1, 1), int), [0, 0, 0], pd.DataFrame({"lang": ["en"]}), 2)
    with pytest.raises(InputError, match="gap is 1; this trace has 1 MoE layers"):
        affinity(single.trace)
    with pytest.raises(InputError, match="at least two MoE layers"):
        layer_links(single.trace)


def test_errors(routed):
    for gap in (0, 3):
        with pytest.raises(InputError, match=f"gap is {gap}; this trace has 3 MoE layers.*1 to 2"):
            affinity(routed.trace, gap=gap)
        with pytest.raises(InputError, match=f"gap is {gap}; .*1 to 2"):
            layer_links(routed.trace, gap=gap)
    with pytest.raises(InputError, match="none of the layers"):
        affinity(routed.trace, layers=(2,))
    with pytest.raises(InputError, match="layer 9"):
        affinity(routed.trace, layers=(9,))


def test_figures_and_findings(routed):
    frame = affinity(routed.trace, n_resamples=10)
    assert len(file.figure(frame).data) == 2 and file.findings(frame)
    links = layer_links(routed.trace, n_resamples=10)
    assert links_file.figure(links).data[0].type == "heatmap" and len(links_file.findings(links)) == 3
    adjacent = links[links["gap"] == 1]
    assert links_file.figure(adjacent).data[-1].type == "scatter" and len(links_file.findings(adjacent)) == 2


def test_many_experts_leave_the_strongest_in_the_figure(tmp_path):
    random = np.random.default_rng(0)
    experts = random.integers(300, size=(200, 2, 1))
    trace = write(tmp_path / "t.duckdb", experts, np.arange(200) // 20, pd.DataFrame({"lang": ["en"] * 10}), 300).trace
    drawn = file.figure(affinity(trace, n_resamples=0))
    assert drawn.data[0].z.shape == (64, 64)
