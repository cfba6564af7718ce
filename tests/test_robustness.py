"""What happens to a run that is killed, interrupted, or has no room left; and to those who read meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import process
import pytest

from workbench import connection
from workbench.store import Writer
from workbench.tracefile import Trace
from workbench.validate import validate

TABLES = ("runs", "layers", "sequences", "tokens", "vocabulary", "routing", "profiles", "loads", "pairs")
N_TEXTS = 160
COMMIT_TOKEN_LAYERS = 3_000
OPTIONS = ("--record", "ids,weights,entropy,profiles", "--batch-tokens", "512")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, a corpus of about 10 thousand tokens, and the trace of an uninterrupted run: whole.duckdb."""
    path = tmp_path_factory.mktemp("robustness")
    checkpoint.folder(path / "model")
    checkpoint.corpus(path / "texts.jsonl", n=N_TEXTS, longest=140)
    log = path / "whole.log"
    run = process.start(*command(path, path / "whole.duckdb"), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS)
    assert process.finish(run) == 0, log.read_text()
    return path


def command(folder: Path, out: Path, *more: str, options: tuple[str, ...] = OPTIONS) -> list[object]:
    return ["trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", out, *options, *more]


def contents(path: Path) -> dict[str, list[dict]]:
    """Every table, but for what says when the run was."""
    with connection.reading(path) as con:
        return {
            table: con.sql(
                f"SELECT * {'EXCLUDE (started, finished)' if table == 'runs' else ''} FROM {table} ORDER BY ALL"
            )
            .to_arrow_table()
            .to_pylist()
            for table in TABLES
        }


def assert_whole(path: Path, folder: Path) -> None:
    """The same tables as the uninterrupted run has."""
    mine, expected = contents(path), contents(folder / "whole.duckdb")
    for table in TABLES:
        assert mine[table] == expected[table], table
    assert validate(path).empty


def assert_readable(path: Path) -> int:
    """What a broken-off run left is a trace without faults; how many sequences it has."""
    problems = validate(path)
    assert "error" not in set(problems["severity"]), problems.to_string()
    kept = Trace(path)
    for layer in range(kept.n_layers):
        assert len(kept.experts(layer)) == kept.n_tokens
    return kept.n_sequences


# kill -9


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_killed_at_random_moments(seed: int, folder: Path, tmp_path: Path):
    """The same run is killed several times, each time a little later, and then finished."""
    dice = random.Random(seed)
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    kept = [0]
    for _ in range(5):
        run = process.start(*command(folder, out, "--resume"), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS)
        before = out.stat().st_mtime_ns if out.exists() else 0
        while run.is_alive() and (out.stat().st_mtime_ns if out.exists() else 0) == before:
            time.sleep(0.002)  # it has not begun to write
        time.sleep(dice.uniform(0, 0.5))
        run.kill()
        assert process.finish(run) in (-signal.SIGKILL, 0), log.read_text()
        kept.append(assert_readable(out))
        assert kept[-1] >= kept[-2]  # nothing that was committed is ever lost
    run = process.start(*command(folder, out, "--resume"), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS)
    assert process.finish(run) == 0, log.read_text()
    assert len(set(kept)) > 2, kept  # or the kills hit nothing
    assert_whole(out, folder)


def test_killed_inside_a_transaction(folder: Path, tmp_path: Path):
    """The third transaction is either not there at all or whole."""
    kept = {}
    for where in ("between tables", "before commit", "after commit"):
        out, log = tmp_path / f"{where}.duckdb", tmp_path / "log"
        run = process.start(*command(folder, out), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS, dies=where)
        assert process.finish(run) == -signal.SIGKILL, log.read_text()
        kept[where] = assert_readable(out)
        assert Trace(out).runs()["status"].tolist() == ["running"]
        run = process.start(*command(folder, out, "--resume"), log=log)
        assert process.finish(run) == 0, log.read_text()
        assert_whole(out, folder)
    assert 0 < kept["between tables"] == kept["before commit"] < kept["after commit"] < N_TEXTS


@pytest.mark.parametrize("group", [pytest.param("seq", marks=pytest.mark.slow), "lang,domain"])
def test_a_run_that_counts_killed_inside_a_transaction(group: str, folder: Path, tmp_path: Path):
    """Totals are replaced in each transaction: it is either not there at all or whole, like rows."""
    options = ("--counts-by", group, "--batch-tokens", "512")
    whole, log = tmp_path / "whole.duckdb", tmp_path / "log"
    assert process.finish(process.start(*command(folder, whole, options=options), log=log)) == 0, log.read_text()
    expected, kept = contents(whole), {}
    assert expected["pairs"] and not expected["routing"]
    for where in ("between tables", "before commit", "after commit"):
        out = tmp_path / f"{where}.duckdb"
        run = process.start(*command(folder, out, options=options), log=log, commit_token_layers=1, dies=where)
        assert process.finish(run) == -signal.SIGKILL, log.read_text()
        problems = validate(out)
        assert problems["check"].tolist() == ["finished"], problems.to_string()
        kept[where] = Trace(out).n_sequences
        run = process.start(*command(folder, out, "--resume", options=options), log=log)
        assert process.finish(run) == 0, log.read_text()
        assert contents(out) == expected
        assert validate(out).empty
    assert 0 < kept["between tables"] == kept["before commit"] < kept["after commit"] < N_TEXTS


def test_killed_while_overwriting(folder: Path, tmp_path: Path):
    """The trace that was to be replaced is kept beside the new one until that has finished."""
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    out.write_bytes((folder / "whole.duckdb").read_bytes())
    run = process.start(
        *command(folder, out, "--overwrite"), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS, dies="before commit"
    )
    assert process.finish(run) == -signal.SIGKILL, log.read_text()
    assert_whole(tmp_path / ".t.duckdb.before", folder)
    assert_readable(out)
    assert process.finish(process.start(*command(folder, out, "--resume"), log=log)) == 0, log.read_text()
    assert_whole(out, folder)
    assert sorted(one.name for one in tmp_path.iterdir() if "lock" not in one.name) == ["log", "t.duckdb"]


def test_killed_as_a_real_command(folder: Path, tmp_path: Path):
    """`python -m workbench`, nothing lowered or replaced; the second command is interrupted, the third finishes."""
    out = tmp_path / "t.duckdb"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.Popen:
        arguments = [sys.executable, "-m", "workbench", *map(str, command(folder, out, *more))]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    with start() as run:
        while not out.exists() and run.poll() is None:
            time.sleep(0.005)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert assert_readable(out) < N_TEXTS
    with start("--resume") as run:
        _, errors = run.communicate()
    assert run.returncode == 0, errors
    assert_whole(out, folder)


# Ctrl-C


def test_interrupted(folder: Path, tmp_path: Path):
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    run = process.start(*command(folder, out), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS)
    process.wait_for(out, run)
    time.sleep(0.2)
    assert run.pid is not None
    os.kill(run.pid, signal.SIGINT)
    assert process.finish(run) == 130, log.read_text()
    said = log.read_text()
    assert f"interrupted: what {out} holds is whole; the same command with --resume finishes it" in said
    assert "Traceback" not in said
    assert assert_readable(out) < N_TEXTS
    assert Trace(out).runs()["status"].tolist() == ["interrupted"]
    assert process.finish(process.start(*command(folder, out, "--resume"), log=log)) == 0, log.read_text()
    assert_whole(out, folder)


# No room


def test_disk_full(folder: Path, tmp_path: Path):
    """The system refuses a file of half the size; with more room the run goes on."""
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    limit = (folder / "whole.duckdb").stat().st_size // 2
    run = process.start(*command(folder, out), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS, file_bytes=limit)
    assert process.finish(run) == 1, log.read_text()
    said = log.read_text()
    assert f"error: writing {out} failed: the disk is full" in said and "--resume continues from there" in said
    assert "Traceback" not in said
    kept = assert_readable(out)
    assert 0 < kept < N_TEXTS and f"{kept:,} whole sequences" in said
    assert process.finish(process.start(*command(folder, out, "--resume"), log=log)) == 0, log.read_text()
    assert_whole(out, folder)


@pytest.fixture
def small_disk(folder: Path, tmp_path: Path):
    """A file system with room for half the trace; skips where none can be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (folder / "whole.duckdb").stat().st_size // 2
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no small file system can be made here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_file_system(folder: Path, small_disk: Path, tmp_path: Path):
    out, log = small_disk / "t.duckdb", tmp_path / "log"
    run = process.start(*command(folder, out), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS)
    assert process.finish(run) == 1, log.read_text()
    assert "the disk is full" in log.read_text() and "Traceback" not in log.read_text()
    kept = assert_readable(out)
    assert 0 < kept < N_TEXTS
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert process.finish(process.start(*command(folder, out, "--resume"), log=log)) == 0, log.read_text()
    assert_whole(out, folder)


def test_no_room_at_all(folder: Path, tmp_path: Path):
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    run = process.start(*command(folder, out), log=log, file_bytes=100_000)
    assert process.finish(run) == 1, log.read_text()
    assert "Traceback" not in log.read_text() and not out.exists()


# Others at the same file


def test_readers_never_see_half_a_transaction(folder: Path, tmp_path: Path):
    """While a run grows, each look at it finds whole sequences in every table, and never fewer than before."""
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    run = process.start(*command(folder, out), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS, pause=0.3)
    process.wait_for(out, run)
    seen = []
    while run.is_alive():
        found = Trace(out)
        counts = found.sql(
            "SELECT (SELECT count(*) FROM sequences) AS sequences, (SELECT count(*) FROM tokens) AS tokens, "
            "(SELECT coalesce(sum(n_tokens), 0) FROM sequences) AS stated, (SELECT count(*) FROM routing) AS routing, "
            "(SELECT count(*) FROM profiles) AS profiles, (SELECT count(*) FROM layers) AS layers"
        ).iloc[0]
        assert counts["tokens"] == counts["stated"]
        assert counts["routing"] == counts["tokens"] * counts["layers"]
        assert counts["profiles"] == counts["sequences"] * counts["layers"]
        assert counts["sequences"] >= found.n_sequences >= (seen[-1] if seen else 0)
        assert len(found.experts(2)) == len(found.weights(1)) == found.n_tokens  # as it stood when it was opened
        seen.append(int(counts["sequences"]))
    assert process.finish(run) == 0, log.read_text()
    assert len(set(seen)) > 3, seen
    assert_whole(out, folder)


def test_a_second_writer_is_refused(folder: Path, tmp_path: Path):
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    layers = [{"name": "router", "n_experts": 8, "top_k": 2}]
    with Writer(out, {"run": "first"}, layers):
        for number, mode in enumerate(("--resume", "--append", "--overwrite"), 1):
            second = process.start(*command(folder, out, mode, "--max-tokens", "100"), log=log)
            assert process.finish(second) == 2, log.read_text()
            assert log.read_text().count(f"error: {out} is being written by another process.") == number
    assert Trace(out).runs()[["run", "status"]].values.tolist() == [["first", "finished"]]
    assert process.finish(process.start(*command(folder, out, "--append"), log=log)) == 0, log.read_text()
    assert Trace(out).runs()["run"].tolist() == ["first", "model.texts"]


def test_a_reader_that_holds_the_file_delays_the_writer(folder: Path, tmp_path: Path):
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    run = process.start(*command(folder, out), log=log, commit_token_layers=COMMIT_TOKEN_LAYERS)
    process.wait_for(out, run)
    with connection.reading(out):
        time.sleep(1)
    assert process.finish(run) == 0, log.read_text()
    assert_whole(out, folder)


# Memory


@pytest.mark.slow
def test_memory_stays_flat():
    """The peak after a million tokens is within 10% of that after a hundred thousand."""
    from workbench.bench.trace import memory

    measured = memory(100_000, 1_000_000)
    assert measured["ratio"] <= 1.1, json.dumps(measured)
