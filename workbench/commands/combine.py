"""Traces put together and taken apart: `merge`, `split`, `sample`."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import File, Json, Overwrite, Run
from workbench.errors import InputError
from workbench.printing import show

By = Annotated[str | None, typer.Option(help="A column: lang, domain, source, … or any metadata.")]


def merge(
    traces: Annotated[
        list[str], typer.Argument(metavar="TRACE…", help="DuckDB files, and folders of Parquet parts (paths or URLs).")
    ],
    out: Annotated[
        str, typer.Option(help="The DuckDB file to write; or, with a slash at its end or as a URL, a folder of parts.")
    ],
    renumber: Annotated[
        bool,
        typer.Option(
            "--renumber",
            help="Where traces have a run of one name and the numbers of their texts clash: number those of each after "
            "those of the one before.",
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Put the runs of several traces into one, or turn a folder of Parquet parts into one file."""
    from workbench.combine import merge as write

    result = write(traces, out, renumber=renumber, overwrite=overwrite)
    runs = len(result.runs())
    print(f"{out}: {runs} run{'s' * (runs != 1)}; {result.run}: {result.n_tokens:,} tokens")


def split(
    file: File,
    out: Annotated[Path, typer.Option(help="The folder to make, of DuckDB files.")],
    by: By = None,
    parts: Annotated[int | None, typer.Option(help="So many files, of consecutive texts.")] = None,
    run: Annotated[str | None, typer.Option(help="This run only. [default: all runs]")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a trace as several files: one for each value of a column (--by), or a number of them (--parts)."""
    if (by is None) == (parts is None):
        raise InputError("--by and --parts: expected one of them.")
    from workbench.extract import split as write

    show(write(file, out, by=by, n_parts=parts, run=run, overwrite=overwrite), as_json)


def sample(
    file: File,
    out: Annotated[Path, typer.Option(help="The DuckDB file to write.")],
    sequences: Annotated[int | None, typer.Option(help="Draw so many sequences.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Draw up to the sequence that reaches so many tokens.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Stratify: each value of this column keeps its share of the sequences.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same.")] = 0,
    run: Run = None,
    overwrite: Overwrite = False,
) -> None:
    """Write some texts of one run, drawn at random, as a new trace."""
    if (sequences is None) == (tokens is None):
        raise InputError("--sequences and --tokens: expected one of them.")
    from workbench.extract import sample as write

    drawn = write(file, out, sequences=sequences, tokens=tokens, by=by, seed=seed, run=run, overwrite=overwrite)
    print(f"{out}: {drawn.n_tokens:,} tokens of {drawn.n_sequences:,} texts")
