"""Changes of token ids and texts between two runs against loops over tokens; laws; what is refused."""

import math

import numpy as np
import pandas as pd
import pytest
from routed import full_trace

from workbench.analysis.token_changes import figure, findings, least, token_changes
from workbench.errors import InputError

E, K, LAYERS = 6, 2, 3
LENGTHS = [9, 2, 11, 8, 10]
SEQ = np.repeat(np.arange(5), LENGTHS)
SEQUENCES = pd.DataFrame(
    {"lang": ["en", "de", "en", None, "de"], "segment_id": ["a", "a", "b", "c", "d"], "domain": "law"}
)
IDS = np.arange(len(SEQ)) * 3 % 7
VOCABULARY = {token_id: f" w{token_id}<" for token_id in range(7)} | {6: "Ã"}


def route(seed: int) -> dict:
    random = np.random.default_rng(seed)
    experts = np.argsort(random.random((len(SEQ), LAYERS, E)), axis=-1)[..., :K]
    experts[random.random(experts.shape) < 0.1] = -1
    experts[random.random(experts.shape[:2]) < 0.1] = -1
    nll = random.random(len(SEQ))
    nll[np.flatnonzero(np.diff(SEQ, prepend=-1))] = np.nan
    return {"experts": experts, "nll": nll.astype(np.float32)}


def record(path, run, routed):
    return full_trace(
        path, routed["experts"], n_experts=E, seq=SEQ, sequences=SEQUENCES, token_ids=IDS, nll=routed["nll"], run=run,
        vocabulary=VOCABULARY, mode="append" if path.exists() else "new",
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("changes") / "t.duckdb"
    routed = [route(1), route(2)]
    return [record(path, name, one) for name, one in zip(("first", "second"), routed, strict=True)], routed


def overlap(routed, token, layer):
    a, b = ({int(e) for e in one["experts"][token, layer] if e >= 0} for one in routed)
    return len(a & b) / max(len(a), len(b)) if a or b else math.nan


def differs(routed, token):
    return any(set(routed[0]["experts"][token, at]) - {-1} != set(routed[1]["experts"][token, at]) - {-1}
               for at in range(LAYERS))  # fmt: skip


@pytest.mark.parametrize("per", ["id", "text"])
def test_against_loop(runs, per):
    (first, _), routed = runs
    frame = token_changes(first, per=per, minimum=3, n_resamples=50)
    key = IDS if per == "id" else SEQ
    items = [item for item in np.unique(key) if (key == item).sum() >= 3]
    assert sorted(frame["token_id" if per == "id" else "seq"]) == items
    assert (frame["n_left_out"] == len(np.unique(key)) - len(items)).all()
    assert frame["overlap"].is_monotonic_increasing
    for row in frame.itertuples():
        tokens = np.flatnonzero(key == (row.token_id if per == "id" else row.seq))
        by_layer = [[overlap(routed, token, layer) for token in tokens] for layer in range(LAYERS)]
        assert row.overlap == pytest.approx(np.nanmean(by_layer))
        means = np.nanmean(by_layer, axis=1)
        assert (row.worst_layer, row.worst) == (means.argmin(), pytest.approx(means.min()))
        assert row.differs_anywhere == pytest.approx(np.mean([differs(routed, token) for token in tokens]))
        assert row.nll_difference == pytest.approx(np.nanmean(routed[1]["nll"][tokens] - routed[0]["nll"][tokens]))
        texts = {SEQUENCES["segment_id"][SEQ[token]] for token in tokens}
        assert (row.n_tokens, row.n_texts) == (len(tokens), len(texts))
        assert row.low <= row.overlap <= row.high if len(texts) > 1 else math.isnan(row.low)
    if per == "text":
        row = frame.set_index("seq").loc[3]
        assert row["domain"] == "law" and pd.isna(row["lang"])
        assert row["text"] == "".join(VOCABULARY[token_id] for token_id in IDS[SEQ == 3])
    figure(frame)
    assert "What changed most" in findings(frame)[1]


def test_a_sentence_is_text_and_a_label_is_escaped(runs):
    (first, _), _ = runs
    frame = token_changes(first, per="text", minimum=3, n_resamples=20).assign(lang="<b>", domain=None)
    assert "(<b>)" in findings(frame)[1]
    drawn = figure(frame).to_json()
    assert "&lt;b&gt;" in drawn and "(<b>)" not in drawn


def test_interval_against_drawing_texts(runs):
    (first, _), routed = runs
    row = token_changes(first, minimum=3, n_resamples=4000).set_index("token_id").loc[2]
    of_text: dict[str, list[float]] = {}
    for token in np.flatnonzero(IDS == 2):
        values = [overlap(routed, token, layer) for layer in range(LAYERS)]
        of_text.setdefault(SEQUENCES["segment_id"][SEQ[token]], []).extend(v for v in values if not math.isnan(v))
    random = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        drawn = [v for name in random.choice(list("abcd"), 4) for v in of_text.get(name, [])]
        means.append(np.mean(drawn) if drawn else np.nan)
    assert [row["low"], row["high"]] == pytest.approx(np.nanpercentile(means, [2.5, 97.5]), abs=0.012)


def test_most_frequent_are_kept(runs):
    (first, _), _ = runs
    frame = token_changes(first, minimum=1, most=2, n_resamples=0)
    number = np.bincount(IDS)
    assert set(frame["n_tokens"]) <= set(np.sort(number)[-2:]) and len(frame) == 2
    assert frame[["low", "high"]].isna().all(axis=None)
    assert (frame["n_left_out"] == 5).all()


def test_same_run_changes_nothing(runs):
    (first, _), _ = runs
    frame = token_changes(first, other=first, minimum=3, n_resamples=10)
    assert (frame["overlap"] == 1).all() and (frame["differs_anywhere"] == 0).all()
    assert findings(frame) == ["first and first choose the same experts for all tokens of these 7 token ids."]


def test_surest_first():
    """An interval from few texts, or none, says little, however low it is."""
    frame = pd.DataFrame(
        {
            "per": "id", "overlap": [0.0, 0.2, 0.3, 0.4], "high": [0.0, 0.9, 0.5, np.nan], "n_texts": [2, 9, 9, 1],
            "token_id": [0, 1, 2, 3],
        }
    )  # fmt: skip
    assert least(frame)["token_id"].tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize("n", [1, 3])
def test_nothing_chosen(n, tmp_path):
    path = tmp_path / "t.duckdb"
    traces = [
        full_trace(
            path, np.full((n, 1, 2), -1), n_experts=2, seq=np.zeros(n, int),
            sequences=pd.DataFrame({"segment_id": ["a"]}), run=run, mode="append" if path.exists() else "new",
        )
        for run in ("one", "two")
    ]  # fmt: skip
    frame = token_changes(traces[0], minimum=1, n_resamples=5)
    assert len(frame) == 1 and frame[["overlap", "worst_layer"]].isna().all(axis=None)
    figure(frame)
    assert findings(frame) == ["Neither one nor two chose any expert for the tokens of these token ids."]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per": "word"}, "per is 'word'; expected one of id, text"),
        ({"minimum": 0}, "minimum is 0, most 2000; expected at least 1"),
        ({"most": -1}, "most -1; expected at least 1"),
        ({"minimum": 99}, "nothing has 99 tokens in both runs: the most frequent has 6. Give a smaller `minimum`"),
    ],
)
def test_refused(runs, options, said):
    (first, _), _ = runs
    with pytest.raises(InputError, match=said):
        token_changes(first, **options)
