"""What learned edits gain: the loss of text that they haven't seen, beside no edit and random ones of the same size.

**Rewiring.** Of each text the first tokens are a context to learn deltas from (`workbench.rewiring`), and the loss of
the tokens that follow is measured with them. "random" has each delta's numbers permuted over the experts, so the same
norm, and is the mean of several draws.

**Remixing.** Of each text the last token is predicted from the others, with the pathway of the last of these remixed
(`workbench.remixing`). The reference is a trace of as many other texts as are asked for, of which the better half by
nll counts as successful. "random neighbours" is the kernel mean with alpha 0 of successful texts drawn at random
instead of the nearest, "random experts" the gradient's pathway permuted over the experts.

nll is in nats a token; change is the difference from the plain model, text by text, so below 0 is a gain. Intervals
cover 95% of bootstrap resamples of texts. A text counts once, however long.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from workbench import learning
from workbench.analysis.resampling import draws, text_interval
from workbench.capture import read_texts, trace
from workbench.corpus import Corpus, from_rows, read
from workbench.errors import InputError
from workbench.intervening import intervene
from workbench.interventions import AnyIntervention, control
from workbench.models import Model, load
from workbench.remixing import reference, remix
from workbench.rewiring import rewire

SHORTEST = 40
"""Characters of a text that the routing of a last token is measured in."""


def run(quick: bool = False) -> dict[str, Any]:
    """Both on the demonstration model, in float32; prints two tables, returns every figure."""
    model = load("demo", dtype="float32")
    n_texts = 3 if quick else 60
    rewired = rewiring_gain(model, "demo", n_texts=n_texts)
    remixed = remixing_gain(model, "demo", n_texts=n_texts, n_reference=12 if quick else 800)
    for name, table in (("rewiring", rewired), ("remixing", remixed)):
        print(f"{name}\n{table.round(4).to_string(index=False)}\n")
    return {
        "bench": "learned",
        "date": datetime.now(UTC).date().isoformat(),
        "model": model.name,
        # Through JSON, where NaN is null.
        "rewiring": json.loads(rewired.to_json(orient="records")),
        "remixing": json.loads(remixed.to_json(orient="records")),
    }


def rewiring_gain(
    model: Model,
    corpus: str | Path | Corpus,
    *,
    n_texts: int = 60,
    n_context: int = 128,
    n_following: int = 64,
    n_random: int = 3,
    ways: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The loss of what follows a context, with deltas learned from it.

    n_texts      taken evenly from those of the corpus with n_context + n_following tokens; longer ones are cut
    n_random     draws of the control
    ways         name -> arguments of `rewire`; None: its defaults, all layers, and four times the steps

    Returns one row a way: way, edit ("learned", "random"; the first row is "plain"), n_texts, nll with low and high,
    change with change_low and change_high, context_change (of the loss of the context; NaN for random).
    InputError if no text is long enough.
    """
    if ways is None:
        everywhere = tuple(layer.index for layer in learning.scored(model))
        ways = {
            "default": {},
            "all layers": {"layers": everywhere},
            "all layers, 20 steps": {"layers": everywhere, "steps": 20},
        }
    length = n_context + n_following
    texts = [t.token_ids[:length] for t in read_texts(model, corpus, long_texts="cut") if len(t.token_ids) >= length]
    if not texts:
        raise InputError(f"no text of the corpus has {length} tokens: give a smaller n_context or n_following.")
    texts = _evenly(texts, n_texts)
    found: dict[tuple[str, str], list[float]] = {("", "plain"): []}
    context: dict[str, list[float]] = {name: [] for name in ways}
    for text in tqdm(texts, desc="rewiring", unit=" texts", disable=None, leave=False):
        found["", "plain"].append(_nll(model, text, n_context))
        for name, arguments in ways.items():
            rewired = rewire(model, text[:n_context], **arguments)
            context[name].append(rewired.losses[-1] - rewired.losses[0])
            found.setdefault((name, "learned"), []).append(_nll(model, text, n_context, rewired.deltas))
            drawn = [_nll(model, text, n_context, control(rewired.deltas, seed + i)) for i in range(n_random)]
            found.setdefault((name, "random"), []).append(float(np.mean(drawn)) if drawn else np.nan)
    table = _table(found, ("way", "edit"), seed)
    table["context_change"] = [
        float(np.mean(context[way])) if edit == "learned" else np.nan
        for way, edit in zip(table["way"], table["edit"], strict=True)
    ]
    return table


def remixing_gain(
    model: Model,
    corpus: str | Path | Corpus,
    *,
    n_texts: int = 60,
    n_reference: int = 800,
    max_length: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """The loss of a text's last token, with the pathway of the token before it remixed.

    n_texts      to measure, n_reference to trace, both taken evenly from the corpus, none in both
    max_length   longer texts are cut

    Returns one row a way ("plain", "kernel", "kernel, alpha 0", "gradient", "random neighbours", "random experts"):
    way, n_texts, nll with low and high, change with change_low and change_high.
    InputError if the corpus has too few texts.
    """
    rows = corpus if isinstance(corpus, Corpus) else read(corpus)
    texts = list(dict.fromkeys(row.text for row in rows if isinstance(row.text, str) and len(row.text) >= SHORTEST))
    if len(texts) < n_texts + n_reference:
        raise InputError(
            f"the corpus has {len(texts)} different texts of {SHORTEST} characters; expected {n_texts + n_reference}."
        )
    taken = _evenly(texts, n_texts + n_reference)
    measured = _evenly(range(len(taken)), n_texts)
    others = [taken[place] for place in sorted(set(range(len(taken))) - set(measured))]
    cut: dict[str, Any] = {"max_length": max_length, "long_texts": "cut"}
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "reference.duckdb"
        known = reference(model, trace(model, from_rows(others), out, record=["logits"], progress=False, **cut))
    anywhere = replace(known, embeddings=random.random((len(known.seq), 8), dtype=np.float32), embedding="given")
    found: dict[tuple[str], list[float]] = {}
    sequences = read_texts(model, from_rows([taken[place] for place in measured]), **cut)
    for sequence in tqdm(sequences, desc="remixing", unit=" texts", disable=None, leave=False):
        text = sequence.token_ids
        prompt = text[:-1]
        descended = remix(model, prompt, known, method="gradient").interventions
        edits = {
            "plain": (),
            "kernel": remix(model, prompt, known).interventions,
            "kernel, alpha 0": remix(model, prompt, known, alpha=0.0).interventions,
            "gradient": descended,
            "random neighbours": remix(model, prompt, anywhere, alpha=0.0, embedding=random.random(8)).interventions,
            "random experts": control(descended, seed),
        }
        for name, edit in edits.items():
            found.setdefault((name,), []).append(_nll(model, text, len(prompt), edit))
    return _table(found, ("way",), seed)


def _nll(model: Model, token_ids: np.ndarray, first: int, edits: Sequence[AnyIntervention] = ()) -> float:
    """Mean nats of the tokens from position `first` on."""
    ids = learning.as_ids(model, token_ids)
    with torch.inference_mode(), intervene(model, edits) if edits else nullcontext():
        return float(learning.loss(model, ids, first))


def _evenly(items: Sequence, n: int) -> list:
    """n of them at even distances, all if there are no more."""
    return [items[place] for place in np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)]


def _table(found: dict[tuple[str, ...], list[float]], names: tuple[str, ...], seed: int) -> pd.DataFrame:
    """Means over texts with intervals; the first entry is that of the plain model."""
    plain = np.array(next(iter(found.values())))
    rows = []
    for key, values in found.items():
        row: dict[str, Any] = {**dict(zip(names, key, strict=True)), "n_texts": len(plain)}
        for measure, one in (("nll", np.array(values)), ("change", np.array(values) - plain)):
            resampled = np.concatenate([drawn @ one for drawn in draws(len(one), 1000, seed)]) / len(one)
            low, high = text_interval(resampled, len(one))
            prefix = "" if measure == "nll" else "change_"
            row |= {measure: one.mean(), f"{prefix}low": float(low), f"{prefix}high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)
