"""Tables of a trace, and tables of results, as files for other programs.

CSV cells that a spreadsheet would run as a formula are made harmless: text that starts with = + - @, a tab or a line
break gets an apostrophe in front. Parquet keeps every value as it is.
"""

import os
import re
from pathlib import Path

import duckdb
import pandas as pd

from workbench import schema
from workbench.errors import InputError, RunError
from workbench.output import new_file

FORMULA = r"^[=+\-@\t\r\n]"
"""Text cells of a CSV file that get an apostrophe in front."""


def export(
    path: str | os.PathLike,
    table: str,
    out: str | os.PathLike,
    *,
    run: str | None = None,
    unnest: bool = False,
    overwrite: bool = False,
) -> int:
    """Write a table of the trace at `path` to `out`, a .csv or .parquet file; returns the number of rows.

    table      one of workbench.schema.TABLES; `selections` has one row a selected expert
    run        rows of this run only; None for all runs
    unnest     `routing` as one row a selected expert, like `selections`, with its norm, entropy and margin beside it

    Streams, so that a table larger than memory can be written. In CSV, lists are JSON text. The file appears under its
    name only when it is whole. InputError if the request can't be met or `out` exists, RunError if writing fails.
    """
    path, out = Path(path), Path(out)
    if table not in schema.TABLES:
        raise InputError(f"no table {table!r} in a trace; choose from {', '.join(schema.TABLES)}.")
    if unnest and table != "routing":
        raise InputError(f"only `routing` can be unnested, not {table!r}.")
    _check_suffix(out, ".csv", ".parquet")
    with schema.reading(path) as con:
        run = None if run is None else schema.find_run(con, path, run)
        if table not in schema.tables(version := schema.version_of(con)):
            raise InputError(f"{path} has trace format {version}, which has no table {table!r}: nothing was counted.")
    if out.exists() and out.samefile(path):
        raise InputError(f"{out} is the trace itself; give another name to --out.")
    with new_file(out, overwrite) as temporary, schema.copying(path) as con:
        source = f"({_UNNESTED})" if unnest else table
        columns = con.execute(f"DESCRIBE FROM {source}").fetchall()
        csv = out.suffix == ".csv"
        wanted = ", ".join(_csv_cell(name, kind) if csv else name for name, kind, *_ in columns)
        where = "" if run is None else f"WHERE run = {schema.quoted(run)}"
        form = "FORMAT csv, HEADER" if csv else "FORMAT parquet, COMPRESSION zstd"
        try:
            query = f"COPY (SELECT {wanted} FROM {source} {where}) TO {schema.quoted(temporary)} ({form})"
            return con.execute(query).fetchall()[0][0]
        except duckdb.Error as error:
            raise RunError(
                f"{out} could not be written: {schema.first_line(error)}. Nothing was left behind."
            ) from error


def _csv_cell(name: str, kind: str) -> str:
    if kind.endswith("[]"):
        return f"to_json({name})::VARCHAR AS {name}"
    if kind in ("VARCHAR", "JSON"):
        apostrophe = schema.quoted("'")
        return f"if(regexp_matches({name}, {schema.quoted(FORMULA)}), {apostrophe} || {name}, {name}) AS {name}"
    return name


_UNNESTED = """
    SELECT run, seq, pos, layer, unnest(range(len(experts)))::USMALLINT AS rank, unnest(experts) AS expert,
        unnest(weights)::FLOAT / 65535::FLOAT * scale AS weight, unnest(norms) AS norm, entropy, margin
    FROM routing"""


def save_table(frame: pd.DataFrame, out: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a table of results as .csv, .parquet or .tex (booktabs). InputError for any other suffix."""
    out = Path(out)
    _check_suffix(out, ".csv", ".parquet", ".tex")
    with new_file(out, overwrite) as temporary:
        if out.suffix == ".csv":
            harmless(frame).to_csv(temporary, index=False)
        elif out.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            temporary.write_text(_tex(frame), encoding="utf-8")


def harmless(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy whose text, the names of columns included, no spreadsheet runs as a formula."""

    def cell(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and re.match(FORMULA, value) else value

    return frame.map(cell).rename(columns=cell)


def _tex(frame: pd.DataFrame) -> str:
    """A table in the style of the LaTeX package booktabs."""
    style = frame.reset_index(drop=True).rename(columns=str).style.hide(axis="index")
    style = style.format(precision=4, escape="latex", na_rep="--").format_index(escape="latex", axis=1)
    return str(style.to_latex(hrules=True))  # pyright: ignore[reportAttributeAccessIssue]


def _check_suffix(out: Path, *suffixes: str) -> None:
    if out.suffix not in suffixes:
        raise InputError(f"{out}: can't tell the format from {out.suffix!r}; expected {', '.join(suffixes)}.")
