"""One text of a trace with the routing of all its tokens: what a page shows that is about single tokens.

    text = read(trace, 777)              # one sequence; or several, as the pieces of a long text
    text.texts[5], text.experts[3, 5]    # what a token spells, its experts in layer 3
    routing(text, 5)                     # the same as a table, a row a layer and rank

The rows of the text alone are read, in four questions, however large the trace is.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench import connection, schema
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.schema import UNKNOWN_TOKEN
from workbench.spelling import pieces, spell
from workbench.tracefile import Trace, matrix
from workbench.transaction import to_float


@dataclass(frozen=True)
class Reading:
    """n tokens of one text, in their order, through L routers; k is the largest top-k of them.

    sequences  a row a sequence that was read, as in `Trace.sequences`
    seq, pos   int32 (n,)
    token_ids  int32 (n,), -1 unknown
    texts      n strings: the characters that begin in a token (workbench.spelling); entries: as the vocabulary has them
    phase      uint8 (n,), codes into workbench.schema.PHASES
    nll        float32 (n,), nats, NaN unknown
    predicted  int32 (n,), the token the model would put next, -1 unknown; None: not recorded
    predicted_texts   n strings; None: not recorded
    experts    uint16 (L, n, k), NO_EXPERT where none
    weights    float32 (L, n, k), 0 where no expert; None: not recorded
    entropy, margin   float32 (L, n), NaN unknown; None: not recorded
    layers     a row a router, as `Trace.layers`
    """

    run: str
    sequences: pd.DataFrame
    seq: np.ndarray
    pos: np.ndarray
    token_ids: np.ndarray
    texts: list[str]
    entries: list[str]
    phase: np.ndarray
    nll: np.ndarray
    predicted: np.ndarray | None
    predicted_texts: list[str] | None
    experts: np.ndarray
    weights: np.ndarray | None
    entropy: np.ndarray | None
    margin: np.ndarray | None
    layers: pd.DataFrame

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def n_layers(self) -> int:
        return len(self.layers)


def read(trace: Trace, seqs: int | Sequence[int]) -> Reading:
    """The tokens of a sequence, or of several one after the other, by `seq`. InputError if the run has no such one."""
    wanted = sorted({int(seq) for seq in ([seqs] if isinstance(seqs, int | np.integer) else seqs)})
    if not wanted:
        raise InputError("no sequence to read; expected at least one id, as in Trace.sequences()['seq'].")
    # The bounds let DuckDB skip whole row groups; a list alone makes it read the column.
    where = "run = ? AND seq BETWEEN ? AND ? AND seq IN (SELECT unnest(?))"
    given = [trace.run, wanted[0], wanted[-1], wanted]
    optional = [name for name in ("weights", "entropy", "margin") if name in trace.recorded]
    columns = ", ".join(["experts", *optional, *(["scale"] if "weights" in optional else [])])
    predicts = "predictions" in trace.recorded
    with connection.reading(trace.path) as con:
        rows = con.execute(f"SELECT * EXCLUDE (run) FROM sequences WHERE {where} ORDER BY seq", given).df()
        found = rows["seq"].tolist()
        if missing := sorted(set(wanted) - set(found)):
            raise InputError(f"run {trace.run!r} has no sequence {missing[0]}.")
        query = f"SELECT seq, pos, token_id, phase, nll {', predicted' if predicts else ''} FROM tokens WHERE {where}"
        tokens = con.execute(f"{query} ORDER BY seq, pos", given).df()
        query = f"SELECT layer, {columns} FROM routing WHERE {where} ORDER BY layer, seq, pos"
        routing = con.sql(query, params=given).to_arrow_table()
        ids = tokens["token_id"].to_numpy(np.int32)
        predicted = tokens["predicted"].fillna(UNKNOWN_TOKEN).to_numpy(np.int32) if predicts else None
        named = np.unique(ids if predicted is None else np.concatenate([ids, predicted])).tolist()
        query = "SELECT token_id, text FROM vocabulary WHERE run = ? AND token_id IN (SELECT unnest(?))"
        known = dict(con.execute(query, [trace.run, named]).fetchall())
    n, n_layers = len(tokens), trace.n_layers
    if len(routing) != n * n_layers:
        raise InputError(
            f"{trace.path}: sequence {wanted[0]} of run {trace.run!r} has {len(routing):,} routing rows; expected "
            f"{n:,} tokens × {n_layers} layers. The file is damaged: see `workbench validate`."
        )
    k = int(trace.layers["top_k"].max()) if n_layers else 0
    shape = (n_layers, n, k)
    weights = None
    if "weights" in optional:
        fixed = matrix(routing["weights"], k, np.uint16, 0)
        weights = to_float(fixed, routing["scale"].to_numpy()[:, None]).reshape(shape)
    numbers = {name: _floats(routing[name]).reshape(shape[:2]) for name in ("entropy", "margin") if name in optional}
    seq = tokens["seq"].to_numpy(np.int32)
    entries = [known.get(token_id) or "" for token_id in ids.tolist()]
    return Reading(
        run=trace.run,
        sequences=_with_metadata(rows),
        seq=seq,
        pos=tokens["pos"].to_numpy(np.int32),
        token_ids=ids,
        texts=_spelled(entries, seq),
        entries=entries,
        phase=pd.Categorical(tokens["phase"], categories=schema.PHASES).codes.astype(np.uint8),
        nll=tokens["nll"].to_numpy(np.float32),
        predicted=predicted,
        predicted_texts=None if predicted is None else [known.get(each) or "" for each in predicted.tolist()],
        experts=matrix(routing["experts"], k, np.uint16, NO_EXPERT).reshape(shape),
        weights=weights,
        entropy=numbers.get("entropy"),
        margin=numbers.get("margin"),
        layers=trace.layers,
    )


def _floats(column: Any) -> np.ndarray:
    """float32; nulls, which become NaN only through a cast, too."""
    return column.to_numpy().astype(np.float32, copy=False)


def _with_metadata(rows: pd.DataFrame) -> pd.DataFrame:
    """Each key of the metadata as a column of its own, as `Trace.sequences` has it."""
    metadata = pd.DataFrame([json.loads(text) for text in rows.pop("metadata")], index=rows.index)
    return rows.join(metadata.rename(columns={name: f"metadata_{name}" for name in metadata if name in rows}))


def _spelled(entries: list[str], seq: np.ndarray) -> list[str]:
    """What the tokens spell; a character never goes on in the next sequence."""
    of_entry = {entry: pieces(entry) for entry in set(entries)}
    broken = [of_entry[entry] for entry in entries]
    texts: list[str] = []
    starts = np.flatnonzero(np.diff(seq, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts, len(entries)][1:], strict=True):
        texts += spell(entries[start:end], broken[start:end])[0]
    return texts


def pieces_of(trace: Trace, seq: int) -> list[int]:
    """The sequences that a long text was split into when it was traced, in order; `[seq]` if it wasn't."""
    query = """
        SELECT seq FROM sequences WHERE run = $run AND metadata->>'split_row' IS NOT NULL AND
        (sha256, metadata->>'split_row') IN
            (SELECT (sha256, metadata->>'split_row') FROM sequences WHERE run = $run AND seq = $seq)
        ORDER BY seq"""
    with connection.reading(trace.path) as con:
        found = con.execute(query, {"run": trace.run, "seq": int(seq)}).fetchall()
    return [piece for (piece,) in found] or [int(seq)]


def visible(text: str) -> str:
    """A token's text so that every character of it can be seen.

    Line breaks keep their effect and get a mark (↵), tabs too (⇥); other control characters become their pictures (␀),
    and what has no width, turns the direction of writing or is a space unlike " " is named: ⟨U+200B⟩.

    >>> visible("a\u200bb\n")
    'a⟨U+200B⟩b↵\n'
    """
    return "".join(MARKS.get(c) or (c if _seen(c) else f"⟨U+{ord(c):04X}⟩") for c in text)


MARKS = {"\n": "↵\n", "\t": "⇥\t", "\x7f": "␡"} | {chr(c): chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"}
WIDE_SPACE = "\u3000"


def _seen(c: str) -> bool:
    kind = unicodedata.category(c)
    return kind not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and (kind != "Zs" or c in (" ", WIDE_SPACE))


def named(text: Reading, at: int) -> str:
    """A token by name, for a title: what it spells, or its vocabulary entry where that is a piece of a character."""
    if text.token_ids[at] == UNKNOWN_TOKEN:
        return "unknown token"
    return visible(text.texts[at] or text.entries[at]).replace("\n", "") or f"token {text.token_ids[at]}"


def routing(text: Reading, at: int) -> pd.DataFrame:
    """One token across layers: a row a layer and rank with an expert, in the router's own order of ranks.

    Columns layer, name, rank (from 0), expert; weight, entropy (nats), margin where they were recorded.
    """
    layers, ranks = np.nonzero(text.experts[:, at] != NO_EXPERT)
    columns: dict[str, Any] = {
        "layer": layers,
        "name": text.layers["name"].to_numpy()[layers],
        "rank": ranks,
        "expert": text.experts[layers, at, ranks].astype(np.int64),
    }
    if text.weights is not None:
        columns["weight"] = text.weights[layers, at, ranks]
    for name in ("entropy", "margin"):
        values = getattr(text, name)
        if values is not None:
            columns[name] = values[layers, at]
    return pd.DataFrame(columns)


def table(text: Reading, layer: int) -> pd.DataFrame:
    """The tokens as rows, with what one layer did with them: what can be downloaded.

    Columns run, seq, pos, token_id, text, phase, nll, predicted (text), layer, expert_0 … (missing: none), weight_0 …,
    entropy, margin; what was not recorded is left out.
    """
    if not 0 <= layer < text.n_layers:
        raise InputError(f"layer {layer}: run {text.run!r} has layers 0 to {text.n_layers - 1}.")
    columns: dict[str, Any] = {
        "run": text.run,
        "seq": text.seq,
        "pos": text.pos,
        "token_id": text.token_ids,
        "text": text.texts,
        "phase": [schema.PHASES[code] for code in text.phase],
        "nll": text.nll,
        "predicted": text.predicted_texts,
        "layer": layer,
    }
    k = int(text.layers["top_k"].iloc[layer])
    experts = text.experts[layer]
    for rank in range(k):
        chosen = pd.array(experts[:, rank].astype(np.int64), dtype="Int64")
        chosen[experts[:, rank] == NO_EXPERT] = pd.NA
        columns[f"expert_{rank}"] = chosen
    for rank in range(k):
        columns[f"weight_{rank}"] = None if text.weights is None else text.weights[layer, :, rank]
    for name in ("entropy", "margin"):
        values = getattr(text, name)
        columns[name] = None if values is None else values[layer]
    return pd.DataFrame(
        {name: values for name, values in columns.items() if values is not None}, index=range(len(text))
    )
