"""Connections to a trace: reading, writing, copying from it, all of them confined to the trace that they are about.

    with reading("udhr.duckdb") as con:
        con.execute("SELECT count(*) FROM tokens").fetchall()

What a trace holds is somebody else's SQL, too: views, macros, triggers. So no connection to one can touch another file,
the network, Python's names or the settings.
"""

import hashlib
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from workbench import folder, schema
from workbench.errors import InputError, interruptible
from workbench.location import Url, exists, is_folder, located
from workbench.schema import first_line, quoted

T = TypeVar("T")

READ_WAIT = 10.0
"""Seconds a reader waits for a writer that is committing."""

MEMORY = "WORKBENCH_MEMORY"
"""The environment variable that says how much memory DuckDB may use, as in `4GB`."""

# Every connection to a trace has these same settings, because DuckDB shares one instance among connections of a process
# to the same file and refuses a second one that is configured differently. The settings are locked from the start: what
# a trace's own views, macros and triggers call can change some, such as where to log. Ours are those still allowed.
_CHANGING = ["memory_limit", "max_temp_directory_size", "enable_progress_bar", "preserve_insertion_order"]
_CONFINED: dict[str, Any] = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "allowed_configs": _CHANGING,
    "lock_configuration": "true",
}
_BUSY = re.compile(r"set lock on file|different configuration|already attached|unique file handle", re.IGNORECASE)


@contextmanager
def reading(path: str | os.PathLike, *, wait: float = READ_WAIT) -> Iterator[duckdb.DuckDBPyConnection]:
    """A read-only connection to the trace at `path` that can touch nothing else: no files, no network, no Python names.
    (To a folder it isn't read-only by itself: a user's SQL goes through `workbench.query.check` first.)

    Waits up to `wait` seconds for a writer that is committing. InputError if the file is not a readable trace.
    """
    with interruptible():
        con = connect(path, wait=wait)
        try:
            yield con
        except duckdb.Error as error:
            if is_folder(there := located(path)):
                raise InputError(folder.why_not(there, schema.columns(), error)) from error
            if not (isinstance(error, duckdb.IOException) or "Corrupt database file" in str(error)):
                raise
            # a part of the file that only this question needed is lost
            raise InputError(_why_not(Path(path), error)) from error
        finally:
            con.close()


@contextmanager
def writing(path: str | os.PathLike, *, wait: float) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that can write to the trace at `path`, and touch nothing else, whatever triggers are in it; an
    unfinished transaction is dropped with it."""
    with interruptible():
        con = connect(path, read_only=False, wait=wait)
        try:
            yield con
        finally:
            con.close()


def connect(path: str | os.PathLike, *, read_only: bool = True, wait: float = READ_WAIT) -> duckdb.DuckDBPyConnection:
    """Open and check the trace at `path`; see `reading`."""
    there = located(path)
    if is_folder(there):
        if not read_only:
            raise InputError(
                f"{path} is a folder; expected a DuckDB file. `workbench merge {path} --out FILE` makes one."
            )
        return _connect_folder(there)
    path = Path(there)
    if not exists(path):
        raise InputError(f"{path}: no such file. Write one with `workbench trace --out {path}`.")
    con = _open(path, read_only, wait)
    try:
        _check(con, path)
    except BaseException:
        con.close()
        raise
    return con


def _open(path: Path, read_only: bool, wait: float) -> duckdb.DuckDBPyConnection:
    # A dict of its own for each call: DuckDB may keep it.
    config = limits() | _CONFINED | _spilling(hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32])
    con = _patiently(path, wait, lambda: duckdb.connect(str(path), read_only=read_only, config=dict(config)))
    return _silent(con)


@contextmanager
def copying(path: str | os.PathLike, out: Path, *, wait: float = READ_WAIT) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that reads the trace at `path` and can write `out`, a file or what is in that folder: for our own
    COPY, not a user's SQL. It can touch nothing else, since the views and macros in a trace are somebody else's SQL."""
    with interruptible():
        con = in_memory()
        try:
            attach(con, path, "trace", wait=wait)
            con.execute("USE trace")
            if out.is_dir():
                folder.confine(con, located(path), out)
            else:
                con.execute(f"SET allowed_paths = [{quoted(out.absolute())}]")
                folder.confine(con, located(path))
            lock(con)
            yield con
        finally:
            con.close()


def attach(con: duckdb.DuckDBPyConnection, path: str | os.PathLike, name: str, *, wait: float = READ_WAIT) -> None:
    """Make the tables of the trace at `path` known to `con` as `name.TABLE`."""
    path = located(path)
    if is_folder(path):
        con.execute(f"ATTACH ':memory:' AS {name}")
        folder.create_views(con, path, schema.columns(), f"{name}.main")
        con.execute(schema.SELECTIONS.replace("VIEW ", f"VIEW {name}.").replace("FROM routing", f"FROM {name}.routing"))
    else:
        _patiently(Path(path), wait, lambda: con.execute(f"ATTACH {quoted(path)} AS {name} (READ_ONLY)"))


def in_memory() -> duckdb.DuckDBPyConnection:
    """A connection to no file; what goes beyond its memory goes to a temporary folder that others can't read."""
    con = duckdb.connect(config={"python_enable_replacements": "false"} | _spilling(uuid.uuid4().hex) | limits())
    return _silent(con)


def _silent(con: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """The connection without a progress bar, which would go to stdout."""
    with suppress(duckdb.InvalidInputException):  # in Jupyter without ipywidgets, where it has none
        con.execute("SET enable_progress_bar = false")
    return con


def _connect_folder(path: Path | Url) -> duckdb.DuckDBPyConnection:
    con = in_memory()
    try:
        con.execute(schema.PHASE_TYPE)
        folder.create_views(con, path, schema.columns())
        con.execute(schema.SELECTIONS)
        folder.confine(con, path)
        lock(con)
        _check_version(path, schema.version_of(con), ())
    except duckdb.Error as error:
        con.close()
        raise InputError(folder.why_not(path, schema.columns(), error)) from error
    except BaseException:
        con.close()
        raise
    return con


def lock(con: duckdb.DuckDBPyConnection) -> None:
    """Leave `con` the settings that it has, but for those that ours may change later."""
    con.execute(f"SET allowed_configs = [{', '.join(map(quoted, _CHANGING))}]")
    con.execute("SET lock_configuration = true")


def _spilling(name: str) -> dict[str, Any]:
    """Where a DuckDB writes what its memory can't hold: a folder of its own that others can't look into."""
    return {"temp_directory": os.path.join(_temporary(os.getpid()).name, name)}


@cache
def _temporary(process: int) -> tempfile.TemporaryDirectory:
    """A folder of this process, until it ends."""
    return tempfile.TemporaryDirectory(prefix=f"workbench.{process}.", ignore_cleanup_errors=True)


def limits() -> dict[str, Any]:
    """Settings of DuckDB that the environment gives. InputError for a memory that isn't a size."""
    memory = os.environ.get(MEMORY)
    if memory and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory, re.IGNORECASE):
        raise InputError(f"{MEMORY} is {memory!r}; expected a size such as 4GB or 512MiB.")
    return {"memory_limit": memory} if memory else {}


def _patiently(path: Path, wait: float, attempt: Callable[[], T]) -> T:
    """Try again while another process, or another thread of this one, has the file."""
    patience = time.monotonic() + wait
    while True:
        try:
            return attempt()
        except duckdb.Error as error:
            if not _BUSY.search(str(error)):
                raise InputError(_why_not(path, error)) from error
            if time.monotonic() > patience:
                raise InputError(
                    f"{path} is in use by another process and stayed locked for {wait:.0f} s. "
                    f"Try again, or end that process. DuckDB says: {first_line(error)}"
                ) from error
        time.sleep(0.02)


def _why_not(path: Path, error: duckdb.Error) -> str:
    if not os.access(path, os.R_OK):
        return f"{path} can't be read: permission denied."
    if path.stat().st_size == 0:
        return f"{path} is empty; expected a trace file. Delete it and trace again."
    text = str(error)
    with path.open("rb") as file:
        magic = file.read(12)[8:]  # DuckDB opens some other kinds of file too, such as JSON, and fails later
    if magic != b"DUCK":
        return f"{path} is not a trace: it is not a DuckDB file. Expected a file written by `workbench trace`."
    if "version number" in text or "newer version" in text:
        return f"{path} was written by a newer DuckDB: update it, `pip install -U duckdb`. It says: {first_line(error)}"
    return (
        f"{path} is damaged or cut short and can't be opened. Copy it again from where it came, or trace again. "
        f"DuckDB says: {first_line(error)}"
    )


def _check(con: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Refuse a DuckDB file that isn't a whole trace of this format, or of one that can be migrated."""
    try:
        # A file's macros answer for functions of the same name, unless these are called by their full names; and a
        # table in another schema would stand for a view of the same name, which is somebody else's SQL.
        here = "database_name = system.main.current_database()"
        query = (
            f"SELECT table_name FROM system.main.duckdb_tables() WHERE NOT internal AND schema_name = 'main' AND {here}"
        )
        found = {name for (name,) in con.execute(query).fetchall()}
        version = schema.version_of(con) if "format" in found else None
        query = f"SELECT block_size, used_blocks FROM system.main.pragma_database_size() WHERE {here}"
        block_size, blocks = con.execute(query).fetchall()[0]
    except duckdb.Error as error:
        raise InputError(_why_not(path, error)) from error
    if version is None:
        raise InputError(
            f"{path} is a DuckDB file but not a trace: it has no table `format` (its tables: "
            f"{', '.join(sorted(found)) or 'none'}). Expected a file written by `workbench trace`."
        )
    _check_version(path, version, schema.MIGRATIONS)
    if missing := set(schema.tables(version)) - {"selections"} - found:
        raise InputError(f"{path} lacks the tables {', '.join(sorted(missing))}: it was changed after it was written.")
    # DuckDB opens a truncated file and fails only on the first query that needs the lost part. Only blocks in use
    # count: free ones at the end of the file may never have been written.
    if path.stat().st_size < blocks * block_size:
        raise InputError(
            f"{path} is cut short: {path.stat().st_size:,} bytes of at least {blocks * block_size:,}. "
            "Copy it again from where it came, or trace again."
        )


def _check_version(path: Path | Url, version: int | None, older: Container[int | None]) -> None:
    if version is not None and version > schema.FORMAT:
        raise InputError(
            f"{path} has trace format {version}; this workbench reads format {schema.FORMAT}. Update the workbench."
        )
    if version != schema.FORMAT and version not in older:
        raise InputError(f"{path} has trace format {version}, which this workbench can't read or migrate. Trace again.")
