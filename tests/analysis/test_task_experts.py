"""Task experts of each language against loops over tokens; planted ones are found and shared, noise is not."""

import numpy as np
import pandas as pd
import pytest
from routed import choose, write
from scipy.stats import hypergeom

from workbench.analysis.task_experts import figure, findings, overlap, task_experts
from workbench.errors import InputError

QUICK = {"n_resamples": 50, "n_permutations": 199}
BOTH = {"task": "domain=math", "general": "domain=news"}


def made(path, *, seed=0, n_texts=30, strength=3.0, languages=("en", "de", "fr"), n_layers=2, n_experts=8):
    """In every language half the texts are math. Layer 0: expert 1 serves math in all languages, expert 2 in English
    only; the last layer knows nothing."""
    random = np.random.default_rng(seed)
    rows = [
        {"lang": lang, "domain": "math" if text % 2 else "news", "segment_id": f"{lang}{text}"}
        for lang in languages
        for text in range(n_texts)
    ]
    sequences = pd.DataFrame(rows)
    seq = np.repeat(np.arange(len(rows)), random.integers(5, 20, len(rows)))
    math = (sequences["domain"] == "math").to_numpy()[seq]
    english = (sequences["lang"] == "en").to_numpy()[seq]
    experts = []
    for layer in range(n_layers):
        logits = np.zeros((len(seq), n_experts))
        if layer == 0:
            logits[math, 1] = strength
            logits[math & english, 2] = strength
        experts.append(choose(random, logits, 2))
    return write(path, np.stack(experts, axis=1), seq, sequences, n_experts)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return made(tmp_path_factory.mktemp("task") / "t.duckdb")


def test_against_loop(routed):
    frame = task_experts(routed.trace, tau=0.2, **BOTH, **QUICK)
    assert len(frame) == 3 * 2 * 8
    kinds = [(routed.sequences["lang"][seq], routed.sequences["domain"][seq]) for seq in routed.seq]
    for _, row in frame.iterrows():
        counts = []
        for domain in ("math", "news"):
            tokens = [token for token, kind in enumerate(kinds) if kind == (row["lang"], domain)]
            hits = sum(row["expert"] in routed.experts[token, row["layer"]] for token in tokens)
            counts.append((hits, len(tokens)))
        (k, n), (other, rest) = counts
        assert [row["count"], row["n_tokens"], row["count_general"], row["n_tokens_general"]] == [k, n, other, rest]
        assert row["difference"] == pytest.approx(k / n - other / rest)
        assert row["chosen"] == (row["difference"] > 0.2 and row["q"] < 0.05)
        assert row["low"] <= row["difference"] <= row["high"]
    assert frame["n_texts"].eq(15).all() and frame["n_texts_general"].eq(15).all()
    chosen = {(row.lang, row.layer, row.expert) for row in frame[frame["chosen"]].itertuples()}
    assert chosen == {("en", 0, 1), ("en", 0, 2), ("de", 0, 1), ("fr", 0, 1)}
    mine = {(row.layer, row.expert) for row in frame[frame["in_reference"]].itertuples()}
    assert mine == {(0, 1), (0, 2)}
    text = findings(frame)
    assert "In en, 2 of 16 experts are task experts of domain=math" in text[0] and "2 other languages" in text[1]


def test_everything_else_is_general(routed):
    one, two = task_experts(routed.trace, **BOTH, **QUICK), task_experts(routed.trace, task="domain=math", **QUICK)
    assert np.allclose(one["difference"], two["difference"]) and set(two["general"]) == {"everything else"}


def test_overlap_against_hypergeometric(routed):
    frame = task_experts(routed.trace, tau=0.2, **BOTH, **QUICK)
    rows = overlap(frame).set_index("lang")
    assert rows.loc["de", ["n_chosen", "n_reference", "n_shared"]].tolist() == [1, 2, 1]
    assert rows.loc["de", "jaccard"] == pytest.approx(0.5)
    assert rows.loc["de", "expected"] == pytest.approx(2 / 8)
    assert rows.loc["de", "p"] == pytest.approx(hypergeom.sf(0, 8, 2, 1))
    # two layers, by simulation
    random = np.random.default_rng(0)
    made_up = pd.DataFrame(
        {"lang": "de", "reference": "en", "layer": np.repeat([0, 1], 8), "expert": np.tile(np.arange(8), 2)}
    )
    made_up["chosen"] = made_up["expert"] < np.where(made_up["layer"] == 0, 3, 5)
    made_up["in_reference"] = made_up["expert"] < 4
    row = overlap(made_up).iloc[0]
    shared = [sum((random.permutation(8)[:size] < 4).sum() for size in (3, 5)) for _ in range(4000)]
    assert row["n_shared"] == 7 and row["expected"] == pytest.approx(4)
    assert row["p"] == pytest.approx(np.mean(np.array(shared) >= 7), abs=0.01)


def test_noise_has_no_task_experts(tmp_path):
    frame = task_experts(
        made(tmp_path / "t.duckdb", seed=5, strength=0.0).trace, tau=0.0, n_resamples=0, n_permutations=499, **BOTH
    )
    assert (frame["p"] <= 0.05).mean() <= 0.15 and not frame["chosen"].any()
    assert "No expert is a task expert" in findings(frame)[0]
    figure(frame)


def test_figure_puts_shared_experts_first(routed):
    frame = task_experts(routed.trace, tau=0.2, **BOTH, **QUICK)
    shown = figure(frame).data[0]
    assert list(shown["x"]) == ["1", "2"] and list(shown["y"]) == ["en", "de", "fr"]
    assert np.shape(shown["z"]) == (3, 2)


def test_errors(routed):
    with pytest.raises(InputError, match="needs the tokens of a task"):
        task_experts(routed.trace)
    with pytest.raises(InputError, match="tokens are both 'domain=math' and 'lang=en'"):
        task_experts(routed.trace, task="domain=math", general="lang=en")
    with pytest.raises(InputError, match="lang 'sv' doesn't have tokens both.*choose the reference from de, en, fr"):
        task_experts(routed.trace, reference="sv", **BOTH)
    with pytest.raises(InputError, match="no lang has both"):
        task_experts(routed.trace, task="lang=en & domain=math", general="lang=de")
    with pytest.raises(InputError, match="no 'dialect'"):
        task_experts(routed.trace, by="dialect", **BOTH)
    with pytest.raises(InputError, match="no sequence has domain 'code'"):
        task_experts(routed.trace, task="domain=code")


def test_degenerate(tmp_path):
    """One text a side, one expert, nothing chosen; only the reference has both sets."""
    sequences = pd.DataFrame({"lang": ["en", "en", "de"], "domain": ["math", "news", "news"]})
    for number, experts in enumerate(([0, 0, 0, 0, 0, 0], [-1] * 6, [0, 1, 0, 2, 1, 0])):
        trace = write(
            tmp_path / f"{number}.duckdb", np.array(experts)[:, None, None], [0, 0, 1, 1, 2, 2], sequences, 3
        ).trace
        frame = task_experts(trace, **BOTH, **QUICK)
        assert set(frame["lang"]) == {"en"} and frame["low"].isna().all() and not frame["chosen"].any()
        assert overlap(frame).empty
        figure(frame)
        assert findings(frame)
    bare = task_experts(trace, n_resamples=0, n_permutations=0, **BOTH)
    assert bare["q"].isna().all() and bare["chosen"].sum() == (bare["difference"] > 0.1).sum()
