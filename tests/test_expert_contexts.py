"""Contexts against loops: which tokens are shown, in what order, and with what text around them."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from routed import full_trace

from workbench.errors import InputError
from workbench.expert_contexts import contexts, excerpts, window
from workbench.expert_profile import firings, token_index


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    random = np.random.default_rng(3)
    sequences = pd.DataFrame({
        "lang": ["en", "de"] * 10, "segment_id": [f"s{text // 2}" for text in range(20)], "domain": "x", "source": "y",
    })  # fmt: skip
    seq = np.repeat(np.arange(20), 30)
    ids = random.integers(0, 12, len(seq))
    experts = np.stack([random.permutation(5)[:2] for _ in seq])[:, None]
    weights = random.random(experts.shape).astype(np.float32).round(1)
    trace = full_trace(
        tmp_path_factory.mktemp("contexts") / "t.duckdb", experts, n_experts=5, seq=seq, sequences=sequences,
        token_ids=ids, weights=weights, vocabulary={token_id: f" w{token_id}" for token_id in range(12)},
    )  # fmt: skip
    return trace, token_index(trace), firings(trace, 0, 3)


def spelled(index, seq, start, end):
    first = int(index.first[seq])
    return "".join(f" w{token_id}" for token_id in index.token_id[first + start : first + end])


def test_the_largest_weights_one_of_a_text(example):
    _, index, fired = example
    found = contexts(index, fired, most=8)
    best = {}
    for token, weight in zip(fired["token"], fired["weight"], strict=True):
        text = int(index.text[token])
        best[text] = max(best.get(text, 0), weight)
    assert found["weight"].tolist() == sorted(best.values(), reverse=True)[:8]
    assert len({index.sequences["segment_id"][row["seq"]] for row in found.to_dict("records")}) == 8
    for row in found.to_dict("records"):
        seq, pos = row["seq"], row["pos"]
        assert row["before"] == spelled(index, seq, max(0, pos - 24), pos)
        assert row["token"] == f" w{row['token_id']}" == spelled(index, seq, pos, pos + 1)
        assert row["after"] == spelled(index, seq, pos + 1, min(30, pos + 25))
        assert row["lang"] == ["en", "de"][seq % 2] and (row["domain"], row["source"]) == ("x", "y")
        match = fired[fired["token"] == row["place"]].iloc[0]
        assert (match["weight"], match["rank"]) == (row["weight"], row["rank"])
        assert index.first[seq] + pos == row["place"]


@pytest.mark.parametrize(("per_text", "per_token"), [(1, None), (2, 1), (None, 3), (None, None), (3, 2)])
def test_limits_are_kept_and_nothing_else_is_left_out(example, per_text, per_token):
    _, index, fired = example
    found = contexts(index, fired, most=10_000, per_text=per_text, per_token=per_token)
    texts, ids = Counter(), Counter()
    chosen = set(found["place"])
    for place in found["place"]:
        texts[index.text[place]] += 1
        ids[index.token_id[place]] += 1
    assert max(texts.values()) <= (per_text or 10_000) and max(ids.values()) <= (per_token or 10_000)
    for token in set(fired["token"]) - chosen:
        assert texts[index.text[token]] == per_text or ids[index.token_id[token]] == per_token
    assert found["weight"].is_monotonic_decreasing


def test_drawn_at_random(example):
    _, index, fired = example
    one, same, other = (contexts(index, fired, order="random", most=15, seed=seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(one, same)
    assert set(one["place"]) != set(other["place"]) and set(one["place"]) <= set(fired["token"])
    drawn = [contexts(index, fired, order="random", most=1, seed=seed)["weight"].iloc[0] for seed in range(200)]
    assert np.mean(drawn) == pytest.approx(fired["weight"].mean(), abs=0.08)


def test_one_token_id_and_some_sequences(example):
    _, index, fired = example
    german = (index.sequences["lang"] == "de").to_numpy()
    found = contexts(index, fired, most=99, per_text=None, token_id=4, sequences=german)
    expected = [t for t in fired["token"] if index.token_id[t] == 4 and index.of_sequence[t] % 2 == 1]
    assert sorted(found["place"]) == expected and (found["lang"] == "de").all()
    nothing = contexts(index, fired, token_id=77)
    assert nothing.empty and list(nothing) == list(found)


def test_without_weights_first_choices_come_first(example):
    _, index, fired = example
    found = contexts(index, fired.assign(weight=np.nan), most=9)
    assert (found["rank"] == 0).all() and found["weight"].isna().all()
    parts = excerpts(index, fired.assign(weight=np.nan), found)
    assert {part["weight"] for line in parts for part in line} == {0.0, 1.0}


def test_excerpts(example):
    _, index, fired = example
    found = contexts(index, fired, most=5, width=3)
    fires = dict(zip(fired["token"], fired["weight"], strict=True))
    for row, line in zip(found.to_dict("records"), excerpts(index, fired, found, width=3), strict=True):
        assert "".join(part["text"] for part in line) == row["before"] + row["token"] + row["after"]
        start = row["place"] - [part["here"] for part in line].index(True)
        for at, part in enumerate(line):
            assert part["fires"] == (start + at in fires)
            expected = fires.get(start + at, 0) / fired["weight"].max()
            assert part["weight"] == pytest.approx(expected, abs=1e-3)
        assert sum(part["here"] for part in line) == 1 and len(line) <= 7


def test_pieces_of_characters_unknown_ids_and_the_ends_of_texts(tmp_path):
    euro = "€".encode()
    vocabulary = {0: "a", 1: "â", 2: "\x82", 3: "¬", 4: " b"} | {
        at + 1: {0xE2: "â", 0x82: "Ĥ", 0xAC: "¬"}[byte] for at, byte in enumerate(euro)
    }
    ids = [0, 1, 2, 3, 4, 4, -1, 0]
    trace = full_trace(
        tmp_path / "t.duckdb", np.zeros((8, 1, 1), int), n_experts=1, seq=[0] * 5 + [1] * 3, token_ids=ids,
        sequences=pd.DataFrame({"lang": ["en", "en"]}), vocabulary=vocabulary,
    )  # fmt: skip
    index = token_index(trace)
    assert window(index, 0, 9) == (0, ["a", "€", "", "", " b"])
    assert window(index, 2, 1) == (1, ["€", "Ĥ", ""])  # its own entry, because it begins no character
    assert window(index, 4, 0) == (4, [" b"])
    assert window(index, 5, 3) == (5, [" b", "\ufffd", "a"])
    found = contexts(index, firings(trace, 0, 0), most=9, per_text=None, width=2)
    row = found[found["place"] == 6].iloc[0]
    assert (row["before"], row["token"], row["after"]) == (" b", "\ufffd", "a")


def test_errors(example):
    _, index, fired = example
    with pytest.raises(InputError, match="order is 'best'; expected one of weight, random"):
        contexts(index, fired, order="best")
    for wrong in ({"most": 0}, {"per_text": 0}, {"per_token": 0}, {"width": -1}):
        with pytest.raises(InputError, match="expected at least 1"):
            contexts(index, fired, **wrong)
