"""Parts of a trace: the same arrays, cut."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import random_trace

from workbench import analysis, slicing
from workbench.analysis.counting import text_codes
from workbench.errors import InputError
from workbench.tracefile import Trace


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return random_trace(tmp_path_factory.mktemp("slicing") / "t.duckdb", n_texts=12)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_part_has_the_arrays_of_its_sequences(routed, data):
    whole = routed.trace
    seqs = data.draw(st.lists(st.sampled_from(range(whole.n_sequences)), unique=True))
    part = whole.only(seqs)
    mine = np.isin(routed.seq, seqs)
    assert part.n_sequences == len(seqs) and part.n_tokens == mine.sum()
    assert part.sequences()["seq"].tolist() == sorted(seqs)
    pd.testing.assert_frame_equal(part.tokens(), whole.tokens()[mine].reset_index(drop=True))
    for layer in range(whole.n_layers):
        np.testing.assert_array_equal(part.experts(layer), whole.experts(layer)[mine])
    np.testing.assert_array_equal(
        part.sequences()["seq"].to_numpy()[part.sequence_index()] if seqs else [], routed.seq[mine]
    )


def test_the_whole_is_left_as_it_was(routed):
    before = routed.trace.n_tokens
    routed.trace.only([0])
    assert routed.trace.n_tokens == before and routed.trace.experts(0).shape[0] == before


def test_parts_of_parts(routed):
    part = routed.trace.only([3, 1, 7])
    assert part.only([7, 1]).sequences()["seq"].tolist() == [1, 7]
    with pytest.raises(InputError, match="has no sequence 2"):
        part.only([1, 2])


def test_where_is_the_filter_of_columns(routed):
    part = slicing.where(routed.trace, "lang=de & source=c1")
    wanted = routed.sequences.index[(routed.sequences["lang"] == "de") & (routed.sequences["source"] == "c1")]
    assert part.sequences()["seq"].tolist() == wanted.tolist()
    own = analysis.load(part, n_resamples=0)
    by_source = analysis.load(slicing.where(routed.trace, "lang=de"), by="source", n_resamples=0)
    theirs = by_source[by_source["group"] == "c1"]
    np.testing.assert_array_equal(own["count"], theirs["count"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lang=fr", "there is de, en"),
        ("language=de", "nothing called 'language'"),
        ("de", "is not a condition"),
        ("phase=prompt", "means single tokens"),
        ("text~a", "means single tokens"),
        ("lang~^x", "no sequence meets"),
    ],
)
def test_where_says_what_is_wrong(routed, text, message):
    with pytest.raises(InputError, match=message):
        slicing.where(routed.trace, text)


@pytest.mark.parametrize("n_tokens", [1, 17, 60, 10_000])
def test_a_sample_is_whole_texts_with_enough_tokens(routed, n_tokens):
    whole = routed.trace
    part = slicing.sample(whole, n_tokens, seed=3)
    assert part.n_tokens >= min(n_tokens, whole.n_tokens)
    sequences = whole.sequences()
    drawn = sequences["seq"].isin(part.sequences()["seq"])
    texts = pd.Series(text_codes(sequences))
    assert set(texts[drawn]).isdisjoint(texts[~drawn])
    again = slicing.sample(whole, n_tokens, seed=3)
    assert again.sequences()["seq"].tolist() == part.sequences()["seq"].tolist()
    if n_tokens == 10_000:
        assert part is whole
    else:  # without the last text that was drawn there would be too few
        sizes = sequences.groupby(texts.to_numpy())["n_tokens"].sum()[sorted(set(texts[drawn]))]
        assert part.n_tokens - sizes.max() < n_tokens


def test_samples_of_other_seeds_are_other_texts(routed):
    found = {tuple(slicing.sample(routed.trace, 20, seed=seed).sequences()["seq"]) for seed in range(20)}
    assert len(found) > 5


def test_a_sample_has_at_least_a_token(routed):
    with pytest.raises(InputError, match="n_tokens is 0"):
        slicing.sample(routed.trace, 0)


def test_profiles_of_a_part(tmp_path):
    from routed import with_profiles

    profiles = [np.random.default_rng(layer).dirichlet(np.ones(4), 5) for layer in range(2)]
    sequences = pd.DataFrame({"lang": ["de", "en", "de", "fr", None]})
    path = tmp_path / "p.duckdb"
    with_profiles(path, profiles, sequences, [2, 3, 1, 4, 2])
    part = slicing.where(Trace(path), "lang=de")
    np.testing.assert_allclose(part.profiles(1), profiles[1][[0, 2]], atol=1e-6)
