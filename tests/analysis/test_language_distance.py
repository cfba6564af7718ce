"""The matrix of language distances against loops over texts, and what it shares with alignment."""

import math

import numpy as np
import pandas as pd
import pytest
from routed import random_trace, with_profiles, write
from translations import divergence, parallel, translated

from workbench import analysis
from workbench.analysis.clustering import matrix, short, tree
from workbench.analysis.language_distance import figure, findings, language_distance
from workbench.errors import InputError

QUICK = {"n_resamples": 50}
MISSING = {(1, "de"), (2, "en"), (3, "fr"), (4, "fr")}


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    random = np.random.default_rng(0)
    sequences, profiles = parallel(random, n_texts=7, missing=MISSING)
    lengths = random.integers(1, 9, len(sequences))
    return (
        with_profiles(tmp_path_factory.mktemp("distance") / "t.duckdb", profiles, sequences, lengths),
        profiles,
        lengths,
    )


def test_against_loop(example):
    trace, profiles, lengths = example
    frame = language_distance(trace, **QUICK)
    sequences = trace.sequences()
    place = {(row.segment_id, row.lang): at for at, row in enumerate(sequences.itertuples())}
    assert len(frame) == 3 * 4 and set(frame["measure"]) == {"divergence"}
    for (lang, other), part in frame.groupby(["lang", "other"]):
        texts = [f"s{t}" for t in range(7) if (f"s{t}", lang) in place and (f"s{t}", other) in place]
        expected = []
        for q in profiles:
            values = [divergence(q[place[text, lang]], q[place[text, other]]) for text in texts]
            expected.append(sum(values) / len(values))
        tokens = sum(lengths[place[text, one]] for text in texts for one in (lang, other))
        by_layer = part[part["layer"].notna()].sort_values("layer")
        assert by_layer["value"].tolist() == pytest.approx(expected, abs=1e-5)
        pooled = part[part["layer"].isna()].iloc[0]
        assert pooled["value"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert (part["n_texts"] == len(texts)).all() and (part["n_tokens"] == tokens).all()
        assert (part["low"] <= part["value"]).all() and (part["value"] <= part["high"]).all()


def test_agrees_with_alignment(example):
    frame = language_distance(example[0], **QUICK)
    reference = analysis.alignment(example[0], reference="fr", **QUICK)
    for row in reference[reference["lang"] != "all"].itertuples():
        pair = frame[(frame["layer"] == row.layer) & (frame["lang"] == min(row.lang, "fr"))]
        pair = pair[pair["other"] == max(row.lang, "fr")].iloc[0]
        for name in ("value", "low", "high"):
            assert pair[name] == pytest.approx(getattr(row, name), abs=0.1 if name != "value" else 1e-9)
        assert pair["n_texts"] == row.n_texts


def test_frequencies(tmp_path):
    routed = random_trace(tmp_path / "t.duckdb", languages=("en", "de", "fr"), n_texts=5, n_experts=4)
    frame = language_distance(routed.trace, **QUICK)
    assert set(frame["measure"]) == {"frequency_divergence"} and len(frame) == 3 * 3
    assert frame["value"].dropna().between(0, 1).all()
    with pytest.raises(InputError, match="holds no router probabilities.*--record ids,weights,profiles"):
        language_distance(routed.trace, measure="divergence")


def test_families_stand_together(tmp_path):
    random = np.random.default_rng(1)
    languages = ("da", "ja", "nb", "ko", "sv")
    sequences = translated(20, languages)
    kind = np.tile([0, 1, 0, 1, 0], 20)
    base = random.dirichlet(np.ones(8), 2)[kind]
    trace = with_profiles(
        tmp_path / "t.duckdb", [0.8 * base + 0.2 * random.dirichlet(np.ones(8), 100)], sequences, [3] * 100
    )
    frame = language_distance(trace, **QUICK)
    order = [str(name) for name in figure(frame).to_dict()["data"][0]["x"]]
    assert abs(order.index("ja") - order.index("ko")) == 1
    text = findings(frame)
    assert "routed most alike" in text[0] and "least" in text[0]
    pooled = frame[frame["layer"].isna()].set_index(["lang", "other"])["value"]
    across = [("da", "ja"), ("da", "ko"), ("ja", "nb"), ("ja", "sv"), ("ko", "nb"), ("ko", "sv")]
    assert pooled[across].min() > 3 * pooled.drop(across).max()


def test_errors_and_degenerate(tmp_path):
    experts, seq = np.zeros((3, 1, 1), int), [0, 1, 2]
    alone = pd.DataFrame({"lang": ["en", "en", "de"], "segment_id": ["a", "b", "c"], "source": "c"})
    trace = write(tmp_path / "a.duckdb", experts, seq, alone, 2).trace
    with pytest.raises(InputError, match="no segment_id occurs with two different lang: this corpus isn't parallel"):
        language_distance(trace)
    with pytest.raises(InputError, match="no 'style'"):
        language_distance(trace, by="style")
    # two languages, one text; all uniform
    trace = with_profiles(tmp_path / "b.duckdb", [np.full((2, 4), 0.25)], translated(1, ("en", "de")), [2, 2])
    frame = language_distance(trace, **QUICK)
    assert frame["value"].isna().all() and (frame["n_undefined"] == 1).all() and (frame["n_texts"] == 0).all()
    figure(frame)
    assert findings(frame) == ["No pair of languages has a defined divergence."]
    trace = with_profiles(tmp_path / "c.duckdb", [np.eye(4)[:2]], translated(1, ("en", "de")), [2, 2])
    frame = language_distance(trace, **QUICK)
    assert frame["value"].tolist() == pytest.approx([0.5, 0.5]) and frame["low"].isna().all()
    assert "de and en is 0.50" in findings(frame)[0]


def test_clustering():
    frame = pd.DataFrame({"a": ["x", "x", "y"], "b": ["y", "z", "z"], "v": [1.0, np.nan, 2.0]})
    labels, values = matrix(frame, "a", "b", "v")
    assert labels == ["x", "y", "z"] and values[0, 1] == values[1, 0] == 1 and math.isnan(values[0, 2])
    found = tree(values)
    assert found is not None and sorted(found[0, :2]) == [0, 1] and found[0, 2] == 1
    assert tree(np.zeros((1, 1))) is None
    long = ["a" * 30, "a" * 31]
    assert short(long[0], [], long) != short(long[1], [0], long) and short("<b>", [], ["<b>"]) == "&lt;b&gt;"
