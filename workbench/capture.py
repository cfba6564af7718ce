"""Run a model over corpora and record its routing: model + corpus -> Trace.

The forward pass runs on the main thread, the file is written on another. Batches are planned from the lengths of the
sequences alone and a batch is committed whole, so a resumed run repeats exactly the batches that are missing.
"""

import platform
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Several
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from workbench import corpus as corpora
from workbench.errors import InputError
from workbench.forward import predicts_next, reads_twice, run_batch, run_pass
from workbench.fused_experts import Experts, which
from workbench.intervening import Given, about_generation, effective_top_k
from workbench.job import Job, n_tokens, observed, observing, progress_bar, token_ids, untold
from workbench.models import Model, load
from workbench.recipe import Recipe, as_recipe, described, to_json
from workbench.recorder import Recorder
from workbench.schema import COUNTS, RECORDABLE
from workbench.store import Writer, check_target
from workbench.tally import Tally, Texts
from workbench.tokenization import LongTexts, Sequence, batches, sequences, survey, token_texts, unchanged
from workbench.tracefile import Trace


def trace(
    model: Model | str,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    out: str | Path,
    *,
    record: Iterable[str] | None = None,
    counts_by: str | Iterable[str] | None = None,
    run: str | None = None,
    mode: str = "new",
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "refuse",
    batch_tokens: int = 4096,
    generate: int = 0,
    recipe: Given | None = None,
    experts: Experts = "auto",
    progress: bool | Callable[[int, int], None] = True,
) -> Trace:
    """Record the routing of every token of `corpus` under `model` into the file `out`.

    model         what `workbench.load` returns, or a name for it
    corpus        bundled names, paths or `workbench.corpus.read(…)` results; several are traced one after the other
    record        any of `workbench.schema.RECORDABLE`; ids are always recorded, profiles are each sequence's mean
                  router probabilities; shift and lookahead can't be recorded of every family. None: ids and weights
    counts_by     instead of a row a token, keep how often experts were chosen, and together (`workbench.counts`): of
                  all texts that agree in these columns of the corpus; or of each text by itself, "seq"
    run           name of the run inside the file; by default the model's and the corpora's, and the recipe's file's
    mode          "new" (refuse an existing file), "overwrite", "append" (one more run) or "resume" (finish a run)
    max_tokens    stop after the sequence that reaches this many tokens
    max_length    longest sequence in tokens; by default what the model allows
    long_texts    "refuse", "split" into consecutive sequences, or "cut" what exceeds max_length
    batch_tokens  padded tokens a forward pass, at most (a longer single sequence still gets a batch of its own)
    generate      greedy tokens to generate after each sequence, routed and recorded as phase "generated"
    recipe        interventions in force, whatever `workbench.intervene` takes; the run's column `recipe` has them
    experts       "model": the checkpoint's own code, bit for bit; "fused": the workbench's; "auto": whichever is known
                  to be faster; see `workbench.fused_experts`. The run's column `corpus` says which it was
    progress      whether to draw bars; or what is called before the first batch and after each with the tokens done and
                  their number in all: what it raises ends the run, like a KeyboardInterrupt, and comes out of here

    Raises InputError before anything is written if the request can't be met, RunError if the run breaks off; whole
    sequences committed until then stay in the file and `mode="resume"` continues. So does an intervention that touched
    no token of a run; of the rest of a resumed run nothing is asked.
    """
    check_target(out, mode)  # before anything slow
    job = prepare(
        model,
        corpus,
        record=record,
        counts_by=counts_by,
        run=run,
        max_tokens=max_tokens,
        max_length=max_length,
        long_texts=long_texts,
        batch_tokens=batch_tokens,
        generate=generate,
        recipe=recipe,
        experts=experts,
        bars=progress is True,
    )
    told = progress if callable(progress) else untold
    run = job.header["run"]
    with Writer(out, job.header, job.layers, mode=mode) as writer, progress_bar(job, progress is True) as bar:
        done = writer.finished_sequences
        if job.tally is not None and done:
            job.tally.restore(Trace(out, run))
        with (
            observing(job.model, job.record, job.recipe, job.experts, idle=bool(done)) as (recorder, _),
            ExitStack() as ending,
        ):
            if job.tally is None:
                process = _recorded(job.model, recorder, writer, generate, "predictions" in job.record)
            else:
                process = ending.enter_context(_counted(job.model, recorder, writer, generate, job.tally))
            n_done = 0
            told(n_done, job.n_tokens)
            for batch in batches(job.texts(), batch_tokens):
                if not done.issuperset(sequence.seq for sequence in batch):
                    process(batch)
                size = n_tokens(batch, generate)
                bar.update(size)
                n_done += size
                told(n_done, job.n_tokens)
    return Trace(out, run=run)


def prepare(
    model: Model | str,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    *,
    record: Iterable[str] | None = None,
    counts_by: str | Iterable[str] | None = None,
    run: str | None = None,
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "refuse",
    batch_tokens: int = 4096,
    generate: int = 0,
    recipe: Given | None = None,
    experts: Experts = "auto",
    engine: str = "hf",
    device: str | None = None,
    bars: bool = False,
) -> Job:
    """Check everything and read the corpus once; arguments and errors as `trace` has them.

    device  where the model will run, if that isn't where it is now
    """
    edited = None if recipe is None else as_recipe(recipe)
    late = None if edited is None or generate else about_generation(edited.interventions)
    if late is not None:
        raise InputError(f"{described(late)} is about generated tokens only: trace with --generate")
    group = _group(counts_by)
    if group is not None and record is not None:
        raise InputError("counts stand instead of a row a token: give counts_by or record, not both")
    record = _recordable(("ids", "weights") if record is None else record) if group is None else [COUNTS]
    sources = _read(corpus)
    model = model if isinstance(model, Model) else load(model)
    _check(model, max_tokens, batch_tokens, generate)
    if "predictions" in record and (reads_twice(model) or not predicts_next(model)):
        raise InputError(f"{model.family} doesn't predict the next token of a text: trace it without predictions")
    top_k = None if edited is None else effective_top_k(model, edited)
    Recorder(model, observed(record))  # refuses what the family doesn't have
    implementation = which(model, experts, device)
    limit = _max_length(model, max_length, generate)

    def texts() -> Iterator[Sequence]:
        return _texts(model, sources, limit, long_texts, max_tokens, generation_prompt=generate > 0)

    known = Texts(group or ())
    found = known.note(texts()) if record == [COUNTS] else texts()
    plan = survey(tqdm(found, desc="reading", unit=" texts", disable=None if bars else True, leave=False))
    rows = layer_rows(model, top_k)
    tally = Tally(rows, model.device, known) if record == [COUNTS] else None
    names = [source.name for source in sources]
    run = run or ".".join([Path(model.name).name, "+".join(Path(name).name for name in names), *_steered(recipe)])
    request = {
        "names": names,
        "fingerprint": plan.fingerprint,
        "sequences": plan.n_sequences,
        "tokens": plan.n_tokens,
        "max_length": limit,
        "long_texts": long_texts,
        "batch_tokens": batch_tokens,
        "generate": generate,
        "experts": implementation,
    }
    if tally is not None:
        request |= {"blocks": tally.n_blocks, "group": known.group}
    return Job(
        model=model,
        header=header(model, run, record, request, edited, engine),
        layers=rows,
        record=record,
        recipe=edited,
        experts=implementation,
        texts=lambda: unchanged(texts(), plan, ", ".join(names)),
        n_tokens=plan.n_tokens + generate * plan.n_sequences,
        longest=plan.longest,
        tally=tally,
    )


def _recorded(
    model: Model, recorder: Recorder, writer: Writer, generate: int, predict: bool
) -> Callable[[list[Sequence]], None]:
    """What writes a row a token of a batch."""
    named: set[int] = set()

    def process(batch: list[Sequence]) -> None:
        block = run_batch(model, recorder, batch, generate, predict=predict)
        new = token_ids(block) - named
        writer.add_vocabulary(token_texts(model.tokenizer, sorted(new)))
        writer.append(block)
        named.update(new)

    return process


@contextmanager
def _counted(
    model: Model, recorder: Recorder, writer: Writer, generate: int, tally: Tally
) -> Iterator[Callable[[list[Sequence]], None]]:
    """What counts a batch. All that was counted whole is written at the end, also where the run breaks off."""

    def process(batch: list[Sequence]) -> None:
        tally.add(run_pass(model, recorder, batch, generate, losses=False))
        if tally.due:
            write()

    def write() -> None:
        found = tally.take() if tally.whole else None
        if found is not None:
            writer.append(found)

    try:
        yield process
    finally:
        write()


def read_texts(
    model: Model,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    *,
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "refuse",
) -> list[Sequence]:
    """The texts of a corpus as a model reads them, all of them in memory; arguments and errors as `trace` has them."""
    sources = _read(corpus)
    _check(model, max_tokens, batch_tokens=1, generate=0)
    return list(_texts(model, sources, _max_length(model, max_length, 0), long_texts, max_tokens))


def _texts(
    model: Model,
    sources: list[corpora.Corpus],
    max_length: int,
    long_texts: LongTexts,
    max_tokens: int | None,
    generation_prompt: bool = False,
) -> Iterator[Sequence]:
    found = sequences(
        sources, model.tokenizer, max_length=max_length, long_texts=long_texts, generation_prompt=generation_prompt
    )
    found = embeddable(found, model)
    return found if max_tokens is None else _until(found, max_tokens)


def _steered(recipe: Given | None) -> list[str]:
    """What tells an intervened run's name apart from that of the same run without."""
    return [] if recipe is None else [Path(recipe).stem if isinstance(recipe, str | Path) else "steered"]


def header(
    model: Model, run: str, record: list[str], request: dict, recipe: Recipe | None = None, engine: str = "hf"
) -> dict:
    """What the table `runs` says of a run; `request` is the column `corpus`."""
    return {
        "run": run,
        "model": model.name,
        "revision": model.revision,
        "family": model.family,
        "engine": engine,
        "dtype": model.dtype,
        "recipe": None if recipe is None else to_json(recipe),
        "recorded": record,
        "corpus": request,
        "versions": _versions(),
    }


def layer_rows(model: Model, top_k: list[int] | None = None) -> list[dict]:
    """The table `layers`: one row a router, in the order of execution. top_k: of each, where it isn't the model's."""
    names = ("name", "n_experts", "top_k", "n_shared", "gating", "stack")
    rows = [{"layer": layer.index} | {name: getattr(layer, name) for name in names} for layer in model.layers]
    return [row | {"top_k": k} for row, k in zip(rows, top_k or [row["top_k"] for row in rows], strict=True)]


def _recordable(record: Iterable[str]) -> list[str]:
    asked = {record} if isinstance(record, str) else set(record)
    if COUNTS in asked:
        raise InputError(f"can't record {COUNTS} beside tokens: count with --counts-by (counts_by), of texts or groups")
    if unknown := asked - set(RECORDABLE):
        raise InputError(f"can't record {', '.join(sorted(unknown))}: choose from {', '.join(RECORDABLE)}")
    return [name for name in RECORDABLE if name in asked or name == "ids"]


def _group(counts_by: str | Iterable[str] | None) -> list[str] | None:
    """Columns to count by; none: each text by itself; None: don't count."""
    if counts_by is None:
        return None
    columns = [counts_by] if isinstance(counts_by, str) else list(counts_by)
    if not columns or ("seq" in columns and len(columns) > 1):
        raise InputError(
            f"counts_by is {','.join(columns)!r}; expected columns of the corpus, as in lang,domain, or just seq for "
            "each text by itself"
        )
    return [] if columns == ["seq"] else columns


def _check(model: Model, max_tokens: int | None, batch_tokens: int, generate: int) -> None:
    if model.tokenizer is None:
        raise InputError(f"model {model.name} has no tokenizer: load it with `workbench.load(…, tokenizer=…)`")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}: give at least 1, or leave it out to trace the whole corpus")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens}: a forward pass needs at least 1 token")
    if generate < 0:
        raise InputError(f"generate is {generate}: give the number of tokens to generate, 0 for none")
    if generate and (reads_twice(model) or not predicts_next(model)):
        raise InputError(f"{model.family} can't continue a text: trace it without --generate")


def _max_length(model: Model, max_length: int | None, generate: int) -> int:
    """Longest sequence that still leaves room to generate."""
    longest = model.max_length
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is {max_length}: a sequence has at least 1 token")
    if longest is None:
        if max_length is None:
            raise InputError(f"model {model.name} states no longest sequence: give --max-length")
        return max_length
    if max_length is not None and max_length + generate > longest:
        raise InputError(
            f"max_length {max_length} and {generate} generated tokens exceed the {longest} positions of {model.name}"
        )
    if generate >= longest:
        raise InputError(f"generate is {generate}: {model.name} has {longest} positions in all")
    return max_length or longest - generate


def _read(corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus]) -> list[corpora.Corpus]:
    several = [corpus] if isinstance(corpus, str | Path | corpora.Corpus) else list(corpus)
    if not several:
        raise InputError("no corpus: name at least one, such as `udhr` or a path")
    return [one if isinstance(one, corpora.Corpus) else corpora.read(one) for one in several]


def embeddable(found: Iterable[Sequence], model: Model) -> Iterator[Sequence]:
    """The same sequences; InputError for a token id that the model has no embedding for."""
    n = model.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for sequence in found:
        if sequence.token_ids.max() >= n:
            raise InputError(
                f"text {sequence.seq} has token id {sequence.token_ids.max()}, but {model.name} knows {n} tokens: "
                "load it with the tokenizer it was trained with"
            )
        yield sequence


def _until(found: Iterable[Sequence], max_tokens: int) -> Iterator[Sequence]:
    """Whole sequences until together they have `max_tokens` tokens."""
    total = 0
    for sequence in found:
        if total >= max_tokens:
            return
        total += len(sequence.token_ids)
        yield sequence


def _versions() -> dict[str, str]:
    packages = ("moe-workbench", "torch", "transformers", "duckdb")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
