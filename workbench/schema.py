"""A trace: one DuckDB file, or a folder of Parquet parts, with any number of runs. Tables, format version, opening.

    runs        one pass of one model over corpora
    layers      one MoE router of a run
    sequences   one text of a run
    tokens      one token position
    vocabulary  one token id that occurs
    routing     one token at one router: ids and weights as lists, written layer by layer inside a transaction
    profiles    mean router probabilities over the tokens of one sequence at one router
    loads       a run that counts: how often the tokens of one text, or of one group of texts, chose each expert
    pairs       a run that counts: how many tokens of one block of texts chose one expert and another
    selections  view: one selected expert
    format      one row: the version of all this

`routing.weights` are fixed point: the weight is `weights / 65535 * scale`, in single precision. `scale` is 1 where the
row's largest weight is at most 1, otherwise the smallest power of two that is at least the largest weight.
A token for which a router chose no expert (dropped, or not seen by that router) has an empty list.

A folder has the same tables as Parquet files (`workbench.folder`), and is read through views of the same names.

A run that counts (`recorded` is just `counts`, see `workbench.counts`) has no rows in tokens, vocabulary, routing and
profiles; all others have none in loads and pairs.
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

from workbench import folder
from workbench.errors import InputError
from workbench.location import Url, exists, is_folder, located

T = TypeVar("T")

FORMAT = 3
"""Version of the tables. An older file is read as it is, and migrated when a run is written to it."""

PHASES = ("template", "prompt", "generated")
"""Where a token comes from, in the order of the codes in `Block.tokens["phase"]`."""

RECORDABLE = (
    "ids", "weights", "entropy", "margin", "logits", "norms", "profiles", "shift", "lookahead", "predictions",
)  # fmt: skip
"""What `runs.recorded` can name of each token. `ids` is always there, but for runs that count."""

COUNTS = "counts"
"""What `runs.recorded` names, alone, where choices were counted instead."""

STATUSES = ("running", "finished", "interrupted", "failed")

UNKNOWN_TOKEN = -1
"""`tokens.token_id` where the id is not known, as in routing that came without its text."""

READ_WAIT = 10.0
"""Seconds a reader waits for a writer that is committing."""

# Row groups of 122,880 rows leave the last block of each column half empty: blocks of 128 kB instead of DuckDB's 256 kB
# save 4% of the file. Below 64 kB the small columns no longer compress.
BLOCK_SIZE = 131_072

COUNTED = """
CREATE TABLE loads (
    run VARCHAR, seq INTEGER, phase phase, block USMALLINT, layer USMALLINT, counts BIGINT[], tokens BIGINT[]);
CREATE TABLE pairs (
    run VARCHAR, block USMALLINT, layer USMALLINT, other USMALLINT, expert USMALLINT, tokens BIGINT, counts BIGINT[]);
"""

_PHASE = f"CREATE TYPE phase AS ENUM {PHASES}"
_SELECTIONS = """
CREATE VIEW selections AS
    SELECT run, seq, pos, layer, unnest(range(len(experts)))::USMALLINT AS rank, unnest(experts) AS expert,
        unnest(weights)::FLOAT / 65535::FLOAT * scale AS weight
    FROM routing"""

SCHEMA = f"""
{_PHASE};
CREATE TABLE format (version INTEGER, written_by VARCHAR);
CREATE TABLE runs (
    run VARCHAR, model VARCHAR, revision VARCHAR, family VARCHAR, engine VARCHAR, dtype VARCHAR, recipe JSON,
    recorded VARCHAR[], corpus JSON, versions JSON, started TIMESTAMP, finished TIMESTAMP, status VARCHAR);
CREATE TABLE layers (
    run VARCHAR, layer USMALLINT, name VARCHAR, n_experts INTEGER, top_k INTEGER, n_shared INTEGER, gating VARCHAR,
    stack VARCHAR);
CREATE TABLE sequences (
    run VARCHAR, seq INTEGER, sha256 VARCHAR, n_prompt INTEGER, n_tokens INTEGER, lang VARCHAR, domain VARCHAR,
    source VARCHAR, segment_id VARCHAR, metadata JSON);
CREATE TABLE tokens (
    run VARCHAR, seq INTEGER, pos INTEGER, token_id INTEGER, phase phase, nll FLOAT, predicted INTEGER);
CREATE TABLE vocabulary (run VARCHAR, token_id INTEGER, text VARCHAR);
CREATE TABLE routing (
    run VARCHAR, seq INTEGER, pos INTEGER, layer USMALLINT, scale FLOAT, experts USMALLINT[], weights USMALLINT[],
    entropy FLOAT, margin FLOAT, logits FLOAT[], norms FLOAT[], shift FLOAT, lookahead USMALLINT[]);
CREATE TABLE profiles (run VARCHAR, seq INTEGER, layer USMALLINT, probs FLOAT[]);
{COUNTED}
{_SELECTIONS};
"""

MIGRATIONS = {
    1: (
        "ALTER TABLE tokens ADD COLUMN predicted INTEGER",
        "ALTER TABLE routing ADD COLUMN shift FLOAT",
        "ALTER TABLE routing ADD COLUMN lookahead USMALLINT[]",
    ),
    2: (COUNTED,),
}
"""What turns a file of one format into one of the next."""

TABLES = (
    "runs", "layers", "sequences", "tokens", "vocabulary", "routing", "profiles", "loads", "pairs", "selections",
)  # fmt: skip
"""What can be queried and exported; the last one is a view."""

_SINCE = {"loads": 3, "pairs": 3}
"""The format that a table came with, where that isn't the first."""

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
_INTERRUPTED = "Query interrupted"
"""What Ctrl-C while DuckDB works comes out of it as, in a RuntimeError."""
_BUSY = re.compile(r"set lock on file|different configuration|already attached|unique file handle", re.IGNORECASE)


def create(path: Path) -> None:
    """Write an empty trace at `path`, which must not exist."""
    con = duckdb.connect(str(path), config={"default_block_size": str(BLOCK_SIZE)})
    try:
        con.execute(SCHEMA)
        con.execute("INSERT INTO format VALUES (?, ?)", [FORMAT, f"duckdb {duckdb.__version__}"])
    finally:
        con.close()


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
                raise InputError(folder.why_not(there, columns(), error)) from error
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


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C while DuckDB works is KeyboardInterrupt, as anywhere else."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != _INTERRUPTED:
            raise
        raise KeyboardInterrupt from error


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
        folder.create_views(con, path, columns(), f"{name}.main")
        con.execute(_SELECTIONS.replace("VIEW ", f"VIEW {name}.").replace("FROM routing", f"FROM {name}.routing"))
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
        con.execute(_PHASE)
        folder.create_views(con, path, columns())
        con.execute(_SELECTIONS)
        folder.confine(con, path)
        lock(con)
        _check_version(path, version_of(con), ())
    except duckdb.Error as error:
        con.close()
        raise InputError(folder.why_not(path, columns(), error)) from error
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


@cache
def columns() -> dict[str, dict[str, str]]:
    """Table -> column -> SQL type."""
    with duckdb.connect() as con:
        con.execute(SCHEMA)
        query = "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal"
        found: dict[str, dict[str, str]] = {name: {} for name in ("format", *TABLES[:-1])}
        for table, column, kind in con.execute(f"{query} ORDER BY table_oid, column_index").fetchall():
            if table in found:
                found[table][column] = kind
    return found


def limits() -> dict[str, Any]:
    """Settings of DuckDB that the environment gives. InputError for a memory that isn't a size."""
    memory = os.environ.get(MEMORY)
    if memory and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory, re.IGNORECASE):
        raise InputError(f"{MEMORY} is {memory!r}; expected a size such as 4GB or 512MiB.")
    return {"memory_limit": memory} if memory else {}


def quoted(text: object) -> str:
    """An SQL string."""
    return "'" + str(text).replace("'", "''") + "'"


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
        version = version_of(con) if "format" in found else None
        query = f"SELECT block_size, used_blocks FROM system.main.pragma_database_size() WHERE {here}"
        block_size, blocks = con.execute(query).fetchall()[0]
    except duckdb.Error as error:
        raise InputError(_why_not(path, error)) from error
    if version is None:
        raise InputError(
            f"{path} is a DuckDB file but not a trace: it has no table `format` (its tables: "
            f"{', '.join(sorted(found)) or 'none'}). Expected a file written by `workbench trace`."
        )
    _check_version(path, version, MIGRATIONS)
    if missing := set(tables(version)) - {"selections"} - found:
        raise InputError(f"{path} lacks the tables {', '.join(sorted(missing))}: it was changed after it was written.")
    # DuckDB opens a truncated file and fails only on the first query that needs the lost part. Only blocks in use
    # count: free ones at the end of the file may never have been written.
    if path.stat().st_size < blocks * block_size:
        raise InputError(
            f"{path} is cut short: {path.stat().st_size:,} bytes of at least {blocks * block_size:,}. "
            "Copy it again from where it came, or trace again."
        )


def _check_version(path: Path | Url, version: int | None, older: Container[int | None]) -> None:
    if version is not None and version > FORMAT:
        raise InputError(
            f"{path} has trace format {version}; this workbench reads format {FORMAT}. Update the workbench."
        )
    if version != FORMAT and version not in older:
        raise InputError(f"{path} has trace format {version}, which this workbench can't read or migrate. Trace again.")


def tables(version: int) -> tuple[str, ...]:
    """Those of TABLES that a file of this format has."""
    return tuple(name for name in TABLES if _SINCE.get(name, 1) <= version)


def version_of(con: duckdb.DuckDBPyConnection) -> int:
    """The format of an open trace."""
    return con.execute("SELECT system.main.max(version) FROM format").fetchall()[0][0]


def migrate(con: duckdb.DuckDBPyConnection) -> None:
    """Bring an older trace to this format, in one transaction: all of it or nothing."""
    version = version_of(con)
    if version == FORMAT:
        return
    con.execute("BEGIN")
    for step in range(version, FORMAT):
        for statement in MIGRATIONS[step]:
            con.execute(statement)
    con.execute("UPDATE format SET version = ?", [FORMAT])
    con.execute("COMMIT")


def runs(con: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Name and status of each run in the file, in the order they were started."""
    rows = con.execute("SELECT run, status, finished FROM runs ORDER BY started, run").fetchall()
    return [{"run": run, "status": status, "finished": finished} for run, status, finished in rows]


def find_run(con: duckdb.DuckDBPyConnection, path: str | os.PathLike, run: str | None) -> str:
    """The run called `run`; for None the only one, or the last finished one. InputError if there is no such run."""
    known = runs(con)
    if not known:
        raise InputError(f"{path} holds no run. Write one with `workbench trace --out {path} --append`.")
    if run is None:
        finished = [row for row in known if row["status"] == "finished"]
        return max(finished, key=lambda row: row["finished"])["run"] if finished else known[-1]["run"]
    if run not in {row["run"] for row in known}:
        listed = ", ".join(f"{row['run']} ({row['status']})" for row in known)
        raise InputError(f"no run {run!r} in {path}. It holds: {listed}.")
    return run


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
