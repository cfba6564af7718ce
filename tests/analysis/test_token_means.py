"""Means of token values by group, and the interval, against loops."""

import numpy as np
import pandas as pd
import pytest
from routed import random_trace

from workbench.analysis import token_means
from workbench.analysis.counting import sort_into_cells
from workbench.analysis.resampling import draws
from workbench.analysis.token_means import by_group, drawn_texts, in_blocks, means, only, resampled, sums


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return random_trace(tmp_path_factory.mktemp("means") / "t.duckdb", n_texts=9)


def labels(routed) -> np.ndarray:
    return routed.sequences["lang"].to_numpy(object)[routed.seq]


def test_means_against_loop(routed):
    random = np.random.default_rng(0)
    values = random.normal(size=(2, len(routed.seq)))
    values[0, random.random(len(routed.seq)) < 0.3] = np.nan
    cells = sort_into_cells(routed.trace, "lang")
    total, number = sums(list(values), cells)
    drawn = drawn_texts(cells, 60, 3)
    value, low, high = means(total, number, cells, drawn)
    text = routed.sequences["segment_id"].to_numpy()[routed.seq]
    names = list(dict.fromkeys(routed.sequences["segment_id"]))
    counts = np.concatenate(list(draws(len(names), 60, 3)))
    for group, label in enumerate(cells.labels):
        for column in range(2):
            used = (labels(routed) == label) & ~np.isnan(values[column])
            assert value[group, column] == pytest.approx(values[column][used].mean())
            again = []
            for times in counts:
                weight = np.array([times[names.index(name)] for name in text[used]])
                again.append((weight * values[column][used]).sum() / weight.sum())
            assert low[group, column] == pytest.approx(np.percentile(again, 2.5))
            assert high[group, column] == pytest.approx(np.percentile(again, 97.5))


def test_a_single_text_and_nothing(routed):
    cells = sort_into_cells(routed.trace, "segment_id")
    total, number = sums([np.full(len(routed.seq), np.nan), np.ones(len(routed.seq))], cells)
    value, low, high = means(total, number, cells, drawn_texts(cells, 20, 0))
    assert np.isnan(value[:, 0]).all() and (value[:, 1] == 1).all()
    assert np.isnan(low).all() and np.isnan(high).all()
    everything = sort_into_cells(routed.trace, None)
    value, low, _ = means(*sums([np.ones(len(routed.seq))], everything), everything, drawn_texts(everything, 0, 0))
    assert value == 1 and np.isnan(low)


def test_only_some_tokens(routed):
    kept = np.random.default_rng(1).random(len(routed.seq)) < 0.3
    kept &= labels(routed) != "de"
    cells = only(sort_into_cells(routed.trace, "lang"), kept, routed.trace.sequence_index())
    assert cells.labels == ["en"] and (np.diff(cells.group) >= 0).all()
    used = kept & (labels(routed) == "en")
    assert cells.n_tokens.tolist() == [used.sum()] and ((cells.of_token >= 0) == used).all()
    assert cells.n_sequences.tolist() == [len(set(routed.seq[used]))]
    texts = set(routed.sequences["segment_id"][routed.seq[used]])
    assert cells.n_texts.tolist() == [len(texts)] == [cells.text.max() + 1]


def test_blocks_of_texts(routed, monkeypatch):
    cells = sort_into_cells(routed.trace, "lang")
    assert in_blocks(cells, 0) is cells
    monkeypatch.setattr(token_means, "MOST_BLOCKS", 4)
    merged = in_blocks(cells, 0)
    assert merged.text.max() == 3 and (np.diff(merged.group) >= 0).all()
    assert merged.n_texts.tolist() == cells.n_texts.tolist()
    value = np.arange(len(routed.seq), dtype=float)
    np.testing.assert_allclose(by_group(sums([value], cells)[0], cells), by_group(sums([value], merged)[0], merged))
    # A text is in one block, with all its tokens.
    block = pd.Series(merged.text[merged.of_token], index=routed.sequences["segment_id"].to_numpy()[routed.seq])
    assert block[merged.of_token >= 0].groupby(level=0).nunique().max() == 1


def test_resampled_group_by_group(routed):
    cells = sort_into_cells(routed.trace, "domain")
    rows = np.random.default_rng(2).normal(size=(len(cells.group), 3))
    drawn = drawn_texts(cells, 5, 1)
    for group, again in enumerate(resampled(rows, cells, drawn)):
        expected = sum(drawn[:, [cells.text[i]]] * rows[i] for i in range(len(rows)) if cells.group[i] == group)
        np.testing.assert_allclose(again, expected, rtol=1e-6)
