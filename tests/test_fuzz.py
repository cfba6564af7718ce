"""Damaged inputs to every reader; and that whatever they could do wrong would be seen."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import Command, refused

from workbench.bench import fuzz
from workbench.bench.readers import READERS, Reader
from workbench.errors import InputError

FEW = 24
SLOW = ("trace file", "folder of parts", "query")


@pytest.mark.parametrize("name", READERS)
def test_a_reader_reads_or_refuses(name: str):
    n = FEW // 3 if name in SLOW else FEW
    found = fuzz.fuzzed(name, READERS[name], range(n), seed=7)
    assert not found["examples"], found
    assert found.get(fuzz.READ, 0) + found.get(fuzz.REFUSED, 0) == n and found.get(fuzz.REFUSED, 0)


# --- readers that do what they mustn't


def _write(folder: Path) -> list[Path]:
    (folder / "a.txt").write_text("valid")
    return [folder / "a.txt"]


def _damaged(files: list[Path]) -> bool:
    return files[0].read_bytes() != b"valid"


def _raises(files: list[Path]) -> None:
    if _damaged(files):
        raise ZeroDivisionError("so")


def _says_nothing(files: list[Path]) -> None:
    if _damaged(files):
        raise InputError(" ")


def _crashes(files: list[Path]) -> None:
    if _damaged(files):
        os.kill(os.getpid(), signal.SIGSEGV)


def _hangs(files: list[Path]) -> None:
    if _damaged(files):
        time.sleep(60)


def _writes(files: list[Path]) -> None:
    if _damaged(files):
        Path("/tmp/workbench-test-fuzz").write_text("x")


def _starts(files: list[Path]) -> None:
    if _damaged(files):
        subprocess.run([sys.executable, "-V"], check=True, stdout=subprocess.DEVNULL)


def _unpickles(files: list[Path]) -> None:
    if _damaged(files):
        pickle.loads(pickle.dumps(Path()))


@pytest.mark.parametrize(
    "read, result, said",
    [
        (_raises, fuzz.TRACEBACK, "ZeroDivisionError at test_fuzz.py"),
        (_says_nothing, fuzz.TRACEBACK, "a message of ' '"),
        (_crashes, fuzz.CRASHED, "signal 11"),
        (_hangs, fuzz.HUNG, "longer than"),
        (_writes, fuzz.ESCAPED, "wrote /tmp/workbench-test-fuzz"),
        (_starts, fuzz.ESCAPED, "subprocess.Popen"),
        (_unpickles, fuzz.ESCAPED, "pickle.find_class"),
    ],
)
def test_what_a_reader_must_not_do_is_seen(read, result: str, said: str, monkeypatch):
    if result == fuzz.HUNG:
        monkeypatch.setattr(fuzz, "SECONDS", 2.0)
    found = fuzz.fuzzed("planted", Reader(_write, read, 1), range(3))
    Path("/tmp/workbench-test-fuzz").unlink(missing_ok=True)
    bad = found.get(result, 0)
    assert bad and bad + found.get(fuzz.READ, 0) == 3, found  # an edit may leave the input as it was
    assert all(said in one for one in found["examples"].values()), found


def test_a_reader_that_refuses_the_valid_input_is_no_reader():
    with pytest.raises(AssertionError, match="doesn't read a valid input: InputError: no"):
        fuzz.fuzzed("planted", Reader(_write, _refuses, 1), range(3))


def _refuses(_: list[Path]) -> None:
    raise InputError("no")


# --- inputs


def test_an_input_follows_from_its_number():
    data = b'{"a": [1, 2.5, "x"]}' * 20
    made = [fuzz.edited(data, random.Random(f"r:{seed}")) for seed in (1, 1, 2, 3)]
    assert made[0] == made[1] and len(set(made)) == 3


def test_edits_differ_from_the_valid_input():
    data = bytes(range(256))
    made = {fuzz.edited(data, random.Random(seed)) for seed in range(300)}
    assert len(made) > 250 and max(map(len, made)) > 256 > min(map(len, made))


def test_the_command(workbench: Command, tmp_path: Path):
    page = tmp_path / "p.md"
    page.write_text("before\n<!-- bench fuzz -->\nold\n<!-- end fuzz -->\nafter\n")
    done = workbench("bench", "fuzz", "--only", "recipe,corpus txt", "--inputs", 20, "--page", page)
    assert done.code == 0 and '"inputs": 20' in done.out, done.err
    said = page.read_text()
    assert "old" not in said and "| recipe | 17 |" in said and said.endswith("<!-- end fuzz -->\nafter\n")
    refused(workbench("bench", "fuzz", "--only", "nothing"), "--only 'nothing'", "choose from trace file")
    refused(workbench("bench", "fuzz", "--only", "recipe:x"), "expected one name and a number")
    refused(workbench("bench", "fuzz", "--page", tmp_path / "none.md"), "has no lines <!-- bench fuzz -->")
    refused(workbench("bench", "store", "--inputs", 5), "--inputs is about `bench fuzz`")
