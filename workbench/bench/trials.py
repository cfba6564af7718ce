"""What can happen to a trace: one function a kind of trouble, which makes it happen once and says what came of it.

Each takes the ground (model, texts and uninterrupted traces), an empty folder, and dice that decide when. Their
docstrings are the rows of the table in docs/reliability.md.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from workbench import connection, parts
from workbench.bench import aftermath, damage, reliability, troubled
from workbench.bench.reliability import AFTER, BEFORE, COUNTED, RECORDED, WRITING, Ground, Outcome
from workbench.bench.troubled import Trouble
from workbench.combine import merge
from workbench.tracefile import Trace
from workbench.validate import validate

Trial = Callable[[Ground, Path, random.Random], Outcome]


def kill(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """`kill -9` at a random moment"""
    return _signalled(ground, place, dice, signal.SIGKILL)


def kill_inside(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """`kill -9` inside a random transaction: between two tables, before or after its COMMIT"""
    options = _options(dice)
    where = dice.choice((troubled.BEFORE, troubled.INSIDE, troubled.AFTER))
    number = dice.randint(1, ground.commits[options])
    trouble = Trouble(dies=number, place=where)
    return _broken_off(ground, place, options, trouble, f"transaction {number}, {where}", codes=(-signal.SIGKILL,))


def terminate(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """SIGTERM at a random moment"""
    return _signalled(ground, place, dice, signal.SIGTERM)


def interrupt(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """Ctrl-C at a random moment, in every third trial twice"""
    return _signalled(ground, place, dice, signal.SIGINT, again=dice.random() < 1 / 3)


def out_of_memory(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """The experts of a random batch run out of memory (`torch.OutOfMemoryError` or `MemoryError`)"""
    options = _options(dice)
    error, at = dice.choice(("OutOfMemoryError", "MemoryError")), dice.randint(1, ground.commits[RECORDED])
    return _broken_off(ground, place, options, Trouble(error=error, at=at), f"{error} in pass {at}", says=("memory",))


def little_memory(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """The system gives the process only 1 to 900 MB more than it starts with (`RLIMIT_AS`)"""
    size = int(10 ** dice.uniform(0, 2.95)) << 20
    # Where native code gets no memory, it ends the process as it likes: without a word of ours.
    return _broken_off(
        ground, place, _options(dice), Trouble(memory_bytes=size), f"{size >> 20} MB", codes=(0, 1, 2), native=True,
        says=("memory",),
    )  # fmt: skip


def file_limit(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """The system refuses a file beyond a random size (`RLIMIT_FSIZE`)"""
    options = _options(dice)
    size = dice.randrange(20_000, ground.whole[options].stat().st_size)
    return _broken_off(
        ground, place, options, Trouble(file_bytes=size), f"{size:,} bytes", codes=(0, 1), says=("disk is full",)
    )


def disk_full(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """A file system of a random size fills up (a tmpfs; needs root)"""
    options = _options(dice)
    size = dice.randrange(100_000, ground.whole[options].stat().st_size)
    disk = place / "disk"
    disk.mkdir()
    if not _mounted(disk, f"size={size}"):
        return Outcome("no file system can be made here", "left out")
    try:
        return _broken_off(
            ground, place, options, Trouble(), f"{size:,} bytes", codes=(0, 1), says=("disk is full",), disk=disk
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def nan(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """A router of a random batch gives NaN for one token"""
    options = dice.choice((RECORDED, COUNTED, ("--record", "ids")))
    at = dice.randint(1, ground.commits[RECORDED])
    trouble = Trouble(nan=True, at=at)
    return _broken_off(ground, place, options, trouble, f"pass {at}, {options[1]}", says=("NaN",))


def clock(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """The clock is put back or forward by up to ten years in a random transaction (that of `time.time`, and the one
    that `started` and `finished` are taken from)"""
    options = _options(dice)
    jump = dice.choice((-1, 1)) * 10 ** dice.uniform(0, 8.5)
    trouble = Trouble(jump=jump, at=dice.randint(1, ground.commits[options]))
    return _broken_off(ground, place, options, trouble, f"{jump:+.0f} s in transaction {trouble.at}", codes=(0,))


def overwriting(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """`kill -9` at a random moment of a run with `--overwrite`: the old trace is there until the new one is finished"""
    out, log = place / "t.duckdb", place / "log"
    shutil.copy(ground.whole[RECORDED], out)
    process = troubled.start(ground.command(out, RECORDED, "--overwrite"), log)
    what, moment = _wait(dice, process, log, ground.commits[RECORDED])
    process.kill()
    outcome = Outcome(f"kill -9 {what}", aftermath.how(troubled.ended(process)), moment)
    before = place / ".t.duckdb.before"
    if process.exitcode == 0:
        outcome.moment = AFTER
    else:
        kept = [one for one in (before, out) if one.exists() and not aftermath.differ(one, ground.whole[RECORDED])]
        outcome.expect(bool(kept), "the trace that was to be replaced is lost")
    mode = "--resume" if out.exists() else "--overwrite"
    aftermath.finish(ground, outcome, out, log, RECORDED, mode)
    return outcome


def other_corpus(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """A text is changed, added, removed or moved between a killed run and `--resume`: refused, and nothing changes;
    with the old texts it goes on"""
    texts, out, log = place / "texts.jsonl", place / "t.duckdb", place / "log"
    shutil.copy(ground.texts, texts)
    options = _options(dice)
    process = troubled.start(ground.command(out, options, "--resume", texts=texts), log)
    what, moment = _wait(dice, process, log, ground.commits[options], least=1)
    process.kill()
    outcome = Outcome("", aftermath.how(troubled.ended(process)), moment)
    before = reliability.contents(out)
    change = damage.change(texts, dice)
    outcome.what = f"killed {what}, a text {change}"
    code = troubled.ended(troubled.start(ground.command(out, options, "--resume", texts=texts), log))
    outcome.ended += f", then {aftermath.how(code)}"
    outcome.said = aftermath.last(log)
    outcome.expect(code == 2, f"resuming with another corpus: exit {code}")
    aftermath.clear(outcome, log, out, ("can't be resumed", "corpus"))
    after = reliability.contents(out)
    outcome.expect(all(before[name].equals(after[name]) for name in before), "a refused run changed the file")
    shutil.copy(ground.texts, texts)
    aftermath.finish(ground, outcome, out, log, options, "--resume", texts=texts)
    return outcome


def changing_corpus(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """A text is changed, added, removed or moved while the run reads the corpus: refused, or too late to matter"""
    texts, out, log = place / "texts.jsonl", place / "t.duckdb", place / "log"
    shutil.copy(ground.texts, texts)
    options = _options(dice)
    process = troubled.start(ground.command(out, options, texts=texts), log)
    while not out.exists() and process.is_alive():
        time.sleep(0.001)
    time.sleep(dice.choice((0.0, dice.uniform(0, 0.3))))
    change = damage.change(texts, dice)
    code = troubled.ended(process)
    outcome = Outcome(f"a text {change}", aftermath.how(code), said=aftermath.last(log))
    if code == 0:
        outcome.expect(
            not aftermath.differ(out, ground.whole[options]), "the run says that it read texts which it didn't read"
        )
    else:
        outcome.expect(code in (1, 2), f"exit {code}")  # 2: it met the file while it was being written
        aftermath.clear(outcome, log, None, ("texts",))
        aftermath.kept(outcome, out, log)
        shutil.copy(ground.texts, texts)
        aftermath.finish(ground, outcome, out, log, options, "--resume", texts=texts)
    return outcome


def two_writers(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """Two runs write to one file, begun at most half a second apart: one is refused, or comes when the other is done"""
    out, logs = place / "t.duckdb", (place / "log", place / "other")
    options = _options(dice)
    mode = dice.choice(((), ("--resume",)))
    delay = dice.choice((0.0, dice.uniform(0, 0.5)))
    processes = []
    for log in logs:
        processes.append(troubled.start(ground.command(out, options, *mode), log))
        time.sleep(delay)
    codes = sorted(str(troubled.ended(process)) for process in processes)
    outcome = Outcome(f"{delay:.2f} s apart, {' '.join(mode) or 'new'}", f"exit {codes[0]} and {codes[1]}")
    outcome.expect(codes in (["0", "2"], ["0", "0"]), "not one that writes and one that is refused")
    outcome.expect(codes == ["0", "2"] or bool(mode), "two runs wrote a new file")
    for process, log in zip(processes, logs, strict=True):
        if process.exitcode == 2:
            aftermath.clear(outcome, log, out, ("is being written by another process", "exists"), every=False)
    aftermath.same(ground, outcome, out, options)
    return outcome


def readers(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """Readers open the growing file again and again, some hold it for up to half a second: they see whole sequences,
    and never fewer than before"""
    out, log = place / "t.duckdb", place / "log"
    process = troubled.start(ground.command(out), log, Trouble(pause=0.05))
    outcome, seen = Outcome(""), [0]
    while process.is_alive():
        if not out.exists():
            time.sleep(0.005)
            continue
        with connection.reading(out) as con:
            n, tokens, stated, routing = con.execute(
                "SELECT (SELECT count(*) FROM sequences), (SELECT count(*) FROM tokens), "
                "(SELECT coalesce(sum(n_tokens), 0) FROM sequences), (SELECT count(*) FROM routing)"
            ).fetchall()[0]
            if dice.random() < 0.2:
                time.sleep(dice.uniform(0, 0.5))
        outcome.expect(tokens == stated and routing == 3 * tokens, f"{tokens} tokens, {stated} stated, {routing} rows")
        outcome.expect(n >= seen[-1], f"{n} sequences after {seen[-1]}")
        seen.append(n)
        time.sleep(dice.uniform(0, 0.1))
    code = troubled.ended(process)
    outcome.what, outcome.ended = f"{len(seen) - 1} looks, {len(set(seen))} states", aftermath.how(code)
    outcome.expect(code == 0, f"exit {code}")
    aftermath.same(ground, outcome, out, RECORDED)
    return outcome


def damaged(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """Random bytes of a finished file are changed, 1 to 4,096 in a row: every table reads as it was, or one is told"""
    out = place / "t.duckdb"
    shutil.copy(ground.whole[_options(dice)], out)
    return damage.harmed(ground, place, out, damage.flip(out, dice))


def cut_short(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """A finished file is cut at a random length"""
    out = place / "t.duckdb"
    shutil.copy(ground.whole[_options(dice)], out)
    length = dice.randrange(out.stat().st_size)
    os.truncate(out, length)
    return damage.harmed(ground, place, out, f"{length:,} bytes left")


def damaged_part(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """Random bytes of a file of a folder of parts are changed: `validate` names it, or nothing reads otherwise"""
    folder = place / "parts"
    merge([ground.whole[RECORDED]], f"{folder}/")
    file = dice.choice(sorted(folder.rglob("*.parquet")))
    return damage.harmed(ground, place, folder, f"{file.parent.name}: {damage.flip(file, dice)}", file)


def part_writer(ground: Ground, place: Path, dice: random.Random) -> Outcome:
    """A writer of parts is killed (`kill -9`) at a random moment, once or twice, and tried again"""
    folder, source = place / "parts", ground.whole[RECORDED]
    outcome = Outcome("", moment=BEFORE)
    kills = dice.randint(1, 2)
    for _ in range(kills):
        process = troubled.process(write_parts, str(folder), str(source), 0.02)
        wanted, patience = dice.randrange(N_PARTS), time.monotonic() + 60
        while process.is_alive() and len(_parts(folder)) < wanted and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        outcome.ended = aftermath.how(troubled.ended(process))
        found = _parts(folder)
        outcome.moment = BEFORE if not found else AFTER if len(found) == N_PARTS else WRITING
        if (folder / "format.parquet").exists():
            outcome.expect("error" not in set(validate(folder)["severity"]), f"{validate(folder).to_string()}")
    outcome.what = f"killed {kills} times, the last with {len(found)} of {N_PARTS} parts"
    process = troubled.process(write_parts, str(folder), str(source), 0.0)
    outcome.expect(troubled.ended(process) == 0, "the writer that was tried again failed")
    wrong = reliability.differing(folder, source)
    outcome.expect(not wrong, f"not the same: {', '.join(wrong)}")
    left = [str(one.relative_to(folder)) for one in folder.rglob(".*")]
    outcome.expect(not left, f"left behind: {', '.join(left)}")
    return outcome


TROUBLES: dict[str, Trial] = {
    one.__name__.replace("_", "-"): one
    for one in (
        kill, kill_inside, terminate, interrupt, out_of_memory, little_memory, file_limit, disk_full, nan, clock,
        overwriting, other_corpus, changing_corpus, two_writers, readers, damaged, cut_short, damaged_part, part_writer,
    )
}  # fmt: skip
"""Each kind of trouble by name."""

N_PARTS = 8


def write_parts(folder: str, source: str, pause: float) -> None:
    """Write the run of a file as a folder of N_PARTS parts, those that are not there yet."""
    with connection.reading(source) as con:
        (run,) = con.sql("SELECT * EXCLUDE (started, finished, status) FROM runs").to_arrow_table().to_pylist()
        layers = con.sql("SELECT * EXCLUDE (run) FROM layers ORDER BY layer").to_arrow_table().to_pylist()
        run |= {name: None if run[name] is None else json.loads(run[name]) for name in ("corpus", "recipe", "versions")}
        there = parts.begin(folder, run, layers, mode="resume")
        for number in range(N_PARTS):
            if f"{number:06}" in there:
                continue
            own = f"WHERE seq % {N_PARTS} = {number}"
            tables: dict[str, Any] = {
                name: [con.sql(f"SELECT * EXCLUDE (run) FROM {name} {own}").to_arrow_table()]
                for name in ("sequences", "tokens", "routing", "profiles")
            }
            if not number:
                tables["vocabulary"] = [con.sql("SELECT token_id, text FROM vocabulary").to_arrow_table()]
            parts.write_part(folder, f"{number:06}", run["run"], tables)
            time.sleep(pause)
    parts.finish(folder, run["run"])


# --- making it happen


def _options(dice: random.Random) -> tuple[str, ...]:
    """Mostly a run that records, sometimes one that counts."""
    return COUNTED if dice.random() < 0.25 else RECORDED


def _signalled(ground: Ground, place: Path, dice: random.Random, which: signal.Signals, again: bool = False) -> Outcome:
    out, log = place / "t.duckdb", place / "log"
    options = _options(dice)
    process = troubled.start(ground.command(out, options), log)
    what, moment = _wait(dice, process, log, ground.commits[options])
    for _ in range(1 + again):
        if process.is_alive() and process.pid:
            os.kill(process.pid, which)
        time.sleep(dice.uniform(0, 0.02))
    code = troubled.ended(process)
    outcome = Outcome(
        f"{which.name}{' twice' if again else ''} {what}", aftermath.how(code), moment, said=aftermath.last(log)
    )
    killed, begun = which is signal.SIGKILL, out.exists()
    written = begun and not killed and Trace(out).runs()["status"].tolist() == ["finished"]
    # Before the run has begun and after it has ended SIGTERM is the system's, and ends the process without a word.
    expected = (0, 130) if begun and not killed and not written else (0, 130, -which)
    outcome.expect(code in expected, f"ended with {aftermath.how(code)}")
    if code == 0 or (written and code == -which):
        outcome.moment = AFTER
    elif not killed and begun:
        says = () if written else ("interrupted", "the same command")
        aftermath.clear(outcome, log, None if written else out, says)
    aftermath.kept(outcome, out, log)
    aftermath.finish(ground, outcome, out, log, options, "--resume")
    return outcome


def _broken_off(
    ground: Ground,
    place: Path,
    options: tuple[str, ...],
    trouble: Trouble,
    what: str,
    *,
    codes: tuple[int, ...] = (1,),
    says: tuple[str, ...] = (),
    native: bool = False,
    disk: Path | None = None,
) -> Outcome:
    """A run that something stops from within. It may end with one of `codes`, its message has to say `says`.

    native  whether native code may end it without a word
    disk    where the file is, if its size is limited: made larger before the run is finished
    """
    out, log = (disk or place) / "t.duckdb", place / "log"
    code = troubled.ended(troubled.start(ground.command(out, options), log, trouble))
    n = len(reliability.told(log))
    moment = BEFORE if not n else AFTER if code == 0 else WRITING
    outcome = Outcome(what, aftermath.how(code), moment, said=aftermath.last(log))
    crashed = native and code is not None and (code < 0 or code > 100)
    outcome.expect(crashed or code in codes, f"ended with {aftermath.how(code)}")
    if code == 1:
        aftermath.clear(outcome, log, out if out.exists() else None, says)
    aftermath.kept(outcome, out, log)
    if disk is not None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    aftermath.finish(ground, outcome, out, log, options, "--resume")
    return outcome


def _wait(dice: random.Random, process: BaseProcess, log: Path, commits: int, *, least: int = 0) -> tuple[str, str]:
    """Let a run go on up to a random moment: a random transaction and a little more; what was waited for, and BEFORE
    or WRITING."""
    wanted = dice.randint(least, commits)
    rest = dice.uniform(0, 0.4 if not wanted else 0.08)
    patience = time.monotonic() + 120
    while process.is_alive() and len(reliability.told(log)) < wanted and time.monotonic() < patience:
        time.sleep(0.001)
    time.sleep(rest)
    return f"{rest:.3f} s after transaction {wanted}", WRITING if wanted else BEFORE


def _parts(folder: Path) -> list[Path]:
    return list((folder / "sequences").glob("[0-9]*.parquet"))


def _mounted(disk: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
