"""Tables of a trace, and tables of results, as files for other programs.

CSV cells that a spreadsheet would run as a formula are made harmless: text that starts with = + - @, a tab or a line
break gets an apostrophe in front. Parquet keeps every value as it is.
"""

import csv
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pandas as pd

from workbench import connection, schema
from workbench.errors import InputError, RunError
from workbench.location import located
from workbench.output import new_file

FORMULA = r"^[=+\-@\t\r\n]"
"""Text cells of a CSV file that get an apostrophe in front."""
LATIN = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ")
"""Letters beyond ASCII that every LaTeX has."""


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
    path, out = located(path), Path(out)
    if table not in schema.TABLES:
        raise InputError(f"no table {table!r} in a trace; choose from {', '.join(schema.TABLES)}.")
    if unnest and table != "routing":
        raise InputError(f"only `routing` can be unnested, not {table!r}.")
    _check_suffix(out, ".csv", ".parquet")
    with connection.reading(path) as con:
        run = None if run is None else schema.find_run(con, path, run)
        if table not in schema.tables(version := schema.version_of(con)):
            raise InputError(f"{path} has trace format {version}, which has no table {table!r}: nothing was counted.")
    if isinstance(path, Path) and out.exists() and out.samefile(path):
        raise InputError(f"{out} is the trace itself; give another name to --out.")
    with new_file(out, overwrite) as temporary, connection.copying(path, temporary) as con:
        source = f"({_UNNESTED})" if unnest else table
        as_csv = out.suffix == ".csv"
        where = "" if run is None else f"WHERE run = {schema.quoted(run)}"
        form = "FORMAT csv, HEADER" if as_csv else "FORMAT parquet, COMPRESSION zstd"
        try:
            columns = con.execute(f"DESCRIBE FROM {source}").fetchall()
            wanted = ", ".join(_csv_cell(name, kind) if as_csv else name for name, kind, *_ in columns)
            query = f"COPY (SELECT {wanted} FROM {source} {where}) TO {schema.quoted(temporary.absolute())} ({form})"
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
    """Write a table of results as .csv, .parquet or .tex (booktabs, with caption, label and intervals).

    InputError for any other suffix, and if `out` exists and isn't to be replaced.
    """
    out = Path(out)
    _check_suffix(out, ".csv", ".parquet", ".tex")
    with new_file(out, overwrite) as temporary:
        if out.suffix == ".csv":
            harmless(frame).to_csv(temporary, index=False, quoting=quoting(frame))
        elif out.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            temporary.write_text(_tex(frame, out.stem), encoding="utf-8")


def harmless(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy whose text, the names of columns included, no spreadsheet runs as a formula."""

    def cell(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and re.match(FORMULA, value) else value

    return frame.map(cell).rename(columns=cell)


def quoting(frame: pd.DataFrame) -> Literal[0, 2]:
    """How to_csv has to quote: all text where a carriage return is in one, which it doesn't quote by itself. What
    follows would be a cell of its own, and might be a formula."""
    texts = frame.map(lambda value: isinstance(value, str) and "\r" in value)
    return csv.QUOTE_NONNUMERIC if texts.to_numpy().any() else csv.QUOTE_MINIMAL


def _tex(frame: pd.DataFrame, name: str) -> str:
    """A table float in the style of the LaTeX package booktabs, labelled tab:`name`; it takes no other package.

    Where value, low and high stand together (also as x, x_low, x_high), they become two columns: x, and its interval
    as low–high. Numbers are right-aligned. Text is shown as it is: what LaTeX would run is escaped, and letters that
    pdfLaTeX hasn't are named by their code, as in <U+4E2D>.
    """
    shown = frame.reset_index(drop=True).rename(columns=str)
    names = [str(column) for column in shown.columns]
    numeric = {column for column in names if pd.api.types.is_numeric_dtype(shown[column])}
    numeric -= {column for column in shown if pd.api.types.is_bool_dtype(shown[column])}
    intervals = {low: high for low, high in map(_ends, names) if {low, high} <= numeric}
    header, columns, kinds = [], [], ""
    for column in names:
        if column in intervals.values():
            continue
        low = column in intervals
        header.append(_escaped(f"{column.removesuffix('low')}interval" if low else column))
        cells = [_cell(value) for value in shown[column]]
        if low:
            cells = [
                "--" if "--" in pair else "{}--{}".format(*pair)
                for pair in zip(cells, map(_cell, shown[intervals[column]]), strict=True)
            ]
        columns.append(cells)
        kinds += "r" if column in numeric else "l"
    rows = [" & ".join(row) + r" \\" for row in zip(*columns, strict=True)]
    label = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII)
    lines = [
        r"% \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{_escaped(name)}}}",
        rf"\label{{tab:{label}}}", rf"\begin{{tabular}}{{{kinds}}}", r"\toprule",
        " & ".join(header) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _ends(column: str) -> tuple[str, str]:
    """The columns of an interval, if `column` is its lower end."""
    return (column, column.removesuffix("low") + "high") if re.search(r"(^|_)low$", column) else (column, "")


def _cell(value: Any) -> str:
    """A value for LaTeX: numbers to 4 significant digits, whole numbers whole, nothing as a dash."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return "--"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"${value}$" if value < 0 else str(value)
    if isinstance(value, float | np.floating):
        if math.isinf(value):
            return r"$\infty$" if value > 0 else r"$-\infty$"
        digits, _, power = f"{value:.4g}".partition("e")
        power = rf" \times 10^{{{int(power)}}}" if power else ""
        return f"${digits}{power}$" if value < 0 or power else digits
    return _escaped(str(value))


_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}", "-": "-{}",
    "[": "{[}", "]": "{]}",
}  # fmt: skip
"""What LaTeX takes for a command, or, as a dash, quote or bracket, for something else than it is."""


def _escaped(text: str) -> str:
    """Text for LaTeX: printable ASCII and Latin letters as they are, any other character as <U+XXXX>."""
    return "".join(
        _SPECIAL[c]
        if c in _SPECIAL
        else c
        if " " <= c <= "~" or c in LATIN
        else rf"\textless{{}}U+{ord(c):04X}\textgreater{{}}"
        for c in text
    )


def _check_suffix(out: Path, *suffixes: str) -> None:
    if out.suffix not in suffixes:
        raise InputError(f"{out}: can't tell the format from {out.suffix!r}; expected {', '.join(suffixes)}.")
