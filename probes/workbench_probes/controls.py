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


def permuted(value: np.ndarray, sequence: np.ndarray, text: np.ndarray, seed: int | tuple[int, ...]) -> np.ndarray:
    """The same values in another order, of the type and shape of `value` (n,): what they would be by chance.

    sequence, text  int (n,): of each row; rows of a sequence are in order

    Texts change places, sequences change places within their text, and the rows of a sequence are turned by a random
    offset, as a ring. So every value occurs as often as before, the labels of a text stay together, and neighbours
    stay neighbours, where shuffled rows would make any score look significant. Where texts or sequences differ in
    length, a run of labels may end in the next one.
    """
    random = np.random.default_rng(seed)
    text, sequence = np.unique(text, return_inverse=True)[1], np.unique(sequence, return_inverse=True)[1]
    row = np.arange(len(value))
    places = np.lexsort((row, sequence, text))
    length, first = np.bincount(sequence), np.unique(sequence[places], return_index=True)[1]
    rank = np.empty(len(value), int)
    rank[places] = row - first[sequence[places]]
    turned = (rank + random.integers(0, length)[sequence]) % length[sequence]
    of_text, of_sequence = random.permutation(text.max() + 1), random.permutation(len(length))
    result = np.empty_like(value)
    result[places] = value[np.lexsort((turned, of_sequence[sequence], of_text[text]))]
    return result
