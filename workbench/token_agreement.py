"""Where two runs of one text agree, token by token: for colouring a text. The analysis `agreement` is about all texts.

agreement(trace, read(trace, 777), other)         # float32 (L, n)
"""

from collections.abc import Sequence

import numpy as np

from workbench import connection
from workbench.analysis.matching import common, need_same_layers, sequence_keys
from workbench.errors import InputError
from workbench.reading import Reading, read
from workbench.routing import NO_EXPERT
from workbench.schema import UNKNOWN_TOKEN
from workbench.tracefile import Trace


def counterparts(trace: Trace, seqs: Sequence[int], other: Trace) -> dict[int, int]:
    """The sequence of another run that is the same text, for each of these sequences that has one.

    The same text as workbench.analysis.matching has it: the digest (sha256) and the prompt's token ids are the same; of
    a text that occurs several times in both runs, the n-th there belongs to the n-th here. Only the sequences with
    these digests are read, of runs without digests those as long.
    Raises InputError where the runs have neither digests nor token ids in common.
    """
    runs = (trace, other)
    digests, known = (all(has(run) for run in runs) for has in (_has_digests, _has_ids))
    if not digests and not known:
        raise InputError(
            f"runs {trace.run!r} and {other.run!r} can't be matched: neither the digests of the texts (sha256) nor the "
            "token ids are known in both. Write them with the runs, as `workbench trace` does."
        )
    alike = "sha256" if digests else "n_prompt"
    with connection.reading(trace.path) as con:
        query = f"SELECT DISTINCT {alike} FROM sequences WHERE run = ? AND seq IN (SELECT unnest(?))"
        values = [value for (value,) in con.execute(query, [trace.run, [int(seq) for seq in seqs]]).fetchall()]
    here, there = (_by_key(run, alike, values, digests, known) for run in runs)
    found = {}
    for key, places in here.items():
        found |= dict(zip(places, there.get(key, ()), strict=False))
    return {int(seq): found[int(seq)] for seq in seqs if int(seq) in found}


def _has_digests(trace: Trace) -> bool:
    return _answer(trace, "SELECT bool_and(sha256 IS NOT NULL) FROM sequences WHERE run = ?")


def _has_ids(trace: Trace) -> bool:
    return _answer(trace, f"SELECT bool_or(token_id <> {UNKNOWN_TOKEN}) FROM tokens WHERE run = ?")


def _answer(trace: Trace, query: str) -> bool:
    with connection.reading(trace.path) as con:
        return bool(con.execute(query, [trace.run]).fetchall()[0][0])


def _by_key(trace: Trace, alike: str, values: list, digests: bool, known: bool) -> dict[tuple, list[int]]:
    """The sequences whose column `alike` has one of these values, by what makes two of them the same."""
    where = f"run = $run AND {alike} IN (SELECT unnest($values))"
    given = {"run": trace.run, "values": values}
    with connection.reading(trace.path) as con:
        table = con.execute(f"SELECT * FROM sequences WHERE {where} ORDER BY seq", given).df()
        query = f"SELECT token_id FROM tokens WHERE run = $run AND seq IN (SELECT seq FROM sequences WHERE {where})"
        ids = con.execute(f"{query} ORDER BY seq, pos", given).df()["token_id"].to_numpy()
    starts = np.concatenate([[0], np.cumsum(table["n_tokens"].to_numpy(np.int64))])
    places: dict[tuple, list[int]] = {}
    for seq, key in zip(table["seq"], sequence_keys(table, ids, starts, digests, known), strict=True):
        places.setdefault(key, []).append(int(seq))
    return places


def agreement(trace: Trace, text: Reading, other: Trace) -> np.ndarray:
    """float32 (L, n), in [0, 1]: share of each token's experts that another run chose too, for the same token.

    The `overlap` of workbench.analysis.agreement: experts in common over the larger of the two numbers of experts. NaN
    where neither run chose any, where the other run doesn't have the text, and after the first token that differs.
    Raises InputError for runs that can't be compared: other layers or experts, or nothing to match texts by.
    """
    need_same_layers(trace, other)
    pairs = counterparts(trace, text.sequences["seq"].tolist(), other)
    result = np.full((text.n_layers, len(text)), np.nan, np.float32)
    if not pairs:
        return result
    there = read(other, list(pairs.values()))
    known = all((ids != UNKNOWN_TOKEN).any() for ids in (text.token_ids, there.token_ids))
    for seq, same in pairs.items():
        a, b = np.flatnonzero(text.seq == seq), np.flatnonzero(there.seq == same)
        n = common(text.token_ids[a], there.token_ids[b]) if known else min(len(a), len(b))
        for layer in range(text.n_layers):
            result[layer, a[:n]] = overlap(text.experts[layer, a[:n]], there.experts[layer, b[:n]])
    return result


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 (n,): experts in common over the larger number of the two; NaN where neither has any.

    a, b  uint16 (n, k), (n, k'), NO_EXPERT where none

    >>> overlap(np.uint16([[0, 1], [2, 65535]]), np.uint16([[1, 5], [2, 65535]])).tolist()
    [0.5, 1.0]
    """
    chosen = a != NO_EXPERT
    both = ((a[:, :, None] == b[:, None, :]) & chosen[:, :, None]).sum(axis=(1, 2))
    most = np.maximum(chosen.sum(axis=1), (b != NO_EXPERT).sum(axis=1))
    return np.divide(both, most, out=np.full(len(a), np.nan), where=most > 0).astype(np.float32)
