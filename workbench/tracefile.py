"""Read a trace: `Trace` answers questions about one run of a trace as arrays, tables or SQL.

>>> trace = Trace("udhr.duckdb")                            # doctest: +SKIP
>>> trace.experts(layer=3)                                  # uint16 (n_tokens, top_k)     doctest: +SKIP
>>> trace.sql("SELECT lang, sum(n_tokens) FROM sequences GROUP BY lang")                   # doctest: +SKIP
"""

import copy
import json
import os
from datetime import datetime
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from workbench import connection, schema
from workbench.errors import InputError
from workbench.location import asking, filesystem, located
from workbench.query import check
from workbench.routing import NO_EXPERT
from workbench.transaction import to_float

FROM_COUNTS = (
    "load", "balance", "specialization", "mutual_information", "group_similarity", "coactivation", "partners",
    "affinity",
)  # fmt: skip
"""The analyses that a run that counts can answer."""


class Trace:
    """One run of a trace file, as it stood when the Trace was made: a run that goes on growing does not change it.

    path  the file; or a folder of Parquet parts (docs/parts.md), which may be a URL such as s3://bucket/folder
    run   name of the run; None for the only one, or the last that finished

    The file is opened for a question at a time, read-only, and never read whole: an array of one layer is the most that
    is held. Arrays of tokens are in the order of `tokens()`: by sequence, then position.
    Raises InputError if the file is not a readable trace or has no such run.
    """

    def __init__(self, path: str | os.PathLike, run: str | None = None):
        self.path = located(path)
        with connection.reading(self.path) as con:
            self.run = schema.find_run(con, self.path, run)
            self.layers: pd.DataFrame = con.execute(
                "SELECT * EXCLUDE (run) FROM layers WHERE run = ? ORDER BY layer", [self.run]
            ).df()
            query = "SELECT recorded, started FROM runs WHERE run = ?"
            ((recorded, started),) = con.execute(query, [self.run]).fetchall()
            query = "SELECT seq, n_tokens FROM sequences WHERE run = ? ORDER BY seq"
            found = con.execute(query, [self.run]).fetchnumpy()
        self.recorded: frozenset[str] = frozenset(recorded)
        """What the run recorded, of `workbench.schema.RECORDABLE`."""
        self.started: datetime = started
        """When it was begun, which tells it apart from another run of the same name in a file of the same name."""
        self._part = False
        self._index(found["seq"], found["n_tokens"])

    def _index(self, seqs: Any, lengths: Any) -> None:
        self._seqs = np.asarray(seqs, dtype=np.int32)
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths

    def only(self, seqs: npt.ArrayLike) -> "Trace":
        """The same run, as if it had no other sequences than these; InputError if one of them isn't in it.

        seqs  integers, ids as in `sequences()["seq"]`, in any order
        """
        wanted = np.unique(np.asarray(seqs, dtype=np.int64))
        known = np.isin(wanted, self._seqs)
        if not known.all():
            raise InputError(f"run {self.run!r} has no sequence {wanted[~known][0]}.")
        part = copy.copy(self)
        part._part = True
        kept = np.isin(self._seqs, wanted)
        part._index(self._seqs[kept], self._lengths[kept])
        return part

    @property
    def counted(self) -> bool:
        """Whether the run counts choices instead of recording each token's: see `workbench.counts`."""
        return schema.COUNTS in self.recorded

    @property
    def is_part(self) -> bool:
        """Whether only some sequences of the run are looked at."""
        return self._part

    @property
    def sequence_ids(self) -> np.ndarray:
        """int32 (n_sequences,): `sequences()["seq"]`."""
        return self._seqs

    def __repr__(self) -> str:
        size = f"{self.n_tokens:,} tokens, {self.n_sequences:,} sequences, {self.n_layers} layers"
        return f"Trace({str(self.path)!r}, run={self.run!r}: {size})"

    @property
    def n_layers(self) -> int:
        """MoE layers (routers) of the run."""
        return len(self.layers)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._lengths.sum())

    @property
    def n_sequences(self) -> int:
        """Texts, or pieces of long ones."""
        return len(self._seqs)

    # --- tables

    def runs(self) -> pd.DataFrame:
        """Every run in the file: the table `runs`, with its JSON columns as Python values."""
        with connection.reading(self.path) as con:
            frame = con.execute("SELECT * FROM runs ORDER BY started, run").df()
        for name in ("recipe", "corpus", "versions"):
            frame[name] = [json.loads(text) if isinstance(text, str) else None for text in frame[name]]
        return frame

    def sequences(self) -> pd.DataFrame:
        """One row a sequence, by `seq`: the table `sequences`, with each key of the metadata as a column of its own.

        A key that is already the name of a column gets the prefix `metadata_`.
        """
        with connection.reading(self.path) as con:
            frame = con.execute("SELECT * EXCLUDE (run) FROM sequences WHERE run = ? ORDER BY seq", [self.run]).df()
        frame = frame.loc[np.isin(frame["seq"], self._seqs)].reset_index(drop=True)
        metadata = pd.DataFrame([json.loads(text) for text in frame.pop("metadata")], index=frame.index)
        return frame.join(metadata.rename(columns={name: f"metadata_{name}" for name in metadata if name in frame}))

    def tokens(self) -> pd.DataFrame:
        """One row a token: seq, pos, token_id (-1 unknown), phase (categorical), nll (nats, NaN unknown)."""
        self._need("ids", "tokens")
        query, given = self._mine("SELECT seq, pos, token_id, phase, nll FROM tokens")
        with connection.reading(self.path) as con:
            frame = con.execute(f"{query} ORDER BY seq, pos", given).df()
        return frame.loc[np.isin(frame["seq"], self._seqs)].reset_index(drop=True)

    def vocabulary(self) -> pd.DataFrame:
        """One row a token id that occurs in the run, by id: token_id, text."""
        with connection.reading(self.path) as con:
            return con.execute("SELECT token_id, text FROM vocabulary WHERE run = ? ORDER BY token_id", [self.run]).df()

    def sequence_index(self) -> np.ndarray:
        """int32 (n_tokens,): the row of `sequences()` that each token belongs to."""
        self._need("ids", "tokens")
        return np.repeat(np.arange(self.n_sequences, dtype=np.int32), self._lengths)

    def sql(self, query: str) -> pd.DataFrame:
        """The answer to a query over the tables of the whole file (all runs), as it stands now.

        query  SQL that asks one question; the answer's columns are its own

        The connection can read this file and nothing else: no other file, no network, no settings, no writing.
        InputError for what is no question, and with DuckDB's reason if the query fails.
        """
        query = check(query)
        with connection.reading(self.path) as con:
            try:
                result = con.execute(query)
                return result.df() if result.description else pd.DataFrame()
            except duckdb.Error as error:
                raise InputError(f"the query failed: {error}") from error

    # --- arrays of one layer

    def experts(self, layer: int) -> np.ndarray:
        """uint16 (n_tokens, top_k): ids in the router's own rank order, NO_EXPERT (65535) where there is none."""
        return self._lists("experts", layer, self._layer(layer)["top_k"], np.uint16, NO_EXPERT)

    def weights(self, layer: int) -> np.ndarray:
        """float32 (n_tokens, top_k): gate weights >= 0 beside `experts`, 0 where there is no expert."""
        self._need("weights")
        rows = self._read(layer, "weights", "scale")
        fixed = matrix(rows["weights"], self._layer(layer)["top_k"], np.uint16, 0)
        return self._place(rows, to_float(fixed, rows["scale"].to_numpy()[:, None]), np.float32(0))

    def norms(self, layer: int) -> np.ndarray:
        """float32 (n_tokens, top_k): L2 norm of each chosen expert's output before weighting, 0 where there is none."""
        self._need("norms")
        return self._lists("norms", layer, self._layer(layer)["top_k"], np.float32, 0)

    def logits(self, layer: int) -> np.ndarray:
        """float32 (n_tokens, E): router logits before gating."""
        self._need("logits")
        return self._lists("logits", layer, self._layer(layer)["n_experts"], np.float32, np.nan)

    def entropy(self, layer: int) -> np.ndarray:
        """float32 (n_tokens,): nats, of the full router distribution; NaN where the router has no scores."""
        return self._numbers("entropy", layer)

    def margin(self, layer: int) -> np.ndarray:
        """float32 (n_tokens,): k-th minus (k+1)-th score of the router's top-k; NaN where k = E or it has no scores."""
        return self._numbers("margin", layer)

    def shift(self, layer: int) -> np.ndarray:
        """float32 (n_tokens,): how far the routed experts turn the residual stream, in [0, 2].

        max(0, 1 - cos(x, x + r)), x the residual stream before the MoE block, r the weighted sum of the routed experts'
        outputs, shared experts left out (EASY-EP, Dong et al. 2025).
        """
        return self._numbers("shift", layer)

    def lookahead(self, layer: int) -> np.ndarray:
        """uint16 (n_tokens, top_k of the next layer): what the next layer's router chooses given this one's input.

        NO_EXPERT where there is none. InputError for the last layer of a stack, which has no next router.
        """
        self._need("lookahead")
        following = self._following(layer)
        return self._lists("lookahead", layer, following["top_k"], np.uint16, NO_EXPERT)

    def predictions(self) -> np.ndarray:
        """int32 (n_tokens,): the token that the model itself would put next after each token; -1 where unknown.

        The argmax of the logits at the token's position. Unknown are, in a run that generates, the tokens of the prompt
        but for its last.
        """
        self._need("predictions")
        query, given = self._mine("SELECT seq, pos, predicted FROM tokens")
        with connection.reading(self.path) as con:
            rows = con.sql(query, params=given).to_arrow_table()
        predicted = rows["predicted"].fill_null(schema.UNKNOWN_TOKEN).to_numpy().astype(np.int32, copy=False)
        return self._place(rows, predicted, schema.UNKNOWN_TOKEN)

    def profiles(self, layer: int) -> np.ndarray:
        """float32 (n_sequences, E): mean router probabilities of a sequence's tokens; rows as in `sequences()`."""
        self._need("profiles")
        n_experts = self._layer(layer)["n_experts"]
        query, given = self._mine("SELECT seq, probs FROM profiles", layer)
        with connection.reading(self.path) as con:
            rows = con.sql(query, params=given).to_arrow_table()
        at, known = self._find(rows["seq"].to_numpy())
        out = np.full((self.n_sequences, n_experts), np.nan, dtype=np.float32)
        out[at[known]] = matrix(rows["probs"], n_experts, np.float32, np.nan)[known]
        return out

    def _layer(self, layer: int) -> dict[str, Any]:
        if not 0 <= layer < self.n_layers:
            raise InputError(f"layer {layer}: run {self.run!r} has layers 0 to {self.n_layers - 1}.")
        return {str(name): value for name, value in self.layers.iloc[layer].items()}

    def _following(self, layer: int) -> dict[str, Any]:
        """The next layer of the same stack; InputError where there is none."""
        here = self._layer(layer)
        after = next(
            (row for row in range(layer + 1, self.n_layers) if self._layer(row)["stack"] == here["stack"]), None
        )
        if after is None:
            raise InputError(
                f"layer {layer} of run {self.run!r} is the last of its stack: there is no router to look ahead to."
            )
        return self._layer(after)

    def only_counts(self, what: str) -> InputError:
        """The error where `what` isn't to be had because the run counts."""
        return InputError(
            f"run {self.run!r} has no {what}: it was traced with --counts-by. It answers "
            f"{', '.join(FROM_COUNTS)}; for all else trace again with --record ids,weights."
        )

    def _need(self, name: str, what: str = "") -> None:
        if name not in self.recorded and self.counted:
            raise self.only_counts(what or name)
        if name not in self.recorded:
            had = ", ".join(name for name in schema.RECORDABLE if name in self.recorded)
            single = name in ("entropy", "margin", "shift", "lookahead")
            raise InputError(
                f"{name} {'was' if single else 'were'} not recorded in run {self.run!r} "
                f"(it has {had}): trace again with --record {had.replace(' ', '')},{name}."
            )

    def _lists(self, name: str, layer: int, width: int, dtype: Any, fill: Any) -> np.ndarray:
        rows = self._read(layer, name)
        return self._place(rows, matrix(rows[name], width, dtype, fill), fill)

    def _numbers(self, name: str, layer: int) -> np.ndarray:
        self._need(name)
        rows = self._read(layer, name)
        # Nulls become NaN only through a cast to float.
        return self._place(rows, rows[name].to_numpy().astype(np.float32, copy=False), np.nan)

    def _read(self, layer: int, *columns: str) -> pa.Table:
        self._layer(layer)
        self._need("ids", "rows of single tokens")
        query, given = self._mine(f"SELECT seq, pos, {', '.join(columns)} FROM routing", layer)
        with connection.reading(self.path) as con:
            return con.sql(query, params=given).to_arrow_table()

    def _mine(self, select: str, layer: int | None = None) -> tuple[str, list[Any]]:
        """A query of the rows of this run (and layer), and its parameters; of a part of a run only what it has."""
        query, given = f"{select} WHERE run = ?", [self.run]
        if layer is not None:
            query, given = f"{query} AND layer = ?", [*given, layer]
        if self._part:
            query, given = f"{query} AND seq IN (SELECT unnest(?))", [*given, self._seqs.tolist()]
        return query, given

    def _place(self, rows: pa.Table, values: np.ndarray, fill: Any) -> np.ndarray:
        """Bring rows into the order of the tokens. Sorting is not needed: each row's place follows from seq and pos."""
        at, known = self._find(rows["seq"].to_numpy())
        pos = rows["pos"].to_numpy()
        if not known.all():  # sequences committed after this Trace was made
            at, pos, values = at[known], pos[known], values[known]
        at = self._starts[at] + pos
        if len(at) != self.n_tokens or (len(at) and at.max() >= self.n_tokens):
            raise InputError(
                f"{self.path}: run {self.run!r} has {len(at):,} routing rows for {self.n_tokens:,} tokens in a layer. "
                "The file changed since this Trace was made, or is damaged: see `workbench validate`."
            )
        if np.array_equal(at, np.arange(len(at))):
            return values
        out = np.full((self.n_tokens, *values.shape[1:]), fill, dtype=values.dtype)
        out[at] = values
        return out

    def _find(self, seq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row in `sequences()` of each id, and whether it is there."""
        if not self.n_sequences:
            return np.zeros(len(seq), dtype=np.int64), np.zeros(len(seq), dtype=bool)
        at = np.minimum(np.searchsorted(self._seqs, seq), self.n_sequences - 1)
        return at, self._seqs[at] == seq


def matrix(lists: pa.ChunkedArray, width: int, dtype: Any, fill: Any) -> np.ndarray:
    """Lists of at most `width` values as an array (rows, width), shorter ones filled up."""
    out = np.full((len(lists), width), fill, dtype=dtype)
    row = 0
    for chunk in lists.chunks:
        n = len(chunk)
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        counts = np.diff(offsets)
        if n and len(values) == n * width and (counts == width).all():
            out[row : row + n] = values.reshape(n, width)
        elif n:
            place = np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], counts)
            out[row + np.repeat(np.arange(n), counts), place] = values
        row += n
    return out


def info(path: str | os.PathLike) -> dict[str, Any]:
    """What a trace holds, as nested facts that JSON can hold (times as datetime)."""
    with connection.reading(path) as con:
        (version,) = con.execute("SELECT version FROM format").fetchall()[0]
        found = con.sql(_INFO).to_arrow_table().to_pylist()
    for run in found:
        for name in ("recipe", "corpus", "versions"):
            run[name] = None if run[name] is None else json.loads(run[name])
    where = located(path)
    fs, name = filesystem(where)
    with asking(where):
        size = fs.du(name)
    return {"file": str(path), "bytes": size, "format": version, "runs": found}


_INFO = """
SELECT run, status, model, revision, family, engine, dtype, recorded, n_layers AS layers, experts, top_k,
    coalesce(sequences, 0) AS sequences, coalesce(tokens, 0) AS tokens, coalesce(languages, 0) AS languages,
    coalesce(domains, 0) AS domains, started, finished, recipe, corpus, versions
FROM runs
LEFT JOIN (
    SELECT run, count(*) AS n_layers, list_sort(list(DISTINCT n_experts)) AS experts,
        list_sort(list(DISTINCT top_k)) AS top_k
    FROM layers GROUP BY run) USING (run)
LEFT JOIN (
    SELECT run, count(*) AS sequences, sum(n_tokens)::BIGINT AS tokens, count(DISTINCT lang) AS languages,
        count(DISTINCT domain) AS domains
    FROM sequences GROUP BY run) USING (run)
ORDER BY started
"""
