"""The `workbench` command: each command parses, calls one function of the library, and prints.

Nothing heavy is imported before a command runs, so that `workbench --help` answers at once.
"""

import inspect
import json
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import InputError
from workbench.printing import listing, print_table, show

app = typer.Typer(
    name="workbench",
    help="Record, query and explain the routing of mixture-of-experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class LongTexts(Enum):
    refuse = "refuse"
    split = "split"
    cut = "cut"


class BadRows(Enum):
    refuse = "refuse"
    skip = "skip"


class Placement(Enum):
    table = "table"
    vllm = "vllm"
    sglang = "sglang"


class Likeness(Enum):
    neurons = "neurons"
    router = "router"


class RouterRow(Enum):
    dominant = "dominant"
    mean = "mean"


class Benchmark(Enum):
    trace = "trace"
    store = "store"
    analysis = "analysis"


File = Annotated[Path, typer.Argument(metavar="FILE", help="A trace: the DuckDB file that `workbench trace` wrote.")]
Run = Annotated[str | None, typer.Option(help="Which run of the file; by default the last one that finished.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")]


@app.command()
def trace(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="A Hub id, a folder, `demo` or `demo-early`.")
    ] = "demo",
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Bundled name, file, folder or Hugging Face data set; may be given several times. [default: demo]"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The DuckDB file to write.")] = Path("trace.duckdb"),
    record: Annotated[
        str,
        typer.Option(
            help="Comma-separated, of: ids weights entropy margin logits norms profiles shift lookahead predictions."
        ),
    ] = "ids,weights",
    run: Annotated[
        str | None, typer.Option(help="Name of the run inside the file. [default: model and corpora]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after the text that reaches this many tokens.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence. [default: what the model allows]")] = None,
    long: Annotated[LongTexts, typer.Option(help="What to do with a text longer than that.")] = LongTexts.refuse,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in one forward pass, at most.")] = 4096,
    generate: Annotated[int, typer.Option(help="Tokens to generate after each text (greedy).")] = 0,
    column: Annotated[
        list[str] | None, typer.Option(help="Map a column, as in `text=content`; may be given several times.")
    ] = None,
    bad_rows: Annotated[BadRows, typer.Option(help="Rows without usable text: refuse the corpus or skip them.")] = (
        BadRows.refuse
    ),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16 or int8.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Finish an interrupted run.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add a run to an existing file.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Record which experts every token of a corpus uses."""
    if resume + append + overwrite > 1:
        raise InputError("--resume, --append and --overwrite exclude each other: give one of them")
    mode = "resume" if resume else "append" if append else "overwrite" if overwrite else "new"
    from workbench.store import check_target

    check_target(out, mode)  # before torch is imported and the model loads
    try:
        from workbench import corpus as corpora
        from workbench.capture import trace as capture
        from workbench.models import load

        columns = dict(_pair(option, "--column", "text=content") for option in column or [])
        sources = [corpora.read(name, columns=columns, bad_rows=bad_rows.value) for name in corpus or ["demo"]]
        loaded = load(model, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        result = capture(
            loaded,
            sources,
            out,
            record=[name.strip() for name in record.split(",") if name.strip()],
            run=run,
            mode=mode,
            max_tokens=max_tokens,
            max_length=max_length,
            long_texts=long.value,
            batch_tokens=batch_tokens,
            generate=generate,
        )
    except KeyboardInterrupt:
        kept = f"what {out} holds is whole; the same command with --resume" if out.exists() else "the same command"
        print(f"interrupted: {kept} finishes it", file=sys.stderr)
        raise typer.Exit(130) from None
    for source in sources:
        if source.skipped.count:
            print(f"{source.name}: {source.skipped.count:,} bad rows skipped; the first: {source.skipped.messages[0]}")
    print(f"{out}: {result.n_tokens:,} tokens of {result.n_sequences:,} texts at {result.n_layers} routers")
    print(f"next:  workbench report {out} --out {out.stem}-report.html")
    print(f"       workbench analyze specialization {out} --by lang")


@app.command()
def info(file: File, as_json: Json = False) -> None:
    """What a trace holds: runs, layers, texts, sizes."""
    from workbench.tracefile import info as describe

    facts = describe(file)
    print(json.dumps(facts, indent=2, default=str) if as_json else listing(facts))


@app.command()
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


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Describe this checkpoint.")] = None,
    as_json: Json = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """The model families that can be traced, with their caveats; or what one checkpoint is made of."""
    if model is None:
        from workbench.families import families

        table = families()
        if as_json:
            show(table, as_json)
        for row in [] if as_json else table.to_dict("records"):
            print(f"{row['family']:<22} {row['gating'] if row['traced'] else 'refused'}")
            if row["note"]:
                print(f"{'':<22} {row['note']}")
        return
    from workbench.models import describe

    facts = describe(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        routers = facts.pop("layers")
        facts = {name: value for name, value in facts.items() if value != ""}
        print(listing({"model": facts.pop("model"), "routers": len(routers), **facts}), end="\n\n")
        for row in routers:
            shared = f" + {row['n_shared']} shared" if row["n_shared"] else ""
            size = f"top-{row['top_k']} of {row['n_experts']}{shared}"
            print(f"{row['layer']:>3}  {row['name']:<40} {size:<24} {row['gating']}  ({row['stack']})")


@app.command()
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
    _check_output(out, (".csv", ".parquet", ".tex"), overwrite)  # before the analysis takes its time
    _check_output(figure, FORMATS, overwrite)
    arguments = dict(_pair(pair, "--set", "reference=de") for pair in option or [])
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
        save(draw(table), figure, overwrite=overwrite)
    if as_json or (out is None and figure is None):
        show(table, as_json)


@app.command()
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


@app.command()
def export(
    file: File,
    table: Annotated[
        str, typer.Option(help="A table of the file, or the view `selections`: one row a selected expert.")
    ],
    out: Annotated[Path, typer.Option(help="The .csv or .parquet file to write.")],
    run: Annotated[str | None, typer.Option(help="Rows of this run only. [default: of all runs]")] = None,
    unnest: Annotated[bool, typer.Option("--unnest", help="`routing` as one row a selected expert.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write one table of a trace as CSV or Parquet."""
    from workbench.export import export as write

    rows = write(file, table, out, run=run, unnest=unnest, overwrite=overwrite)
    print(f"{out}: {rows:,} rows")


@app.command()
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


@app.command()
def place(
    file: File,
    devices: Annotated[int, typer.Option(help="Devices to share the experts of every layer, equally.")],
    out: Annotated[Path, typer.Option(help="The file to write: .json, or .csv and .parquet as a table.")],
    form: Annotated[Placement, typer.Option("--format", help="What reads it.")] = Placement.table,
    balance: Annotated[
        float, typer.Option(help="What a straggler factor of 2 instead of 1 costs, in shares of transitions.")
    ] = 1.0,
    time_limit: Annotated[float, typer.Option(help="Seconds to search, about.")] = 60.0,
    run: Run = None,
    overwrite: Overwrite = False,
) -> None:
    """Place experts on devices so that tokens move little and devices are equally busy."""
    from workbench.analysis.placement import assign
    from workbench.placements import export_placement
    from workbench.tracefile import Trace

    _check_output(out, (".json", ".csv", ".parquet"), overwrite)
    placed = assign(Trace(file, run), devices=devices, balance=balance, time_limit=time_limit)
    export_placement(placed, out, form.value, overwrite=overwrite)
    print(f"{out}: {len(placed):,} experts on {devices} devices")
    print(f"next:  workbench analyze placement {file} --set devices={devices}   # against contiguous and random")


Checkpoint = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, a folder, `demo` or `demo-early`.")]
Scores = Annotated[
    Path, typer.Option(help="Table with layer, expert and a score: `workbench analyze importance FILE --out T.csv`.")
]
Score = Annotated[str, typer.Option(help="Its column that says how important an expert is.")]
Keep = Annotated[int, typer.Option(help="Experts that each layer has afterwards.")]
Folder = Annotated[Path, typer.Option(help="The folder to make, which plain `from_pretrained` loads.")]
Losses = Annotated[
    str | None, typer.Option(help="Also compare losses on this corpus: the original, the result, random choices.")
]
MaxTokens = Annotated[int, typer.Option(help="Tokens of that corpus.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest text of it in tokens; longer ones are cut.")]


@app.command()
def prune(
    model: Checkpoint,
    importance: Scores,
    keep: Keep,
    out: Folder,
    score: Score = "frequency",
    corpus: Losses = None,
    max_tokens: MaxTokens = 20_000,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with only the most important experts of each layer."""
    from workbench.prune import prune as write

    write(model, importance, keep, out, score=score, overwrite=overwrite)
    _compare(model, out, keep, corpus, max_tokens, max_length)


@app.command()
def merge(
    model: Checkpoint,
    importance: Scores,
    keep: Keep,
    out: Folder,
    score: Score = "frequency",
    by: Annotated[Likeness, typer.Option(help="What makes an expert like the one that it joins.")] = Likeness.neurons,
    router: Annotated[RouterRow, typer.Option(help="The router's row of a merged expert.")] = RouterRow.dominant,
    corpus: Losses = None,
    max_tokens: MaxTokens = 20_000,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in which less important experts are merged into the most important ones of their layer."""
    from workbench.merge import merge as write

    write(model, importance, keep, out, score=score, by=by.value, router=router.value, overwrite=overwrite)
    _compare(model, out, keep, corpus, max_tokens, max_length)


def _compare(model: str, out: Path, keep: int, corpus: str | None, max_tokens: int, max_length: int | None) -> None:
    print(f"{out}: {keep} experts a layer")
    if corpus is None:
        return
    from workbench.losses import compare_losses, findings

    losses = compare_losses(model, {out.name: out}, corpus, max_tokens=max_tokens, max_length=max_length)
    show(losses, as_json=False)
    print("", *findings(losses), sep="\n")


@app.command()
def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")],
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run, not how fast.")] = False,
) -> None:
    """Measure speed as ratios in one run, each behind a check that the results are equal."""
    from importlib import import_module

    _check_output(out, (".json",), overwrite=True)
    result = import_module(f"workbench.bench.{what.value}").run(quick=quick)
    line = json.dumps(result)
    if out is not None:
        out.write_text(line + "\n")
    print(line)


def _check_output(path: Path | None, suffixes: Sequence[str], overwrite: bool) -> None:
    if path is None:
        return
    if path.suffix not in suffixes:
        raise InputError(f"{path}: can't tell the format from {path.suffix!r}; expected {', '.join(suffixes)}.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; create it first.")


def _pair(text: str, option: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise InputError(f"{option} {text!r}: expected NAME=VALUE, as in `{option} {example}`")
    return name, value
