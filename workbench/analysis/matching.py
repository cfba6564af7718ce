"""Which tokens two runs have in common, so that what their routers did can be compared token by token.

Sequences are the same if their texts' digests (sha256) and the token ids of their prompts are. Of two such sequences
the tokens up to the first that differs are compared: what a model generates may diverge, and after that the routers no
longer see the same context. A text that occurs several times is matched in the order of occurrence.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench import connection, schema
from workbench.errors import InputError
from workbench.location import exists
from workbench.schema import UNKNOWN_TOKEN
from workbench.tracefile import Trace


@dataclass(frozen=True)
class Matched:
    """Tokens of two runs that are the same token of the same text.

    first, second      int64 (n,)  place among the tokens of either run; `first` ascending
    sequences          int64 (n_pairs, 2)  rows of `sequences()` that were matched
    whole              bool (n_pairs,)  whether all tokens of both are compared
    only_first, only_second        sequences without a counterpart
    n_apart            tokens of the first run's matched sequences that come after a difference
    """

    first: np.ndarray
    second: np.ndarray
    sequences: np.ndarray
    whole: np.ndarray
    only_first: int
    only_second: int
    n_apart: int


def other_run(trace: Trace, other: Trace | str | None) -> Trace:
    """The run to compare with.

    other  a Trace; the name of a run in the same file; the path of another trace file (its only run, or the last that
           finished); `path#run`; None for the other run of a file that holds exactly two

    InputError lists the runs there are.
    """
    if isinstance(other, Trace):
        return other
    with connection.reading(trace.path) as con:
        runs = [row["run"] for row in schema.runs(con)]
    others = [run for run in runs if run != trace.run]
    listed = f"{trace.path} holds {', '.join(runs)}"
    if other is None:
        if len(others) == 1:
            return Trace(trace.path, others[0])
        raise InputError(
            f"which run shall {trace.run!r} be compared with? {listed}. Give `other`: the name of a run, a path, or "
            "path#run."
            + ("" if others else f" Add a run with `workbench trace … --out {trace.path} --append --run NAME`.")
        )
    if other in runs:
        return Trace(trace.path, other)
    path, mark, run = other.rpartition("#")
    if exists(other):
        return Trace(other)
    if mark and exists(path):
        return Trace(path, run)
    raise InputError(
        f"other is {other!r}: neither a run of this file ({listed}) nor a trace file. Expected the name of a run, a "
        "path, or path#run."
    )


def name_of(other: Trace, trace: Trace) -> str:
    """What to call the other run: its name, and of another file that file's name before it."""
    return other.run if other.path == trace.path else f"{other.path.name}#{other.run}"


def need_same_layers(trace: Trace, other: Trace) -> None:
    """Refuse runs whose layers or experts can't be told to be the same."""
    sizes = [run.layers["n_experts"].tolist() for run in (trace, other)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"run {trace.run!r} has {described(sizes[0])}, run {other.run!r} has {described(sizes[1])}: expert by "
            "expert only runs of one architecture can be compared (checkpoints, precisions, engines, steered runs)."
        )


def described(sizes: list[int]) -> str:
    """Numbers of experts, one a layer, in words."""
    return f"{len(sizes)} layers of {'/'.join(str(size) for size in sorted(set(sizes))) or 'no'} experts"


def match(trace: Trace, other: Trace) -> Matched:
    """The tokens that two runs share; InputError if there are none."""
    tables = [run.sequences() for run in (trace, other)]
    ids = [run.tokens()["token_id"].to_numpy() for run in (trace, other)]
    starts = [np.concatenate([[0], np.cumsum(table["n_tokens"].to_numpy(np.int64))]) for table in tables]
    digests = all(len(table) and table["sha256"].notna().all() for table in tables)
    known = all(len(tokens) and (tokens != UNKNOWN_TOKEN).any() for tokens in ids)
    if not digests and not known and all(map(len, ids)):
        raise InputError(
            f"runs {trace.run!r} and {other.run!r} can't be matched: neither the digests of the texts (sha256) nor the "
            "token ids are known in both. Write them with the runs, as `workbench trace` does."
        )
    keys = [
        sequence_keys(table, tokens, start, digests, known)
        for table, tokens, start in zip(tables, ids, starts, strict=True)
    ]
    places: dict[tuple, list[int]] = defaultdict(list)
    for row in range(len(keys[1]) - 1, -1, -1):
        places[keys[1][row]].append(row)
    pairs, lengths = [], []
    for row, key in enumerate(keys[0]):
        if not places.get(key):
            continue
        there = places[key].pop()
        a = ids[0][starts[0][row] : starts[0][row + 1]]
        b = ids[1][starts[1][there] : starts[1][there + 1]]
        pairs.append((row, there))
        lengths.append(common(a, b) if known else min(len(a), len(b)))
    n_pairs = np.array(pairs, np.int64).reshape(-1, 2)
    n_common = np.array(lengths, np.int64)
    if not n_common.sum():
        raise InputError(
            f"run {trace.run!r} ({len(tables[0]):,} sequences) and run {other.run!r} ({len(tables[1]):,}) have no "
            "token of the same text in common. Trace both over the same corpus, with the same tokenizer, --max-length, "
            "--long and --max-tokens."
        )
    sizes = [np.diff(start)[n_pairs[:, side]] for side, start in enumerate(starts)]
    within = np.arange(n_common.sum()) - np.repeat(np.cumsum(n_common) - n_common, n_common)
    return Matched(
        first=np.repeat(starts[0][n_pairs[:, 0]], n_common) + within,
        second=np.repeat(starts[1][n_pairs[:, 1]], n_common) + within,
        sequences=n_pairs,
        whole=(sizes[0] == n_common) & (sizes[1] == n_common),
        only_first=len(tables[0]) - len(pairs),
        only_second=len(tables[1]) - len(pairs),
        n_apart=int((sizes[0] - n_common).sum()),
    )


def sequence_keys(
    table: pd.DataFrame, ids: np.ndarray, starts: np.ndarray, digests: bool, known: bool
) -> list[tuple[str, bytes | int]]:
    """What two sequences must agree in: the text's digest and the prompt's token ids (or the length, if those are
    not known)."""
    ids = np.ascontiguousarray(ids, np.int64)
    names = table["sha256"].tolist() if digests else [""] * len(table)
    prompts = table["n_prompt"].tolist()
    if not known:
        return [(name, int(length)) for name, length in zip(names, np.diff(starts), strict=True)]
    return [
        (name, ids[start : start + prompt].tobytes())
        for name, start, prompt in zip(names, starts, prompts, strict=False)
    ]


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common beginning."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
