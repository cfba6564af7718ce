"""Write a trace as a folder of Parquet parts, from as many processes or machines as there are.

>>> begin("s3://bucket/trace", run, layers)                   # once          # doctest: +SKIP
>>> gathered = transaction("s3://bucket/trace")               # in a worker   # doctest: +SKIP
>>> gathered.add(block); gathered.name({17: "the"}, set())                    # doctest: +SKIP
>>> write("s3://bucket/trace", "000017", gathered)                            # doctest: +SKIP
>>> finish("s3://bucket/trace", run["run"])                   # once          # doctest: +SKIP

What has been written can be read at any time (`Trace("s3://bucket/trace")`), and `workbench.combine.merge` loads it
into one DuckDB file. docs/parts.md has the layout.
"""

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from workbench import connection, schema
from workbench.errors import InputError, RunError
from workbench.folder import FORMAT_FILE, HEADERS, PART, SUFFIX, held, listing
from workbench.location import Url, asking, filesystem, located
from workbench.run_rows import check_same, layer_rows, now, run_row
from workbench.transaction import ROW_GROUP, Transaction

MODES = ("new", "overwrite", "append", "resume")
IN_PARTS = tuple(name for name in schema.TABLES[:-1] if name not in (*HEADERS, "sequences"))
"""Tables that a part can have beside its sequences."""


def begin(
    folder: str | os.PathLike, run: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], *, mode: str = "new"
) -> list[str]:
    """Begin a run in a folder, before its first part; returns the names of the parts that are there already.

    run, layers  as `workbench.store.Writer` has them
    mode         "new" refuses a folder that holds anything; "overwrite" removes the trace that it holds; "append" adds
                 a run to it; "resume" continues the run of that name, or begins it

    InputError if the run can't be written as asked, RunError if the folder can't be written to.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r}: expected one of {', '.join(MODES)}.")
    where, row = located(folder), run_row(run)
    rows = layer_rows(row["run"], layers)
    found = held(where)
    if mode == "new" and found:
        raise InputError(f"{where} is not empty. Replace it with --overwrite, or finish its run with --resume.")
    if found or mode == "append":
        listing(where, ())  # refuses what is no trace
    if mode == "overwrite":
        remove(where)
    row |= {"started": now(), "finished": None, "status": "running"}
    if FORMAT_FILE in held(where):
        with connection.reading(where) as con:
            had = con.sql("SELECT * FROM runs WHERE run = ?", params=[row["run"]]).to_arrow_table().to_pylist()
            query = "SELECT * FROM layers WHERE run = ? ORDER BY layer"
            had_layers = con.sql(query, params=[row["run"]]).to_arrow_table().to_pylist()
        if had and mode == "append":
            raise InputError(f"{where} already has a run {row['run']!r}. Give this one another name with --run.")
        if had:
            check_same(where, had[0], had_layers, row, rows)
            row["started"] = had[0]["started"]
    write_header(where, row, rows)
    return listing(where, ())["sequences"]


def transaction(folder: str | os.PathLike, run: str | None = None) -> Transaction:
    """What gathers the blocks of one part of a run; None: the only one, or the last that was begun."""
    with connection.reading(folder) as con:
        name = schema.find_run(con, located(folder), run or schema.runs(con)[-1]["run"])
        ((recorded,),) = con.execute("SELECT recorded FROM runs WHERE run = ?", [name]).fetchall()
        layers = con.sql("SELECT * FROM layers WHERE run = ? ORDER BY layer", params=[name])
        return Transaction(name, recorded, layers.to_arrow_table().to_pylist())


def write(folder: str | os.PathLike, part: str, gathered: Transaction) -> None:
    """Write one part; it is there for readers when this returns, all of it.

    part  its name, the same whenever the same sequences are written: a part of that name is replaced, so that a worker
          that is tried again leaves nothing doubled. Letters, digits, `_`, `-`, `.`; no two workers may share one

    A part of 5 million token-layers or more is read fastest. RunError if it can't be written; then it isn't there.
    """
    tables = {name: [rows] for name, rows in gathered.tables().items()}
    if "routing" in tables:
        (routing,) = tables["routing"]
        tables["routing"] = [routing.slice(at, gathered.n_tokens) for at in range(0, len(routing), gathered.n_tokens)]
    write_part(folder, part, gathered.run, tables)


def write_part(folder: str | os.PathLike, part: str, run: str, tables: Mapping[str, Iterable[pa.Table]]) -> None:
    """Write the tables of one part, each given in pieces, whose rows need no column `run`.

    A piece of `routing` is best one layer, by sequence and position: a reader of one layer then skips the others.
    """
    if not PART.fullmatch(part):
        raise InputError(f"part {part!r}: expected letters, digits, `_`, `-` and `.`, such as 000017.")
    where = located(folder)
    with _writing(where):
        fs, root = filesystem(where)
        for table in (*IN_PARTS, "sequences"):  # sequences last: they make the part be there
            name = f"{table}/{part}{SUFFIX}"
            if table in tables or table == "sequences":
                _put(where, name, table, (_typed(table, run, piece) for piece in tables.get(table, ())))
            elif fs.exists(f"{root}/{name}"):  # of an earlier attempt
                fs.rm_file(f"{root}/{name}")


def finish(folder: str | os.PathLike, run: str, status: str = "finished") -> None:
    """Say how a run ended, after its last part: one of `workbench.schema.STATUSES`."""
    where = located(folder)
    if status not in schema.STATUSES:
        raise InputError(f"status {status!r}: expected one of {', '.join(schema.STATUSES)}.")
    with connection.reading(where) as con:
        name = schema.find_run(con, where, run)
        (row,) = con.sql("SELECT * FROM runs WHERE run = ?", params=[name]).to_arrow_table().to_pylist()
    _put_runs(where, row | {"status": status, "finished": now() if status == "finished" else None})
    fs, root = filesystem(where)
    with _writing(where):
        for table in (*IN_PARTS, "sequences"):  # what writers that died left behind
            for name in held(where / table):
                if name.startswith("."):
                    fs.rm_file(f"{root}/{table}/{name}")


def write_header(folder: str | os.PathLike, run: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of a run in `runs` and `layers`, and make the folder a trace; `begin` checks them first."""
    where = located(folder)
    with _writing(where):
        name = f"{file_of(run['run'])}{SUFFIX}"
        _put(where, f"layers/{name}", "layers", [_typed("layers", run["run"], pa.Table.from_pylist(list(layers)))])
        _put_runs(where, run)
        version = {"version": schema.FORMAT, "written_by": f"pyarrow {pa.__version__}"}
        _put(where, FORMAT_FILE, "format", [_typed("format", "", pa.Table.from_pylist([version]))])


def remove(folder: str | os.PathLike) -> None:
    """Delete the trace in a folder, and nothing else that is there."""
    where = located(folder)
    fs, root = filesystem(where)
    with _writing(where):
        for name in (FORMAT_FILE, *schema.TABLES):  # without its format it is no trace any more
            if fs.exists(f"{root}/{name}"):
                fs.rm(f"{root}/{name}", recursive=True)


def file_of(run: str) -> str:
    """What the files of a run in `runs` and `layers` are called."""
    return sha256(run.encode()).hexdigest()[:16]


def _put_runs(where: Path | Url, run: Mapping[str, Any]) -> None:
    _put(
        where, f"runs/{file_of(run['run'])}{SUFFIX}", "runs", [_typed("runs", run["run"], pa.Table.from_pylist([run]))]
    )


def _put(where: Path | Url, name: str, table: str, pieces: Iterable[pa.Table]) -> None:
    """A file under its name, whole or not at all; an old one of that name is replaced."""
    fs, root = filesystem(where)
    above, _, base = f"{root}/{name}".rpartition("/")
    partial = f"{above}/.{base}.{uuid.uuid4().hex[:8]}"
    fs.makedirs(above, exist_ok=True)
    try:
        with (
            fs.open(partial, "wb") as stream,
            pq.ParquetWriter(stream, _arrow_schemas()[table], compression="zstd", write_page_checksum=True) as writer,
        ):
            for piece in pieces:
                writer.write_table(piece, row_group_size=ROW_GROUP)
        fs.mv(partial, f"{above}/{base}")
    except BaseException:
        if fs.exists(partial):
            fs.rm_file(partial)
        raise


def _typed(table: str, run: str, rows: pa.Table) -> pa.Table:
    """The rows with all columns of the table, in their types; nulls for those that aren't there."""
    kinds = _arrow_schemas()[table]
    n = rows.num_rows
    found = {
        field.name: pa.repeat(pa.scalar(run), n)
        if field.name == "run"
        else rows[field.name].cast(field.type)
        if field.name in rows.column_names
        else pa.nulls(n, field.type)
        for field in kinds
    }
    return pa.table(found, schema=kinds)


@cache
def _arrow_schemas() -> dict[str, pa.Schema]:
    """Table -> the columns of its files; `phase` and JSON are text there."""
    with duckdb.connect() as con:
        con.execute(schema.SCHEMA)
        found = {name: con.sql(f"FROM {name}").to_arrow_table().schema for name in schema.columns()}
    texts = {
        name: {c for c, kind in types.items() if kind == "JSON" or c == "phase"}
        for name, types in schema.columns().items()
    }
    return {
        name: pa.schema([(f.name, pa.string() if f.name in texts[name] else f.type) for f in fields])
        for name, fields in found.items()
    }


@contextmanager
def _writing(where: Path | Url) -> Iterator[None]:
    with asking(where, RunError):
        try:
            yield
        except pa.ArrowException as error:
            raise RunError(f"{where} can't be written: {schema.first_line(error)}.") from error
