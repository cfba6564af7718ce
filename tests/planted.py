"""Traces with planted structure for the tests of probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from routed import choose, full_trace

from workbench.tracefile import Trace

N_LAYERS, N_EXPERTS, K = 3, 8, 2
KNOWS = 1
"""The layer that knows the language; the others choose at random."""


def planted(path: Path, *, seed: int = 0, n_texts: int = 30, length: int = 12, strength: float = 6.0, **more) -> Trace:
    """Each text in two languages. Layer KNOWS prefers experts 0 and 1 in German, 2 and 3 in English; nothing else
    depends on the language: token ids, losses and metadata are drawn at random."""
    random = np.random.default_rng(seed)
    rows = [
        {"lang": lang, "segment_id": f"s{text}", "domain": "ab"[text % 2], "source": f"c{text % 3}"}
        for text in range(n_texts)
        for lang in ("de", "en")
    ]
    seq = np.repeat(np.arange(len(rows)), length)
    logits = np.zeros((len(seq), N_LAYERS, N_EXPERTS))
    german = (seq % 2 == 0)[:, None]
    logits[:, KNOWS, :4] = strength * np.where(german, [1, 1, 0, 0], [0, 0, 1, 1])
    experts = np.stack([choose(random, logits[:, layer], K) for layer in range(N_LAYERS)], axis=1)
    weights = random.random(experts.shape)
    given = {
        "token_ids": random.integers(0, 20, len(seq)),
        "nll": random.exponential(2, len(seq)),
        "weights": weights / weights.sum(axis=-1, keepdims=True),
    }
    return full_trace(path, experts, n_experts=N_EXPERTS, seq=seq, sequences=pd.DataFrame(rows), **(given | more))


def main(frame: pd.DataFrame, score: str = "balanced_accuracy") -> pd.DataFrame:
    """The rows of one score, by (features, layer), -1 for all layers together."""
    shown = frame[frame["score"] == score]
    return shown.assign(layer=shown["layer"].fillna(-1).astype(int)).set_index(["features", "layer"]).sort_index()
