"""What one transaction adds to a trace: blocks of whole sequences, checked and turned into the file's types."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from workbench.errors import RunError
from workbench.routing import NO_EXPERT, Routing
from workbench.schema import PHASES

ROW_GROUP = 122_880
"""Rows that DuckDB keeps together."""

# A transaction below about 300 k rows goes through DuckDB's write-ahead log, at a third of the speed and up to twice
# the size; larger ones waste less of the last block of each column.
COMMIT_TOKEN_LAYERS = 5 * ROW_GROUP
COMMIT_BYTES = 192 << 20
COMMIT_SECONDS = 30.0

FULL_SCALE = 65535
"""`routing.weights` count in 1/FULL_SCALE of `routing.scale`."""


@dataclass(frozen=True)
class Block:
    """Whole sequences: what one batch adds to a trace.

    sequences  one dict a sequence: seq, sha256, n_prompt, n_tokens, lang, domain, source, segment_id, metadata (a dict)
    tokens     arrays of n: seq int32, pos int32, token_id int32, phase uint8 (code into PHASES), nll float32 (nats, NaN
               where unknown) and, if recorded, predicted int32 (-1 unknown); the tokens of a sequence together, in
               order of position
    routing    one Routing a layer, of the same n tokens in the same order
    profiles   float32 (n_sequences, E) a layer: mean router probabilities over a sequence's tokens; None: not recorded
    """

    sequences: list[dict[str, Any]]
    tokens: dict[str, np.ndarray]
    routing: list[Routing]
    profiles: list[np.ndarray] | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.tokens["seq"])

    @property
    def nbytes(self) -> int:
        arrays = [*self.tokens.values(), *(self.profiles or ())]
        arrays += [getattr(layer, field.name) for layer in self.routing for field in fields(layer)]
        return sum(array.nbytes for array in arrays if array is not None)


class Transaction:
    """Blocks gathered for one commit to run `run`, whose `layers` have the columns of the table `layers`."""

    def __init__(self, run: str, recorded: Iterable[str], layers: list[dict[str, Any]]):
        self.run, self.recorded, self.layers = run, frozenset(recorded), layers
        self.clear()

    def clear(self) -> None:
        self.sequences: list[dict[str, Any]] = []
        self.tokens: list[dict[str, np.ndarray]] = []
        self.routing: list[list[dict[str, np.ndarray]]] = [[] for _ in self.layers]
        self.profiles: list[tuple[int, int, np.ndarray]] = []  # seq, layer, (E,)
        self.vocabulary: dict[int, str] = {}
        self.n_tokens = self.nbytes = 0
        self.since: float | None = None

    def empty(self) -> bool:
        return not self.sequences and not self.vocabulary

    def full(self, more: int = 0) -> bool:
        """Whether `more` further tokens are too many."""
        token_layers = (self.n_tokens + more) * len(self.layers)
        return token_layers > COMMIT_TOKEN_LAYERS or self.nbytes >= COMMIT_BYTES

    def seconds_left(self) -> float | None:
        """Until what was added first has waited long enough; None if there is nothing."""
        return None if self.since is None else max(0.0, self.since + COMMIT_SECONDS - time.monotonic())

    def add(self, block: Block) -> None:
        """Check and encode one block. RunError names the layer and the token; then nothing of the block is added."""
        n = _check_tokens(block)
        if len(block.routing) != len(self.layers):
            raise RunError(
                f"a block has {len(block.routing)} layers; run {self.run!r} was begun with {len(self.layers)}"
            )
        if "predictions" in self.recorded and "predicted" not in block.tokens:
            raise RunError("predictions are to be recorded, but the tokens of a block came without `predicted`")
        encoded = []
        for layer, routing in zip(self.layers, block.routing, strict=True):
            after = _after(self.layers, layer)
            recorded = self.recorded if after else self.recorded - {"lookahead"}
            missing = [name for name in recorded & _OPTIONAL if getattr(routing, name) is None]
            if missing:
                raise RunError(f"layer {layer['layer']} came without {', '.join(sorted(missing))}, to be recorded")
            encoded.append(_encode(routing, layer, after or layer, recorded, block.tokens, n))
        if "profiles" in self.recorded:
            self.profiles += _profiles(block, self.layers)
        self.sequences += [sequence_row(self.run, row) for row in block.sequences]
        self.tokens.append(block.tokens)
        for rows, columns in zip(self.routing, encoded, strict=True):
            rows.append(columns)
            self.nbytes += sum(column.nbytes for column in columns.values())
        self.n_tokens += n
        self.since = self.since or time.monotonic()

    def name(self, texts: Mapping[int, str], known: set[int]) -> None:
        """Add the texts of token ids that are not `known`."""
        self.vocabulary |= {int(i): clean(text) or "" for i, text in texts.items() if i not in known}

    def insert(self, con: duckdb.DuckDBPyConnection) -> None:
        """Write everything inside the transaction that `con` has begun."""
        for table, rows in self.tables().items():
            insert_columns(con, table, self.run, rows)

    def tables(self) -> dict[str, pa.Table]:
        """Everything, by table, without the column `run`; routing layer by layer, as it will be read."""
        found = {}
        if self.sequences:
            found["sequences"] = pa.Table.from_pylist(self.sequences).drop_columns("run")
        if self.vocabulary:
            texts = {"token_id": pa.array(list(self.vocabulary), pa.int32()), "text": list(self.vocabulary.values())}
            found["vocabulary"] = pa.table(texts)
        if not self.tokens:
            return found
        tokens = {name: np.concatenate([block[name] for block in self.tokens]) for name in self.tokens[0]}
        seq, pos = (pa.array(tokens[name].astype(np.int32, copy=False)) for name in ("seq", "pos"))
        nll = tokens["nll"].astype(np.float32, copy=False)
        columns = {
            "seq": seq,
            "pos": pos,
            "token_id": pa.array(tokens["token_id"].astype(np.int32, copy=False)),
            "phase": pa.DictionaryArray.from_arrays(pa.array(tokens["phase"].astype(np.int8)), pa.array(PHASES)),
            "nll": pa.array(nll, mask=np.isnan(nll)),
        }
        if "predictions" in self.recorded:
            columns["predicted"] = pa.array(tokens["predicted"].astype(np.int32, copy=False))
        found["tokens"] = pa.table(columns)
        if self.n_tokens:
            layers = [_rows(layer, seq, pos, blocks) for layer, blocks in enumerate(self.routing)]
            # The last layer of a stack has no column `lookahead`: nulls stand for it.
            found["routing"] = pa.concat_tables(layers, promote_options="default")
        if self.profiles:
            rows = [{"seq": seq, "layer": layer, "probs": probs} for seq, layer, probs in self.profiles]
            kinds = pa.schema([("seq", pa.int32()), ("layer", pa.uint16()), ("probs", pa.list_(pa.float32()))])
            found["profiles"] = pa.Table.from_pylist(rows, schema=kinds)
        return found


_OPTIONAL = frozenset(("weights", "entropy", "margin", "logits", "norms", "shift", "lookahead"))
# The lists of the table `routing`, and whose lengths theirs are.
_LISTS = {"experts": "experts", "weights": "experts", "norms": "experts", "logits": "logits", "lookahead": "lookahead"}


def _after(layers: list[dict[str, Any]], layer: dict[str, Any]) -> dict[str, Any] | None:
    """The next layer of the same stack."""
    return next((row for row in layers[layer["layer"] + 1 :] if row["stack"] == layer["stack"]), None)


def _check_tokens(block: Block) -> int:
    """Number of tokens, after checking that sequences and tokens describe each other."""
    lengths = [row["n_tokens"] for row in block.sequences]
    n = sum(lengths)
    sizes = {name: len(array) for name, array in block.tokens.items()}
    if set(sizes.values()) != {n}:
        raise RunError(f"the sequences of a block have {n} tokens in all, its token arrays {sizes}")
    starts = np.cumsum([0, *lengths[:-1]])
    if not np.array_equal(block.tokens["seq"], np.repeat([row["seq"] for row in block.sequences], lengths)):
        raise RunError("the token arrays of a block don't follow the order and lengths of its sequences")
    if not np.array_equal(block.tokens["pos"], np.arange(n) - np.repeat(starts, lengths)):
        raise RunError("the positions of a block don't count up from 0 in each sequence")
    return n


def _encode(
    routing: Routing,
    layer: Mapping[str, Any],
    after: Mapping[str, Any],
    recorded: frozenset[str],
    tokens: Mapping[str, np.ndarray],
    n: int,
) -> dict[str, np.ndarray]:
    """The columns of one layer: lists as flat values, their lengths beside them as `NAME lengths`, int32 (n,)."""

    def where(rows: Any) -> str:
        row = int(np.argmax(rows))
        return f"layer {layer['layer']} ({layer['name']}), sequence {tokens['seq'][row]}, position {tokens['pos'][row]}"

    def ids_of(name: str, layer: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
        ids = np.ascontiguousarray(getattr(routing, name), dtype=np.uint16)
        if ids.ndim != 2 or len(ids) != n or ids.shape[1] > layer["top_k"]:
            raise RunError(
                f"layer {layer['layer']}: {name} of shape {ids.shape}; expected {n} tokens, top-{layer['top_k']}"
            )
        used = None  # bool (n, k) if some places are empty
        if ids.size and ids.max() >= layer["n_experts"]:
            used = ids != NO_EXPERT
            bad = used & (ids >= layer["n_experts"])
            if bad.any():
                raise RunError(f"expert id {ids[bad][0]} of {layer['n_experts']} experts: {where(bad.any(axis=1))}")
        lengths = np.full(n, ids.shape[1], dtype=np.int32) if used is None else used.sum(axis=1, dtype=np.int32)
        return ids, used, {name: _flat(ids, used), f"{name} lengths": lengths}

    experts, used, columns = ids_of("experts", layer)
    if "weights" in recorded and routing.weights is not None:
        weights = np.asarray(routing.weights, dtype=np.float32)
        if weights.shape != experts.shape:
            raise RunError(f"layer {layer['layer']}: weights of shape {weights.shape} for experts of {experts.shape}")
        if used is not None:
            weights = np.where(used, weights, np.float32(0))
        # A comparison with NaN is false: this refuses NaN, infinity and negative weights alike.
        if weights.size and not (weights.min() >= 0 and weights.max() < np.inf):
            good = (weights >= 0) & (weights < np.inf)
            raise RunError(f"weight {weights[~good][0]} is not a finite number >= 0: {where(~good.all(axis=1))}")
        fixed, columns["scale"] = to_fixed(weights)
        columns["weights"] = _flat(fixed, used)
    for name in ("entropy", "margin", "shift"):
        if name in recorded:
            columns[name] = np.asarray(getattr(routing, name), dtype=np.float32)
    if "norms" in recorded:
        columns["norms"] = _flat(np.asarray(routing.norms, dtype=np.float32), used)
    if "logits" in recorded:
        columns["logits"] = np.asarray(routing.logits, dtype=np.float32).reshape(n * layer["n_experts"])
        columns["logits lengths"] = np.full(n, layer["n_experts"], dtype=np.int32)
    if "lookahead" in recorded:
        columns |= ids_of("lookahead", after)[2]
    return columns


def to_fixed(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fixed-point form of float32 (n, k) weights that are finite and >= 0.

    Returns uint16 (n, k) in 1/65535 of the row's scale, and the scales, float32 (n,): 1 where no weight exceeds 1,
    else the smallest power of two that none exceeds. The error is at most scale / 131070.
    """
    scale = np.ones(len(weights), dtype=np.float32)
    if weights.size and weights.max() > 1:
        fraction, exponent = np.frexp(weights.max(axis=1))
        scale = np.maximum(scale, np.ldexp(np.float32(1), exponent - (fraction == 0.5)))
        weights = weights / scale[:, None]
    return np.rint(weights * np.float32(FULL_SCALE)).astype(np.uint16), scale


def to_float(fixed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Weights from fixed point; the view `selections` computes the same bits. scale broadcasts against fixed."""
    return fixed.astype(np.float32) / np.float32(FULL_SCALE) * scale


def _flat(values: np.ndarray, used: np.ndarray | None) -> np.ndarray:
    return values.reshape(-1) if used is None else values[used]


def _profiles(block: Block, layers: list[dict[str, Any]]) -> list[tuple[int, int, np.ndarray]]:
    if block.profiles is None or len(block.profiles) != len(layers):
        raise RunError("profiles are to be recorded but came without one array a layer")
    found = []
    for layer, profile in zip(layers, block.profiles, strict=True):
        if profile.shape != (len(block.sequences), layer["n_experts"]):
            raise RunError(
                f"layer {layer['layer']}: profiles of shape {profile.shape}; expected "
                f"{len(block.sequences)} sequences and {layer['n_experts']} experts"
            )
        found += [(row["seq"], layer["layer"], probs) for row, probs in zip(block.sequences, profile, strict=True)]
    return found


def _rows(layer: int, seq: pa.Array, pos: pa.Array, blocks: list[dict[str, np.ndarray]]) -> pa.Table:
    """One layer of the table `routing`, in the order of the tokens."""
    n = len(seq)
    columns = {"seq": seq, "pos": pos, "layer": pa.array(np.full(n, layer, dtype=np.uint16))}
    joined = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    lengths = {name: joined.pop(f"{name} lengths") for name in _LISTS if f"{name} lengths" in joined}
    offsets = {name: np.append(np.int32(0), np.cumsum(sizes, dtype=np.int32)) for name, sizes in lengths.items()}
    for name, values in joined.items():
        if name in _LISTS:
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets[_LISTS[name]]), pa.array(values))
        else:
            columns[name] = pa.array(values, mask=np.isnan(values))
    return pa.table(columns)


def sequence_row(run: str, row: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: clean(row.get(name)) for name in ("sha256", "lang", "domain", "source", "segment_id")}
    numbers = {name: int(row[name]) for name in ("seq", "n_prompt", "n_tokens")}
    return {"run": run, **numbers, **texts, "metadata": as_json(row.get("metadata") or {})}


def clean(text: Any) -> str | None:
    """Text that a database can hold: lone surrogates, which UTF-8 can't express, become question marks."""
    return None if text is None else str(text).encode("utf-8", "replace").decode("utf-8")


def as_json(value: Any) -> str:
    """Compact JSON with sorted keys; what JSON has no word for (NaN, infinity) becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {clean(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset | np.ndarray):
            return [plain(item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value if value is None or isinstance(value, bool | int | float) else clean(value)

    return json.dumps(plain(value), ensure_ascii=False, sort_keys=True)


def insert_rows(con: duckdb.DuckDBPyConnection, table: str, rows: list[dict[str, Any]]) -> None:
    """Append dicts that all have the same keys, which name columns of `table`."""
    if not rows:
        return
    names = ", ".join(rows[0])
    con.register("incoming", pa.Table.from_pylist(rows))
    con.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM incoming")
    con.unregister("incoming")


def insert_columns(con: duckdb.DuckDBPyConnection, table: str, run: str, rows: pa.Table) -> None:
    """Append rows of run `run`, which name columns of `table`."""
    names = ", ".join(rows.column_names)
    # Batches are inserted in parallel. Other sizes than whole row groups would leave some partly filled, or be slower.
    batches = rows.combine_chunks().to_batches(max_chunksize=ROW_GROUP)
    con.register("incoming", pa.Table.from_batches(batches, rows.schema))
    con.execute(f"INSERT INTO {table} (run, {names}) SELECT ?, {names} FROM incoming", [run])
    con.unregister("incoming")
