"""A part of a trace: the texts that meet a filter, or some drawn at random. Every analysis takes it like a trace.

    german = where(trace, "lang=de & domain=legal-rights")
    few = sample(trace, 50_000)         # whole texts, at least 50,000 tokens if there are as many

A *text* is what resampling draws, too: the sequences of one `segment_id`, which are its pieces and its translations, or
one sequence where there is none. So a sample of parallel texts has all their languages.
"""

import numpy as np

from workbench.analysis import filters
from workbench.analysis.counting import text_codes
from workbench.errors import InputError
from workbench.tracefile import Trace


def where(trace: Trace, text: str) -> Trace:
    """The sequences that meet a filter of columns such as `lang=de,fr & source=udhr` (workbench.analysis.filters).

    InputError for a wrong filter, one of tokens (phase, position, token, text), and one that no sequence meets.
    """
    return trace.only(trace.sequences()["seq"].to_numpy()[filters.sequence_mask(trace, text)])


def sample(trace: Trace, n_tokens: int, seed: int = 0) -> Trace:
    """Whole texts drawn at random, without replacement, until they have `n_tokens` tokens or more.

    A trace with no more tokens than that is returned as it is, and so is a run that counts: it is small already, and
    its pairs can't be taken apart. The same seed draws the same texts.
    """
    if n_tokens < 1:
        raise InputError(f"n_tokens is {n_tokens}; expected at least 1 token to sample.")
    if trace.n_tokens <= n_tokens or trace.counted:
        return trace
    sequences = trace.sequences()
    text = text_codes(sequences)
    order = np.random.default_rng(seed).permutation(text.max() + 1)
    sizes = np.bincount(text, weights=sequences["n_tokens"])[order]
    n_texts = int(np.searchsorted(np.cumsum(sizes), n_tokens)) + 1
    return trace.only(sequences["seq"].to_numpy()[np.isin(text, order[:n_texts])])
