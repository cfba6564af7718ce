"""What a probe predicts from: one row a token or a sequence, as a sparse or dense float32 matrix.

| features | of a token | of a sequence |
|---|---|---|
| `choices` | 1 for each expert that it chose, else 0 (E columns a layer) | each expert's share of the assignments |
| `weights` | gate weight of each expert, 0 where it wasn't chosen | mean gate weight over the tokens |
| `probabilities` | full router distribution (recorded logits) | its mean over the tokens (recorded profiles) |
| `tokens` | 1 for the token's id: what the vocabulary alone knows | each id's share of the tokens |
| `hidden` | what the router of the layer reads, from running the model | its mean over the tokens |

All but `tokens` are of one layer, or of several side by side. A token without experts (dropped) has a row of zeros.
`hidden` is the input of the MoE block: the residual stream after the norm in front of the block, in all families that
have one there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse

from workbench.analysis import router_probabilities
from workbench.analysis.counting import experts_of
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.schema import UNKNOWN_TOKEN
from workbench.tracefile import Trace

FEATURES = ("choices", "weights", "probabilities", "tokens", "hidden")
OF_LAYERS = ("choices", "weights", "probabilities", "hidden")
Matrix = np.ndarray | sparse.csr_array
"""Features of n rows: (n, n_columns), float32."""


def check(trace: Trace, names: Sequence[str], layers: Sequence[int] | None, unit: str) -> list[int]:
    """The layers asked for (None: all), ascending; InputError for features that this trace can't give, before work."""
    if not names:
        raise InputError(f"no features were asked for; choose from {', '.join(FEATURES)}.")
    for name in names:
        if name not in FEATURES:
            raise InputError(f"there are no features {name!r}; choose from {', '.join(FEATURES)}.")
    if trace.counted:
        raise trace.only_counts("rows of single tokens to probe")
    if "weights" in names and "weights" not in trace.recorded:
        raise InputError(f"run {trace.run!r} holds no weights: probe choices, or trace again with --record weights.")
    needed = "logits" if unit == "token" else "profiles"
    if "probabilities" in names and needed not in trace.recorded:
        raise InputError(
            f"probabilities of a {unit} take recorded {needed}, which run {trace.run!r} doesn't have: trace again with "
            f"--record ids,weights,{needed}, or leave them out."
        )
    chosen = sorted(set(range(trace.n_layers) if layers is None else layers))
    wrong = [layer for layer in chosen if not 0 <= layer < trace.n_layers]
    if wrong or not chosen:
        named = wrong[0] if wrong else "none"
        raise InputError(f"layer {named}: run {trace.run!r} has layers 0 to {trace.n_layers - 1}.")
    return chosen


def of_layer(trace: Trace, name: str, layer: int, row: np.ndarray, unit: str) -> Matrix:
    """One layer's `choices`, `weights` or `probabilities` for some rows: float32 (n, E), sparse but for the last.

    row  int64 (n,): places among the trace's tokens (unit "token") or sequences
    """
    n_experts = experts_of(trace, layer)
    if name == "probabilities":
        return _probabilities(trace, layer, row, unit)
    experts = trace.experts(layer)
    weights = trace.weights(layer) if name == "weights" else None
    if unit == "token":
        return spread(experts[row], n_experts, None if weights is None else weights[row])
    owner = trace.sequence_index()
    there = experts != NO_EXPERT
    cell = (owner[:, None].astype(np.int64) * n_experts + np.where(there, experts, 0))[there]
    given = None if weights is None else weights[there]
    total = np.bincount(cell, given, trace.n_sequences * n_experts).reshape(trace.n_sequences, n_experts)
    by = total.sum(axis=1) if weights is None else np.bincount(owner, minlength=trace.n_sequences)
    share = np.divide(total, by[:, None], out=np.zeros_like(total, dtype=float), where=by[:, None] > 0)
    return narrow(share[row].astype(np.float32))


def spread(experts: np.ndarray, n_experts: int, values: np.ndarray | None = None) -> sparse.csr_array:
    """Ids (n, k), NO_EXPERT for none, as columns: float32 (n, E) with `values` (n, k), or 1, where an id is."""
    there = experts != NO_EXPERT
    pointers = np.append(0, np.cumsum(there.sum(axis=1)))
    data = np.ones(int(there.sum()), np.float32) if values is None else values[there].astype(np.float32)
    result = sparse.csr_array((data, experts[there].astype(np.int32), pointers), shape=(len(experts), n_experts))
    result.sort_indices()
    return narrow(result)


def _probabilities(trace: Trace, layer: int, row: np.ndarray, unit: str) -> np.ndarray:
    if unit == "sequence":
        return np.nan_to_num(trace.profiles(layer)[row])
    score = router_probabilities.scoring(trace, layer)
    if score == "hash":
        raise InputError(f"layer {layer} selects by the token id, so it has no probabilities: leave it out of layers.")
    logits = trace.logits(layer)[row]
    result = np.zeros(logits.shape, np.float32)
    for part in router_probabilities.chunks(*logits.shape):
        result[part] = np.exp(router_probabilities.log_probabilities(logits[part], score))
    return np.nan_to_num(result)


def of_tokens(trace: Trace, row: np.ndarray, unit: str) -> sparse.csr_array:
    """Token identity alone: float32 (n, ids that occur in the trace).

    InputError where the trace doesn't know its token ids.
    """
    token_id = known_ids(trace)
    ids, code = np.unique(token_id, return_inverse=True)
    if unit == "token":
        shape = (len(row), len(ids))
        return narrow(
            sparse.csr_array((np.ones(len(row), np.float32), code[row], np.arange(len(row) + 1)), shape=shape)
        )
    owner = trace.sequence_index()
    size = np.bincount(owner, minlength=trace.n_sequences)
    shape = (trace.n_sequences, len(ids))
    share = sparse.coo_array(((1 / size[owner]).astype(np.float32), (owner, code)), shape=shape).tocsr()
    return narrow(share[row])


def known_ids(trace: Trace) -> np.ndarray:
    """int32 (n_tokens,): the token ids; InputError where one is unknown."""
    token_id = trace.tokens()["token_id"].to_numpy()
    if (token_id == UNKNOWN_TOKEN).any():
        raise InputError(
            f"run {trace.run!r} doesn't know its token ids: leave out the features `tokens` and `hidden`, or pass "
            "token_ids to from_arrays."
        )
    return token_id


def beside(parts: Sequence[Matrix]) -> Matrix:
    """Several layers' features side by side, in the order given."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate([np.asarray(part) for part in parts], axis=1)
    joined: Any = sparse.hstack(parts, format="csr", dtype=np.float32)
    return narrow(joined)


def narrow(matrix: Any) -> sparse.csr_array:
    """A matrix as csr, with 32-bit indices where they suffice: not all of scikit-learn takes others."""
    result = sparse.csr_array(matrix)
    if max(result.nnz, *shape_of(result)) < 2**31:
        result.indices, result.indptr = result.indices.astype(np.int32), result.indptr.astype(np.int32)
    return result


def rows_of(matrix: Matrix, rows: np.ndarray) -> Matrix:
    """Some rows of a matrix: places, int (n,)."""
    picked: Any = matrix[rows]  # type: ignore[index]
    return picked


def shape_of(matrix: Matrix) -> tuple[int, int]:
    """Rows and columns of a matrix; the stubs of scipy don't say that it has two."""
    found: Any = matrix.shape
    return found
