"""Some sequences of a trace as traces of their own: `split` and `sample`.

    split("all.duckdb", "by-language", by="lang")        # by-language/de.duckdb, …
    sample("all.duckdb", "few.duckdb", sequences=1000, by="lang")

Sequences stay whole and keep their numbers, so that `workbench.combine.merge` of what `split` wrote has the rows of the
trace. The same question writes the same rows again.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from workbench import connection, schema
from workbench.analysis.counting import as_label, column
from workbench.combine import ROWS, attached, columns, file_out, write_runs
from workbench.errors import InputError, not_negative
from workbench.location import local_path, located
from workbench.output import LOCK, new_folder
from workbench.tracefile import Trace
from workbench.transaction import as_json

MOST_FILES = 1000
"""That a trace is split into."""
INDEX = "split.json"
"""What `split` writes beside the files: which is which."""


def split(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    by: str | None = None,
    n_parts: int | None = None,
    run: str | None = None,
    overwrite: bool = False,
) -> pd.DataFrame:
    """Write a trace as several DuckDB files in a new folder: one for each value of a column, or so many.

    by       a column of the sequences, or a key of their metadata; sequences without it get a file of their own
    n_parts  consecutive sequences of each run, as equal in number as can be
    run      of this run only; None for all

    Returns a row a file: value (of the column; or the number of the part, from 1), file, sequences, tokens; so does
    `split.json` in the folder. Each file has the whole vocabulary of its runs; the first one has the runs without any
    sequence, too. InputError if the folder exists or is a URL, and for a run that counts, whose pairs of experts can't
    be taken apart.
    """
    if (by is None) == (n_parts is None):
        raise InputError("split by a column or into a number of parts: give one of the two.")
    with connection.reading(path) as con:
        names = [row["run"] for row in schema.runs(con)] if run is None else [schema.find_run(con, located(path), run)]
    frames = [_sequences(Trace(path, name)).assign(run=name) for name in names]
    empty = [name for name, frame in zip(names, frames, strict=True) if frame.empty]
    frames = [frame for frame in frames if not frame.empty]
    if not frames:
        raise InputError(f"{path} holds no sequence, so there is nothing to split.")
    chosen = pd.concat(frames, ignore_index=True)
    if by is None:
        chosen["value"] = np.concatenate([_numbered(len(one), n_parts or 0, one["run"].iloc[0]) for one in frames])
    else:
        chosen["value"] = column(chosen, by).map(as_label)
    groups = list(chosen.groupby("value", dropna=False))
    if len(groups) > MOST_FILES:
        raise InputError(f"{by or 'n_parts'} makes {len(groups):,} files; expected at most {MOST_FILES:,}.")
    rows: list[dict[str, Any]] = []
    where = local_path(out)
    if where.resolve() in Path(located(path)).resolve().parents:
        raise InputError(f"{path} is in the folder {where}, which is to be written; choose another name.")
    with new_folder(where, overwrite, marker=INDEX, contents=(INDEX, "*.duckdb", LOCK)) as folder:
        for value, group in groups:
            name = _file_name(value, {row["file"] for row in rows})
            with file_out(folder / name, False) as con:
                _extract(con, path, group, with_runs=[] if rows else empty)
            known = None if pd.isna(value) else value
            rows.append({"value": known, "file": name, "sequences": len(group), "tokens": int(group["n_tokens"].sum())})
        said = json.dumps({"by": by, "files": rows}, ensure_ascii=False, indent=1)
        (folder / INDEX).write_text(f"{said}\n", encoding="utf-8")
    return pd.DataFrame(rows)


def sample(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    sequences: int | None = None,
    tokens: int | None = None,
    by: str | None = None,
    seed: int = 0,
    run: str | None = None,
    overwrite: bool = False,
) -> Trace:
    """Write some sequences of one run, drawn at random without replacement, as a new DuckDB file.

    sequences  exactly so many
    tokens     up to the sequence that reaches so many tokens
    by         a column: each of its values has its share of the sequences drawn, as near as whole sequences can come
               (Sainte-Laguë's method); sequences without it are a value of their own
    seed       the same seed draws the same, and more with a larger number
    run        None for the only one, or the last that finished

    `corpus` of the run says how it was drawn. InputError if there aren't so many, and for a run that counts.
    """
    if (sequences is None) == (tokens is None):
        raise InputError("sample a number of sequences or of tokens: give one of the two.")
    not_negative(seed=seed)
    trace = Trace(path, run)
    frame = _sequences(trace)
    what = "sequences" if tokens is None else "tokens"
    wanted, total = (sequences or 0, trace.n_sequences) if tokens is None else (tokens, trace.n_tokens)
    if not 1 <= wanted <= total:
        raise InputError(f"{what} is {wanted}; expected 1 to {total:,}, which run {trace.run!r} has.")
    group = np.zeros(len(frame), int) if by is None else pd.factorize(column(frame, by).map(as_label))[0]
    drawn = frame.iloc[drawing_order(group, seed)]
    size = np.arange(1, len(drawn) + 1) if tokens is None else drawn["n_tokens"].cumsum().to_numpy()
    chosen = drawn.iloc[: int(np.searchsorted(size, wanted)) + 1].assign(run=trace.run)
    note = {"sample": {what: wanted, "of": total, "by": by, "seed": seed}}
    with file_out(out, overwrite) as con:
        _extract(con, path, chosen, note)
    return Trace(out)


def drawing_order(group: np.ndarray, seed: int) -> np.ndarray:
    """An order of n things, int (n,), whose beginnings, however long, have each group in proportion.

    group  int (n,)

    Within a group the order is random. The i-th of a group of m, counted from 0, comes at (i + 1/2) / m; so the groups
    get places as Sainte-Laguë's method gives seats to parties. Ties are broken at random.
    """
    order = np.random.default_rng(seed).permutation(len(group))
    shuffled = pd.Series(group[order])
    same = shuffled.groupby(shuffled)
    place = (same.cumcount() + 0.5) / same.transform("size")
    return order[np.argsort(place.to_numpy(), kind="stable")]


def _sequences(trace: Trace) -> pd.DataFrame:
    if trace.counted:
        raise InputError(
            f"run {trace.run!r} counts, and its counts of pairs can't be taken apart by text. Name another run with "
            "--run, or trace again with --record ids,weights."
        )
    return trace.sequences()


def _numbered(n_sequences: int, n_parts: int, run: str) -> np.ndarray:
    """The part of each sequence, from 1."""
    if not 1 <= n_parts <= n_sequences:
        raise InputError(f"n_parts is {n_parts}; expected 1 to {n_sequences:,}, the sequences of run {run!r}.")
    return np.repeat(np.arange(1, n_parts + 1), [len(part) for part in np.array_split(np.arange(n_sequences), n_parts)])


def _file_name(value: Any, taken: set[str]) -> str:
    """A name for the file of a value, which may be any text."""
    plain = "none" if pd.isna(value) else re.sub(r"[^\w.-]+", "_", str(value))[:80].strip("._") or "value"
    known = {name.casefold() for name in taken}
    names = (f"{plain}{'' if n == 1 else f'-{n}'}.duckdb" for n in range(1, len(taken) + 2))
    return next(name for name in names if name.casefold() not in known)


def _extract(
    con: duckdb.DuckDBPyConnection,
    path: str | os.PathLike,
    chosen: pd.DataFrame,
    note: Mapping[str, Any] | None = None,
    with_runs: Iterable[str] = (),
) -> None:
    """Write these sequences (columns run, seq) of the trace at `path`, and these runs without sequences; `note` goes
    into what `corpus` says."""
    wanted = {*chosen["run"], *with_runs}
    runs = {name: run for name, run in attached(con, [path]).items() if name in wanted}
    for run in runs.values() if note else ():
        run.row["corpus"] = as_json(json.loads(run.row["corpus"] or "{}") | note)
    write_runs(con, runs)
    con.execute("INSERT INTO vocabulary FROM t0.vocabulary WHERE list_contains(?, run)", [sorted(wanted)])
    con.register("chosen", chosen[["run", "seq"]])
    for table in ROWS:
        names = ", ".join(columns(con, "t0", table))
        if names and table != "pairs":
            con.execute(
                f"INSERT INTO {table} ({names}) SELECT {names} FROM t0.{table} SEMI JOIN chosen USING (run, seq)"
            )
    con.unregister("chosen")
