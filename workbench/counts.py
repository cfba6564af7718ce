"""Runs that count: for each router how often experts were chosen, and chosen together, instead of a row a token.

A trace of a very large corpus need not hold every token. `--counts-by` keeps the texts (the table `sequences`) and

    loads  how often the tokens of one text and phase chose each expert. With `--counts-by lang,domain`, those of all
           texts of a block that have the same language and domain, so that the table stops growing with the corpus
    pairs  how many tokens of one block of texts chose expert i and expert j of the same router, or of the next one

A *block* is a random part of the texts, one of at most 64, drawn once before the run begins, as the analyses of pairs
draw theirs of any trace (`workbench.analysis.pairs.text_blocks` with seed 0): so they give the same numbers.

What is here reads and writes the two tables; `workbench.tally` counts while a model runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from workbench import connection
from workbench.errors import InputError
from workbench.schema import PHASES
from workbench.tracefile import Trace, matrix
from workbench.transaction import insert_columns, insert_rows, sequence_row


@dataclass(frozen=True)
class Loads:
    """How often experts were chosen by n texts and phases, or by n groups of texts.

    seq     int32 (n,)             the text; of a group its first
    phase   int8 (n,)              place in PHASES; -1 in groups, whose texts are counted with all their phases
    block   uint16 (n,)            block of the text, or of all the group's
    counts  int64 (n, E) a layer   tokens that chose each expert
    tokens  int64 (n, k + 1) a layer   tokens that chose 0, 1, … k experts
    """

    seq: np.ndarray
    phase: np.ndarray
    block: np.ndarray
    counts: list[np.ndarray]
    tokens: list[np.ndarray]


@dataclass(frozen=True)
class Counts:
    """What some batches add to a run that counts.

    sequences  those of the batches, as in `Block`
    loads      of these batches; of the whole run so far if `grouped`
    pairs      (layer, other layer) -> int64 (n_blocks, E + 1, E' + 1) of the whole run so far: tokens that chose i and
               j; the last row and column stand for any expert
    """

    sequences: list[dict[str, Any]]
    loads: Loads
    pairs: dict[tuple[int, int], np.ndarray]
    grouped: bool

    @property
    def n_tokens(self) -> int:
        return sum(row["n_tokens"] for row in self.sequences)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in [*self.loads.counts, *self.loads.tokens, *self.pairs.values()])


class CountsTransaction:
    """What `Transaction` is, for a run that counts: each `Counts` is committed by itself."""

    def __init__(self, run: str):
        self.run = run
        self.clear()

    def clear(self) -> None:
        self.counts: Counts | None = None
        self.sequences: list[dict[str, Any]] = []
        self.vocabulary: dict[int, str] = {}
        self.n_tokens = 0
        self.since: float | None = None

    def empty(self) -> bool:
        return self.counts is None

    def full(self, more: int = 0) -> bool:
        """Whether there is anything: `more` tokens never fit beside it."""
        return self.counts is not None

    def seconds_left(self) -> float | None:
        return None if self.since is None else 0.0

    def add(self, counts: Counts) -> None:
        self.counts, self.since = counts, time.monotonic()
        self.sequences = [sequence_row(self.run, row) for row in counts.sequences]
        self.n_tokens = counts.n_tokens

    def name(self, texts: Mapping[int, str], known: set[int]) -> None:
        """No token is kept, so no text of a token either."""

    def insert(self, con: duckdb.DuckDBPyConnection) -> None:
        """Write everything inside the transaction that `con` has begun. Totals replace those the file has."""
        assert self.counts is not None
        insert_rows(con, "sequences", self.sequences)
        for table in ("loads", "pairs") if self.counts.grouped else ("pairs",):
            con.execute(f"DELETE FROM {table} WHERE run = ?", [self.run])
        for layer in range(len(self.counts.loads.counts)):
            insert_columns(con, "loads", self.run, _loads_table(self.counts.loads, layer))
        for (layer, other), table in self.counts.pairs.items():
            insert_columns(con, "pairs", self.run, _pairs_table(table, layer, other))


def _loads_table(loads: Loads, layer: int) -> pa.Table:
    phase = pa.array(loads.phase, mask=loads.phase < 0)
    return pa.table(
        {
            "seq": pa.array(loads.seq),
            "phase": pa.DictionaryArray.from_arrays(phase, pa.array(PHASES)),
            "block": pa.array(loads.block),
            "layer": pa.array(np.full(len(loads.seq), layer, np.uint16)),
            "counts": _lists(loads.counts[layer]),
            "tokens": _lists(loads.tokens[layer]),
        }
    )


def _pairs_table(table: np.ndarray, layer: int, other: int) -> pa.Table:
    """Rows of what was chosen at all; the last of `table`, any expert, is null."""
    block, expert = np.nonzero(table[:, :, -1])
    n = len(block)
    return pa.table(
        {
            "block": pa.array(block.astype(np.uint16)),
            "layer": pa.array(np.full(n, layer, np.uint16)),
            "other": pa.array(np.full(n, other, np.uint16)),
            "expert": pa.array(expert.astype(np.uint16), mask=expert == table.shape[1] - 1),
            "tokens": pa.array(table[block, expert, -1]),
            "counts": _lists(table[block, expert, :-1]),
        }
    )


def _lists(rows: np.ndarray) -> pa.Array:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(rows).reshape(-1)))


# --- reading


def grouped_by(trace: Trace) -> list[str]:
    """The columns whose values make a group of texts; none where each text is counted by itself."""
    return list(_settings(trace).get("group") or ())


def rows(trace: Trace) -> pd.DataFrame:
    """What `loads` has a row a layer of, in its order: seq, phase (categorical), block, n_tokens."""
    if trace.is_part and grouped_by(trace):
        raise trace.only_counts("counts of a part of its texts")
    with connection.reading(trace.path) as con:
        frame = con.execute(
            "SELECT seq, phase, block, list_sum(tokens)::BIGINT AS n_tokens FROM loads WHERE run = ? AND layer = 0 "
            "ORDER BY seq, phase",
            [trace.run],
        ).df()
    return frame[np.isin(frame["seq"], trace.sequence_ids)].reset_index(drop=True)


def loads(trace: Trace, layer: int) -> np.ndarray:
    """int64 (n, E): how often the tokens of each of `rows` chose each expert."""
    return _read(trace, layer, "counts", int(trace.layers["n_experts"].iloc[layer]))


def load_sizes(trace: Trace, layer: int) -> np.ndarray:
    """int64 (n, k + 1): how many tokens of each of `rows` chose 0, 1, … k experts."""
    return _read(trace, layer, "tokens", int(trace.layers["top_k"].iloc[layer]) + 1)


def pairs(trace: Trace, layer: int, other: int) -> np.ndarray:
    """int64 (n_blocks, E + 1, E' + 1): tokens that chose i and j, as in `Counts`. InputError where not counted."""
    if other not in (layer, layer + 1):
        raise trace.only_counts(f"pairs of experts of layers {layer} and {other}")
    if trace.is_part:
        raise trace.only_counts("pairs of experts in a part of its texts")
    if _settings(trace).get("pairs") is False:
        raise InputError(
            f"run {trace.run!r} has no pairs of experts: what it was imported from counts each expert by itself."
        )
    n_experts = [int(trace.layers["n_experts"].iloc[at]) for at in (layer, other)]
    with connection.reading(trace.path) as con:
        found = con.sql(
            "SELECT block, coalesce(expert, ?) AS expert, tokens, counts FROM pairs "
            "WHERE run = ? AND layer = ? AND other = ?",
            params=[n_experts[0], trace.run, layer, other],
        ).to_arrow_table()
    table = np.zeros((n_blocks(trace), n_experts[0] + 1, n_experts[1] + 1), np.int64)
    block, expert = found["block"].to_numpy(), found["expert"].to_numpy()
    table[block, expert, -1] = found["tokens"].to_numpy()
    table[block, expert, :-1] = matrix(found["counts"], n_experts[1], np.int64, 0)
    return table


def n_blocks(trace: Trace) -> int:
    """Blocks that the texts were put into."""
    return int(_settings(trace)["blocks"])


def _settings(trace: Trace) -> dict[str, Any]:
    (facts,) = (row for row in trace.runs().to_dict("records") if row["run"] == trace.run)
    return facts["corpus"] or {}


def _read(trace: Trace, layer: int, column: str, width: int) -> np.ndarray:
    with connection.reading(trace.path) as con:
        query = f"SELECT seq, {column} FROM loads WHERE run = ? AND layer = ? ORDER BY seq, phase"
        found = con.sql(query, params=[trace.run, layer]).to_arrow_table()
    return matrix(found[column], width, np.int64, 0)[np.isin(found["seq"].to_numpy(), trace.sequence_ids)]
