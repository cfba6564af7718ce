"""A trace: one DuckDB file, or a folder of Parquet parts, with any number of runs. Tables and format version.

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

import os
from functools import cache
from pathlib import Path
from typing import Any

import duckdb

from workbench.errors import InputError

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

# Row groups of 122,880 rows leave the last block of each column half empty: blocks of 128 kB instead of DuckDB's 256 kB
# save 4% of the file. Below 64 kB the small columns no longer compress.
BLOCK_SIZE = 131_072

COUNTED = """
CREATE TABLE loads (
    run VARCHAR, seq INTEGER, phase phase, block USMALLINT, layer USMALLINT, counts BIGINT[], tokens BIGINT[]);
CREATE TABLE pairs (
    run VARCHAR, block USMALLINT, layer USMALLINT, other USMALLINT, expert USMALLINT, tokens BIGINT, counts BIGINT[]);
"""

PHASE_TYPE = f"CREATE TYPE phase AS ENUM {PHASES}"
SELECTIONS = """
CREATE VIEW selections AS
    SELECT run, seq, pos, layer, unnest(range(len(experts)))::USMALLINT AS rank, unnest(experts) AS expert,
        unnest(weights)::FLOAT / 65535::FLOAT * scale AS weight
    FROM routing"""

SCHEMA = f"""
{PHASE_TYPE};
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
{SELECTIONS};
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


def create(path: Path) -> None:
    """Write an empty trace at `path`, which must not exist."""
    con = duckdb.connect(str(path), config={"default_block_size": str(BLOCK_SIZE)})
    try:
        con.execute(SCHEMA)
        con.execute("INSERT INTO format VALUES (?, ?)", [FORMAT, f"duckdb {duckdb.__version__}"])
    finally:
        con.close()


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


def quoted(text: object) -> str:
    """An SQL string."""
    return "'" + str(text).replace("'", "''") + "'"


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
