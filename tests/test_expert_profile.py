"""What an expert fires on against loops over tokens; a planted taste is found."""

from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
from routed import choose, full_trace, write

from workbench.errors import InputError
from workbench.expert_profile import (
    CLASS,
    choices,
    firings,
    group_figure,
    group_labels,
    group_table,
    groupings,
    partner_figure,
    summary,
    token_index,
    token_table,
)
from workbench.slicing import where

WORDS = {0: " the", 1: "ing", 2: "<script>", 3: " 12", 4: "\n", 5: "<0xE2>", 6: "。", 7: " a"}


def made(path, *, seed=0, n_texts=14, k=2, n_experts=6, dropped=0.1, weights=True):
    """Texts of two sequences (two languages) with a taste of ids for experts, and dropped tokens."""
    random = np.random.default_rng(seed)
    sequences = pd.DataFrame(
        [
            {
                "lang": lang,
                "segment_id": f"s{text}",
                "domain": None if text % 5 == 0 else "ab"[text % 2],
                "level": text % 3,
            }
            for text in range(n_texts)
            for lang in ("zz", "de")
        ]
    )
    seq = np.repeat(np.arange(len(sequences)), random.integers(1, 25, len(sequences)))
    ids = random.integers(0, 8, len(seq))
    ids[random.random(len(seq)) < 0.05] = -1
    taste = 2 * random.normal(size=(9, n_experts))
    experts = np.stack([choose(random, taste[ids], k) for _ in range(2)], axis=1)
    experts[random.random(experts.shape[:2]) < dropped] = -1
    gates = np.where(experts < 0, 0, random.random(experts.shape)).astype(np.float32)
    trace = full_trace(
        path, experts, n_experts=n_experts, seq=seq, sequences=sequences, token_ids=ids, vocabulary=WORDS,
        weights=gates if weights else None,
    )  # fmt: skip
    return trace, experts, trace.weights(1) if weights else None, seq, ids, sequences


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return made(tmp_path_factory.mktemp("profile") / "t.duckdb")


def test_firings_against_loop(example):
    trace, experts, gates, *_ = example
    for expert in range(6):
        fired = firings(trace, 1, expert)
        expected = [
            (token, rank, gates[token, rank])
            for token in range(len(experts))
            for rank in range(2)
            if experts[token, 1, rank] == expert
        ]
        assert list(fired.itertuples(index=False, name=None)) == expected


def test_firings_without_weights(tmp_path):
    trace, *_ = made(tmp_path / "t.duckdb", weights=False)
    fired = firings(trace, 0, 2)
    assert len(fired) and fired["weight"].isna().all()
    facts = summary(token_index(trace), fired, trace.experts(0), 6)
    assert np.isnan(facts["mean_weight"]) and np.isnan(facts["max_weight"]) and facts["load"] > 0
    assert token_table(token_index(trace), fired, minimum=1)["mean_weight"].isna().all()


def test_index(example):
    trace, _, _, seq, ids, sequences = example
    index = token_index(trace)
    assert index.token_id.tolist() == ids.tolist() and index.of_sequence.tolist() == seq.tolist()
    assert index.first.tolist() == [int((seq < row).sum()) for row in range(len(sequences))]
    names = sequences["segment_id"].to_numpy()[seq]
    assert all((index.text == index.text[at]).tolist() == (names == names[at]).tolist() for at in range(0, len(seq), 7))
    assert set(index.text) == set(range(14))
    known = Counter(ids[ids >= 0].tolist())
    assert dict(zip(index.ids.tolist(), index.n_tokens.tolist(), strict=True)) == known
    assert index.spelled([2, 99]) == ["<script>", None]


def test_summary_against_loop(example):
    trace, experts, gates, seq, _, sequences = example
    index, fired = token_index(trace), firings(trace, 1, 3)
    facts = summary(index, fired, trace.experts(1), 6)
    hits = [(token, rank) for token in range(len(seq)) for rank in range(2) if experts[token, 1, rank] == 3]
    assert facts["n_fired"] == len(hits) and facts["n_tokens"] == len(seq) and facts["n_texts"] == 14
    assert facts["n_texts_fired"] == len({sequences["segment_id"][seq[token]] for token, _ in hits})
    assert facts["rate"] == pytest.approx(len(hits) / len(seq))
    assert facts["load"] == pytest.approx(6 * len(hits) / (experts[:, 1] >= 0).sum())
    assert facts["mean_weight"] == pytest.approx(np.mean([gates[at] for at in hits]))
    assert facts["max_weight"] == pytest.approx(max(gates[at] for at in hits))
    assert facts["first"] == pytest.approx(np.mean([rank == 0 for _, rank in hits]))
    for name in ("rate", "load", "mean_weight"):
        assert facts[f"{name}_low"] < facts[name] < facts[f"{name}_high"]
    again = summary(index, fired, trace.experts(1), 6)
    pd.testing.assert_series_equal(facts, again)


@pytest.mark.parametrize("minimum", [1, 20])
def test_token_table_against_loop(example, minimum):
    trace, experts, gates, seq, ids, sequences = example
    frame = token_table(token_index(trace), firings(trace, 1, 3), minimum=minimum)
    n, fires, weights, texts = Counter(), Counter(), defaultdict(list), defaultdict(set)
    for token, token_id in enumerate(ids.tolist()):
        if token_id < 0:
            continue
        n[token_id] += 1
        for rank in range(2):
            if experts[token, 1, rank] == 3:
                fires[token_id] += 1
                weights[token_id].append(gates[token, rank])
                texts[token_id].add(sequences["segment_id"][seq[token]])
    assert set(frame["token_id"]) == {token_id for token_id in n if n[token_id] >= minimum}
    base = fires.total() / n.total()
    for row in frame.to_dict("records"):
        token_id = row["token_id"]
        rate = fires[token_id] / n[token_id]
        assert row["text"] == WORDS[token_id]
        assert (row["count"], row["n_tokens"]) == (fires[token_id], n[token_id])
        assert row["share"] == pytest.approx(fires[token_id] / fires.total())
        assert row["overall"] == pytest.approx(n[token_id] / n.total())
        assert row["rate"] == pytest.approx(rate) and row["lift"] == pytest.approx(rate / base)
        assert row["lift_low"] == pytest.approx(row["low"] / base)
        assert row["lift_high"] == pytest.approx(row["high"] / base)
        assert row["low"] <= rate <= row["high"] and 1 <= row["n_effective"] <= n[token_id]
        assert row["n_texts"] == len(texts[token_id])
        if fires[token_id]:
            assert row["mean_weight"] == pytest.approx(np.mean(weights[token_id]), rel=1e-6)
            assert row["max_weight"] == pytest.approx(max(weights[token_id]))
        else:
            assert np.isnan(row["mean_weight"]) and np.isnan(row["max_weight"]) and row["q"] == 1
    assert frame["lift_low"].is_monotonic_decreasing


def planted(path, *, together: bool):
    """Id 1 always fires expert 0, the others seldom; together: all tokens of an id stand in one text."""
    random = np.random.default_rng(1)
    ids = np.repeat(np.arange(20), 20) if together else np.tile(np.arange(20), 20)
    experts = np.where(random.random(400) < 0.1, 0, random.integers(1, 8, 400))
    experts[ids == 1] = 0
    seq = np.repeat(np.arange(20), 20)
    return full_trace(path, experts[:, None, None], n_experts=8, seq=seq, token_ids=ids,
                      sequences=pd.DataFrame({"lang": ["en"] * 20}))  # fmt: skip


def test_a_taste_is_found_and_chance_is_not(tmp_path):
    trace = planted(tmp_path / "t.duckdb", together=False)
    frame = token_table(token_index(trace), firings(trace, 0, 0))
    assert frame["token_id"].iloc[0] == 1 and frame["q"].iloc[0] < 1e-6 and frame["lift_low"].iloc[0] > 2
    assert (frame["q"].iloc[1:] > 0.05).all()


def test_tokens_of_one_text_count_less(tmp_path):
    spread = planted(tmp_path / "a.duckdb", together=False)
    frame = token_table(token_index(spread), firings(spread, 0, 0))
    random = np.random.default_rng(2)
    # Whole texts fire or don't: 40 tokens of an id in 2 texts are worth about 2.
    fires = random.random(40) < 0.3
    seq = np.repeat(np.arange(40), 20)
    ids = np.where(np.arange(800) % 2, seq // 2, 99)
    trace = full_trace(tmp_path / "b.duckdb", np.where(fires[seq], 0, 1)[:, None, None], n_experts=2, seq=seq,
                       token_ids=ids, sequences=pd.DataFrame({"lang": ["en"] * 40}))  # fmt: skip
    alike = token_table(token_index(trace), firings(trace, 0, 0))
    rare = alike[alike["token_id"] != 99]
    assert (rare["n_tokens"] == 20).all() and (rare["n_effective"] < 4).all()
    assert (frame["n_effective"] > 15).all()


def grouped(trace, index, by, experts, seq, ids, sequences):
    if by in sequences:
        return [None if pd.isna(value) else str(value) for value in sequences[by].to_numpy()[seq]]
    if by == "phase":
        return ["prompt"] * len(seq)
    if by == "position":
        pos = np.concatenate([np.arange(n) for n in np.bincount(seq)])
        return ["0" if at == 0 else "1–3" if at < 4 else "4–15" if at < 16 else "16–63" for at in pos]
    kinds = {
        0: "word start", 1: "word part", 2: "word part", 3: "digit", 4: "whitespace", 5: "byte", 6: "punctuation",
        7: "word start", -1: None,
    }  # fmt: skip
    return [kinds[token_id] for token_id in ids.tolist()]


@pytest.mark.parametrize("by", ["lang", "domain", "level", "phase", "position", CLASS])
def test_group_table_against_loop(example, by):
    trace, experts, _, seq, ids, sequences = example
    index = token_index(trace)
    frame = group_table(trace, index, firings(trace, 1, 3), by, n_resamples=100)
    labels = grouped(trace, index, by, experts, seq, ids, sequences)
    n = Counter(label for label in labels if label is not None)
    fires = Counter(
        label for label, chosen in zip(labels, experts[:, 1], strict=True) if label is not None and 3 in chosen
    )
    texts = {label: {sequences["segment_id"][seq[at]] for at, one in enumerate(labels) if one == label} for label in n}
    assert set(frame["group"]) == set(n) and frame["group"].tolist() == group_labels(trace, index, by)
    for row in frame.to_dict("records"):
        label = row["group"]
        assert (row["count"], row["n_tokens"], row["n_texts"]) == (fires[label], n[label], len(texts[label]))
        assert row["share"] == pytest.approx(fires[label] / fires.total())
        assert row["overall"] == pytest.approx(n[label] / n.total())
        assert row["rate"] == pytest.approx(fires[label] / n[label])
        assert row["lift"] == pytest.approx(row["share"] / row["overall"])
        assert row["low"] - 1e-9 <= row["lift"] <= row["high"] + 1e-9
        assert row["share_low"] - 1e-9 <= row["share"] <= row["share_high"] + 1e-9
    assert len(group_figure(frame).data[0]["y"]) == len(frame)


def test_group_order_is_that_of_figures(example):
    trace = example[0]
    assert group_labels(trace, token_index(trace), "lang") == ["de", "zz"]
    assert group_labels(trace, token_index(trace), "position")[:3] == ["0", "1–3", "4–15"]


def test_very_many_texts_are_drawn_in_blocks(tmp_path):
    """More texts than blocks: the same values, and an interval of about the same width."""
    random = np.random.default_rng(0)
    seq = np.arange(2500)
    lang = np.where(random.random(2500) < 0.3, "de", "en")
    expert = np.where(random.random(2500) < np.where(lang == "de", 0.6, 0.2), 0, 1)
    trace = write(tmp_path / "t.duckdb", expert[:, None, None], seq, pd.DataFrame({"lang": lang}), 2).trace
    frame = group_table(trace, token_index(trace), firings(trace, 0, 0), "lang").set_index("group")
    for label in ("de", "en"):
        here = lang == label
        assert frame.loc[label, "lift"] == pytest.approx((expert[here] == 0).mean() / (expert == 0).mean())
        assert frame.loc[label, "n_texts"] == here.sum()
    p, n = 0.6, (lang == "de").sum()
    width = (frame["high"] - frame["low"])["de"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / n) / (expert == 0).mean(), rel=0.5)


def test_groupings(example):
    trace = example[0]
    assert groupings(token_index(trace)) == ["lang", "domain", "level", "phase", "position", CLASS]


def test_a_part_of_a_trace(example):
    trace, experts, _, seq, ids, sequences = example
    part = where(trace, "lang=de")
    index, fired = token_index(part), firings(part, 1, 3)
    kept = sequences["lang"].to_numpy()[seq] == "de"
    assert index.token_id.tolist() == ids[kept].tolist()
    assert len(fired) == (experts[kept, 1] == 3).sum()
    frame = group_table(part, index, fired, "domain", n_resamples=10)
    assert frame["n_tokens"].sum() == (kept & sequences["domain"].notna().to_numpy()[seq]).sum()


def test_an_expert_that_is_never_chosen(tmp_path):
    experts = np.zeros((30, 1, 1), int)
    sequences = pd.DataFrame({"lang": ["en", "de", "en"]})
    trace = full_trace(tmp_path / "t.duckdb", experts, n_experts=3, seq=np.repeat([0, 1, 2], 10), sequences=sequences,
                       token_ids=np.arange(30) % 2)  # fmt: skip
    index, fired = token_index(trace), firings(trace, 0, 2)
    assert fired.empty
    facts = summary(index, fired, trace.experts(0), 3)
    assert facts["n_fired"] == 0 and facts["rate"] == 0 and facts["load"] == 0 and np.isnan(facts["first"])
    frame = token_table(index, fired)
    assert (frame["count"] == 0).all() and frame["share"].isna().all() and frame["lift"].isna().all()
    frame = group_table(trace, index, fired, "lang", n_resamples=10)
    assert (frame["count"] == 0).all() and frame["lift"].isna().all()
    group_figure(frame)


def test_one_token_and_no_token(tmp_path):
    sequences = pd.DataFrame({"lang": ["en"]})
    trace = full_trace(tmp_path / "one.duckdb", np.array([[[2, 0]]]), n_experts=3, seq=[0], sequences=sequences,
                       token_ids=[5])  # fmt: skip
    index, fired = token_index(trace), firings(trace, 0, 0)
    facts = summary(index, fired, trace.experts(0), 3)
    assert facts["rate"] == 1 and np.isnan(facts["rate_low"]) and facts["first"] == 0
    assert token_table(index, fired, minimum=1)["lift"].tolist() == [1]
    frame = group_table(trace, index, fired, "lang")
    assert frame["lift"].tolist() == [1] and frame[["low", "high", "share_low"]].isna().all(axis=None)
    empty = where(trace, "lang=en").only([])
    index, fired = token_index(empty), firings(empty, 0, 0)
    assert fired.empty and not index.known and np.isnan(summary(index, fired, empty.experts(0), 3)["rate"])


def test_an_expert_that_is_always_chosen(tmp_path):
    """An expert that every token chose: nothing can be preferred. Ids above 255."""
    seq = np.repeat([0, 1], 10)
    random = np.random.default_rng(0)
    experts = np.array([[[299, *random.permutation(299)[:2]]] for _ in range(20)])
    trace = full_trace(tmp_path / "many.duckdb", experts, n_experts=300, seq=seq, token_ids=np.arange(20) % 2,
                       sequences=pd.DataFrame({"lang": ["en", "de"]}))  # fmt: skip
    fired = firings(trace, 0, 299)
    assert len(fired) == 20 and (fired["rank"] == 0).all()
    frame = token_table(token_index(trace), fired, minimum=1)
    assert np.allclose(frame["lift"], 1) and (frame["q"] > 0.9).all()


def test_only_ids_of_experts(tmp_path):
    routed = write(tmp_path / "t.duckdb", np.zeros((4, 1, 1), int), [0, 0, 1, 1], pd.DataFrame({"lang": ["a", "b"]}), 2)
    index = token_index(routed.trace)
    assert not index.known and groupings(index) == ["lang", "phase", "position"]
    assert choices(routed.trace, 0)[1] is None
    with pytest.raises(InputError, match="ids of the tokens are not known"):
        token_table(index, firings(routed.trace, 0, 0))


def test_errors(example):
    trace = example[0]
    index, fired = token_index(trace), firings(trace, 0, 0)
    with pytest.raises(InputError, match="layer 2: .* layers 0 to 1"):
        firings(trace, 2, 0)
    with pytest.raises(InputError, match="expert 6: layer 1 has experts 0 to 5"):
        firings(trace, 1, 6)
    with pytest.raises(InputError, match="minimum is 0"):
        token_table(index, fired, minimum=0)
    with pytest.raises(InputError, match="no token id occurs 9999 times"):
        token_table(index, fired, minimum=9999)
    with pytest.raises(InputError, match="no 'height'"):
        group_table(trace, index, fired, "height")


def test_no_vocabulary(tmp_path):
    trace = full_trace(tmp_path / "t.duckdb", np.zeros((3, 1, 1), int), n_experts=2, seq=[0, 0, 0], token_ids=[1, 2, 1],
                       sequences=pd.DataFrame({"lang": ["en"]}), vocabulary={})  # fmt: skip
    index, fired = token_index(trace), firings(trace, 0, 0)
    assert token_table(index, fired, minimum=1)["text"].isna().all() and CLASS not in groupings(index)
    with pytest.raises(InputError, match="has no vocabulary"):
        group_table(trace, index, fired, CLASS)


def test_figures_show_text_as_it_is(example):
    frame = pd.DataFrame({
        "group": ["<b>x</b>", "y"], "lift": [2.0, 0.0], "low": [1.5, 0.0], "high": [3.0, np.nan],
        "share": [0.5, 0.0], "overall": [0.2, 0.1], "count": [5, 0],
    })  # fmt: skip
    drawn = group_figure(frame)
    assert drawn.data[0]["y"][0] == "&lt;b&gt;x&lt;/b&gt;" and (np.array(drawn.data[0]["x"]) > 0).all()
    many = pd.concat([frame] * 50)
    assert len(group_figure(many, most=30).data[0]["y"]) == 30


def test_partner_figure():
    frame = pd.DataFrame({
        "other": [4, 2, 9], "lift": [1.5, 3.0, np.nan], "lift_low": [1.2, 2.0, np.nan], "lift_high": [2.0, 4.0, np.nan],
        "probability": [0.1, 0.2, 0], "count": [3, 6, 0],
    })  # fmt: skip
    assert list(partner_figure(frame).data[0]["y"]) == ["expert 2", "expert 4"]
