"""Divergence between translations, and the U-shape, against loops over texts."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from routed import random_trace, with_profiles, write
from translations import divergence, entropy, parallel, translated

from workbench import analysis
from workbench.analysis.alignment import mismatch
from workbench.analysis.parallel import normalised_divergence
from workbench.errors import InputError

QUICK = {"n_resamples": 100}


def test_alignment_against_loop(tmp_path):
    random = np.random.default_rng(0)
    sequences, profiles = parallel(random, missing={(1, "de"), (2, "en")})
    trace = with_profiles(tmp_path / "t.duckdb", profiles, sequences, random.integers(1, 9, len(sequences)))
    frame = analysis.alignment(trace, **QUICK).set_index(["layer", "lang"])
    assert set(frame["measure"]) == {"divergence"}
    place = {(row.segment_id, row.lang): at for at, row in enumerate(sequences.itertuples())}
    for layer, q in enumerate(profiles):
        each = {}
        for lang in ("de", "fr"):
            texts = [t for t in range(6) if (f"s{t}", "en") in place and (f"s{t}", lang) in place]
            values = [divergence(q[place[f"s{t}", "en"]], q[place[f"s{t}", lang]]) for t in texts]
            each[lang] = sum(values) / len(values)
            row = frame.loc[(layer, lang)]
            assert row["value"] == pytest.approx(each[lang], abs=1e-5)
            assert row["low"] <= row["value"] <= row["high"]
            assert row["n_texts"] == len(texts) == row["n_sequences"]
            assert row["gain"] + row["value"] == pytest.approx(row["shuffled"])
        assert frame.loc[(layer, "all"), "value"] == pytest.approx(sum(each.values()) / 2, abs=1e-5)


def test_frequency_divergence_against_loop(tmp_path):
    routed = random_trace(tmp_path / "t.duckdb", languages=("en", "de"), n_texts=7, n_experts=4)
    frame = analysis.alignment(routed.trace, **QUICK).set_index(["layer", "lang"])
    assert set(frame["measure"]) == {"frequency_divergence"}
    for layer in range(2):
        values = []
        for text in range(7):
            q = []
            for lang in (0, 1):
                mine = routed.experts[routed.seq == 2 * text + lang, layer].ravel()
                counts = [int((mine == expert).sum()) for expert in range(4)]
                q.append([count / sum(counts) for count in counts] if sum(counts) else None)
            if all(q):
                values.append(divergence(*q))
        values = [value for value in values if not math.isnan(value)]
        assert frame.loc[(layer, "de"), "value"] == pytest.approx(sum(values) / len(values))
        assert frame.loc[(layer, "de"), "n_texts"] == len(values)
    with pytest.raises(InputError, match="holds no router probabilities"):
        analysis.alignment(routed.trace, measure="divergence")
    with pytest.raises(InputError, match="expected one of"):
        analysis.alignment(routed.trace, measure="cosine")


distributions = arrays(float, 6, elements=st.floats(0, 1)).filter(lambda a: a.sum() > 1e-3).map(lambda a: a / a.sum())


def direct(p, q) -> float:
    return float(normalised_divergence(p, q, np.array(entropy(p)), np.array(entropy(q))))


@settings(max_examples=200, deadline=None)
@given(distributions, distributions)
def test_divergence_laws(p, q):
    value = direct(p, q)
    assert math.isnan(value) or 0 <= value <= 1
    assert direct(q, p) == pytest.approx(value, abs=1e-9, nan_ok=True)
    assert direct(p[::-1], q[::-1]) == pytest.approx(value, abs=1e-9, nan_ok=True)
    if not math.isnan(value):
        assert value == pytest.approx(divergence(p, q), abs=1e-6)
        jsd = value * (math.log(6) - (entropy(p) + entropy(q)) / 2)
        assert -1e-9 <= jsd <= math.log(2) + 1e-9
    same = direct(p, p)
    assert math.isnan(same) or same == pytest.approx(0, abs=1e-9)


def test_extremes_of_divergence():
    assert direct(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1)
    assert direct(np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.5, 0.5])) == pytest.approx(1)
    assert direct(np.array([1.0, 0, 0, 0]), np.array([0, 1.0, 0, 0])) == pytest.approx(0.5)  # log 2 / log 4
    assert math.isnan(direct(np.full(4, 0.25), np.full(4, 0.25)))
    assert math.isnan(direct(np.array([1.0]), np.array([1.0])))


def test_identical_and_uniform_texts(tmp_path):
    sequences = translated(4, ("en", "de"))
    random = np.random.default_rng(0)
    same = np.repeat(random.dirichlet(np.ones(5), 4), 2, axis=0)
    flat = np.full((8, 5), 0.2)
    trace = with_profiles(tmp_path / "t.duckdb", [same, flat], sequences, [3] * 8)
    frame = analysis.alignment(trace, **QUICK)
    alike = frame[(frame["lang"] == "de") & (frame["layer"] == 0)].iloc[0]
    assert alike["value"] == pytest.approx(0, abs=1e-5) and alike["gain_low"] > 0
    uniform = frame[(frame["lang"] == "de") & (frame["layer"] == 1)].iloc[0]
    assert np.isnan(uniform["value"]) and np.isnan(uniform["low"])
    assert uniform["n_texts"] == 0 and uniform["n_undefined"] == 4
    _, draw = analysis.find("alignment")
    draw(frame)
    assert analysis.file("alignment").findings(frame)


def test_pieces_are_pooled_by_tokens(tmp_path):
    """A text in two sequences of 1 and 3 tokens has the token-weighted mean profile."""
    a, b, whole, other = (np.random.default_rng(seed).dirichlet(np.ones(4)) for seed in range(4))
    sequences = pd.DataFrame({"lang": ["en", "de", "de", "en", "de"], "segment_id": list("xxxyy"), "source": "c"})
    trace = with_profiles(tmp_path / "t.duckdb", [np.stack([whole, a, b, other, other])], sequences, [5, 1, 3, 2, 2])
    frame = analysis.alignment(trace, **QUICK).iloc[0]
    expected = (divergence(whole, (a + 3 * b) / 4) + 0) / 2
    assert frame["value"] == pytest.approx(expected, abs=1e-5)
    assert frame["n_texts"] == 2 and frame["n_sequences"] == 3 and frame["n_tokens"] == 6


def test_mismatch_moves_every_text_within_its_source():
    source = np.array([0, 0, 0, 1, 1, 2])
    for seed in range(20):
        partner = mismatch(source, np.random.default_rng(seed))
        assert partner[5] == -1 and (partner[:5] != np.arange(5)).all()
        assert (source[partner[:5]] == source[:5]).all() and len(set(partner[:5])) == 5


def test_content_against_language(tmp_path):
    """Layer 0 routes by content, layer 1 by language."""
    random = np.random.default_rng(4)
    sequences = translated(30, ("en", "de"))
    content = np.repeat(random.dirichlet(np.full(8, 0.5), 30), 2, axis=0)
    language = np.tile(random.dirichlet(np.full(8, 0.5), 2), (30, 1))
    noise = random.dirichlet(np.ones(8), 60)
    profiles = [0.9 * x + 0.1 * noise for x in (content, language)]
    trace = with_profiles(tmp_path / "t.duckdb", profiles, sequences, [4] * 60)
    frame = analysis.alignment(trace, **QUICK)
    frame = frame[frame["lang"] == "de"].set_index("layer")
    assert frame["gain_low"][0] > 0.1 and abs(frame["gain"][1]) < 0.02 and frame["value"][1] > 0.1


def test_errors_say_what_is_missing(tmp_path):
    experts, seq = np.zeros((3, 1, 1), int), [0, 1, 2]
    alone = pd.DataFrame({"lang": ["en", "en", "de"], "segment_id": ["a", "b", "c"], "source": "c"})
    trace = write(tmp_path / "a.duckdb", experts, seq, alone, 2).trace
    with pytest.raises(InputError, match="isn't parallel"):
        analysis.alignment(trace)
    with pytest.raises(InputError, match="no text has lang 'fr'.*de, en"):
        analysis.alignment(trace, reference="fr")
    trace = write(tmp_path / "b.duckdb", experts, seq, alone.drop(columns="segment_id"), 2).trace
    with pytest.raises(InputError, match="no 'segment_id'"):
        analysis.alignment(trace)
    with pytest.raises(InputError, match="at least three MoE layers"):
        analysis.u_shape(trace)


@pytest.mark.parametrize("spread, shape", [((1, 0, 1), "U"), ((0, 1, 0), "inverted U"), ((1, 0.2, 0), "falling"),
                                           ((0, 0.2, 1), "rising"), ((0.5, 0.5, 0.5), "none")])  # fmt: skip
def test_u_shape(tmp_path, spread, shape):
    random = np.random.default_rng(6)
    sequences = translated(40, ("en", "de", "fr"))
    base, parts = np.repeat(random.dirichlet(np.ones(8), 40), 3, axis=0), random.dirichlet(np.full(8, 0.5), 3)
    one_layer = [(1 - s) * base + s * parts[np.arange(120) % 3] for s in spread]
    profiles = [0.8 * q + 0.2 * random.dirichlet(np.ones(8), 120) for q in one_layer for _ in range(2)]
    trace = with_profiles(tmp_path / "t.duckdb", profiles, sequences, [3] * 120)
    frame = analysis.u_shape(trace, **QUICK)
    row = frame.set_index("lang").loc["all"]
    assert row["shape"] == shape
    by_layer = analysis.alignment(trace, **QUICK)
    values = by_layer[by_layer["lang"] == "all"]["value"].to_numpy()
    assert row["first"] == pytest.approx(values[:2].mean()) and row["last"] == pytest.approx(values[-2:].mean())
    assert row["middle"] == pytest.approx(values[2:4].mean())
    assert row["first_minus_middle_low"] <= row["first_minus_middle"] <= row["first_minus_middle_high"]
    assert "U-shape" in analysis.file("u_shape").findings(frame)[0]
    analysis.find("u_shape")[1](frame)


def test_a_single_text_has_no_shape(tmp_path):
    random = np.random.default_rng(6)
    profiles = [random.dirichlet(np.ones(8), 3) for _ in range(3)]
    trace = with_profiles(tmp_path / "t.duckdb", profiles, translated(1, ("en", "de", "fr")), [3] * 3)
    frame = analysis.u_shape(trace, **QUICK)
    assert (frame["n_texts"] == 1).all() and (frame["shape"] == "none").all()
    assert frame.filter(regex="_(low|high)$").isna().all(axis=None) and frame["first_minus_middle"].notna().all()
    said = analysis.file("u_shape").findings(frame)[0]
    assert said.startswith("There is no clear U-shape (mean divergence of each third") and "nan" not in said
    assert "; " not in said and "0 of 2 languages" in said
    analysis.find("u_shape")[1](frame)


def test_many_languages_get_a_panel_each(tmp_path):
    random = np.random.default_rng(0)
    languages = ("en", *(f"l{number}" for number in range(12)))
    sequences, profiles = parallel(random, n_texts=3, languages=languages)
    trace = with_profiles(tmp_path / "t.duckdb", profiles, sequences, [2] * len(sequences))
    figure = analysis.find("alignment")[1](analysis.alignment(trace, **QUICK))
    assert len({one["xaxis"] for one in figure.data}) == 12
