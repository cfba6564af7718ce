"""The Ray engine: the same rows as one process, workers that die, runs that are interrupted, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from commandline import Command, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import capture, parts
from workbench.combine import merge
from workbench.errors import InputError, RunError
from workbench.forward import run_batch
from workbench.interventions import Ablate, Replay
from workbench.job import observing
from workbench.models import load
from workbench.run_rows import layer_rows
from workbench.schema import RECORDABLE
from workbench.tokenization import Sequence, batches
from workbench.tracefile import Trace
from workbench.validate import validate

ray = pytest.importorskip("ray")
from workbench.engines import ray as engine  # noqa: E402
from workbench.engines import ray_cluster  # noqa: E402
from workbench.engines.ray_tries import Tries  # noqa: E402
from workbench.engines.ray_worker import OUTCOME, TRIES, Work, Worker, packed, shards, unpacked  # noqa: E402

OPTIONS: dict[str, Any] = {"batch_tokens": 300, "run": "texts", "progress": False}
TABLES = ("layers", "sequences", "tokens", "vocabulary", "routing", "profiles")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, `model`, and `texts.jsonl`, about 2,500 tokens in 48 texts, with metadata."""
    path = tmp_path_factory.mktemp("ray")
    checkpoint.folder(path / "model")
    checkpoint.corpus(path / "texts.jsonl", n=48)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster.cluster("local"):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # as each of two workers on two cores has: sums in another order differ in the last bits


def single(folder: Path, out: Path, **options: Any) -> Trace:
    """The trace that one process makes."""
    return capture.trace(str(folder / "model"), folder / "texts.jsonl", out, **OPTIONS | options)


def spread(folder: Path, out: Path | str, **options: Any) -> Trace:
    given = {"workers": 2} | OPTIONS | options
    return engine.trace(folder / "model", folder / "texts.jsonl", out, **given)


def assert_same(one: Trace, other: Trace) -> None:
    """Every row of every table, but for what says when, and by which engine, a run was made."""
    for table in TABLES:
        found = [each.sql(f"FROM {table} ORDER BY ALL").to_dict("list") for each in (one, other)]
        assert len(found[0]["run"]) == len(found[1]["run"]), table
        np.testing.assert_equal(*found)
    facts = ("run", "model", "revision", "family", "dtype", "recipe", "recorded", "corpus", "status")
    assert one.runs()[[*facts]].astype(str).equals(other.runs()[[*facts]].astype(str))
    assert other.runs()["engine"].tolist() == ["ray"] and validate(other.path).empty


def begun(folder: Path, out: Path, n: int) -> None:
    """A run whose driver died: in a folder, with the parts of its first `n` batches."""
    model = load(str(folder / "model"))
    asked = {"run": "texts", "batch_tokens": 300, "engine": "ray", "device": "cpu"}
    job = capture.prepare(model, folder / "texts.jsonl", **asked)
    header = job.header | {"versions": job.header["versions"] | {"ray": ray.__version__}}
    parts.begin(out, header, job.layers, mode="resume")
    gathered = parts.transaction(out)
    with observing(model, job.record, None, job.experts) as (recorder, _):
        for batch in islice(batches(job.texts(), 300), n):
            gathered.add(run_batch(model, recorder, batch, 0))
    parts.write(out, "00000000", gathered)


def sound(trace: Trace) -> bool:
    """Whether nothing is wrong with an unfinished trace, but that it isn't finished."""
    return not (validate(trace.path)["severity"] == "error").any()


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Worker processes of the cluster that a process started."""
    return [one for one in process.children(recursive=True) if "MapWorker" in " ".join(one.cmdline()[:1])]


def killing(at: int, times: int) -> Callable[[int, int], None]:
    """What, as `progress`, kills a worker with SIGKILL, `times` times, from the call `at` on."""
    calls = 0

    def tell(done: int, total: int) -> None:
        nonlocal calls
        if at <= calls < at + times:
            victim = workers_of(psutil.Process())[0]
            victim.kill()
            victim.wait(10)
        calls += 1

    return tell


# --- runs


def test_two_workers_write_what_one_process_writes(cluster, folder: Path, tmp_path: Path):
    record = RECORDABLE
    told: list[tuple[int, int]] = []
    one = single(folder, tmp_path / "one.duckdb", record=record)
    two = spread(folder, tmp_path / "two.duckdb", record=record, progress=lambda *now: told.append(now))
    assert_same(one, two)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")} == {"one.duckdb", "two.duckdb"}
    assert told[0] == (0, one.n_tokens) and told[-1] == (one.n_tokens, one.n_tokens) and told == sorted(told)
    assert len(told) > 8  # or there was nothing to share out


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost_or_doubled(cluster, folder: Path, tmp_path: Path):
    steered = {"recipe": [Ablate(layer=1, experts=[2])], "generate": 3, "record": ["weights", "profiles"]}
    one = single(folder, tmp_path / "one.duckdb", **steered)
    two = spread(folder, f"{tmp_path}/two/", progress=killing(at=1, times=2), **steered)
    assert two.path.is_dir()
    assert_same(one, two)


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(cluster, folder: Path, tmp_path: Path, workbench: Command):
    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spread(folder, tmp_path / "two.duckdb", progress=interrupt)
    left = Trace(tmp_path / "two.duckdb.parts")
    assert left.runs()["status"].tolist() == ["interrupted"] and 0 < left.n_sequences < 48
    assert not (tmp_path / "two.duckdb").exists() and sound(left)
    with pytest.raises(InputError, match="--resume"):
        spread(folder, tmp_path / "two.duckdb")
    kept = {name: (left.path / "sequences" / name).stat().st_mtime_ns for name in os.listdir(left.path / "sequences")}
    with pytest.raises(InputError, match="batch_tokens"):
        spread(folder, tmp_path / "two.duckdb", mode="resume", batch_tokens=100)

    def still_there(done: int, total: int) -> None:
        assert done >= left.n_tokens
        for name, when in kept.items():
            assert (left.path / "sequences" / name).stat().st_mtime_ns == when

    two = spread(folder, tmp_path / "two.duckdb", mode="resume", workers=1, progress=still_there)
    assert_same(single(folder, tmp_path / "one.duckdb"), two)
    assert not left.path.exists()
    again = spread(folder, tmp_path / "two.duckdb", mode="resume")  # nothing is left to do
    assert again.runs()["status"].tolist() == ["finished"] and again.n_tokens == two.n_tokens


@pytest.mark.slow
def test_what_a_worker_runs_into_ends_the_run_with_its_message(cluster, folder: Path, tmp_path: Path):
    broken = checkpoint.olmoe()
    with torch.no_grad():
        broken.module.model.layers[1].mlp.gate.weight.fill_(float("nan"))  # type: ignore[union-attr]
    broken.module.save_pretrained(folder / "nan")  # type: ignore[operator]
    broken.tokenizer.save_pretrained(folder / "nan")
    with pytest.raises(RunError, match=r"layers\.1\..* text \d+ at position 0"):
        engine.trace(folder / "nan", folder / "texts.jsonl", tmp_path / "nan.duckdb", workers=2, **OPTIONS)
    assert not (tmp_path / "nan.duckdb.parts").exists()  # no text was traced
    with pytest.raises(RunError, match="touched nothing"):
        spread(folder, f"{tmp_path}/idle/", recipe=[Ablate(layer=1, experts=[2], scope="token=300")])


def commanded(folder: Path, out: Path, workers: int) -> list[str]:
    """What the command line of a run is."""
    asked = ["trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", out, "--run", "texts"]
    asked += ["--engine", "ray", "--workers", workers, "--batch-tokens", "300"]
    return [sys.executable, "-m", "workbench", *map(str, asked)]


@contextmanager
def writing(command: list[str], out: Path) -> Iterator[subprocess.Popen]:
    """The process of a run that has written its first part, or has ended."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        patience = time.monotonic() + 240
        while not list(out.with_name(f"{out.name}.parts").glob("sequences/*.parquet")) and driver.poll() is None:
            assert time.monotonic() < patience
            time.sleep(0.05)
        yield driver


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_whole_parts_and_no_process(folder: Path, tmp_path: Path):
    out = tmp_path / "two.duckdb"
    command = commanded(folder, out, workers=2)
    with writing(command, out) as driver:
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert started and {one.name() for one in alive} <= {
        "ray::DashboardAgent",
        "ray::RuntimeEnvAgent",
    }  # they end later
    left = Trace(out.with_name("two.duckdb.parts"))
    assert 0 < left.n_sequences < 48 and sound(left)
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.startswith(f"{out}: ")
    assert_same(single(folder, tmp_path / "one.duckdb"), Trace(out))


@pytest.mark.slow
def test_workers_without_a_place_are_not_waited_for_long(cluster, folder: Path, tmp_path: Path, monkeypatch):
    @ray.remote(num_cpus=os.cpu_count())
    class Greedy:
        def here(self) -> bool:
            return True

    greedy = Greedy.remote()
    assert ray.get(greedy.here.remote())
    monkeypatch.setattr(engine, "START_SECONDS", 3)
    with pytest.raises(RunError, match=r"2 workers with 0\.\d+ CPUs and 0 GPUs each found no place within 3 s"):
        spread(folder, f"{tmp_path}/two/")
    ray.kill(greedy)


@pytest.mark.slow
def test_sigterm_ends_a_run_as_ctrl_c_does(folder: Path, tmp_path: Path):
    out = tmp_path / "two.duckdb"
    with writing(commanded(folder, out, workers=1), out) as driver:
        driver.terminate()
        _, said = driver.communicate()
    assert driver.returncode == 130 and "--resume finishes it" in said and "Traceback" not in said
    assert Trace(out.with_name("two.duckdb.parts")).runs()["status"].tolist() == ["interrupted"]


# --- without workers: what is done before them, and after


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Work]]:
    """`engine.trace` on no cluster, whose workers do only what `do` says; returns what they were given."""
    monkeypatch.setattr(engine, "cluster", lambda address: nullcontext())
    monkeypatch.setattr(engine, "claim_of", lambda workers, gpus: None)

    def drive(do: Callable[[Work], None], *asked: Any, **options: Any) -> Work:
        given: list[Work] = []

        def stand_in(job: object, work: Work, *_: object) -> None:
            given.append(work)
            do(work)

        monkeypatch.setattr(engine, "_run", stand_in)
        engine.trace(*asked, **{"workers": 1} | OPTIONS | options)
        return given[0]

    yield drive


def nothing(work: Work) -> None:
    """What workers do whose parts go elsewhere."""


def test_parts_that_do_not_arrive_are_noticed(driven, folder: Path, tmp_path: Path):
    for out in (f"{tmp_path}/x/", tmp_path / "x.duckdb"):
        with pytest.raises(RunError, match=r"0 of the 48 texts.* a place that all machines see"):
            driven(nothing, folder / "model", folder / "texts.jsonl", out)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []


def test_a_refusal_before_any_row_leaves_nothing_behind(driven, folder: Path, tmp_path: Path):
    def refuse(work: Work) -> None:
        raise InputError("no such device")

    asked = (folder / "model", folder / "texts.jsonl")
    (tmp_path / "f").mkdir()
    for _ in range(2):
        for out in (tmp_path / "x.duckdb", f"{tmp_path}/f/"):
            with pytest.raises(InputError, match="no such device"):
                driven(refuse, *asked, out)
    assert not (tmp_path / "x.duckdb.parts").exists() and (tmp_path / "f").exists()
    begun(folder, tmp_path / "f", n=1)
    with pytest.raises(InputError, match="no such device"):
        driven(refuse, *asked, f"{tmp_path}/f/", mode="resume")
    assert Trace(tmp_path / "f").n_sequences > 0
    with pytest.raises(InputError, match="no such device"):
        driven(refuse, *asked, f"{tmp_path}/f/", mode="append", run="other")
    assert Trace(tmp_path / "f", "texts").n_sequences > 0


def test_a_relative_path_means_the_same_to_every_worker(driven, folder: Path, tmp_path: Path, monkeypatch):
    single(folder, tmp_path / "one.duckdb", record=["weights"])
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(folder / "model")
    (tmp_path / "demo").mkdir()

    def stop(work: Work) -> None:
        assert work.model == str(tmp_path / "model") and work.folder == str(tmp_path / "x.duckdb.parts")
        assert work.recipe is not None and work.recipe.interventions == (Replay(trace=str(tmp_path / "one.duckdb")),)
        raise InputError("enough")

    with pytest.raises(InputError, match="enough"):
        driven(stop, "model", folder / "texts.jsonl", "x.duckdb", recipe=[Replay(trace="one.duckdb")])
    assert engine._from_anywhere("demo") == "demo" and engine._from_anywhere("org/name") == "org/name"


# --- a worker, in this process


@pytest.fixture
def worker(cluster, folder: Path, tmp_path: Path) -> Callable[..., Worker]:
    tries = ray.remote(num_cpus=0)(Tries).remote()

    def make(model: str = "model", record: tuple[str, ...] = ("ids", "weights"), run: str = "texts") -> Worker:
        asked: dict[str, Any] = {"record": record, "run": run, "batch_tokens": 300, "engine": "ray"}
        job = capture.prepare(str(folder / "model"), folder / "texts.jsonl", **asked)
        parts.begin(tmp_path / "parts", job.header, job.layers, mode="resume")
        rows = layer_rows(run, job.layers)
        path = str(folder / model)
        return Worker(Work(str(tmp_path / "parts"), run, rows, job.record, path, {}, None, job.experts, 0), 1, tries)

    return make


def some_shards(folder: Path, size: int = 300) -> list[pa.Table]:
    model = load(str(folder / "model"))
    found = capture.read_texts(model, folder / "texts.jsonl")
    return list(shards(batches(found, 300), set(), size, 0))


def test_a_shard_that_is_tried_again_is_there_once(worker, folder: Path, tmp_path: Path):
    made = worker()
    table = pa.concat_tables(some_shards(folder)[:2])
    for _ in range(2):
        outcome = made(table)
        assert outcome.schema == OUTCOME and outcome["error"].to_pylist() == [None, None]
        parts.finish(tmp_path / "parts", "texts")
        assert Trace(tmp_path / "parts").n_tokens == sum(outcome["tokens"].to_pylist())
        assert validate(tmp_path / "parts").empty


def test_a_run_that_is_added_to_a_folder_leaves_the_others(worker, folder: Path, tmp_path: Path):
    (shard,) = some_shards(folder, size=10**6)
    for run in ("texts", "more"):
        worker(run=run)(shard)
        parts.finish(tmp_path / "parts", run)
    one = single(folder, tmp_path / "one.duckdb")
    for run in ("texts", "more"):
        for table in TABLES:
            query = f"SELECT * EXCLUDE (run) FROM {table} WHERE run = {{}} ORDER BY ALL"
            found = Trace(tmp_path / "parts", run).sql(query.format(f"'{run}'"))
            np.testing.assert_equal(found.to_dict("list"), one.sql(query.format("'texts'")).to_dict("list"))
    assert validate(tmp_path / "parts").empty


def test_a_shard_can_make_several_parts(worker, folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("workbench.engines.ray_worker.COMMIT_BYTES", 1)
    (shard,) = some_shards(folder, size=10**6)
    worker()(shard)
    parts.finish(tmp_path / "parts", "texts")
    numbers = [number for number, _ in unpacked(shard["shard"][0].as_py())]
    assert sorted(p.stem for p in (tmp_path / "parts" / "sequences").iterdir()) == [
        f"{parts.file_of('texts')}-{n:08}" for n in numbers
    ]
    assert_same(single(folder, tmp_path / "one.duckdb"), Trace(tmp_path / "parts"))


def test_what_goes_wrong_in_a_worker_is_told(worker, folder: Path):
    (first, *_) = some_shards(folder)
    (outcome,) = worker(model="nowhere")(first).to_pylist()
    assert outcome["refused"] and "nowhere" in outcome["error"]
    made = worker()
    for _ in range(TRIES):
        assert ray.get(made._tries.begin.remote(0)) <= TRIES + 1  # the worker died
    (outcome,) = made(first).to_pylist()
    assert not outcome["refused"] and f"{TRIES} workers died" in outcome["error"]


# --- shards


@st.composite
def planned(draw) -> list[list[Sequence]]:
    """Batches of short sequences with any text in their metadata."""
    text = st.none() | st.text(max_size=5)
    numbers = iter(range(100))

    def sequence() -> Sequence:
        n = draw(st.integers(1, 5))
        ids = np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n)), np.int32)
        phase = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)), np.uint8)
        metadata = draw(
            st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text(max_size=3), max_size=2)
        )
        return Sequence(next(numbers), ids, phase, draw(text), draw(text), draw(text), draw(text), metadata, "0" * 64)

    return [[sequence() for _ in range(draw(st.integers(1, 3)))] for _ in range(draw(st.integers(0, 8)))]


@settings(max_examples=60, deadline=None)
@given(found=planned(), size=st.integers(1, 30), generate=st.integers(0, 3), data=st.data())
def test_shards_hold_every_batch_that_is_not_done(found, size: int, generate: int, data):
    numbers = [one.seq for batch in found for one in batch]
    done = set(data.draw(st.lists(st.sampled_from(numbers), unique=True))) if numbers else set()
    made = list(shards(iter(found), done, size, generate))
    unpackeds = [unpacked(table["shard"][0].as_py()) for table in made]
    expected = [(n, batch) for n, batch in enumerate(found) if not {one.seq for one in batch} <= done]
    for (n, batch), (number, other) in zip(expected, [one for shard in unpackeds for one in shard], strict=True):
        assert n == number and len(batch) == len(other)
        for one, two in zip(batch, other, strict=True):
            assert np.array_equal(one.token_ids, two.token_ids) and two.token_ids.dtype == np.int32
            assert np.array_equal(one.phase, two.phase) and two.phase.dtype == np.uint8
            names = ("seq", "lang", "domain", "source", "segment_id", "sha256", "metadata")
            assert [getattr(one, name) for name in names] == [getattr(two, name) for name in names]
    tokens = [sum(len(one.token_ids) + generate for _, batch in shard for one in batch) for shard in unpackeds]
    assert tokens == [table["tokens"][0].as_py() for table in made]
    assert all(n >= size for n in tokens[:-1])


def test_half_a_surrogate_pair_becomes_a_question_mark():
    one = Sequence(
        0, np.array([1], np.int32), np.array([1], np.uint8), "\ud800", None, None, None, {"x": "\udfff"}, "0"
    )
    ((_, (two,)),) = unpacked(packed([(0, [one])]))
    assert two.lang == "?" and two.metadata == {"x": "?"}


# --- what is refused


def test_what_can_not_be_is_refused(folder: Path, tmp_path: Path, workbench: Command):
    def ask(*more: object, out: object = tmp_path / "x.duckdb"):
        base = ("trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", out, "--engine", "ray")
        return workbench(*base, *more)

    refused(ask(), "--workers")
    refused(ask("--workers", 0), "workers is 0", "at least 1")
    refused(ask("--workers", 2, "--counts-by", "lang"), "counts", "one process")
    refused(ask("--workers", 2, "--worker-gpus", 0.5), "0.5", "cuda")
    refused(ask("--workers", 2, "--worker-gpus", 0, "--device", "cuda"), "cuda")
    refused(ask("--workers", 2, "--device", "cuda:1"), "cuda:1")
    for gpus in ("1.5", "nan", "inf", "-1"):
        refused(ask("--workers", 2, "--device", "cuda", "--worker-gpus", gpus), "--worker-gpus")
    refused(ask("--workers", 2, "--worker-gpus", "nan"), "--worker-gpus")
    for device in ("bogus", "", "cuda:x"):
        refused(ask("--workers", 2, "--device", device), f"device '{device}' can't be used")
    refused(ask("--workers", 2, "--append"), "workbench merge")
    refused(ask("--workers", 2, out=tmp_path / "no" / "x.duckdb"), "not a folder")
    (tmp_path / "x.duckdb").touch()
    refused(ask("--workers", 2), "--overwrite")
    (tmp_path / "y.duckdb.parts").mkdir()
    (tmp_path / "y.duckdb.parts" / "z").touch()
    refused(ask("--workers", 2, out=tmp_path / "y.duckdb"), "y.duckdb.parts", "--resume")
    refused(workbench("trace", folder / "model", "--workers", 2, "--out", tmp_path / "z.duckdb"), "--engine ray")
    refused(workbench("trace", folder / "model", "--out", f"{tmp_path}/z/"), "--engine ray")
    with pytest.raises(InputError, match="Model"):
        engine.trace(load(str(folder / "model")), folder / "texts.jsonl", tmp_path / "z.duckdb", workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.duckdb", "y.duckdb.parts"]


def test_a_file_with_other_runs_is_not_replaced_by_a_resumed_one(folder: Path, tmp_path: Path):
    out = tmp_path / "x.duckdb"
    single(folder, out, run="other")
    with pytest.raises(InputError, match="it holds 'other': move it elsewhere"):
        spread(folder, out, mode="resume")
    single(folder, out, mode="append")
    begun(folder, tmp_path / "x.duckdb.parts", n=1)
    with pytest.raises(InputError, match="it holds 'other', 'texts': move it elsewhere"):
        spread(folder, out, mode="resume")
    assert Trace(out).runs()["run"].tolist() == ["other", "texts"]


def test_a_file_without_all_texts_is_not_finished_by_resuming_without_its_parts(folder: Path, tmp_path: Path):
    begun(folder, tmp_path / "x.duckdb.parts", n=1)
    parts.finish(tmp_path / "x.duckdb.parts", "texts", "interrupted")
    merge([tmp_path / "x.duckdb.parts"], tmp_path / "x.duckdb")
    shutil.move(tmp_path / "x.duckdb.parts", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"\d+ of the 48 texts.* are gone.*--overwrite"):
        spread(folder, tmp_path / "x.duckdb", mode="resume")
    assert Trace(tmp_path / "x.duckdb").runs()["status"].tolist() == ["interrupted"]


def test_more_gpus_than_there_are_is_refused(cluster):
    with pytest.raises(InputError, match="2 workers with 0.5 GPUs each don't fit a cluster with 0 GPUs"):
        ray_cluster.claim_of(2, 0.5)
    assert ray_cluster.claim_of(3, 0.0).cpus * 3 <= (os.cpu_count() or 1) / 2 + 1e-3


def test_a_cluster_that_does_not_answer(monkeypatch):
    def init(*_: object, **__: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    for name, double in {"is_initialized": lambda: False, "init": init, "shutdown": lambda: None}.items():
        monkeypatch.setattr(ray, name, double)
    with (
        pytest.raises(RunError, match=r"Ray \(10.0.0.1:6379\) can't be used: .*RAY_AUTH_MODE=token"),
        ray_cluster.cluster("10.0.0.1:6379"),
    ):
        pass


def test_ray_does_not_keep_the_handler_of_sigterm(monkeypatch):
    def init(*_: object, **__: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    for name, double in {"is_initialized": lambda: False, "init": init, "shutdown": lambda: None}.items():
        monkeypatch.setattr(ray, name, double)
    before = signal.getsignal(signal.SIGTERM)
    with ray_cluster.cluster("10.0.0.1:6379"):
        now = signal.signal(signal.SIGTERM, before)
    assert now is before


def test_workers_with_gpus_are_asked_for_as_ray_takes_it(cluster, monkeypatch):
    monkeypatch.setattr(engine, "START_SECONDS", 2)
    places: list[Any] = []
    remote = ray.remote

    def noted(*what: Any, **how: Any) -> Any:
        places.append(how.get("scheduling_strategy"))
        return remote(*what, **how)

    monkeypatch.setattr(ray, "remote", noted)
    work = Work("/nowhere", "texts", [], [], "demo", {}, None, "model", 0)
    shard = ray.put(pa.table({"shard": [b""], "tokens": [1]}))
    with pytest.raises(RunError, match="1 workers with 0.5 CPUs and 1 GPUs each found no place within 2 s"):
        next(engine._outcomes([shard], work, engine.Claim(1, 0.5, 1.0, 1)))
    (place,) = [place for place in places if isinstance(place, engine.NodeAffinitySchedulingStrategy)]  # of Tries
    assert place.node_id == ray.get_runtime_context().get_node_id() and not place.soft


def test_why_workers_broke_off_is_told_in_one_line_that_a_terminal_can_take():
    def after(error: Exception, before: Exception) -> Exception:
        error.__cause__ = before
        return error

    silent = engine.SystemException()
    found = engine.RayTaskError("f", "tb", ValueError("\x1b[31mno\x07 room\nat all"), "ray::f", 1, "10.0.0.1")
    assert engine._why(after(found, silent)) == r"ValueError: \x1b[31mno\x07 room"
    assert engine._why(after(silent, found)) == r"ValueError: \x1b[31mno\x07 room"
    assert engine._why(after(engine.RayError("it died."), engine.SystemException())) == "RayError: it died"
    assert engine._why(AssertionError()) == "AssertionError"


def test_without_ray_the_extra_is_named(folder: Path, tmp_path: Path):
    code = (
        "import sys; sys.modules['ray'] = None; from workbench.__main__ import main; "
        f"sys.argv = ['workbench', 'trace', {json.dumps(str(folder / 'model'))}, '--engine', 'ray', '--workers', '1', "
        f"'--out', {json.dumps(str(tmp_path / 'x.duckdb'))}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "moe-workbench[scale]" in done.stderr and "Traceback" not in done.stderr
