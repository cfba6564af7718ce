"""What one router did for a batch of tokens, as NumPy arrays: the unit between recorder, store and analyses."""

from dataclasses import dataclass

import numpy as np

NO_EXPERT = np.uint16(65535)
"""Fills the places of `experts` beyond the experts a token really used (dropped tokens, variable k)."""


@dataclass(frozen=True, slots=True)
class Routing:
    """One router, n tokens, at most k experts each, E experts in all. What was not recorded is None.

    experts   uint16  (n, k)  ids the experts consumed, in the model's own rank order; NO_EXPERT where none
    weights   float32 (n, k)  gate weights the experts consumed (>= 0); 0 where there is no expert
    entropy   float32 (n,)    nats, of the full router distribution; NaN where the router has no scores
    margin    float32 (n,)    k-th minus (k+1)-th score as the router's top-k saw them; NaN where k = E or no scores
    logits    float32 (n, E)  router logits before gating
    norms     float32 (n, k)  L2 norm of each selected expert's output, before weighting; 0 where there is no expert
    shift     float32 (n,)    how far the routed experts turn the residual stream: max(0, 1 - cos(x, x + r))
    lookahead uint16  (n, k')  ids that the next router, of top-k', would choose; None in the last layer of a stack
    """

    experts: np.ndarray
    weights: np.ndarray | None = None
    entropy: np.ndarray | None = None
    margin: np.ndarray | None = None
    logits: np.ndarray | None = None
    norms: np.ndarray | None = None
    shift: np.ndarray | None = None
    lookahead: np.ndarray | None = None
