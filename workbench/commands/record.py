"""Recording: `trace`."""

import signal
import sys
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any

import typer

from workbench.commands.edits import RecipeFile
from workbench.commands.options import Demo, Device, Dtype, Overwrite, Revision, Trust, pair
from workbench.errors import InputError, RunError, interrupted
from workbench.interventions import Replay
from workbench.location import Url, exists, located
from workbench.recipe import read_recipe


class Engine(Enum):
    hf = "hf"
    ray = "ray"
    vllm = "vllm"
    ndif = "ndif"


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
    out: Annotated[
        str,
        typer.Option(help="The DuckDB file to write; with --engine ray also a folder of parts: FOLDER/, or a URL."),
    ] = "trace.duckdb",
    record: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, of: ids weights entropy margin logits norms profiles shift lookahead predictions. "
            "[default: ids,weights]"
        ),
    ] = None,
    counts_by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN[,COLUMN]",
            help="Count choices instead of recording tokens, for corpora too large for a row a token: texts that agree "
            "in these columns together, or, with seq, each text by itself.",
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
    engine: Annotated[
        Engine,
        typer.Option(
            help="What runs the model: transformers in this process (hf), or in many (ray); vLLM, which tells ids "
            "only; or NDIF, far away, for a few texts."
        ),
    ] = Engine.hf,
    workers: Annotated[
        int | None, typer.Option(help="With --engine ray: processes that each hold the model, over all machines.")
    ] = None,
    worker_gpus: Annotated[
        float | None,
        typer.Option(help="With --engine ray: GPUs of each worker, also a fraction. [default: 1 with --device cuda]"),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="With --engine ray: a running cluster. [default: one on this machine, for the run]",
        ),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="With --engine vllm: GPUs that each layer is split over.")] = 1,
    data_parallel: Annotated[
        int, typer.Option(help="With --engine vllm: processes that share out the texts and the experts.")
    ] = 1,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="With --engine vllm: an argument of its engine, as in gpu_memory_utilization=0.8; may be given "
            "several times.",
        ),
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option(
            envvar="WORKBENCH_VLLM_PYTHON",
            help="With --engine vllm: an interpreter whose environment has it. [default: what make vllm-env made]",
        ),
    ] = None,
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
    if engine is Engine.ray:
        if workers is None:
            raise InputError("--engine ray: say how many processes are to hold the model, as in --workers 4")
    else:
        if workers is not None or worker_gpus is not None:
            raise InputError("--workers and --worker-gpus are about --engine ray: add it, or leave them out")
        if out.endswith("/") or isinstance(located(out), Url):
            raise InputError(f"--out {out} is a folder of parts, which --engine ray writes; give a DuckDB file")
        from workbench.store import check_target

        check_target(out, mode)  # before torch is imported and the model loads
    if engine is not Engine.vllm and (tensor_parallel != 1 or data_parallel != 1 or engine_arg):
        raise InputError("--tensor-parallel, --data-parallel and --engine-arg are about --engine vllm: add it")
    if engine in (Engine.vllm, Engine.ndif) and experts is not Experts.auto:
        raise InputError(f"--experts is about transformers, not about --engine {engine.value}: leave it out")
    if recipe is not None:
        read_recipe(recipe)
    replayed = None if replay is None else _replay(replay)
    began = datetime.now(UTC).replace(tzinfo=None)  # as a trace has it
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from workbench import corpus as corpora

        columns = dict(pair(option, "--column", "text=content") for option in column or [])
        sources = [corpora.read(name, columns=columns, bad_rows=bad_rows.value) for name in corpus or ["demo"]]
        loading = {"revision": revision, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        asked: dict[str, Any] = {
            "record": None if record is None else _names(record),
            "counts_by": None if counts_by is None else _names(counts_by),
            "run": run,
            "mode": mode,
            "max_tokens": max_tokens,
            "max_length": max_length,
            "long_texts": long.value,
            "batch_tokens": batch_tokens,
            "generate": generate,
            "recipe": recipe or replayed,
            "experts": experts.value,
        }
        elsewhere = loading | asked  # where the device and the batches are the engine's own business
        for name in ("device", "batch_tokens", "experts"):
            del elsewhere[name]
        if engine is Engine.ray:
            from workbench.engines import ray

            cluster = {"workers": workers, "worker_gpus": worker_gpus, "address": ray_address}
            result = ray.trace(model, sources, out, **cluster, **loading, **asked)
        elif engine is Engine.vllm:
            from workbench.engines import vllm

            given = {"python": vllm_python, "engine_args": vllm.arguments(engine_arg or [])}
            parallel = {"tensor_parallel": tensor_parallel, "data_parallel": data_parallel}
            result = vllm.trace(model, sources, out, **given, **parallel, **elsewhere)
        elif engine is Engine.ndif:
            from workbench.engines import ndif

            result = ndif.trace(model, sources, out, **elsewhere)
        else:
            from workbench.capture import trace as capture
            from workbench.models import load

            result = capture(load(model, **loading), sources, out, **asked)
    except BaseException as error:
        if interrupted(error):
            for which in handlers:  # a second one is not to swallow the message
                signal.signal(which, signal.SIG_IGN)
            again = _again(out, mode, began)
            kept = "" if again is None else f"what {out} holds is whole; "
            print(f"interrupted: {kept}{again or 'the same command'} finishes it", file=sys.stderr)
            raise typer.Exit(130) from None
        again = None if not isinstance(error, RunError) or "--resume" in str(error) else _again(out, mode, began)
        if again is None:
            raise
        kept = f"What {out} holds is whole; {again} goes on from there."
        raise RunError(f"{str(error).rstrip('.')}. {kept}") from error
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
    for source in sources:
        if source.skipped.count:
            print(f"{source.name}: {source.skipped.count:,} bad rows skipped; the first: {source.skipped.messages[0]}")
    print(f"{out}: {result.n_tokens:,} tokens of {result.n_sequences:,} texts at {result.n_layers} routers")
    print(f"next:  workbench report {out} --out {located(out).stem}-report.html")
    labels = result.sql("SELECT count(DISTINCT lang) AS lang, count(DISTINCT domain) AS domain FROM sequences").iloc[0]
    by = next((f"specialization {out} --by {name}" for name in ("lang", "domain") if labels[name] > 1), f"load {out}")
    print(f"       workbench analyze {by}")


def _interrupt(*_: object) -> None:
    """SIGTERM, which schedulers send before they kill, ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def _again(out: str, mode: str, began: datetime) -> str | None:
    """The command that goes on with the run; None if nothing of it has been written since this one began."""
    since = datetime.min if mode == "resume" else began
    if not any(when >= since for name in (out, f"{out}.parts") for when in _starts(name)):
        return None
    instead = {"new": " with --resume", "resume": ""}
    return "the same command" + instead.get(mode, f" with --resume in place of --{mode}")


def _starts(out: str) -> list[datetime]:
    """When the runs of a trace began; none if there is no trace that can be read."""
    if not exists(out):
        return []
    from workbench import connection

    try:
        with connection.reading(out, wait=1) as con:
            return [started for (started,) in con.execute("SELECT started FROM runs").fetchall()]
    except InputError:
        return []


def _names(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _replay(text: str) -> Replay:
    """The Replay that FILE or FILE:RUN means. InputError if there is no such file or run."""
    from workbench.tracefile import Trace

    file, colon, run = text.rpartition(":")
    if not colon or exists(text):
        file, run = text, None
    return Replay(trace=file, run=Trace(file, run).run)
