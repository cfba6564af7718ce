"""SQL that a user types: what may be asked, examples, and the answer up to a size that a page can hold.

Two walls stand between a query and the machine. `check` lets only questions through, one at a time: SELECT and what is
short for it (FROM …, VALUES, PIVOT, DESCRIBE, SUMMARIZE, SHOW), EXPLAIN of one of these, and PRAGMAs that only tell;
none of them with a part that writes.
And the connection that answers is read-only and confined to the trace (workbench.connection.reading): it can open no
other file, reach no network, and change no setting.
"""

import os
import re
import threading
import time
from textwrap import dedent
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pandas as pd

from workbench import connection, schema
from workbench.errors import InputError

MOST_ROWS = 1_000_000
MOST_BYTES = 128 * 2**20
"""An answer ends with the first of these."""
MEMORY, DISK = "1GB", "8GB"
"""What DuckDB may use for one query in a process of its own; what is sorted beyond the first goes to the disk."""
LONGEST = 600.0
"""Seconds that a query may take: nobody may be waiting for it any more."""

_QUESTIONS = ("SELECT", "MULTI")  # MULTI: a PIVOT, which looks its columns up first
_BEGINNINGS = (
    "SELECT", "FROM", "WITH", "VALUES", "TABLE", "PIVOT", "UNPIVOT", "DESCRIBE", "DESC", "SHOW", "SUMMARIZE",
)  # fmt: skip
"""The first word of a question."""
_WINDOWS = ("PARTITION", "ORDER", "ROWS", "RANGE", "GROUPS")
"""What else can stand first in parentheses after AS: the definition of a window."""
_RUNNING = ("query", "json_execute_serialized_sql")
"""Functions that run a statement of their own, made while the question is answered."""
_TELLING = re.compile(r"\s*PRAGMA\s+(table_info|storage_info|show_tables|database_size|version)\b", re.IGNORECASE)


def check(sql: str) -> str:
    """The one question in a text, without the semicolon. InputError if it is empty, wrong, several, or does something.

    >>> check("SELECT 1;")
    'SELECT 1'
    >>> check("DROP TABLE tokens")
    Traceback (most recent call last):
    workbench.errors.InputError: DROP is refused: ...
    """
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"Character {error.start + 1} of the query is not Unicode text; type it anew.") from None
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise InputError(message(error)) from error
    if not statements:
        raise InputError("The query is empty. Expected SQL such as SELECT lang, count(*) FROM sequences GROUP BY lang.")
    if len(statements) > 1:
        raise InputError(f"There are {len(statements)} statements; expected one query. Remove the others.")
    kind, text = statements[0].type.name, statements[0].query  # in which every kind of space is a plain one
    words = _words(text)
    text = text.encode()[: words[-1].end].decode()
    if words[0].said == "EXPLAIN":
        check(_explained(text, words))
    elif not (kind in _QUESTIONS or kind == "PRAGMA" and _TELLING.match(text)):
        raise _refused(kind)
    elif kind == "MULTI" and not _is_subquery(text):
        raise _refused(words[0].said)
    _check_parts(words)
    if statements[0].named_parameters:
        names = ", ".join(sorted(statements[0].named_parameters))
        raise InputError(f"The query has parameters ({names}); write the values themselves.")
    return text


class _Word(NamedTuple):
    """A word or sign of SQL, from byte `start` to `end`: in capitals, and whether it is one of SQL's own, unquoted."""

    said: str
    keyword: bool
    start: int
    end: int


def _words(sql: str) -> list[_Word]:
    """All but comments and semicolons, as DuckDB takes them apart."""
    text = sql.encode()
    found: list[tuple[int, Any]] = duckdb.tokenize(sql)
    words = []
    for (start, kind), end in zip(found, [*(start for start, _ in found[1:]), len(text)], strict=True):
        word = text[start:end].rstrip()
        if kind != duckdb.token_type.comment and word != b";":
            words.append(_Word(word.decode().upper(), kind == duckdb.token_type.keyword, start, start + len(word)))
    return words


def _explained(text: str, words: list[_Word]) -> str:
    """What EXPLAIN, which may have options, is to explain."""
    said = [word.said for word in words]
    at = 2 if said[1:2] == ["ANALYZE"] else 1
    if said[1:2] == ["("] and said[2:3] != ["("] and not set(said[2:3]) & {*_BEGINNINGS} and ")" in said:
        at = said.index(")") + 1
    if at >= len(words):
        raise InputError("EXPLAIN lacks the query that it is to explain, such as EXPLAIN SELECT count(*) FROM tokens.")
    return text.encode()[words[at].start :].decode()


def _is_subquery(text: str) -> bool:
    """Whether it is a question all through: other statements with a PIVOT in them are no tables."""
    try:
        return len(duckdb.extract_statements(f"FROM (\n{text}\n)")) == 1
    except duckdb.Error:
        return False


def _check_parts(words: list[_Word]) -> None:
    """InputError for WITH name AS (COPY …) and the like, and for functions that run what only they know."""
    for before, here, after in zip(words, words[1:], words[2:], strict=False):
        if here.said != "(":
            continue
        if before.said.strip('"').lower() in _RUNNING:
            raise InputError(f"The function {before.said.lower()} is refused: write the query itself.")
        named = before.keyword and before.said in ("AS", "MATERIALIZED")
        if named and after.keyword and after.said not in _BEGINNINGS + _WINDOWS:
            raise _refused(after.said)


def _refused(what: str) -> InputError:
    return InputError(
        f"{what} is refused: only questions can be asked, and the trace is never changed. "
        "Expected SELECT, FROM, VALUES, PIVOT, DESCRIBE, SUMMARIZE, SHOW or EXPLAIN."
    )


def ask(
    path: str | os.PathLike,
    sql: str,
    *,
    most_rows: int = MOST_ROWS,
    most_bytes: int = MOST_BYTES,
    memory: str = "",
    seconds: float = LONGEST,
) -> pd.DataFrame:
    """The answer to a query over the trace at `path`, its first rows if it has more than most_rows or most_bytes.

    memory   what DuckDB may use, such as "1GB"; it counts where this process has no other connection to the file
    seconds  after which the query is ended

    The frame's `attrs` say `complete` (whether this is all of it) and `seconds`. Lists are Python lists. InputError for
    what `check` refuses and for what DuckDB can't answer.
    """
    question = check(sql)
    started = time.perf_counter()
    with connection.reading(path) as con:
        if memory:
            con.execute(f"SET memory_limit = {schema.quoted(memory)}")
            con.execute(f"SET max_temp_directory_size = {schema.quoted(DISK)}")
        end = threading.Timer(seconds, con.interrupt)
        end.start()
        try:
            result = con.execute(question)
            frame, complete = _fetch(result, most_rows, most_bytes) if result.description else (pd.DataFrame(), True)
        except duckdb.InterruptException as error:
            raise InputError(f"The query took longer than {seconds:g} s and was ended. Ask for less.") from error
        except duckdb.Error as error:
            raise InputError(message(error)) from error
        finally:
            end.cancel()
    frame.attrs = {"complete": complete, "seconds": time.perf_counter() - started}
    return frame


def _fetch(result: duckdb.DuckDBPyConnection, most_rows: int, most_bytes: int) -> tuple[pd.DataFrame, bool]:
    """The first rows, and whether they are all."""
    chunks: list[pd.DataFrame] = []
    rows = size = 0
    while rows <= most_rows and size <= most_bytes:
        chunk = result.fetch_df_chunk(10)  # of 2,048 rows each
        if not len(chunk) and chunks:
            break
        chunk = chunk.apply(_listed)
        chunks.append(chunk)
        rows += len(chunk)
        size += int(np.sum(chunk.memory_usage(deep=True)))
        if not len(chunk):
            break
    else:
        return pd.concat(chunks, ignore_index=True).head(most_rows), False
    return pd.concat(chunks, ignore_index=True), True


def _listed(column: pd.Series) -> pd.Series:
    """Arrays in cells as lists, which are written to CSV whole."""
    if column.dtype != object or not any(isinstance(value, np.ndarray) for value in column.head(100)):
        return column
    return column.map(lambda value: value.tolist() if isinstance(value, np.ndarray) else value)


def message(error: duckdb.Error) -> str:
    """What DuckDB says, for somebody who typed the query: the kind of error, the place, and what was meant."""
    text = str(error).strip()
    if "file system operations are disabled" in text or isinstance(error, duckdb.PermissionException):
        return f"Refused: a query sees the tables of this trace, no files and no network. {schema.first_line(error)}"
    if "configuration has been locked" in text:
        return f"Refused: a query can't change settings. {schema.first_line(error)}"
    if isinstance(error, duckdb.OutOfMemoryException):
        return (
            "The query needs more memory than a query may use. Take fewer rows (WHERE layer = 0, USING SAMPLE 10%), "
            f"or aggregate before joining. {schema.first_line(error)}"
        )
    return re.sub(r"\n\s*\n+", "\n", text)


def examples(run: str) -> dict[str, str]:
    """Title -> SQL, about the run of that name."""
    name = schema.quoted(run)
    found = {
        "Texts and tokens by language and domain": f"""
            SELECT lang, domain, count(*) AS texts, sum(n_tokens)::BIGINT AS tokens
            FROM sequences
            WHERE run = {name}
            GROUP BY ALL
            ORDER BY tokens DESC""",
        "Load of every expert": f"""
            SELECT layer, expert, count(*) AS tokens
            FROM (SELECT layer, unnest(experts) AS expert FROM routing WHERE run = {name})
            GROUP BY ALL
            ORDER BY layer, expert""",
        "Entropy by layer and language": f"""
            SELECT layer, lang, avg(entropy) AS entropy, count(*) AS tokens
            FROM routing JOIN sequences USING (run, seq)
            WHERE run = {name}
            GROUP BY ALL
            ORDER BY layer, lang""",
        "Tokens that an expert takes most often": f"""
            SELECT text, count(*) AS tokens
            FROM routing JOIN tokens USING (run, seq, pos) JOIN vocabulary USING (run, token_id)
            WHERE run = {name} AND layer = 0 AND list_contains(experts, 3)
            GROUP BY ALL
            ORDER BY tokens DESC
            LIMIT 50""",
        "Loss by position": f"""
            SELECT pos // 16 * 16 AS position, avg(nll) AS nll, count(*) AS tokens
            FROM tokens
            WHERE run = {name}
            GROUP BY ALL
            ORDER BY position""",
        "The choices that were closest": f"""
            SELECT seq, pos, text, layer, margin, experts
            FROM routing JOIN tokens USING (run, seq, pos) JOIN vocabulary USING (run, token_id)
            WHERE run = {name} AND margin IS NOT NULL
            ORDER BY margin
            LIMIT 100""",
        "One text, token by token": f"""
            SELECT pos, text, nll, experts, entropy
            FROM routing JOIN tokens USING (run, seq, pos) JOIN vocabulary USING (run, token_id)
            WHERE run = {name} AND layer = 0
                AND seq = (SELECT min(seq) FROM sequences WHERE run = {name})
            ORDER BY pos""",
        "Runs of this file": """
            SELECT run, model, dtype, status, started, finished, corpus->>'fingerprint' AS fingerprint
            FROM runs
            ORDER BY started""",
    }
    return {title: dedent(sql).strip() for title, sql in found.items()}
