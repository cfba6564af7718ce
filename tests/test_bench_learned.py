"""What learned edits gain, against the same by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workbench import remixing
from workbench.bench.learned import remixing_gain, rewiring_gain
from workbench.corpus import from_rows
from workbench.errors import InputError
from workbench.forward import next_token_nll
from workbench.intervening import intervene
from workbench.interventions import control
from workbench.models import Model, load
from workbench.rewiring import rewire

TEXTS = [f"{start} the right to life, liberty and security." for start in ("All have", "We want", "No to")]


@pytest.fixture(scope="module")
def demo() -> Model:
    torch.set_num_threads(1)
    return load("demo", dtype="float32")


def following(model: Model, ids: torch.Tensor, first: int, edits=None) -> float:
    with torch.inference_mode():
        if edits is None:
            return float(next_token_nll(model.module(ids).logits, ids)[0, first:].mean())
        with intervene(model, edits):
            return float(next_token_nll(model.module(ids).logits, ids)[0, first:].mean())


def test_rewiring_is_measured_on_what_follows(demo: Model):
    given = {
        "n_texts": 2,
        "n_context": 8,
        "n_following": 4,
        "n_random": 2,
        "ways": {"one": {"layers": [1], "steps": 2}},
    }
    table = rewiring_gain(demo, from_rows([*TEXTS, "short"]), **given).set_index("edit")
    texts = [torch.tensor([demo.tokenizer(text)["input_ids"][:12]]) for text in (TEXTS[0], TEXTS[2])]
    learned = [rewire(demo, ids[0, :8], layers=[1], steps=2) for ids in texts]
    plain = np.array([following(demo, ids, 8) for ids in texts])
    edited = np.array([following(demo, ids, 8, one.deltas) for ids, one in zip(texts, learned, strict=True)])
    random = np.array(
        [
            np.mean([following(demo, ids, 8, control(one.deltas, seed)) for seed in (0, 1)])
            for ids, one in zip(texts, learned, strict=True)
        ]
    )
    for edit, values in (("plain", plain), ("learned", edited), ("random", random)):
        row = table.loc[edit]
        assert row["nll"] == pytest.approx(values.mean(), abs=1e-5) and row["n_texts"] == 2
        assert row["change"] == pytest.approx((values - plain).mean(), abs=1e-5)
        assert row["change_low"] <= row["change"] <= row["change_high"]
    context = np.mean([one.losses[-1] - one.losses[0] for one in learned])
    assert table.loc["learned", "context_change"] == pytest.approx(context, abs=1e-6) and context < 0


def test_remixing_is_measured_at_the_last_token(demo: Model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remixing, "ALPHAS", (0.0, 1.0))
    words = ["the", "right", "to", "life", "and", "liberty", "of", "every", "person", "in", "all", "the", "world"]
    texts = [" ".join(np.random.default_rng(number).permutation(words)) for number in range(12)]
    table = remixing_gain(demo, from_rows(texts), n_texts=2, n_reference=8, max_length=12).set_index("way")
    assert set(table.index) == {
        "plain", "kernel", "kernel, alpha 0", "gradient", "random neighbours", "random experts",
    }  # fmt: skip
    # Ten of twelve at even distances, and of these the first and the last.
    both = [torch.tensor([demo.tokenizer(texts[place])["input_ids"][:12]]) for place in (0, 11)]
    plain = np.mean([following(demo, ids, ids.shape[1] - 1) for ids in both])
    assert table.loc["plain", "nll"] == pytest.approx(plain, abs=1e-5)
    assert table.loc["plain", "change"] == 0 and (table["n_texts"] == 2).all()
    np.testing.assert_allclose(table["change"].to_numpy(), table["nll"].to_numpy() - plain, atol=1e-5)


def test_too_little_text_is_named(demo: Model):
    with pytest.raises(InputError, match="no text of the corpus has 192 tokens"):
        rewiring_gain(demo, from_rows(TEXTS))
    with pytest.raises(InputError, match="the corpus has 3 different texts of 40 characters; expected 860"):
        remixing_gain(demo, from_rows(TEXTS))
