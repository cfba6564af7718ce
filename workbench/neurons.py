"""Which neuron of one expert plays the part of which neuron of another: Hungarian matching on cosines.

The order of an expert's neurons is arbitrary: reordering them, in all its matrices alike, changes nothing that it
computes. So experts are compared, and averaged, after their neurons have been matched.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays one."""
    rows = np.asarray(rows, np.float32)
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)


def match(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Places of b's neurons that make b[order] most like a, neuron by neuron: int64 (n,).

    a, b  (n, width), a row a neuron. The sum of cosines of matched neurons is the largest possible.
    """
    return best_order(unit(a) @ unit(b).T)


def best_order(similarity: np.ndarray) -> np.ndarray:
    """The order of columns with the largest sum on the diagonal of similarity[:, order]: int64 (n,)."""
    return linear_sum_assignment(similarity, maximize=True)[1]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays of the same shape, flattened; NaN if one of them is zero."""
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.vdot(a, b)) / lengths if lengths > 0 else float("nan")


def cosines(inner: np.ndarray) -> np.ndarray:
    """Cosines from the inner products of some vectors with each other: (n, n); NaN where one is zero."""
    length = np.sqrt(np.diag(inner))
    scale = np.outer(length, length)
    return np.divide(inner, scale, out=np.full(inner.shape, np.nan), where=scale > 0)
