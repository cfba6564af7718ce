"""Control labels: what a probe scores when there is nothing to know but who is who (Hewitt & Liang 2019, section 2).

Each **token type** (token id) gets a label at random, the same wherever it occurs. A probe can only learn them by
heart, so its score on them says how much of the score on the real labels is memory of the vocabulary: **selectivity** =
score − score on control labels. Where a row is a sequence, or token ids are unknown, each **text** gets a random label:
as no text is in both training and test, that can't be learned at all, and the control is what the whole procedure
scores by chance.

Labels are drawn from those of the rows, so that a class is as frequent as in the target (in expectation).
"""

import numpy as np


def control_values(value: np.ndarray, kind: np.ndarray, seed: int | tuple[int, ...]) -> np.ndarray:
    """A random value for each kind, of the type and shape of `value` (n,).

    kind  int (n,): token id, or text, of each row; rows of a kind get one value, drawn from `value` with replacement,
          independently of what that kind's values are
    """
    kinds, place = np.unique(kind, return_inverse=True)
    return np.random.default_rng(seed).choice(value, size=len(kinds))[place]
