"""Recording: `trace`."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.edits import RecipeFile
from workbench.commands.options import Demo, Device, Dtype, Overwrite, Revision, Trust, pair
from workbench.errors import InputError
from workbench.interventions import Replay
from workbench.recipe import read_recipe


class LongTexts(Enum):
    refuse = "refuse"
    split = "split"
    cut = "cut"


class Experts(Enum):
    auto = "auto"
    model = "model"
    fused = "fused"


class BadRows(Enum):
    refuse = "refuse"
    skip = "skip"


def trace(
    model: Demo = "demo",
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
            help="Comma-separated, of: ids weights entropy margin logits norms profiles shift lookahead predictions. "
            "Or just counts, for corpora too large for a row a token."
        ),
    ] = "ids,weights",
    group: Annotated[
        str | None,
        typer.Option(
            help="With --record counts: columns of the corpus, as in lang,domain; texts that agree in all of them are "
            "counted together. [default: each text by itself]"
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of the run inside the file. [default: model and corpora]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after the text that reaches this many tokens.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence. [default: what the model allows]")] = None,
    long: Annotated[LongTexts, typer.Option(help="What to do with a text longer than that.")] = LongTexts.refuse,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in one forward pass, at most.")] = 4096,
    generate: Annotated[int, typer.Option(help="Tokens to generate after each text (greedy).")] = 0,
    recipe: RecipeFile = None,
    replay: Annotated[
        str | None,
        typer.Option(metavar="TRACE[:RUN]", help="Select the experts that this run selected for the same texts."),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Map a column, as in `text=content`; may be given several times.")
    ] = None,
    bad_rows: Annotated[BadRows, typer.Option(help="Rows without usable text: refuse the corpus or skip them.")] = (
        BadRows.refuse
    ),
    revision: Revision = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    experts: Annotated[
        Experts,
        typer.Option(
            help="Code that the experts run: the model's own, bit for bit; fused, which differs in the last bits; or "
            "whichever is known to be faster."
        ),
    ] = Experts.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Finish an interrupted run.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add a run to an existing file.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Record which experts every token of a corpus uses."""
    if resume + append + overwrite > 1:
        raise InputError("--resume, --append and --overwrite exclude each other: give one of them")
    if recipe is not None and replay is not None:
        raise InputError("--recipe and --replay exclude each other: put a Replay into the recipe")
    mode = "resume" if resume else "append" if append else "overwrite" if overwrite else "new"
    from workbench.store import check_target

    check_target(out, mode)  # before torch is imported and the model loads
    if recipe is not None:
        read_recipe(recipe)
    replayed = None if replay is None else _replay(replay)
    try:
        from workbench import corpus as corpora
        from workbench.capture import trace as capture
        from workbench.models import load

        columns = dict(pair(option, "--column", "text=content") for option in column or [])
        sources = [corpora.read(name, columns=columns, bad_rows=bad_rows.value) for name in corpus or ["demo"]]
        loaded = load(model, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        result = capture(
            loaded,
            sources,
            out,
            record=_names(record),
            group=_names(group or ""),
            run=run,
            mode=mode,
            max_tokens=max_tokens,
            max_length=max_length,
            long_texts=long.value,
            batch_tokens=batch_tokens,
            generate=generate,
            recipe=recipe or replayed,
            experts=experts.value,
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


def _names(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _replay(text: str) -> Replay:
    """The Replay that FILE or FILE:RUN means. InputError if there is no such file or run."""
    from workbench.tracefile import Trace

    file, colon, run = text.rpartition(":")
    if not colon or Path(text).exists():
        file, run = text, None
    return Replay(trace=file, run=Trace(file, run).run)
