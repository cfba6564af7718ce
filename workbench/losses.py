"""What dropping or merging experts costs: the loss of checkpoints on the same texts, beside random choices.

    compare_losses("demo", {"frequency": "demo-16", "merged": "demo-16-merged"}, "demo", max_tokens=40_000)

**nll** is the mean loss in nats a predicted token; the first token of a text is predicted from nothing and left out.
**delta** is the difference from the original's, text by text. **versus_random** is the difference from the mean of
checkpoints in which experts were drawn at random, as many as the given one has: a choice that
isn't clearly below it has found nothing out about the model. Intervals cover 95% of bootstrap resamples of texts; they
say nothing about other random draws, whose spread the rows `random` show.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench import corpus as corpora
from workbench.analysis.resampling import draws, interval
from workbench.capture import read_texts
from workbench.errors import InputError
from workbench.forward import next_token_nll, pad_id, padded, predicts_next, reads_twice
from workbench.models import Model, load
from workbench.prune import at_random
from workbench.subset import subset
from workbench.tokenization import LongTexts, Sequence, batches

RANDOM = "random"


def compare_losses(
    model: Model | str | Path,
    others: Mapping[str, Model | str | Path],
    corpus: str | Path | corpora.Corpus = "demo",
    *,
    n_random: int = 3,
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "cut",
    batch_tokens: int = 4096,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Loss of a model, of checkpoints made from it, and of random choices of as many experts, on the same texts.

    others      name -> checkpoint folder or model
    n_random    random choices for each number of experts that occurs in `others`; 0 leaves them out
    max_tokens  stop after the text that reaches this many tokens

    Returns one row a checkpoint: name ("original", those of `others`, "random N" for the mean of the random choices of
    N experts, "random N.i" for each); n_experts, top_k; nll with low, high; delta with delta_low, delta_high;
    versus_random with versus_random_low, versus_random_high (NaN for the original, the random ones, and where no random
    choice has as many experts); n_random choices compared with, n_random_better of them that lose less; n_tokens
    (predicted ones), n_texts. Intervals are NaN where there is a single text.
    InputError for a model without a tokenizer, or one whose logits aren't about the next token.
    """
    original = model if isinstance(model, Model) else load(model)
    for name in others:
        if name == "original" or name.startswith(RANDOM):
            raise InputError(f"a checkpoint can't be called {name!r} here: the model and its controls are.")
    texts = texts_with_loss(original, corpus, max_tokens=max_tokens, max_length=max_length, long_texts=long_texts)
    text = np.unique([sequence.sha256 for sequence in texts], return_inverse=True)[1]
    grouped = list(batches(texts, batch_tokens))

    def measured(one: Model) -> np.ndarray:
        found = np.zeros((2, text.max() + 1))
        for sequence, nll, n in sequence_losses(one, grouped):
            found[:, text[sequence]] += nll, n
        return found

    total, n_tokens = measured(original)
    sums, rows = {"original": total}, {"original": _sizes(original)}
    for name, one in others.items():
        loaded = one if isinstance(one, Model) else load(one, tokenizer=original.tokenizer)
        sums[name], rows[name] = measured(loaded)[0], _sizes(loaded)
    for keep in sorted({rows[name]["n_experts"] for name in others}) if n_random else ():
        names = [f"{RANDOM} {keep}.{number}" for number in range(n_random)]
        for number, name in enumerate(names):
            control = subset(original, at_random(original, keep, seed + number))
            sums[name], rows[name] = measured(control)[0], _sizes(control)
        sums[f"{RANDOM} {keep}"] = np.mean([sums[name] for name in names], axis=0)
        rows[f"{RANDOM} {keep}"] = rows[names[0]]
    table = []
    for name, mine in sums.items():
        against = None if name == "original" or name.startswith(RANDOM) else f"{RANDOM} {rows[name]['n_experts']}"
        row: dict[str, Any] = {"name": name, **rows[name]}
        for measure, baseline in (("nll", None), ("delta", "original"), ("versus_random", against)):
            difference = mine - sums[baseline] if baseline in sums else mine
            known = measure == "nll" or baseline in sums
            value, low, high = _mean(difference, n_tokens, n_resamples, seed) if known else (np.nan,) * 3
            prefix = "" if measure == "nll" else f"{measure}_"
            row |= {measure: value, f"{prefix}low": low, f"{prefix}high": high}
        controls = [sums[f"{against}.{number}"].sum() for number in range(n_random)] if against in sums else []
        row["n_random"] = len(controls)
        row["n_random_better"] = sum(lost < mine.sum() for lost in controls)
        table.append(row | {"n_tokens": int(n_tokens.sum()), "n_texts": int((n_tokens > 0).sum())})
    return pd.DataFrame(table)


def sequence_losses(model: Model, grouped: Iterable[list[Sequence]]) -> Iterator[tuple[int, float, int]]:
    """(seq, sum of nats, predicted tokens) of each sequence, batch by batch."""
    for batch in grouped:
        logits, ids, mask = next_token_logits(model, batch)
        nll = next_token_nll(logits, ids).double().masked_fill(~mask, torch.nan)
        for sequence, total, n in zip(batch, nll.nansum(1).tolist(), mask.sum(1).tolist(), strict=True):
            yield sequence.seq, total, n - 1


def next_token_logits(model: Model, batch: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (B, S, V), token ids int64 (B, S) and which of them are of texts, bool (B, S): padding is on the right."""
    ids, mask = padded(batch, pad_id(model), "right", model.device)
    with torch.inference_mode():
        return model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids, mask.bool()


def texts_with_loss(
    model: Model,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    *,
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "cut",
) -> list[Sequence]:
    """`capture.read_texts`, and InputError where the model or the texts leave no token to predict."""
    if reads_twice(model) or not predicts_next(model):
        raise InputError(f"{model.family} doesn't predict the next token, so it has no loss to compare.")
    taken = read_texts(model, corpus, max_tokens=max_tokens, max_length=max_length, long_texts=long_texts)
    if all(len(sequence.token_ids) < 2 for sequence in taken):
        raise InputError("no text of the corpus has two tokens, so nothing is predicted in it.")
    return taken


def findings(frame: pd.DataFrame) -> list[str]:
    """What each checkpoint costs, and whether it is better than chance, in sentences."""
    first = frame.iloc[0]
    sentences = [
        f"The model loses {first['nll']:.3f} nats a token [{first['low']:.3f}, {first['high']:.3f}] on "
        f"{first['n_tokens']:,} tokens of {first['n_texts']:,} texts."
    ]
    for _, row in frame.iloc[1:].iterrows():
        if str(row["name"]).startswith(RANDOM):
            continue
        said = (
            f"{row['name']}, {row['n_experts']} experts: {row['delta']:+.3f} nats "
            f"[{row['delta_low']:+.3f}, {row['delta_high']:+.3f}]"
        )
        if np.isfinite(row["versus_random"]):
            said += (
                f", {row['versus_random']:+.3f} [{row['versus_random_low']:+.3f}, {row['versus_random_high']:+.3f}] "
                f"against experts chosen at random ({row['n_random_better']} of {row['n_random']} of these lose less)"
            )
        sentences.append(said + ".")
    return sentences


def _sizes(model: Model) -> dict[str, int]:
    return {"n_experts": model.layers[0].n_experts, "top_k": model.layers[0].top_k}


def _mean(total: np.ndarray, n_tokens: np.ndarray, n_resamples: int, seed: int) -> tuple[float, float, float]:
    """Nats a token, with the interval from resampling texts: total and n_tokens are (n_texts,)."""
    value = float(total.sum() / n_tokens.sum())
    known = n_tokens > 0
    if n_resamples == 0 or known.sum() < 2:
        return value, np.nan, np.nan
    both = np.stack([total, n_tokens], axis=1)[known]
    sums = np.concatenate([drawn.astype(np.float64) @ both for drawn in draws(len(both), n_resamples, seed)])
    low, high = interval(sums[:, 0] / sums[:, 1])
    return value, float(low), float(high)
