"""Segment routing best performance against loops over windows, and its laws."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import Routed, random_trace, write

from workbench.analysis import windows as counting
from workbench.analysis.consistency import PUBLISHED, consistency, figure, findings, score
from workbench.errors import InputError
from workbench.routing import NO_EXPERT


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("consistency") / "t.duckdb", n_texts=6, n_experts=5)


def as_lists(routed: Routed, layer: int, lang: str | None = None) -> list[list[list[int]]]:
    """Texts of a layer as lists of tokens, each the experts it chose."""
    texts = []
    for number in range(len(routed.sequences)):
        if lang is None or routed.sequences["lang"][number] == lang:
            tokens = routed.experts[routed.seq == number, layer]
            texts.append([[int(expert) for expert in token if expert >= 0] for token in tokens])
    return texts


def same(row: pd.Series, expected: dict[str, float] | None) -> None:
    """A row of the table has the numbers of the reference; its α is the largest of those that choose alike."""
    if expected is None:
        assert row[["srp", "alpha", "rho", "rate", "excess"]].isna().all()
        return
    assert row["srp"] == pytest.approx(expected["srp"], abs=1e-12)
    assert row["rho"] == pytest.approx(expected["rho"]) and row["rate"] == pytest.approx(expected["rate"])
    assert row["alpha"] >= expected["alpha"]
    assert row["alpha"] == math.ceil(row["window"] * expected["srp"] / 2 - 1e-9)


WINDOWS = (1, 2, 3, 5, 11, 40)


def test_layers_against_loops(routed):
    frame = consistency(routed.trace, windows=WINDOWS, n_resamples=20)
    assert len(frame) == 2 * len(WINDOWS)
    for _, row in frame.iterrows():
        same(row, references.srp([(as_lists(routed, row["layer"]), 5)], row["window"]))
    assert frame.loc[frame["window"] == 40, "srp"].isna().all()  # no text is that long
    lengths = np.bincount(routed.seq, minlength=len(routed.sequences))
    for _, row in frame.iterrows():
        long = lengths >= row["window"]
        assert row["n_windows"] == (lengths[long] - row["window"] + 1).sum() and row["n_tokens"] == lengths[long].sum()
        assert row["n_sequences"] == long.sum() and row["n_short"] == (~long).sum()
        assert row["n_texts"] == routed.sequences["segment_id"][long].nunique()
    pd.testing.assert_frame_equal(frame, consistency(routed.trace, windows=WINDOWS, n_resamples=20))


def test_experts_and_model_against_loops(routed):
    for _, row in consistency(routed.trace, windows=WINDOWS, level="expert", n_resamples=0).iterrows():
        same(row, references.srp([(as_lists(routed, row["layer"]), 5)], row["window"], only=row["expert"]))
    layers = [(as_lists(routed, layer), 5) for layer in range(2)]
    frame = consistency(routed.trace, windows=WINDOWS, level="model", n_resamples=0)
    assert "layer" not in frame and (frame["n_experts"] == 10).all()
    for _, row in frame.iterrows():
        same(row, references.srp(layers, row["window"]))


@pytest.mark.parametrize("level", ["layer", "model", "expert"])
def test_groups_against_loops(routed, level):
    frame = consistency(routed.trace, by="lang", windows=(2, 5), level=level, n_resamples=10)
    assert set(frame["group"]) == {"en", "de"} and (frame["n_unlabelled"] == 6).all()
    for _, row in frame.iterrows():
        layers = [row["layer"]] if level != "model" else [0, 1]
        texts = [(as_lists(routed, layer, row["group"]), 5) for layer in layers]
        same(row, references.srp(texts, row["window"], only=row.get("expert")))


def test_rows_are_in_order(routed):
    frame = consistency(routed.trace, by="lang", windows=(5, 2), level="expert", n_resamples=0)
    columns = ["layer", "expert", "group", "window"]
    pd.testing.assert_frame_equal(frame[columns], frame[columns].sort_values(columns, ignore_index=True))


def test_shuffling_inside_texts(routed):
    """The exact expectation against all places of the tokens that use an expert, counted one by one."""
    for single, level in ((False, "layer"), (True, "expert")):
        texts = counting.sort_into_blocks(routed.trace, "lang", level, (3,), 0)
        (counted,) = counting.count_windows(routed.trace, 0, texts, (3,), single)
        expected = np.zeros_like(counted.shuffled)
        for number, lang in enumerate(("de", "en")):
            for text in as_lists(routed, 0, lang):
                n_windows = max(len(text) - 2, 0)
                for expert in range(5):
                    used = [expert in token for token in text]
                    drawn = Counter(sum(three) for three in combinations(used, 3))
                    for f, times in drawn.items():
                        expected[number, expert if single else 0, f] += n_windows * times / math.comb(len(text), 3)
        assert np.allclose(counted.shuffled, expected, rtol=1e-10, atol=1e-12)


def test_shuffling_long_texts():
    """Tails that are left out don't matter: the probabilities of long texts sum to 1 and have the right mean."""
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((5000, 40)) ** np.linspace(0.1, 3, 40), axis=1)[:, :4].astype(np.uint16)
    experts[:, 3] = np.where(experts[:, :3].min(axis=1) > 0, 0, NO_EXPERT)  # one that nearly every token uses
    table, one = np.zeros((1, 40, 257)), np.array([0])
    logs = np.array([math.lgamma(n + 1) for n in range(5002)])
    counting.shuffle(experts, one, np.array([5000]), one, 256, np.arange(40), logs, table)
    assert np.allclose(table[0].sum(axis=1), 5000 - 255, rtol=1e-9)
    uses = np.bincount(experts[experts != NO_EXPERT], minlength=40)
    assert np.allclose(table[0] @ np.arange(257), (5000 - 255) * 256 * uses / 5000, rtol=1e-9)


texts_of_tokens = st.lists(
    st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=0, max_size=12), min_size=1, max_size=4
)


def count(texts: list[list[list[int]]], window: int, n_experts: int = 5, single: bool = False) -> np.ndarray:
    """What the kernel counts for texts as lists: (n_experts or 1, window + 1)."""
    tokens = [token for text in texts for token in text]
    experts = np.full((max(len(tokens), 1), 3), NO_EXPERT, np.uint16)
    for place, token in enumerate(tokens):
        experts[place, : len(token)] = token
    length = np.array([len(text) for text in texts])
    found = np.zeros((1, n_experts if single else 1, window + 1), np.int64)
    loads = np.zeros((1, n_experts), np.int64)
    row = np.arange(n_experts) if single else np.zeros(n_experts, np.int64)
    cell = np.zeros(len(texts), np.int64)
    counting.slide(experts, np.cumsum(length) - length, length, cell, window, row, found, loads)
    assert (found[0].sum(axis=0) @ np.arange(window + 1)) == loads.sum()  # activations counted in two ways
    return found[0]


@settings(max_examples=50, deadline=None)
@given(texts_of_tokens, st.integers(1, 14))
def test_any_texts_against_loops(texts, window):
    row = pd.Series({name: value[0] for name, value in score(count(texts, window)).items()})
    same(pd.concat([row, pd.Series({"window": window, "excess": row["srp"]})]), references.srp([(texts, 5)], window))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=20).filter(lambda found: any(found[1:])))
def test_laws(found):
    window = len(found) - 1
    result = score(np.array(found))
    rate = result["rate"]
    assert 2 * rate / (1 + rate) - 1e-12 <= result["srp"] <= 1 + 1e-12
    assert result["alpha"] == math.ceil(window * result["srp"] / 2 - 1e-9)
    alpha = int(result["alpha"])
    kept, matched = sum(found[alpha:]), sum(f * found[f] for f in range(alpha, window + 1))
    used = sum(f * number for f, number in enumerate(found))
    assert 2 * matched / (window * kept + used) == pytest.approx(result["srp"])
    assert window * kept / used == pytest.approx(result["rho"])
    times_three = score(3 * np.array(found))
    assert all(times_three[name] == pytest.approx(result[name]) for name in result)


@settings(max_examples=30, deadline=None)
@given(texts_of_tokens, st.integers(1, 6), st.permutations(range(5)))
def test_names_of_experts_do_not_matter(texts, window, names):
    renamed = [[[names[expert] for expert in token] for token in text] for text in texts]
    assert np.array_equal(count(texts, window), count(renamed, window))
    single, moved = count(texts, window, single=True), count(renamed, window, single=True)
    assert np.array_equal(single, moved[names])


def test_constant_choice_is_perfect_and_its_null_too(tmp_path):
    experts = np.tile([[[0, 3], [2, 1]]], (40, 1, 1))
    routed = write(tmp_path / "t.duckdb", experts, np.repeat([0, 1], 20), pd.DataFrame({"lang": ["en", "de"]}), 6)
    frame = consistency(routed.trace, windows=(4, 16), n_resamples=10)
    assert np.allclose(frame[["srp", "null", "within_text", "rho", "low", "high"]], 1) and np.allclose(
        frame["excess"], 0
    )
    assert (frame["alpha"] == frame["window"] / 2).all()
    single = consistency(routed.trace, windows=(4,), level="expert", n_resamples=0)
    assert single["srp"].notna().sum() == 4 and (single["srp"].dropna() == 1).all()  # never used: nothing to say


def stretches(seed: int, length: int, n_texts: int = 120, n_experts: int = 12) -> np.ndarray:
    """Tokens (n, 1, 2) that keep their two experts for stretches of so many tokens."""
    random = np.random.default_rng(seed)
    n = n_texts * 60
    scores = random.random((n // length + 1, n_experts)) ** np.linspace(0.5, 2, n_experts)
    return np.repeat(np.argsort(-scores, axis=1)[:, :2], length, axis=0)[:n, None, :]


def test_null_is_what_shuffled_tokens_give(tmp_path):
    experts, seq = stretches(1, 10), np.repeat(np.arange(120), 60)
    sequences = pd.DataFrame({"lang": ["en"] * 120})
    planted = consistency(write(tmp_path / "a.duckdb", experts, seq, sequences, 12).trace, n_resamples=100)
    shuffled = np.random.default_rng(2).permutation(experts)
    noise = consistency(write(tmp_path / "b.duckdb", shuffled, seq, sequences, 12).trace, n_resamples=100)
    for window in (4, 16):
        row, null = (frame[frame["window"] == window].iloc[0] for frame in (planted, noise))
        assert row["low"] > row["null"] + 0.1 and row["low"] < row["srp"] < row["high"]
        assert abs(null["srp"] - row["null"]) < 0.01 and abs(null["excess"]) < 0.01
        assert row["low"] > row["within_text"] + 0.05 and abs(null["srp"] - null["within_text"]) < 0.01
    assert planted["srp"].dropna().is_monotonic_decreasing


def test_intervals_cover(tmp_path):
    """Of 20 groups of texts drawn from one population, nearly all intervals hold the value of that population."""
    experts, seq = stretches(3, 5, n_texts=400), np.repeat(np.arange(400), 60)
    sequences = pd.DataFrame({"lot": [str(text % 20) for text in range(400)]})
    trace = write(tmp_path / "t.duckdb", experts, seq, sequences, 12).trace
    truth = consistency(trace, windows=(8,), n_resamples=0)["srp"].iloc[0]
    lots = consistency(trace, by="lot", windows=(8,), n_resamples=500)
    assert 16 <= ((lots["low"] <= truth) & (truth <= lots["high"])).sum() <= 20
    assert (lots["high"] - lots["low"]).between(0.2 * lots["srp"].std(), 20 * lots["srp"].std()).all()


def test_blocks_of_texts(tmp_path, monkeypatch):
    """More texts than blocks: the numbers stay, the intervals hardly change."""
    experts, seq = stretches(4, 7), np.repeat(np.arange(120), 60)
    routed = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame({"lang": ["en", "de"] * 60}), 12)
    fine = consistency(routed.trace, by="lang", windows=(4, 16), n_resamples=400)
    monkeypatch.setattr(counting, "MOST_BLOCKS", 40)
    coarse = consistency(routed.trace, by="lang", windows=(4, 16), n_resamples=400)
    ends = ["low", "high"]
    pd.testing.assert_frame_equal(fine.drop(columns=ends), coarse.drop(columns=ends))
    ratio = (coarse["high"] - coarse["low"]) / (fine["high"] - fine["low"])
    assert ratio.between(0.6, 1.6).all() and not fine[ends].equals(coarse[ends])


def test_one_thread_or_many(routed, monkeypatch):
    tables = []
    for n_threads in (1, 2, 5, 64):
        monkeypatch.setattr(counting.os, "cpu_count", lambda n_threads=n_threads: n_threads)
        tables.append(consistency(routed.trace, by="lang", windows=(2, 5), level="expert", n_resamples=5))
    assert all(tables[0].equals(table) for table in tables[1:])


@pytest.mark.parametrize("n_experts, k, n_tokens", [(1, 1, 5), (4, 4, 6), (300, 2, 40), (3, 1, 1)])
def test_extremes(tmp_path, n_experts, k, n_tokens):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((n_tokens, 1, n_experts)), axis=2)[..., :k]
    routed = write(tmp_path / "t.duckdb", experts, np.zeros(n_tokens, int), pd.DataFrame({"lang": ["en"]}), n_experts)
    for level in ("layer", "expert", "model"):
        frame = consistency(routed.trace, windows=(1, 4), level=level, n_resamples=5)
        assert frame["low"].isna().all()  # one text has no interval
        assert figure(frame).data and findings(frame)
        if level == "layer":
            for _, row in frame.iterrows():
                same(row, references.srp([(as_lists(routed, 0), n_experts)], row["window"]))
        if k == n_experts:
            assert np.allclose(frame.loc[frame["n_windows"] > 0, "srp"], 1)


def test_nothing_chosen_and_no_text_long_enough(tmp_path):
    routed = write(tmp_path / "t.duckdb", np.full((3, 1, 2), -1), [0, 0, 1], pd.DataFrame({"lang": ["en", "de"]}), 4)
    for windows in ((1,), (2,), (9,)):
        for level in ("layer", "expert", "model"):
            frame = consistency(routed.trace, windows=windows, level=level, n_resamples=5)
            assert frame[["srp", "alpha", "rho", "null", "within_text", "low"]].isna().all(axis=None)
            assert figure(frame) and "nothing to measure" in findings(frame)[0]


def test_layers_of_different_size(tmp_path):
    from workbench.arrays import from_arrays

    random = np.random.default_rng(0)
    experts = np.stack([np.argsort(random.random((50, n)), axis=1)[:, :2] for n in (4, 400)], axis=1)
    trace = from_arrays(tmp_path / "t.duckdb", experts, n_experts=[4, 400], seq=np.repeat([0, 1], 25))
    frame = consistency(trace, windows=(4,), level="model", n_resamples=5)
    layers = [([experts[:25, layer].tolist(), experts[25:, layer].tolist()], n) for layer, n in ((0, 4), (1, 400))]
    same(frame.iloc[0], references.srp(layers, 4))
    assert consistency(trace, windows=(4,), level="expert", n_resamples=5).groupby("layer").size().tolist() == [4, 400]


def test_repeated_ids_do_not_write_outside(tmp_path):
    """Files from elsewhere can hold an expert twice in a token; `workbench validate` says so."""
    experts = np.zeros((30, 3), np.uint16)
    found, loads = np.zeros((1, 2, 5), np.int64), np.zeros((1, 2), np.int64)
    one = np.array([0])
    counting.slide(experts, one, np.array([30]), one, 4, np.arange(2), found, loads)
    assert found[0].tolist() == [[0, 0, 0, 0, 27], [27, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"windows": (4, 0)}, "windows are 4, 0; expected different numbers from 1 on"),
        ({"windows": ()}, "windows are none"),
        ({"windows": (4, 4)}, "windows are 4, 4"),
        ({"level": "token"}, "level is 'token'; expected expert, layer, model"),
        ({"by": "style"}, "no 'style'"),
        ({"by": "position"}, "several positions"),
        ({"by": "phase"}, "several phases"),
    ],
)
def test_bad_input(routed, options, message):
    with pytest.raises(InputError, match=message):
        consistency(routed.trace, **options)


def legend(frame: pd.DataFrame) -> list[str]:
    """The names that the figure explains."""
    lines = figure(frame).to_dict()["data"]
    return [line["name"] for line in lines if line.get("name") and line.get("showlegend")]


def test_figures_and_findings(routed, tmp_path):
    whole = consistency(routed.trace, windows=(2, 5), n_resamples=20)
    assert legend(whole) == ["2 tokens", "5 tokens", "tokens choosing independently"]
    assert "windows of 5 tokens" in findings(whole)[0] and "independently" in findings(whole)[1]
    by = consistency(routed.trace, by="lang", windows=(2, 5), n_resamples=20)
    assert legend(by) == ["en", "de"] and " on " in findings(by)[0]
    model = consistency(routed.trace, windows=(4, 16), level="model", n_resamples=0)
    assert "OLMoE, published" in legend(model)
    assert "[" not in findings(model)[0]

    experts, names = stretches(5, 6, n_texts=20), [f"<b>{number}" for number in range(10)] * 2
    many = write(tmp_path / "t.duckdb", experts, np.repeat(np.arange(20), 60), pd.DataFrame({"style": names}), 12)
    for level in ("layer", "model", "expert"):
        frame = consistency(many.trace, by="style", windows=(4, 16), level=level, n_resamples=5)
        drawn = str(figure(frame).to_json())
        assert "&lt;b&gt;3" in drawn and '"<b>3' not in drawn.replace("\\u003c", "<")
        said = findings(frame)
        assert ("Published values" in said[-1]) == (level == "model")
    assert max(PUBLISHED, key=lambda name: PUBLISHED[name]) == "LLaMA-MoE-v2"
