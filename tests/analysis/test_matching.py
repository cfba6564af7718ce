"""Which tokens two runs share: whatever their order, splits, repeats and continuations."""

import numpy as np
import pandas as pd
import pytest
from routed import full_trace, write

from workbench.analysis.matching import match, other_run
from workbench.errors import InputError
from workbench.tracefile import Trace


def record(path, texts, run="a", **more):
    """A trace of texts given as (digest, prompt ids, generated ids)."""
    ids = [token for _, prompt, generated in texts for token in (*prompt, *generated)]
    lengths = [len(prompt) + len(generated) for _, prompt, generated in texts]
    seq = np.repeat(np.arange(len(texts)), lengths)
    sequences = pd.DataFrame({"sha256": [digest for digest, *_ in texts], "n_prompt": [len(p) for _, p, _ in texts]})
    return write_ids(path, seq, sequences, ids)


def write_ids(path, seq, sequences, ids):
    from workbench.arrays import from_arrays

    experts = np.zeros((len(ids), 1, 1), int)
    return from_arrays(path, experts, n_experts=2, seq=seq, sequences=sequences, token_ids=np.array(ids, int))


def shared(a, b):
    """Pairs of (token of a, token of b)."""
    matched = match(a, b)
    return list(zip(matched.first.tolist(), matched.second.tolist(), strict=True)), matched


def test_order_repeats_and_what_only_one_has(tmp_path):
    a = record(tmp_path / "a", [("x", [1, 2], []), ("y", [3], []), ("x", [1, 2], []), ("only", [9, 9, 9], [])])
    b = record(tmp_path / "b", [("y", [3], []), ("new", [9, 9, 9], []), ("x", [1, 2], []), ("x", [5], [])])
    pairs, matched = shared(a, b)
    assert pairs == [(0, 4), (1, 5), (2, 0)]  # the second x has other tokens there, `only` another digest
    assert (matched.only_first, matched.only_second, matched.n_apart) == (2, 2, 0) and matched.whole.all()


def test_what_was_generated_is_shared_until_it_differs(tmp_path):
    a = record(tmp_path / "a", [("x", [1, 2], [3, 4, 5]), ("y", [1], [2])])
    b = record(tmp_path / "b", [("x", [1, 2], [3, 7, 5]), ("y", [1], [2, 3])])
    pairs, matched = shared(a, b)
    assert pairs == [(0, 0), (1, 1), (2, 2), (5, 5), (6, 6)]
    assert matched.n_apart == 2 and matched.whole.tolist() == [False, False]


def test_without_digests_or_without_ids(tmp_path):
    plain = pd.DataFrame({"lang": ["en", "de"]})
    named = plain.assign(sha256=["p", "q"])
    a = write_ids(tmp_path / "a", [0, 0, 1], plain, [4, 5, 6])
    b = write_ids(tmp_path / "b", [0, 1, 1], plain, [6, 4, 5])
    assert shared(a, b)[0] == [(0, 1), (1, 2), (2, 0)]
    experts = np.zeros((3, 1, 1), int)
    c = write(tmp_path / "c", experts, [0, 0, 1], named, 2).trace
    d = write(tmp_path / "d", experts, [0, 1, 1], named.iloc[::-1], 2).trace
    assert shared(c, d)[0] == [(0, 1), (1, 2), (2, 0)]
    e = write(tmp_path / "e", experts, [0, 0, 1], plain, 2).trace
    with pytest.raises(InputError, match="neither the digests of the texts .sha256. nor the token ids"):
        match(e, c)


def test_nothing_in_common(tmp_path):
    a, b = (record(tmp_path / name, [(name, [1, 2], [])]) for name in "ab")
    with pytest.raises(InputError, match=r"\(1 sequences\).*have no token of the same text in common.*--max-length"):
        match(a, b)
    empty = write(tmp_path / "none", np.zeros((0, 1, 1), int), [], pd.DataFrame({"lang": []}), 2).trace
    with pytest.raises(InputError, match=r"\(0 sequences\)"):
        match(empty, a)


def test_which_run(tmp_path):
    path, texts = tmp_path / "t.duckdb", pd.DataFrame({"lang": ["en"]})
    first = full_trace(path, np.zeros((1, 1, 1), int), n_experts=2, seq=[0], sequences=texts, run="one")
    with pytest.raises(InputError, match=r"which run shall 'one' be compared with.*holds one.*--append --run NAME"):
        other_run(first, None)
    for run in ("two", "three"):
        full_trace(path, np.zeros((1, 1, 1), int), n_experts=2, seq=[0], sequences=texts, run=run, mode="append")
        if run == "two":
            assert other_run(Trace(path, "one"), None).run == "two"
            assert other_run(Trace(path, "two"), None).run == "one"
    with pytest.raises(InputError, match="holds one, two, three. Give `other`"):
        other_run(first, None)
    other = record(tmp_path / "b#c.duckdb", [("x", [1], [])])
    assert other_run(first, "three").run == "three"
    assert other_run(first, str(other.path)).run == "arrays"
    assert other_run(first, f"{other.path}#arrays").run == "arrays"
    assert other_run(first, f"{path}#two").run == "two" and other_run(first, first) is first
    with pytest.raises(InputError, match="other is 'nope': neither a run of this file .*one, two, three. nor a trace"):
        other_run(first, "nope")
    with pytest.raises(InputError, match="no run 'four'"):
        other_run(first, f"{path}#four")
