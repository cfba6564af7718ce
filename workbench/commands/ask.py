"""Asking a trace: `info`, `validate`, `analyze`, `report`, `export`, `query`."""

import inspect
import json
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import File, Json, Layout, Overwrite, Run, check_layout, check_output, pair
from workbench.errors import InputError
from workbench.printing import listing, print_table, show
from workbench.recipe import described, from_json


class ExportFormat(Enum):
    table = "table"
    hf = "hf"
    ktransformers = "ktransformers"


def info(file: File, as_json: Json = False) -> None:
    """What a trace holds: runs, layers, texts, sizes."""
    from workbench.tracefile import info as describe

    facts = describe(file)
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return
    for run in facts["runs"]:
        with suppress(InputError):  # another tool's, or none
            run["recipe"] = "; ".join(described(one) for one in from_json(run["recipe"]).interventions)
    print(listing(facts))


def validate(file: File, run: Run = None, as_json: Json = False) -> None:
    """Check every invariant of a trace and name the rows that break one (exit code 1 if any does)."""
    from workbench.validate import validate as check

    problems = check(file, run)
    if as_json:
        show(problems, as_json)
    elif problems.empty:
        print(f"{file}: no problems")
    else:
        print_table(problems)
    if "error" in set(problems["severity"]):
        raise typer.Exit(1)


def analyze(
    metric: Annotated[
        str | None, typer.Argument(metavar="METRIC", help="Which analysis; without one, the list of them.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="A trace, or the name of a model for an analysis of the model itself; without it, the definition of "
            "the metric and its options.",
        ),
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Group by this column: lang, domain, source, … or any metadata.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="A further argument of the analysis, as in `reference=de`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table: .csv, .parquet or .tex.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the figure: .html, .svg, .png or .pdf.")] = None,
    layout: Layout = "screen",
    run: Run = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Ask one question of a trace: a table, a figure, or both."""
    from workbench import analysis
    from workbench.export import save_table
    from workbench.figures import FORMATS, save
    from workbench.tracefile import Trace

    if metric is None:
        print("\n".join(f"{name:<20} {analysis.question(name)}" for name in analysis.NAMES))
        return
    ask, draw = analysis.find(metric)
    if file is None:
        options = list(inspect.signature(ask).parameters.values())[1:]
        said = "\n".join(f"    {option}" for option in options)
        print((analysis.file(metric).__doc__ or "").strip(), inspect.getdoc(ask), f"Options:\n{said}", sep="\n\n")
        return
    check_output(out, (".csv", ".parquet", ".tex"), overwrite)  # before the analysis takes its time
    check_output(figure, FORMATS, overwrite)
    check_layout(layout, figure)
    arguments = dict(pair(text, "--set", "reference=de") for text in option or [])
    if by is not None:
        arguments["by"] = by
    options = analysis.arguments(ask, arguments)
    if analysis.subject(ask) == "model":
        from workbench.models import load

        if run is not None:
            raise InputError(f"--run {run!r}: {metric} looks at a model, {file!r}, and takes no run of a trace.")
        table = ask(load(file), **options)
    else:
        table = ask(Trace(file, run), **options)
    if out is not None:
        save_table(table, out, overwrite=overwrite)
    if figure is not None:
        save(draw(table), figure, layout=layout, overwrite=overwrite)
    if as_json or (out is None and figure is None):
        show(table, as_json)


def report(
    file: File,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    run: Run = None,
    overwrite: Overwrite = False,
) -> None:
    """One self-contained HTML file that opens offline: summary, figures, and how each number is defined."""
    from workbench.report import report as write
    from workbench.tracefile import Trace

    write(Trace(file, run), out, overwrite=overwrite)
    print(f"{out}: open it in a browser")


def export(
    file: File,
    out: Annotated[Path, typer.Option(help="What to write: .csv or .parquet; a folder for hf; .pt for ktransformers.")],
    table: Annotated[
        str | None, typer.Option(help="A table of the file, or the view `selections`: one row a selected expert.")
    ] = None,
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="table: one table of the file; hf: a folder that the library datasets loads, a row a text; "
            "ktransformers: how often each expert was chosen, for --init-expert-location.",
        ),
    ] = ExportFormat.table,
    run: Annotated[
        str | None, typer.Option(help="This run only. [default: for a table all runs, else the last that finished]")
    ] = None,
    unnest: Annotated[bool, typer.Option("--unnest", help="`routing` as one row a selected expert.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write one table of a trace as CSV or Parquet, or what another tool reads."""
    if (form is ExportFormat.table) != (table is not None):
        raise InputError("give --table, or another --format than table: one of them.")
    if unnest and table is None:
        raise InputError("--unnest is about --table routing.")
    if form is ExportFormat.hf:
        from workbench.dataset_folder import export_dataset

        print(f"{out}: {export_dataset(file, out, run=run, overwrite=overwrite):,} texts; `load_dataset` reads it")
        return
    if form is ExportFormat.ktransformers:
        from workbench.activation_counts import export_counts

        shape = export_counts(file, out, run=run, overwrite=overwrite)
        print(f"{out}: counts of {shape[1]} layers of {shape[2]} experts")
        return
    from workbench.export import export as write

    assert table is not None
    rows = write(file, table, out, run=run, unnest=unnest, overwrite=overwrite)
    print(f"{out}: {rows:,} rows")


def query(
    file: File,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help='Such as "select lang, sum(n_tokens) from sequences group by 1".')
    ],
    as_json: Json = False,
) -> None:
    """Run SQL over a trace, read-only."""
    from workbench.tracefile import Trace

    show(Trace(file).sql(sql), as_json)
