"""Parallel texts for the tests of alignment and its kin, and the divergence of two distributions by loops."""

import math

import numpy as np
import pandas as pd


def entropy(p) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def divergence(p, q) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    half = (entropy(p) + entropy(q)) / 2
    room = math.log(len(p)) - half
    return (entropy(middle) - half) / room if room > 1e-6 else math.nan


def parallel(random, n_texts=6, languages=("en", "de", "fr"), n_layers=3, n_experts=5, missing=()):
    """Profiles (one a layer) and sequences of parallel texts; `missing` are (text, language) that don't exist."""
    rows = [
        {"lang": lang, "segment_id": f"s{text}", "source": f"c{text % 2}"}
        for text in range(n_texts)
        for lang in languages
        if (text, lang) not in missing
    ]
    profiles = [random.dirichlet(np.ones(n_experts), len(rows)) for _ in range(n_layers)]
    return pd.DataFrame(rows), profiles


def translated(n_texts, languages) -> pd.DataFrame:
    rows = [{"lang": lang, "segment_id": f"s{t}", "source": "c"} for t in range(n_texts) for lang in languages]
    return pd.DataFrame(rows)
