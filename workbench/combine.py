"""Several traces as one: `merge`.

    merge(["shards/a.duckdb", "s3://bucket/parts"], "all.duckdb")

Traces are files or folders of Parquet parts (docs/parts.md), with any number of runs. What is written appears whole or
not at all.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from workbench import connection, folder, parts, schema
from workbench.errors import InputError, RunError, interruptible
from workbench.folder import FORMAT_FILE, held
from workbench.location import Url, local_path, located
from workbench.output import LOCK, new_file, new_folder
from workbench.run_rows import SAME
from workbench.tracefile import Trace
from workbench.transaction import as_json, insert_rows

PART_TOKEN_LAYERS = 5_000_000
"""Size of the parts that are written."""
ROWS = ("sequences", "tokens", "routing", "profiles", "loads", "pairs")
"""Tables whose rows are copied one by one; of `vocabulary` they are taken distinct."""


@dataclass
class Run:
    """A run that is written.

    row, layers  of the tables `runs` and `layers`
    sources      attached trace -> what is added to the numbers of the sequences that come from it
    """

    row: dict[str, Any]
    layers: list[dict[str, Any]]
    sources: dict[str, int] = field(default_factory=dict)

    @property
    def counted(self) -> bool:
        return self.row["recorded"] == [schema.COUNTS]


def merge(
    traces: Sequence[str | os.PathLike], out: str | os.PathLike, *, renumber: bool = False, overwrite: bool = False
) -> Trace:
    """Write the runs of several traces, files or folders of parts, into one.

    out       a DuckDB file; or a folder of Parquet parts: a URL, a name with a slash at its end, or a folder
    renumber  where several traces have a run of one name, number the sequences of each after those of the one before

    Runs of one name become one run. They have to agree in model, engine, number format, recipe, layers and in what they
    recorded, and no sequence may have the number of another. It is finished if all of them are; of `corpus` and
    `versions` it keeps what they say alike, and `corpus` has all that they said under `merged`. InputError if that
    can't be done, for two runs of one name that count, and if `out` exists; then nothing is written. Where `out` is a
    URL, an old trace is gone once writing begins.
    """
    if not traces:
        raise InputError("nothing to merge: name at least one trace.")
    if os.fspath(out).endswith("/") or isinstance(located(out), Url) or Path(out).is_dir():
        with working() as con:
            runs = attached(con, traces, renumber)  # before anything is replaced
            with _folder_out(out, overwrite, traces) as folder:
                for name, run in runs.items():
                    _write_parts(con, folder, name, run)
                for run in runs.values():  # last: until then a URL is no trace
                    parts.write_header(folder, run.row, run.layers)
    else:
        with file_out(out, overwrite) as con:
            runs = attached(con, traces, renumber)
            write_runs(con, runs)
            _copy_rows(con, runs)
    finished = [name for name, run in runs.items() if run.row["status"] == "finished"]
    return Trace(out, finished[-1] if finished else None)


# --- what there is


def attached(
    con: duckdb.DuckDBPyConnection, traces: Sequence[str | os.PathLike], renumber: bool = False
) -> dict[str, Run]:
    """Attach the traces as t0, t1, …; returns the runs that they make together, by name, in order of their start.

    From then on `con` can open no other file, but for the trace that it writes.
    """
    runs: dict[str, Run] = {}
    for number, path in enumerate(traces):
        connection.connect(path).close()  # refuses what is no trace, with the reason
        connection.attach(con, path, f"t{number}")
    # Before anything in them is read: it could be somebody else's SQL.
    folder.confine(con, *map(located, traces))
    connection.lock(con)
    for number, path in enumerate(traces):
        source = f"t{number}"
        for row in con.sql(f"FROM {source}.runs ORDER BY started, run").to_arrow_table().to_pylist():
            layers = con.sql(f"FROM {source}.layers WHERE run = ? ORDER BY layer", params=[row["run"]])
            found = Run(row, layers.to_arrow_table().to_pylist())
            had = runs.setdefault(row["run"], found)
            if had is not found:
                _check_same(path, had, found)
                had.row = _one_row(had.row, row)
            had.sources[source] = 0
    for name, run in runs.items():
        if renumber:
            _renumber(con, name, run)
        else:
            _check_numbers(con, name, run, traces)
        _check_texts(con, name, run)
    return dict(sorted(runs.items(), key=lambda item: (item[1].row["started"], item[0])))


def _check_same(path: str | os.PathLike, had: Run, found: Run) -> None:
    name = had.row["run"]
    for key in SAME:
        if had.row[key] != found.row[key]:
            raise InputError(
                f"{path}: the {key} of run {name!r} is {found.row[key]!r}, in a trace before it {had.row[key]!r}; "
                "expected parts of one run. Give different runs different names: `workbench trace --run NAME`."
            )
    if had.layers != found.layers:
        raise InputError(f"{path}: run {name!r} has other MoE layers than in a trace before it; expected the same.")
    if had.counted:
        raise InputError(
            f"{path}: run {name!r} counts, and a trace before it has it too; counts can't be added up. Give it another "
            "name, or leave one of them out."
        )


def _one_row(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The row in `runs` of a run whose parts have these two."""
    unfinished = [row["status"] for row in (one, other) if row["status"] != "finished"]
    made = {
        **one,
        "started": min(one["started"], other["started"]),
        "finished": None if unfinished else max(one["finished"], other["finished"]),
        "status": unfinished[0] if unfinished else "finished",
    }
    for key in ("corpus", "versions"):
        if one[key] != other[key]:
            mine, theirs = (json.loads(row[key] or "{}") for row in (one, other))
            merged = [*(mine.pop("merged", None) or [dict(mine)]), theirs]
            alike = {name: value for name, value in mine.items() if theirs.get(name) == value}
            made[key] = as_json(alike | ({"merged": merged} if key == "corpus" else {}))
    return made


def _renumber(con: duckdb.DuckDBPyConnection, name: str, run: Run) -> None:
    following = None
    for source in run.sources:
        query = f"SELECT min(seq), max(seq) FROM {source}.sequences WHERE run = ?"
        first, last = con.execute(query, [name]).fetchall()[0]
        if first is not None:
            run.sources[source] = 0 if following is None else following - first
            following = last + run.sources[source] + 1


def _check_numbers(con: duckdb.DuckDBPyConnection, name: str, run: Run, traces: Sequence[str | os.PathLike]) -> None:
    """InputError if two sequences of the run have one number."""
    every = " UNION ALL ".join(
        f"SELECT seq, {source[1:]} AS place FROM {source}.sequences WHERE run = $run" for source in run.sources
    )
    query = f"SELECT seq, list_sort(list(place)) FROM ({every}) GROUP BY seq HAVING count(*) > 1 ORDER BY seq LIMIT 1"
    for seq, places in con.execute(query, {"run": name}).fetchall():
        first, second = (traces[place] for place in places[:2])
        if places[0] == places[1]:
            raise InputError(f"{first}: run {name!r} has sequence {seq} twice; see `workbench validate {first}`.")
        raise InputError(
            f"{first} and {second} both have sequence {seq} of run {name!r}. If they hold different texts, number "
            "those of the later trace anew with --renumber; if not, leave one of them out."
        )


def _check_texts(con: duckdb.DuckDBPyConnection, name: str, run: Run) -> None:
    """InputError if traces have different texts for one token id of the run."""
    every = " UNION ALL ".join(
        f"SELECT token_id, text FROM {source}.vocabulary WHERE run = $run AND text <> ''" for source in run.sources
    )
    query = f"SELECT token_id, min(text), max(text) FROM ({every}) GROUP BY ALL HAVING min(text) <> max(text) LIMIT 1"
    for token_id, one, other in con.execute(query, {"run": name}).fetchall():
        raise InputError(
            f"run {name!r}: token id {token_id} is {one!r} in one trace and {other!r} in another, so they come from "
            "different tokenizers. Give the runs different names: `workbench trace --run NAME`."
        )


# --- writing


@contextmanager
def working(path: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection, to our own trace at `path` or to none, that may read and write files: for our own SQL, until
    `attached` confines it."""
    with interruptible():
        con = connection.in_memory()
        try:
            if path is not None:
                con.execute(f"ATTACH {schema.quoted(path)} AS made")
                con.execute("USE made")
            yield con
        except duckdb.Error as error:
            raise RunError(f"nothing was written: {schema.first_line(error)}") from error
        finally:
            con.close()


@contextmanager
def file_out(out: str | os.PathLike, overwrite: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to an empty trace, which gets the name `out` when the block ends well."""
    out = local_path(out)
    with new_file(out, overwrite) as partial:
        try:
            try:
                schema.create(partial)
            except duckdb.Error as error:
                raise RunError(f"{out} could not be written: {schema.first_line(error)}") from error
            with working(partial) as con:
                yield con
                con.execute("CHECKPOINT")  # closing would say nothing of a full disk
            Path(f"{out}.wal").unlink(missing_ok=True)  # of the file that is replaced
        finally:
            partial.with_name(f"{partial.name}.wal").unlink(missing_ok=True)


@contextmanager
def _folder_out(out: str | os.PathLike, overwrite: bool, traces: Sequence[str | os.PathLike]) -> Iterator[Path | Url]:
    """Where to write parts of these traces."""
    where = located(out)
    if isinstance(where, Path):
        empty = where.is_dir() and not any(where.iterdir())
        contents = (FORMAT_FILE, *schema.TABLES, LOCK)
        with new_folder(where, overwrite or empty, marker=FORMAT_FILE, contents=contents) as folder:
            yield folder
        return
    found = held(where)
    if found and not (overwrite and FORMAT_FILE in found):
        raise InputError(f"{where} is not empty; choose another name, or replace a trace with --overwrite.")
    if where in map(located, traces):
        raise InputError(f"{where} is to be read and to be replaced; choose another name.")
    parts.remove(where)
    try:
        yield where
    except BaseException:
        parts.remove(where)
        raise


def write_runs(con: duckdb.DuckDBPyConnection, runs: Mapping[str, Run]) -> None:
    """Fill the tables `runs` and `layers`."""
    for run in runs.values():
        insert_rows(con, "runs", [run.row])
        insert_rows(con, "layers", run.layers)


def columns(con: duckdb.DuckDBPyConnection, source: str, table: str) -> list[str]:
    """Those that an attached trace has; one of an older format may lack the table."""
    query = "SELECT column_name FROM duckdb_columns() WHERE database_name = ? AND table_name = ? ORDER BY column_index"
    return [name for (name,) in con.execute(query, [source, table]).fetchall()]


def _copy_rows(con: duckdb.DuckDBPyConnection, runs: Mapping[str, Run]) -> None:
    """All rows of all runs."""
    # Keeping the order of rows costs a third more; blocks of rows of one layer stay together without it, too.
    con.execute("SET preserve_insertion_order = false")
    sources = dict.fromkeys(source for run in runs.values() for source in run.sources)
    every = " UNION ALL ".join(f"SELECT run, token_id, text FROM {source}.vocabulary" for source in sources)
    con.execute(f"INSERT INTO vocabulary SELECT run, token_id, max(text) FROM ({every}) GROUP BY ALL")
    for source in sources:
        added = {name: run.sources[source] for name, run in runs.items() if run.sources.get(source)}
        for table in ROWS:
            if names := columns(con, source, table):
                chosen = ", ".join(_seq(added) if name == "seq" else name for name in names)
                con.execute(f"INSERT INTO {table} ({', '.join(names)}) SELECT {chosen} FROM {source}.{table}")


def _seq(added: Mapping[str, int]) -> str:
    """SQL of the number of a sequence, when so much is added in these runs."""
    if not added:
        return "seq"
    cases = " ".join(f"WHEN {schema.quoted(run)} THEN {number}" for run, number in added.items())
    return f"seq + CASE run {cases} ELSE 0 END AS seq"


def _write_parts(con: duckdb.DuckDBPyConnection, folder: Path | Url, name: str, run: Run) -> None:
    """The sequences of one run as parts; those of a run that counts as one, for its pairs are of all of them."""
    number = 0
    for source, added in run.sources.items():
        query = f"SELECT seq, n_tokens FROM {source}.sequences WHERE run = ? ORDER BY seq"
        found = con.execute(query, [name]).fetchnumpy()
        numbers = np.asarray(found["seq"])
        ends = np.cumsum(found["n_tokens"], dtype=np.int64) * len(run.layers)
        cuts = np.flatnonzero(np.diff(ends // PART_TOKEN_LAYERS)) + 1
        for seqs in [numbers] if run.counted else np.split(numbers, cuts):
            if not len(seqs):
                continue

            def rows(
                table: str, seqs: np.ndarray = seqs, source: str = source, added: int = added
            ) -> Iterator[pa.Table]:
                names = columns(con, source, table)
                chosen = ", ".join(_seq({name: added} if added else {}) if one == "seq" else one for one in names)
                within = f"AND seq BETWEEN {seqs[0]} AND {seqs[-1]}" if "seq" in names else ""
                ordered = ", ".join(key for key in ("seq", "pos") if key in names) or "ALL"
                query = f"SELECT {chosen} FROM {source}.{table} WHERE run = ? {within}"
                for layer in range(len(run.layers)) if table == "routing" else (None,):
                    only = "" if layer is None else f"AND layer = {layer}"
                    yield con.sql(f"{query} {only} ORDER BY {ordered}", params=[name]).to_arrow_table()

            kinds = ("loads", "pairs") if run.counted else ("tokens", "vocabulary", "routing", "profiles")
            if "profiles" not in run.row["recorded"]:
                kinds = tuple(kind for kind in kinds if kind != "profiles")
            tables = {table: rows(table) for table in ("sequences", *kinds)}
            parts.write_part(folder, f"{parts.file_of(name)}-{number:06}", name, tables)
            number += 1
