"""From recorded router logits to the probabilities of the experts, in NumPy and in chunks.

The full distribution p over the experts is softmax(z) for softmax routers, s / sum(s) for routers that score with a
sigmoid or sqrt-softplus; a selection bias is left out. The scoring is the one that the trace's layers name in `gating`;
where they name none (routing that came from elsewhere) a softmax is assumed.
"""

from collections.abc import Iterator

import numpy as np
from scipy.special import log_expit, log_softmax

from workbench.tracefile import Trace

SCORINGS = ("sqrt-softplus", "sigmoid", "softmax")
CHUNK = 1 << 22
"""Probabilities held at once."""


def scoring(trace: Trace, layer: int) -> str:
    """ "softmax", "sigmoid", "sqrt-softplus", or "hash" where the token id selects and there are no scores."""
    gating = trace.layers["gating"].iloc[layer]
    steps = [part.strip() for part in str(gating).replace("+", ",").split(",")] if isinstance(gating, str) else []
    if "hash" in steps:
        return "hash"
    return next((name for name in SCORINGS if name in steps), "softmax")


def log_probabilities(logits: np.ndarray, score: str) -> np.ndarray:
    """ln p over the last axis: float64, of the shape of logits; NaN for "hash"."""
    z = logits.astype(np.float64)
    if score == "hash":
        return np.full(z.shape, np.nan)
    if score == "sigmoid":
        z = log_expit(z)
    elif score == "sqrt-softplus":
        # ln sqrt(softplus(z)); for very negative z softplus(z) is exp(z), whose logarithm is z.
        z = 0.5 * np.where(z < -20, z, np.log(np.logaddexp(0, np.maximum(z, -20))))
    return log_softmax(z, axis=-1)


def chunks(n_tokens: int, n_experts: int) -> Iterator[slice]:
    """Ranges of tokens whose probabilities fit into memory together."""
    step = max(1, CHUNK // max(n_experts, 1))
    for start in range(0, n_tokens, step):
        yield slice(start, min(start + step, n_tokens))
