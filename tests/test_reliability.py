"""Some trials of `workbench bench reliability`; and that a fault would be seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from commandline import Command, refused

from workbench.bench import aftermath, reliability, soak
from workbench.bench.reliability import RECORDED, Ground, Outcome
from workbench.bench.trials import TROUBLES
from workbench.tracefile import Trace

SEEDS = {name: 1 for name in TROUBLES}
SELDOM = ("disk-full", "readers", "changing-corpus", "cut-short", "overwriting", "clock", "terminate")
"""What is like another trouble, or tested elsewhere, runs with the slow tests."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return reliability.prepare(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SELDOM)) for n in TROUBLES])
def test_a_trial(name: str, ground: Ground, tmp_path: Path):
    outcome = reliability.attempt(ground, tmp_path / "trial", name, SEEDS[name])
    assert outcome.what and outcome.ended and not outcome.wrong, outcome
    assert not (tmp_path / "trial").exists()


# --- faults that are planted


def kept(ground: Ground, tmp_path: Path, reported: str, sql: str = "") -> list[str]:
    """What is said of a trace, after some SQL, whose run reported so many sequences."""
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    shutil.copy(ground.whole[RECORDED], out)
    if sql:
        with duckdb.connect(str(out)) as con:
            con.execute(sql)
    Path(f"{log}.told").write_text(reported)
    outcome = Outcome("")
    aftermath.kept(outcome, out, log)
    return outcome.wrong


def test_what_was_reported_has_to_be_there(ground: Ground, tmp_path: Path):
    n = Trace(ground.whole[RECORDED]).n_sequences
    assert kept(ground, tmp_path, f"3\n{n}\n99") == []  # the last line was cut off
    assert kept(ground, tmp_path, f"3\n{n + 1}\n") == [f"{n + 1} sequences were reported as written, {n} are there"]
    (wrong,) = kept(ground, tmp_path, "", "DELETE FROM routing WHERE seq = 3 AND layer = 1")
    assert wrong.startswith("not whole") and "routing_positions" in wrong


def test_rows_that_differ_are_seen(ground: Ground, tmp_path: Path):
    whole, out = ground.whole[RECORDED], tmp_path / "t.duckdb"
    for table, sql in {
        "tokens": "UPDATE tokens SET nll = nll + 1 WHERE seq = 5 AND pos = 1",
        "vocabulary": "DELETE FROM vocabulary WHERE token_id = (SELECT max(token_id) FROM vocabulary)",
        "runs": "UPDATE runs SET model = 'other'",
    }.items():
        shutil.copy(whole, out)
        assert reliability.differing(out, whole) == []
        with duckdb.connect(str(out)) as con:
            con.execute(sql)
        assert reliability.differing(out, whole) == [table]


def test_messages_have_to_be_clear(tmp_path: Path):
    log, out = tmp_path / "log", tmp_path / "t.duckdb"

    def wrong(said: str) -> list[str]:
        log.write_text(said)
        outcome = Outcome("")
        aftermath.clear(outcome, log, out, ("disk is full", "--resume"))
        return outcome.wrong

    assert wrong(f"error: {out}: the disk is full; --resume goes on") == []
    assert wrong(f"error: {out}: the disk is full") == ["the message lacks ('disk is full', '--resume')"]
    assert wrong("error: the disk is full; --resume") == ["the message doesn't name the file"]
    assert "a traceback" in wrong(f"Traceback (most recent call last): {out} the disk is full --resume")


def test_files_left_behind_are_seen(ground: Ground, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    shutil.copy(ground.whole[RECORDED], out)
    (tmp_path / ".t.duckdb.new").touch()
    outcome = Outcome("")
    aftermath.same(ground, outcome, out, RECORDED)
    assert outcome.wrong == ["left behind: .t.duckdb.new"]


def test_the_table_and_the_command(workbench: Command, tmp_path: Path):
    page = tmp_path / "p.md"
    page.write_text("<!-- bench reliability -->\n<!-- end reliability -->\n")
    done = workbench("bench", "reliability", "--only", "damaged:5", "--page", page)
    assert done.code == 0 and '"trials": 1' in done.out, done.err
    assert "seed 5: 1 trials" in page.read_text() and "| **damaged**: Random bytes" in page.read_text()
    refused(workbench("bench", "reliability", "--only", "fire"), "--only 'fire': choose from kill, ")
    refused(workbench("bench", "reliability", "--only", "kill,nan:1"), "expected one name and a number")
    wrong = {"troubles": {"kill": {"trials": 2, "ended": {"exit 0": 2}, "moments": {},
             "wrong": {"7": {"what": "w", "wrong": ["lost"], "said": ""}}}}}  # fmt: skip
    facts = {"date": "d", "device": "x", "seed": 1, "trials": 2, "minutes": 0}
    assert "| kill:7 lost |" in reliability.table(facts | wrong) and ", 1 went wrong" in reliability.table(
        facts | wrong
    )


# --- the long run


def looks(memory: list[float], cpu: list[float]) -> pd.DataFrame:
    n = len(memory)
    return pd.DataFrame({"tokens": range(1000, 1000 * (n + 1), 1000), "memory": memory, "cpu": cpu, "seconds": cpu})


def test_growing_memory_and_time_are_seen():
    steady, line = [100.0] * 20, [float(i) for i in range(1, 21)]
    assert soak.judged(looks(steady, line)) | {"flat": 1, "linear": 1} == soak.judged(looks(steady, line))
    leak = [100.0 + 10 * i for i in range(20)]
    assert soak.judged(looks(leak, line))["flat"] == pytest.approx(290 / 110, abs=1e-3)
    squares = [i * i / 20 for i in line]
    assert soak.judged(looks(steady, squares))["linear"] == pytest.approx(3)


def test_a_short_soak(workbench: Command, tmp_path: Path):
    done = workbench("bench", "soak", "--tokens", 40_000, "--figure", tmp_path / "f.html")
    assert done.code == 0 and '"tokens": 40000' in done.out, done.err
    assert (tmp_path / "f.html").stat().st_size > 100_000
