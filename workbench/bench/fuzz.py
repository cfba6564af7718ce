"""Everything that reads files or texts that somebody else may have written, given damaged ones: `workbench bench fuzz`.

An input is a valid one that was edited at random: bytes, pieces that mean something in JSON, CSV, SQL or a header,
parts doubled, moved, or cut off. It is good if the reader reads it or refuses it (InputError, RunError) in time, and
neither writes outside of its folder, nor starts a program, nor reaches for the network, nor unpickles anything.

Inputs are read in processes of their own, many in one: where one crashes or hangs, the next process goes on behind it.
An input follows from its reader and its number, so that it can be made again. What is read: `workbench.bench.readers`.
"""

import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.bench import troubled
from workbench.bench.readers import READERS, Reader
from workbench.bench.reliability import chosen
from workbench.errors import InputError, RunError

INPUTS = 100_000
BATCH = 250
"""Inputs that a process reads at most."""
SECONDS = 60.0
"""For one input, on a machine that may be busy."""
READ, REFUSED, TRACEBACK, ESCAPED, CRASHED, HUNG = "read", "refused", "traceback", "escaped", "crashed", "hung"
BAD = (TRACEBACK, ESCAPED, CRASHED, HUNG)

PIECES = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"4294967296", b"[", b"]", b"{", b"}",
    b"{}", b"[]", b'""', b'"', b"'", b",", b";", b":", b"\n", b"\r", b"\t", b"\0", b"\\", b"\\ud800", b"\xff\xfe",
    b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 500, b"../../escaped", b"/tmp/escaped", b"<script>",
    b"=1+1", b"--", b"/*", b"(" * 300, b"__class__", b"\x80\x04\x95", b"cos\nsystem\n", "🙂".encode(), b"\xe2\x80\xae",
]  # fmt: skip
NUMBER = re.compile(rb"-?\d+(\.\d+)?")


def edited(data: bytes, dice: random.Random) -> bytes:
    """The bytes with one to four random edits."""
    for _ in range(dice.choice((1, 1, 1, 2, 3, 4))):
        at = dice.randrange(len(data) + 1)
        piece = dice.choice(PIECES) if dice.random() < 0.5 else dice.randbytes(dice.randint(1, 8))
        length = int(2 ** dice.uniform(0, 10))
        match dice.randrange(8):
            case 0:
                data = data[:at] + piece + data[at + len(piece) :]
            case 1:
                data = data[:at] + piece + data[at:]
            case 2:
                data = data[:at] + data[at + length :]
            case 3:
                data = data[:at]
            case 4:
                data = data[: at + length] + data[at:]  # a part twice
            case 5:
                other = dice.randrange(len(data) + 1)
                data = data[:at] + data[other : other + length] + data[at:]
            case 6 if at < len(data):
                data = data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
            case _:
                numbers = list(NUMBER.finditer(data[at : at + 4096]))
                if numbers:
                    found = dice.choice(numbers)
                    data = data[: at + found.start()] + piece + data[at + found.end() :]
    return data


def run(
    quick: bool = False, *, inputs: int | None = None, seed: int | None = None, only: str | None = None
) -> dict[str, Any]:
    """What `workbench bench fuzz` prints.

    inputs  how many, shared out by `Reader.share`
    seed    of all inputs; None: 0
    only    readers, between commas; or READER:NUMBER, a single input
    """
    started = time.perf_counter()
    names, number = chosen(only, READERS)
    total = inputs or (20 * len(names) if quick else INPUTS)
    shares = sum(READERS[name].share for name in names)
    found = {}
    for name in names:
        n = max(1, round(total * READERS[name].share / shares))
        found[name] = fuzzed(name, READERS[name], range(n) if number is None else [number], seed or 0)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return {
        "bench": "fuzz",
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "seed": seed or 0,
        "inputs": sum(one["inputs"] for one in found.values()),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "readers": found,
    }


def fuzzed(name: str, reader: Reader, numbers: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Inputs of these numbers to one reader: how many were read, refused, …; and what was said of the bad ones."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    rest = list(numbers)
    with tempfile.TemporaryDirectory(prefix="fuzz.") as temporary:
        watched = Path(temporary)
        while rest:
            batch, rest = rest[:BATCH], rest[BATCH:]
            done = _batch(name, reader, batch, seed, watched)
            for number, (result, said) in zip(batch, done, strict=False):
                counts[result] += 1
                if result in BAD:
                    examples[f"{name}:{number}"] = f"{result}: {said}"
            rest = batch[len(done) :] + rest
    return {"inputs": len(numbers), **counts, "examples": examples}


def _batch(name: str, reader: Reader, numbers: Sequence[int], seed: int, watched: Path) -> list[tuple[str, str]]:
    """Results of the first of these inputs, at least of one: all of them, unless one crashed or hung."""
    here, there = troubled.pipe()
    process = troubled.process(_read_all, there, name, reader, list(numbers), seed, str(watched))
    there.close()
    done: list[tuple[str, str]] = []
    if why := here.recv():
        raise AssertionError(f"{name} doesn't read a valid input: {why}")
    try:
        while len(done) < len(numbers):
            if not here.poll(SECONDS):
                process.kill()
                done.append((HUNG, f"longer than {SECONDS:.0f} s"))
                break
            done.append(here.recv())
    except EOFError:
        code = troubled.ended(process, 10)
        done.append((CRASHED, f"signal {-code}" if code and code < 0 else f"exit {code}"))
    process.kill()
    process.join()
    for one in watched.iterdir():
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    return done


def _read_all(there: Any, name: str, reader: Reader, numbers: list[int], seed: int, watched: str) -> None:
    """In the new process: read the inputs, each in an empty folder. Tells first why the valid input can't be read
    (nothing if it can), then the result of each."""
    place = Path(watched) / "place"
    (Path(watched) / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(Path(watched) / "tmp")
    template = Path(watched) / "template"
    template.mkdir()
    files = reader.write(template)
    os.chdir(watched)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        reader.read(files)  # imports what it needs
    except Exception as error:
        there.send(f"{type(error).__name__}: {error}")
        return
    there.send("")
    shutil.rmtree(template)  # and whatever the reader left beside it
    template.mkdir()
    files = reader.write(template)
    harm = watch(Path(watched))
    for number in numbers:
        harm.clear()
        dice = random.Random(f"{name}:{seed}:{number}")
        shutil.copytree(template, place)
        mine = [place / one.relative_to(template) for one in files]
        broken = dice.choice(mine)
        before = broken.read_bytes()
        broken.write_bytes(edited(before, dice))
        result = _one(reader.read, mine)
        if harm:
            result = ESCAPED, "; ".join(sorted(set(harm)))[:400]
        there.send(result)
        shutil.rmtree(place)


def _one(read: Callable[[list[Path]], Any], files: list[Path]) -> tuple[str, str]:
    try:
        read(files)
    except (InputError, RunError) as error:
        said = str(error)
        return (
            (REFUSED, "") if said.strip() and "Traceback" not in said else (TRACEBACK, f"a message of {said[:100]!r}")
        )
    except BaseException as error:
        frames, last = error.__traceback__, "?"
        while frames is not None:
            last = f"{Path(frames.tb_frame.f_code.co_filename).name}:{frames.tb_lineno}"
            frames = frames.tb_next
        return TRACEBACK, f"{type(error).__name__} at {last}: {str(error)[:200]}"
    return READ, ""


def watch(folder: Path) -> list[str]:
    """A list that grows by what this process does from now on and a reader mustn't: programs, network, pickles, and
    files that are written outside of the folder."""
    harm: list[str] = []
    never = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class")
    inside = (str(folder), os.devnull, "/proc/self/")

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in never:
            harm.append(f"{event} {given!r:.200}")
        elif (
            event == "open" and isinstance(given[0], str | bytes | os.PathLike) and given[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            path = os.path.abspath(os.fsdecode(given[0]))
            if not path.startswith(inside) and not path.endswith((".nbi", ".nbc", ".pyc")) and "/numba" not in path:
                harm.append(f"wrote {path}")

    sys.addaudithook(hook)
    return harm


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    columns = (READ, REFUSED, *BAD)
    lines = [f"| reader | inputs | {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for name, one in result["readers"].items():
        lines.append(f"| {name} | {one['inputs']:,} | {' | '.join(f'{one.get(key, 0):,}' for key in columns)} |")
    totals = [sum(one.get(key, 0) for one in result["readers"].values()) for key in columns]
    lines.append(f"| all | {result['inputs']:,} | {' | '.join(f'{n:,}' for n in totals)} |")
    examples = [
        f"- `{key}` {said}" for one in result["readers"].values() for key, said in list(one["examples"].items())[:3]
    ]
    head = f"{result['date']}, {result['device']}, seed {result['seed']}, {result['minutes']} minutes."
    return "\n".join([head, "", *lines, *(["", *examples] if examples else [])])
