"""Traces from anywhere: expert ids as a NumPy array -> a trace file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from workbench.errors import InputError
from workbench.routing import NO_EXPERT, Routing
from workbench.schema import PHASES, UNKNOWN_TOKEN
from workbench.store import Writer
from workbench.tracefile import Trace
from workbench.transaction import Block, clean

BLOCK_TOKENS = 16_384

_COLUMNS = ("sha256", "n_prompt", "lang", "domain", "source", "segment_id")


def from_arrays(
    out: str | os.PathLike,
    experts: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    n_experts: int | Sequence[int],
    seq: npt.ArrayLike | None = None,
    sequences: pd.DataFrame | None = None,
    token_ids: npt.ArrayLike | None = None,
    predictions: npt.ArrayLike | None = None,
    vocabulary: Mapping[int, str] | None = None,
    run: str = "arrays",
    overwrite: bool = False,
) -> Trace:
    """Write routing that is already in memory as a trace.

    out         the file to write; InputError if it exists, unless `overwrite`
    experts     integers (n_tokens, n_layers, k) in [0, n_experts), ids of a row distinct; -1 or NO_EXPERT where none
    weights     numbers >= 0 of the same shape; None: not recorded. They are kept to 1/65535 of the row's scale
    n_experts   E, the same for every layer or one a layer
    seq         integers (n_tokens,), never decreasing: the sequence of each token; None: all are of one sequence
    sequences   one row a sequence, in the order of their ids; a column `seq` names the ids, otherwise they are 0, 1, …
                Columns lang, domain, source, segment_id, sha256 and n_prompt are what they are in a trace, every other
                one becomes metadata
    token_ids   integers (n_tokens,); None: unknown
    predictions integers (n_tokens,): the token that the model would put next, -1 where unknown; None: not recorded
    vocabulary  texts of the token ids, predicted ones too

    Positions count up from 0 in each sequence. Raises InputError, naming the token and the layer, if an array is not
    as described; then nothing is written.
    """
    ids = _experts(experts)
    n_tokens, n_layers, k = ids.shape
    sizes = [int(n_experts)] * n_layers if isinstance(n_experts, int | np.integer) else [int(n) for n in n_experts]
    if len(sizes) != n_layers:
        raise InputError(
            f"n_experts names {len(sizes)} layers, experts has {n_layers}: give one number or one a layer."
        )
    _check_ids(ids, sizes)
    gates = None if weights is None else _weights(weights, ids)
    order = _sequence_of(seq, n_tokens)
    rows = _sequence_rows(sequences, order)
    tokens = np.full(n_tokens, UNKNOWN_TOKEN) if token_ids is None else _token_ids("token_ids", token_ids, n_tokens)
    predicted = None if predictions is None else _token_ids("predictions", predictions, n_tokens)
    layers = [
        {"name": f"layers.{layer}", "n_experts": size, "top_k": k, "gating": None} for layer, size in enumerate(sizes)
    ]
    given = {"weights": gates, "predictions": predicted}
    recorded = ["ids", *(name for name, array in given.items() if array is not None)]
    run = clean(run) or ""  # as it will be in the trace
    header = {"run": run, "engine": "arrays", "recorded": recorded}
    with Writer(out, header, layers, mode="overwrite" if overwrite and Path(out).exists() else "new") as writer:
        writer.add_vocabulary(vocabulary or {})
        for first, last in _blocks([row["n_tokens"] for row in rows]):
            start = sum(row["n_tokens"] for row in rows[:first])
            part = rows[first:last]
            here = slice(start, start + sum(row["n_tokens"] for row in part))
            lengths = [row["n_tokens"] for row in part]
            writer.append(
                Block(
                    sequences=part,
                    tokens={
                        "seq": order[here].astype(np.int32),
                        "pos": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
                        "token_id": tokens[here].astype(np.int32),
                        "phase": np.concatenate([phases(row) for row in part]),
                        "nll": np.full(here.stop - here.start, np.nan, dtype=np.float32),
                        **({} if predicted is None else {"predicted": predicted[here].astype(np.int32)}),
                    },
                    routing=[
                        Routing(ids[here, layer], None if gates is None else gates[here, layer])
                        for layer in range(n_layers)
                    ],
                )
            )
    return Trace(out, run)


def _experts(experts: npt.ArrayLike) -> np.ndarray:
    """uint16 (n_tokens, n_layers, k), a copy with NO_EXPERT where there is no expert."""
    given = np.asarray(experts)
    if given.ndim != 3 or 0 in given.shape[1:]:
        raise InputError(f"experts has shape {given.shape}; expected (n_tokens, n_layers, k).")
    if given.dtype.kind not in "iu" and given.size:
        raise InputError(f"experts is {given.dtype}; expected integers, with -1 where there is no expert.")
    wide = given.astype(np.int64)
    none = (wide == -1) | (wide == int(NO_EXPERT))
    if (bad := ~none & ((wide < 0) | (wide > int(NO_EXPERT)))).any():
        token, layer, rank = np.argwhere(bad)[0]
        raise InputError(
            f"experts[{token}, {layer}, {rank}] is {given[token, layer, rank]}; expected an id, or -1 for none."
        )
    return np.where(none, NO_EXPERT, wide).astype(np.uint16)


def _check_ids(ids: np.ndarray, sizes: list[int]) -> None:
    for layer, size in enumerate(sizes):
        here = ids[:, layer]
        if (bad := (here != NO_EXPERT) & (here >= size)).any():
            token, rank = np.argwhere(bad)[0]
            raise InputError(
                f"experts[{token}, {layer}, {rank}] is {here[token, rank]}; layer {layer} has {size} experts."
            )
        ordered = np.sort(here, axis=1)
        if (bad := (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_EXPERT)).any():
            token = int(np.argwhere(bad)[0, 0])
            raise InputError(f"experts[{token}, {layer}] is {here[token].tolist()}: an expert is chosen at most once.")


def _weights(weights: npt.ArrayLike, ids: np.ndarray) -> np.ndarray:
    """float32 of the same shape as ids, 0 where there is no expert."""
    given = np.asarray(weights)
    if given.shape != ids.shape or given.dtype.kind not in "fiu":
        raise InputError(f"weights is {given.dtype} of shape {given.shape}; expected numbers of shape {ids.shape}.")
    gates = np.where(ids == NO_EXPERT, np.float32(0), given.astype(np.float32))
    if not (good := (gates >= 0) & (gates < np.inf)).all():
        token, layer, rank = np.argwhere(~good)[0]
        raise InputError(
            f"weights[{token}, {layer}, {rank}] is {given[token, layer, rank]}; expected finite numbers >= 0."
        )
    return gates


def _token_ids(name: str, token_ids: npt.ArrayLike, n_tokens: int) -> np.ndarray:
    given = np.asarray(token_ids)
    if given.shape != (n_tokens,) or given.dtype.kind not in "iu":
        raise InputError(f"{name} is {given.dtype} of shape {given.shape}; expected {n_tokens} integers.")
    if n_tokens and (given.min() < UNKNOWN_TOKEN or given.max() > np.iinfo(np.int32).max):
        raise InputError(f"{name} range from {given.min()} to {given.max()}; expected 0 to {np.iinfo(np.int32).max:,}.")
    return given


def _sequence_of(seq: npt.ArrayLike | None, n_tokens: int) -> np.ndarray:
    if seq is None:
        return np.zeros(n_tokens, dtype=np.int64)
    given = np.asarray(seq)
    if given.shape != (n_tokens,) or (given.size and given.dtype.kind not in "iu"):
        raise InputError(f"seq is {given.dtype} of shape {given.shape}; expected {n_tokens} integers, one a token.")
    order = given.astype(np.int64)
    if n_tokens and (order.min() < 0 or order.max() > np.iinfo(np.int32).max):
        raise InputError(f"seq ranges from {order.min()} to {order.max()}; expected 0 to {np.iinfo(np.int32).max}.")
    if (falls := np.diff(order) < 0).any():
        token = int(np.argmax(falls)) + 1
        raise InputError(
            f"seq falls at token {token} (from {order[token - 1]} to {order[token]}): bring each sequence's tokens "
            'together first, with `order = np.argsort(seq, kind="stable")`.'
        )
    return order


def _sequence_rows(sequences: pd.DataFrame | None, order: np.ndarray) -> list[dict[str, Any]]:
    """One dict a sequence, by id, also for those without a token."""
    found, counts = np.unique(order, return_counts=True)
    lengths = dict(zip(found.tolist(), counts.tolist(), strict=True))
    if sequences is None:
        return [sequence_row(seq, n, {}) for seq, n in lengths.items()]
    frame = sequences if "seq" in sequences else sequences.reset_index(drop=True).rename_axis("seq").reset_index()
    ids = [int(seq) for seq in frame["seq"]]
    if len(set(ids)) < len(ids):
        raise InputError("sequences names the same `seq` twice: expected one row a sequence.")
    if missing := sorted(set(lengths) - set(ids)):
        raise InputError(f"sequences has no row for sequence {missing[0]}, which occurs in seq.")
    records = dict(zip(ids, frame.drop(columns="seq").to_dict("records"), strict=True))
    return [sequence_row(seq, lengths.get(seq, 0), records[seq]) for seq in sorted(ids)]


def sequence_row(seq: int, n_tokens: int, record: Mapping[Any, Any]) -> dict[str, Any]:
    """What a `Block` holds of a sequence, from its columns; those that a trace has no place for become metadata."""
    known = {name: record.get(name) for name in _COLUMNS}
    known = {name: None if value is not None and pd.isna(value) else value for name, value in known.items()}
    for name in ("segment_id", "sha256"):
        known[name] = None if known[name] == "" else known[name]  # rows without a text of their own aren't one text
    n_prompt = n_tokens if known["n_prompt"] is None else int(known["n_prompt"])
    if not 0 <= n_prompt <= n_tokens:
        raise InputError(f"sequence {seq}: n_prompt is {n_prompt}; it has {n_tokens} tokens.")
    metadata = {str(name): value for name, value in record.items() if name not in (*_COLUMNS, "n_tokens")}
    return {"seq": seq, "n_tokens": n_tokens, **known, "n_prompt": n_prompt, "metadata": metadata}


def phases(row: Mapping[str, Any]) -> np.ndarray:
    """uint8 (n_tokens,): what follows the prompt was generated."""
    generated = np.arange(row["n_tokens"]) >= row["n_prompt"]
    return np.where(generated, PHASES.index("generated"), PHASES.index("prompt")).astype(np.uint8)


def _blocks(lengths: list[int]) -> list[tuple[int, int]]:
    """Ranges of consecutive sequences, each of BLOCK_TOKENS tokens or one sequence more."""
    ranges, first, total = [], 0, 0
    for index, length in enumerate(lengths):
        total += length
        if total >= BLOCK_TOKENS or index == len(lengths) - 1:
            ranges.append((first, index + 1))
            first, total = index + 1, 0
    return ranges
