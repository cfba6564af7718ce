"""Losses of checkpoints side by side, against one text at a time."""

from __future__ import annotations

from typing import Any

import checkpoint
import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from workbench.corpus import from_rows
from workbench.errors import InputError
from workbench.losses import compare_losses, findings, sequence_losses
from workbench.prune import at_random
from workbench.subset import subset
from workbench.tokenization import batches, sequences

QUICK: dict[str, Any] = {"n_resamples": 50, "batch_tokens": 200}
KEPT = [np.array([0, 2, 5])] * 3


def corpus() -> Any:
    return from_rows(checkpoint.rows(12, longest=40), "rows")


def by_hand(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Nats and predicted tokens of each text, one forward pass each."""
    found = []
    for sequence in sequences(corpus(), model.tokenizer, max_length=256):
        ids = torch.tensor(sequence.token_ids, dtype=torch.long)[None]
        with torch.inference_mode():
            logits = model.module(ids).logits[0]
        found.append((float(cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")), ids.shape[1] - 1))
    return np.array([nll for nll, _ in found]), np.array([n for _, n in found])


def test_losses_against_single_texts(tmp_path):
    torch.set_num_threads(1)
    model = checkpoint.olmoe()
    smaller = subset(model, KEPT)
    smaller.module.save_pretrained(tmp_path / "out")
    smaller.tokenizer.save_pretrained(tmp_path / "out")
    others = {"memory": smaller, "folder": tmp_path / "out"}
    frame = compare_losses(model, others, corpus(), n_random=2, **QUICK)
    assert frame["name"].tolist() == ["original", "memory", "folder", "random 3.0", "random 3.1", "random 3"]
    rows: Any = frame.set_index("name")
    nll, n = by_hand(model)
    assert rows.loc["original", "nll"] == pytest.approx(nll.sum() / n.sum(), abs=1e-4)
    assert (frame["n_tokens"] == n.sum()).all() and (frame["n_texts"] == (n > 0).sum()).all()
    expected = {"memory": by_hand(smaller)[0], "folder": by_hand(smaller)[0]}
    random = [by_hand(subset(model, at_random(model, 3, seed)))[0] for seed in (0, 1)]
    expected |= {"random 3.0": random[0], "random 3.1": random[1], "random 3": (random[0] + random[1]) / 2}
    for name, lost in expected.items():
        row: Any = rows.loc[name]
        assert rows.loc[name, "nll"] == pytest.approx(lost.sum() / n.sum(), abs=1e-4)
        assert rows.loc[name, "delta"] == pytest.approx((lost - nll).sum() / n.sum(), abs=1e-4)
        assert row["delta_low"] <= row["delta"] <= row["delta_high"]
        assert (rows.loc[name, "n_experts"], rows.loc[name, "top_k"]) == (3, 3)
    for name in others:
        difference = (expected[name] - expected["random 3"]).sum() / n.sum()
        assert rows.loc[name, "versus_random"] == pytest.approx(difference, abs=1e-4)
        better = sum(lost.sum() < expected[name].sum() for lost in random)
        assert (rows.loc[name, "n_random"], rows.loc[name, "n_random_better"]) == (2, better)
    assert np.isnan(rows.loc["random 3", "versus_random"]) and rows.loc["original", "delta"] == 0
    assert "at random" in findings(frame)[1] and len(findings(frame)) == 3


def test_intervals_are_of_texts():
    model = checkpoint.olmoe()
    found = {s.seq: 0.0 for s in sequences(corpus(), model.tokenizer, max_length=256)}
    grouped = batches(sequences(corpus(), model.tokenizer, max_length=256), 100)
    for seq, nll, n in sequence_losses(model, grouped):
        assert n >= 0 and (nll == 0) == (n == 0)
        found[seq] = nll
    assert len(found) == 12
    frame = compare_losses(model, {}, corpus(), n_resamples=400)
    nll, n = by_hand(model)
    random = np.random.default_rng(0)
    drawn = [random.integers(len(n), size=len(n)) for _ in range(2000)]
    low, high = np.percentile([nll[d].sum() / n[d].sum() for d in drawn if n[d].sum()], [2.5, 97.5])
    width = high - low
    assert frame.loc[0, "low"] == pytest.approx(low, abs=0.25 * width)
    assert frame.loc[0, "high"] == pytest.approx(high, abs=0.25 * width)


def test_without_controls_and_resamples():
    model = checkpoint.olmoe()
    frame = compare_losses(model, {"three": subset(model, KEPT)}, corpus(), n_random=0, n_resamples=0)
    assert frame["name"].tolist() == ["original", "three"]
    assert frame[["low", "delta_low", "versus_random"]].isna().all(axis=None)
    assert "random" not in findings(frame)[1]


def test_a_model_compared_with_itself():
    model = checkpoint.olmoe()
    frame = compare_losses(model, {"same": subset(model, [np.arange(8)] * 3)}, corpus(), n_random=1, **QUICK)
    row = frame.set_index("name").loc["same"]
    assert row["delta"] == row["delta_low"] == row["delta_high"] == row["versus_random"] == 0


def test_max_tokens_and_long_texts():
    model = checkpoint.olmoe()
    few = compare_losses(model, {}, corpus(), max_tokens=1, **QUICK)
    assert few.loc[0, "n_texts"] == 1 and np.isnan(few.loc[0, "low"])
    cut = compare_losses(model, {}, corpus(), max_length=5, **QUICK)
    assert cut["n_tokens"].max() <= 12 * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"others": {"original": "x"}}, "can't be called 'original'"),
        ({"others": {"random 3": "x"}}, "can't be called 'random 3'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"corpus": from_rows(["a"], "one")}, "no text of the corpus has two tokens"),
    ],
)
def test_bad_requests(options: Any, message: str):
    arguments = {"others": {}, "corpus": corpus()} | options
    with pytest.raises(InputError, match=message):
        compare_losses(checkpoint.olmoe(), **arguments)


def test_models_without_tokenizer_or_next_token():
    with pytest.raises(InputError, match="has no tokenizer"):
        compare_losses(tiny.model("olmoe"), {}, corpus())
    model = checkpoint.model("switch_transformers")
    with pytest.raises(InputError, match="doesn't predict the next token"):
        compare_losses(model, {}, corpus())
