"""Correlation of divergence and loss against scipy and loops over texts."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from routed import full_trace, random_trace
from scipy.stats import pearsonr, spearmanr
from translations import divergence

from workbench.analysis.loss_correlation import correlation, figure, findings, loss_correlation
from workbench.errors import InputError

QUICK = {"n_resamples": 60, "n_permutations": 199}
LANGUAGES = ("en", "de", "fr", "ja", "ko", "th")
WORDS = {0: "a", 1: "日", 2: " the", 3: "é!"}


def made(path, *, seed=0, n_texts=12, missing=(), languages=LANGUAGES, gap=0.0, nll=True, n_layers=2):
    """Parallel texts; with a gap, each further language is routed more unlike English and predicted worse."""
    random = np.random.default_rng(seed)
    rows = [
        {"lang": lang, "segment_id": f"s{text}", "source": "c"}
        for text in range(n_texts)
        for lang in languages
        if (text, lang) not in missing
    ]
    lengths = random.integers(20, 30, len(rows))
    seq = np.repeat(np.arange(len(rows)), lengths)
    rank = np.array([languages.index(row["lang"]) for row in rows])[seq]
    experts = np.where(random.random((len(seq), n_layers)) < gap * rank[:, None] / 6, 1, 0) + 2 * random.integers(
        0, 2, (len(seq), n_layers)
    )
    loss = random.normal(3 + gap * rank, 0.5)
    loss[np.flatnonzero(np.diff(seq, prepend=-1))] = np.nan
    trace = full_trace(
        path, experts[:, :, None], n_experts=6, seq=seq, sequences=pd.DataFrame(rows),
        token_ids=random.integers(0, 4, len(seq)), vocabulary=WORDS, nll=loss if nll else None,
    )  # fmt: skip
    return trace, experts, seq, rows, loss


@pytest.mark.parametrize("per", ["token", "byte", "text"])
@pytest.mark.parametrize("common", [True, False])
def test_against_loop(tmp_path, per, common):
    missing = {(1, "de"), (2, "en"), (3, "fr"), (3, "ja")}
    trace, experts, seq, rows, loss = made(tmp_path / "t.duckdb", missing=missing, gap=0.3)
    if per == "text" and not common:
        with pytest.raises(InputError, match="per=text compares whole texts"):
            loss_correlation(trace, per=per, common=False)
        return
    frame = loss_correlation(trace, per=per, common=common, **QUICK)
    token_ids = trace.tokens()["token_id"]
    place = {(row["segment_id"], row["lang"]): number for number, row in enumerate(rows)}
    everywhere = [f"s{t}" for t in range(12) if t not in (1, 2, 3)]
    divergences, losses = {0: [], 1: []}, []
    for lang in LANGUAGES[1:]:
        shared = [f"s{t}" for t in range(12) if (f"s{t}", "en") in place and (f"s{t}", lang) in place]
        texts = everywhere if common else shared
        for layer in range(2):
            q = []
            for one in ("en", lang):
                tokens = [experts[seq == place[text, one], layer] for text in texts]
                q.append([np.bincount(mine, minlength=6) / len(mine) for mine in tokens])
            divergences[layer].append(np.mean([divergence(*pair) for pair in zip(*q, strict=True)]))
        total, size = 0.0, 0.0
        for text in texts:
            for token in np.flatnonzero(seq == place[text, lang]):
                if np.isfinite(loss[token]):
                    total += np.float32(loss[token])
                    size += len(WORDS[token_ids[token]].encode()) if per == "byte" else per == "token"
        losses.append(total / (len(texts) if per == "text" else size))
    divergences[pd.NA] = np.mean([divergences[0], divergences[1]], axis=0)
    for key, points in divergences.items():
        part = frame[frame["layer"].isna() if key is pd.NA else frame["layer"] == key].set_index("statistic")
        assert part.loc["pearson", "value"] == pytest.approx(pearsonr(points, losses)[0])
        assert part.loc["spearman", "value"] == pytest.approx(spearmanr(points, losses)[0])
    assert (frame["low"] <= frame["value"] + 1e-9).all() and (frame["value"] <= frame["high"] + 1e-9).all()
    assert frame["n_languages"].eq(5).all() and frame["p"].between(1 / 200, 1).all()
    assert frame["n_texts"].eq(9 if common else 11).all()


numbers = arrays(float, 7, elements=st.floats(-5, 5).map(lambda x: round(x, 1)))


@settings(max_examples=50, deadline=None)
@given(numbers, numbers, st.sets(st.integers(0, 6), max_size=3))
def test_correlation_against_scipy(x, y, unknown):
    x = x.copy()
    x[list(unknown)] = np.nan
    known = np.isfinite(x)
    for statistic, scipy in (("pearson", pearsonr), ("spearman", spearmanr)):
        found = float(correlation(x, y, statistic))
        if np.ptp(x[known]) < 1e-9 or np.ptp(y[known]) < 1e-9:
            assert np.isnan(found)
        else:
            assert found == pytest.approx(scipy(x[known], y[known])[0], abs=1e-6)
            assert found == pytest.approx(float(correlation(np.stack([x, x]), y, statistic)[1]))


def test_planted_is_found_and_noise_is_not(tmp_path):
    languages = tuple(f"l{number}" for number in range(9))
    trace = made(tmp_path / "a.duckdb", languages=languages, gap=0.4)[0]
    frame = loss_correlation(trace, reference="l0", **QUICK)
    assert (frame["value"] > 0.8).all() and (frame["q"] < 0.05).all()
    assert "higher loss a token" in findings(frame)[0]
    hits = []
    for seed in range(2):
        trace = made(tmp_path / f"n{seed}.duckdb", seed=seed, n_texts=3, languages=languages, n_layers=12)[0]
        hits.append(loss_correlation(trace, reference="l0", n_resamples=0, n_permutations=99)["p"] <= 0.05)
    assert np.mean(hits) <= 0.2


def test_errors(tmp_path):
    trace = made(tmp_path / "a.duckdb", nll=False)[0]
    with pytest.raises(InputError, match="loss of no token was recorded in run 'full': trace with a model"):
        loss_correlation(trace)
    trace = made(tmp_path / "b.duckdb", languages=LANGUAGES[:4])[0]
    with pytest.raises(InputError, match="3 languages beside 'en'.*at least 4"):
        loss_correlation(trace)
    with pytest.raises(InputError, match="per is 'letter'; expected one of token, byte, text"):
        loss_correlation(trace, per="letter")
    with pytest.raises(InputError, match="no text has lang 'sv'"):
        loss_correlation(trace, reference="sv")
    apart = {(text, lang) for text in range(6) for lang in ("de", "fr")} | {(text, "ja") for text in range(6, 12)}
    trace = made(tmp_path / "c.duckdb", missing=apart)[0]
    with pytest.raises(InputError, match="no text exists in all 6 languages; use common=false"):
        loss_correlation(trace)
    assert len(loss_correlation(trace, common=False, **QUICK)) == 6
    with pytest.raises(InputError, match="isn't parallel|no 'segment_id'"):
        loss_correlation(random_trace(tmp_path / "d.duckdb", languages=("en",)).trace)


def test_degenerate(tmp_path):
    """Languages that don't differ in routing have nothing to correlate."""
    trace, _, seq, rows, loss = made(tmp_path / "a.duckdb")
    same = full_trace(
        tmp_path / "b.duckdb",
        np.zeros((len(seq), 2, 1), int),
        n_experts=6,
        seq=seq,
        sequences=pd.DataFrame(rows),
        nll=loss,
    )
    frame = loss_correlation(same, **QUICK)
    assert frame["value"].isna().all() and frame["p"].isna().all()
    assert "nothing to correlate" in findings(frame)[0]
    figure(frame)
    unsure = loss_correlation(trace, **QUICK)
    assert findings(unsure) and len(figure(unsure).data) >= 2
    bare = loss_correlation(trace, n_resamples=0, n_permutations=0)
    assert bare[["low", "high", "p"]].isna().all(axis=None) and findings(bare)
