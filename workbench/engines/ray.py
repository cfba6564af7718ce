"""Trace with many processes, on one machine or many: `--engine ray --workers N`.

The driver reads the corpus and plans the batches that one process would run. Consecutive batches make a *shard*. Ray
Data hands the shards, token ids and metadata, to workers that each hold the model; a worker writes what it records as
parts (docs/parts.md), and only numbers come back. At the end a DuckDB file is loaded from the parts, or the folder of
parts is the trace.

A part is named after its run and its first batch, so a worker that is tried again writes the same parts anew, and
`--resume` runs the batches whose sequences no part has: nothing is lost, nothing is there twice.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as Several
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from tqdm.auto import tqdm

from workbench import bundled, connection, parts, schema
from workbench import corpus as corpora
from workbench.capture import prepare
from workbench.combine import merge
from workbench.errors import InputError, RunError
from workbench.folder import held
from workbench.intervening import check_touched
from workbench.interventions import AnyIntervention, Contrast, Replay
from workbench.job import Job, observing, progress_bar, untold
from workbench.location import Url, located
from workbench.models import load
from workbench.printing import plain
from workbench.recipe import Recipe
from workbench.run_rows import layer_rows
from workbench.store import Writer, check_target
from workbench.tokenization import Sequence, batches
from workbench.tracefile import Trace

try:
    import ray
    import ray.data
    from ray.data.exceptions import SystemException
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as missing:
    raise InputError(f"--engine ray needs Ray ({missing}): pip install 'moe-workbench[scale]'") from missing

from workbench.engines.ray_cluster import Claim, claim_of, cluster, stalled
from workbench.engines.ray_tries import Tries, here
from workbench.engines.ray_worker import Work, Worker, shards

SHARDS = 8
"""Shards a worker, at least, where the corpus is small; so they end at about the same time."""
SHARD_TOKEN_LAYERS = 5_000_000
"""Largest shard: parts of this size are read fastest."""
START_SECONDS = 300.0
"""Within which all workers have to have their place in the cluster. Loading the model isn't counted."""


def trace(
    model: str | Path,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    out: str | os.PathLike,
    *,
    workers: int,
    worker_gpus: float | None = None,
    address: str | None = None,
    mode: str = "new",
    device: str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    batch_tokens: int = 4096,
    generate: int = 0,
    progress: bool | Callable[[int, int], None] = True,
    **asked: Any,
) -> Trace:
    """Record the routing of every token of `corpus` as `workbench.trace` does, row for row, in many processes.

    model        a name that each worker can load: `demo`, a Hub id, or a folder that is there on every machine
    out          a DuckDB file; or a folder of parts: a URL, a name with a slash at its end, or a folder
    workers      processes that each load the model. On a CPU each computes with its share of the cores
    worker_gpus  GPUs of each, also a fraction; by default 1 where `device` is cuda, else 0
    address      of a running Ray cluster; by default RAY_ADDRESS, or processes of this machine for this run alone
    mode, device, dtype, revision, trust_remote_code, and what else is asked: as `workbench.trace` and `load` have them

    For a DuckDB file the parts are in FILE.parts until it is loaded from them. The driver loads the model once on its
    own CPU to see what it is, and lets it go again. Counts need one process, and a DuckDB file takes no second run.

    InputError and RunError as `workbench.trace` has them, also for what goes wrong in a worker; RunError if the workers
    find no place in the cluster, or keep dying. Parts that were written stay, and `mode="resume"` continues.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; expected at least 1.")
    gpus = _gpus(worker_gpus, device)
    if asked.get("counts_by") is not None:
        raise InputError("counts are of one process: leave out --engine ray, or record tokens.")
    if not isinstance(model, str | Path):
        raise InputError(f"model is a {type(model).__name__}; expected a name, since each worker loads its own.")
    folder, file = _targets(out, mode)
    loading = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    loaded = load(model, **loading)
    more = {"batch_tokens": batch_tokens, "generate": generate, "bars": progress is True}
    job = prepare(loaded, corpus, **more, engine="ray", device=device, **asked)
    with observing(loaded, job.record, job.recipe, job.experts, idle=True):
        pass  # what doesn't fit the model is refused here, not in each worker
    header = job.header | {"versions": job.header["versions"] | {"ray": ray.__version__}}
    if mode == "resume" and file is not None and file.exists():
        _check_resumed(file, folder, header)
        if not held(folder):
            with Writer(file, header, job.layers, mode=mode):  # refuses a run that isn't the same; this one has ended
                return Trace(file, header["run"])
    for parameter in loaded.module.parameters():
        parameter.data = torch.empty(0)  # the tokenizer is still needed, the weights aren't
    work = Work(
        folder=str(folder.absolute() if isinstance(folder, Path) else folder),
        run=header["run"],
        layers=layer_rows(header["run"], job.layers),
        record=job.record,
        model=_from_anywhere(model),
        loading=loading | {"device": device},
        recipe=_replaying_from_anywhere(job.recipe),
        experts=job.experts,
        generate=generate,
    )
    with _locked(file or folder), cluster(address):
        claim = claim_of(workers, gpus)
        with _begun(folder, header, job.layers, mode), progress_bar(job, progress is True) as bar:
            told = progress if callable(progress) else untold
            _run(job, work, claim, batches(job.texts(), batch_tokens), bar, told)
            _check_arrived(folder, header)
        if file is not None:
            merge([folder], file, overwrite=mode in ("overwrite", "resume"))
            shutil.rmtree(folder)
    return Trace(file or folder, work.run)


# --- what is asked for


def _gpus(asked: float | None, device: str) -> float:
    try:
        torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} can't be used: {schema.first_line(error)}. Take cpu or cuda.") from error
    kind = device.partition(":")[0]
    gpus = (1.0 if kind == "cuda" else 0.0) if asked is None else asked
    if not math.isfinite(gpus) or gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise InputError(f"--worker-gpus {gpus:g}: expected a whole number, or a fraction of one GPU.")
    if (gpus > 0) != (kind == "cuda"):
        raise InputError(f"--worker-gpus {gpus:g} and --device {device}: GPUs go with cuda, and only with it.")
    if ":" in device:
        raise InputError(f"--device {device}: Ray chooses each worker's GPU; give --device {kind}.")
    return gpus


def _targets(out: str | os.PathLike, mode: str) -> tuple[Path | Url, Path | None]:
    """The folder for the parts, and the file to load from them, if there is to be one."""
    there = located(out)
    if os.fspath(out).endswith("/") or isinstance(there, Url) or there.is_dir():
        return there, None
    if mode == "append":
        raise InputError(
            f"{there}: with --engine ray a run is added to a folder only. Trace into another file and put both into "
            "one with `workbench merge`."
        )
    check_target(there, mode)
    folder = there.with_name(f"{there.name}.parts")
    if mode == "new" and held(folder):
        raise InputError(
            f"{folder} holds parts of a run that hasn't finished: finish it with --resume, or replace it with "
            "--overwrite."
        )
    return folder, there


def _check_resumed(file: Path, folder: Path | Url, header: Mapping[str, Any]) -> None:
    """InputError unless the file holds this run alone, and, where there are no parts to continue with, all of it."""
    with connection.reading(file) as con:
        there = [row["run"] for row in schema.runs(con)]
    run, expected = header["run"], header["corpus"]["sequences"]
    if there != [run]:
        raise InputError(
            f"{file} would be replaced by the run {run!r}, but it holds {', '.join(map(repr, there)) or 'no run'}: "
            "move it elsewhere, or resume with the --run and --out that were given before."
        )
    found = Trace(file, run).n_sequences
    if found < expected and not held(folder):
        raise InputError(
            f"{file} has {found:,} of the {expected:,} texts, and the parts that it was loaded from, {folder}, are "
            "gone, so the run can't be resumed: put them back, or trace anew with --overwrite."
        )


def _from_anywhere(model: str | Path) -> str:
    """The name of a model for a process that may have been started in another folder."""
    path = Path(model).expanduser()
    return str(path.absolute()) if str(model) not in bundled.MODELS and path.is_dir() else str(model)


def _replaying_from_anywhere(recipe: Recipe | None) -> Recipe | None:
    """The recipe for such a process: with the whole path of a trace that it replays."""

    def absolute(edit: AnyIntervention) -> Any:
        if isinstance(edit, Contrast):
            return replace(edit, weak=[absolute(one) for one in edit.weak])
        if not isinstance(edit, Replay) or isinstance(there := located(edit.trace), Url):
            return edit
        return replace(edit, trace=str(there.absolute()))

    return None if recipe is None else replace(recipe, interventions=tuple(map(absolute, recipe.interventions)))


@contextmanager
def _locked(out: Path | Url) -> Iterator[None]:
    """One writer at a time, on this machine."""
    if isinstance(out, Url):
        yield
        return
    lock = filelock.FileLock(out.absolute().parent / f".{out.name}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"{out} is being written by another process. Wait for it to finish, or write to another file."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _begun(folder: Path | Url, header: Mapping[str, Any], layers: list[dict[str, Any]], mode: str) -> Iterator[None]:
    """The run in the folder, which says at the end how it ended.

    A trace that the run made, and that it failed to write a row of, is removed: it would only be in the way.
    """
    made = mode == "overwrite" or not held(folder)
    there = isinstance(folder, Path) and folder.exists()
    parts.begin(folder, header, layers, mode=mode)
    status = "failed"
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        if status == "failed" and made and not _done(folder, header["run"]):
            parts.remove(folder)
            if isinstance(folder, Path) and not there and not held(folder):
                folder.rmdir()
        else:
            parts.finish(folder, header["run"], status)


def _done(folder: Path | Url, run: str) -> set[int]:
    """The run's sequences that parts have."""
    with connection.reading(folder) as con:
        return {seq for (seq,) in con.execute("SELECT seq FROM sequences WHERE run = ?", [run]).fetchall()}


def _check_arrived(folder: Path | Url, header: Mapping[str, Any]) -> None:
    """RunError unless the parts that the workers have written are in the folder, as this process sees it."""
    found, expected = len(_done(folder, header["run"])), header["corpus"]["sequences"]
    if found < expected:
        raise RunError(
            f"{folder} has {found:,} of the {expected:,} texts: the workers' parts aren't where this process looks. "
            "--out has to be a place that all machines see."
        )


def _run(
    job: Job,
    work: Work,
    claim: Claim,
    found: Iterator[list[Sequence]],
    bar: tqdm,
    told: Callable[[int, int], None],
) -> None:
    """Every batch that no part has yet. Raises what a worker ran into."""
    done = _done(located(work.folder), work.run)
    size = min(SHARD_TOKEN_LAYERS // len(work.layers), job.n_tokens // (SHARDS * claim.workers))
    refs, n_done = [], job.n_tokens
    for shard in shards(found, done, max(1, size), work.generate):
        refs.append(ray.put(shard))
        n_done -= shard["tokens"][0].as_py()
    bar.update(n_done)
    told(n_done, job.n_tokens)
    touched = np.zeros(0 if job.recipe is None else len(job.recipe.interventions), np.int64)
    # Closed before anything else is done: then the workers are gone.
    with closing(_outcomes(refs, work, claim)) as outcomes:
        for outcome in outcomes:
            if outcome["error"] is not None:
                raise (InputError if outcome["refused"] else RunError)(outcome["error"])
            touched += np.array(outcome["touched"], np.int64)
            n_done += outcome["tokens"]
            bar.update(outcome["tokens"])
            told(n_done, job.n_tokens)
    if job.recipe is not None and not done:
        check_touched(job.recipe.interventions, touched.tolist())


def _outcomes(refs: list[Any], work: Work, claim: Claim) -> Generator[dict[str, Any], None, None]:
    """What the workers say of each shard, in the order in which they finish."""
    if not refs:
        return
    if not ray.wait([ray.remote(here).remote()], timeout=START_SECONDS)[0]:  # Ray Data asks without a limit
        raise stalled(claim, START_SECONDS)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.wait_for_min_actors_s = int(START_SECONDS)
    context.execution_no_progress_timeout_s = -1  # a shard takes as long as it takes
    context.raise_original_map_exception = True  # else all that is said of it is that there was one
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    with ray.data.DataContext.current(context):
        # Where the driver is: if that machine goes away all is over anyway, and any other may.
        place: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        tries: Any = ray.remote(num_cpus=0, scheduling_strategy=place)(Tries).remote()
        dataset = ray.data.from_arrow_refs(refs).map_batches(
            Worker,
            fn_constructor_args=(work, claim.threads, tries),
            batch_size=1,  # a shard; with GPUs Ray wants a number
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(claim.workers, len(refs)), max_tasks_in_flight_per_actor=1),
            num_cpus=claim.cpus,
            num_gpus=claim.gpus,
        )
    try:
        yield from dataset.iter_rows()
    except GetTimeoutError as error:
        raise stalled(claim, START_SECONDS) from error
    except (RayError, SystemException) as error:
        raise RunError(f"the workers broke off: {_why(error)}. --resume continues with what is missing.") from error
    finally:
        ray.kill(tries)


def _why(error: BaseException) -> str:
    """What Ray's error began with, in one line."""
    while True:
        before = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if before is None or (isinstance(before, SystemException) and before.__cause__ is None):  # it says nothing
            break
        error = before
    said = next(iter(str(error).strip().splitlines()), "").rstrip(".")
    return plain(f"{type(error).__name__}: {said}" if said else type(error).__name__)
