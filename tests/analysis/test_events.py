"""Streams of events against loops over texts."""

import numpy as np
import pandas as pd
import pytest
from routed import Routed, full_trace, random_trace, write

from workbench.analysis import events as module
from workbench.analysis.events import Events, events, joint_events, plan
from workbench.errors import InputError


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("events") / "t.duckdb", dropped=0.3)


def listed(stream: Events) -> list[list[list[int]]]:
    """Runs of events of experts."""
    cut = [stream.experts[a:b].tolist() for a, b in zip(stream.offsets[:-1], stream.offsets[1:], strict=True)]
    return [cut[a:b] for a, b in zip(stream.runs[:-1], stream.runs[1:], strict=True)]


def union(rows) -> list[int]:
    """Experts of some tokens, by first occurrence."""
    return list(dict.fromkeys(int(expert) for row in rows for expert in row if expert >= 0))


def texts(routed: Routed, layer: int) -> list[np.ndarray]:
    return [routed.experts[routed.seq == number, layer] for number in range(len(routed.sequences))]


def test_every_token_is_an_event(routed):
    for layer in range(2):
        stream = events(routed.trace, layer, plan(routed.trace))
        assert listed(stream) == [[union([row]) for row in text] for text in texts(routed, layer)]
        assert stream.n_experts == 6 and stream.per_token == 1 and stream.largest == 2
        assert stream.unit.tolist() == [number // 3 for number in range(24)]  # three languages of each text
        assert stream.n_units == 8


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_a_chunk_is_an_event(routed, chunk):
    planned = plan(routed.trace, phase="prefill", chunk=chunk)
    size = chunk or 1000
    expected = [[union(text[at : at + size]) for at in range(0, len(text), size)] for text in texts(routed, 1)]
    assert listed(events(routed.trace, 1, planned)) == expected
    assert planned.tokens.sum() == len(routed.seq) and planned.n_texts == 8


@pytest.mark.parametrize("phase, chunk", [("decode", None), ("prefill", 2)])
def test_batches_advance_together(routed, phase, chunk):
    step = chunk or 1
    expected, split = [], texts(routed, 0)
    for first in range(0, 24, 5):
        group = split[first : first + 5]
        places = range(0, max(map(len, group)), step)
        expected.append([union([row for text in group for row in text[at : at + step]]) for at in places])
    planned = plan(routed.trace, phase=phase, chunk=chunk, batch=5)
    stream = events(routed.trace, 0, planned)
    assert listed(stream) == expected and stream.n_units == 5 and planned.n_texts == 5
    assert planned.tokens.tolist() == [sum(map(len, split[first : first + 5])) for first in range(0, 24, 5)]


def test_prompts_in_chunks_and_generated_tokens_alone(tmp_path):
    phase = np.array([0, 1, 1, 1, 2, 2, 1, 1, 2, 1, 1, 1])
    seq = np.repeat([0, 1, 2], [6, 3, 3])
    experts = np.arange(12)[:, None, None]
    sequences = pd.DataFrame({"lang": ["en"] * 3})
    trace = full_trace(tmp_path / "t.duckdb", experts, n_experts=12, seq=seq, sequences=sequences, phase=phase)
    found = listed(events(trace, 0, plan(trace, phase="recorded")))
    assert found == [[[0, 1, 2, 3], [4], [5]], [[6, 7], [8]], [[9, 10, 11]]]
    found = listed(events(trace, 0, plan(trace, phase="recorded", chunk=3)))
    assert found == [[[0, 1, 2], [3], [4], [5]], [[6, 7], [8]], [[9, 10, 11]]]


def test_all_layers_in_one_stream(tmp_path):
    random = np.random.default_rng(0)
    ids = [np.argsort(random.random((7, 4)), axis=1)[:, :2], np.argsort(random.random((7, 3)), axis=1)[:, :1]]
    ids[0][2] = -1
    sequences = pd.DataFrame({"lang": ["en", "de"]})
    trace = full_trace(tmp_path / "t.duckdb", ids, n_experts=[4, 3], seq=[0] * 5 + [1] * 2, sequences=sequences)
    tokens = [[union([ids[0][token]]), [int(ids[1][token, 0]) + 4]] for token in range(7)]
    planned = plan(trace)
    stream = joint_events(trace, planned)
    assert listed(stream) == [[event for token in tokens[a:b] for event in token] for a, b in ((0, 5), (5, 7))]
    assert stream.n_experts == 7 and stream.per_token == 2
    whole = joint_events(trace, planned, whole_tokens=True)
    assert listed(whole) == [[first + second for first, second in tokens[a:b]] for a, b in ((0, 5), (5, 7))]
    assert whole.per_token == 1 and whole.largest == 3


def test_many_texts_are_resampled_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_UNITS", 4)
    sequences = pd.DataFrame({"lang": ["en"] * 10})
    routed = write(tmp_path / "t.duckdb", np.zeros((20, 1, 1), int), np.repeat(np.arange(10), 2), sequences, 2)
    planned = plan(routed.trace, seed=1)
    assert planned.n_units == 4 and planned.n_texts == 10
    assert sorted(np.bincount(planned.unit).tolist()) == [2, 2, 3, 3] and planned.tokens.sum() == 20
    assert not np.array_equal(planned.unit, plan(routed.trace, seed=2).unit)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"phase": "training"}, "phase is 'training'; expected one of decode, prefill, recorded"),
        ({"chunk": 0}, "chunk is 0"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_refused(routed, options, said):
    with pytest.raises(InputError, match=said):
        plan(routed.trace, **options)
