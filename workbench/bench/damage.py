"""Damage to texts and to traces, at random places, and what looking at a damaged trace shows."""

import json
import random
from pathlib import Path

from workbench.bench import aftermath, reliability, troubled
from workbench.bench.reliability import Ground, Outcome
from workbench.errors import InputError


def change(texts: Path, dice: random.Random) -> str:
    """Write the texts anew, with one that isn't as it was."""
    lines = texts.read_text(encoding="utf-8").splitlines()
    at, how = dice.randrange(len(lines)), dice.choice(("changed", "added", "removed", "moved"))
    row = json.loads(lines[at])
    match how:
        case "changed":
            lines[at] = json.dumps(row | {"text": row["text"][:-1] + "§"}, ensure_ascii=False)
        case "added":
            lines.insert(at, json.dumps(row | {"text": "more"}, ensure_ascii=False))
        case "removed":
            del lines[at]
        case _:
            lines[at], lines[at - 1] = lines[at - 1], lines[at]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{how} (line {at + 1})"


def flip(file: Path, dice: random.Random) -> str:
    data = bytearray(file.read_bytes())
    n = min(int(2 ** dice.uniform(0, 12)), len(data))
    at = dice.randrange(len(data) - n + 1)
    for place in range(at, at + n):
        data[place] ^= dice.randint(1, 255)
    file.write_bytes(data)
    return f"{n:,} bytes from {at:,} on"


def harmed(ground: Ground, place: Path, path: Path, what: str, file: Path | None = None) -> Outcome:
    """A trace whose bytes are not what they were, looked at in processes of their own: DuckDB may crash."""
    outcome, log = Outcome(what), place / "log"
    checked = troubled.ended(troubled.start(["validate", str(path)], log))
    said = log.read_text()
    outcome.said = aftermath.last(log)
    code, found = troubled.elsewhere(read_all, str(path), [str(one) for one in ground.whole.values()])
    for step, ended in {"validate": checked, "reading": code}.items():
        outcome.expect(ended is not None, f"{step} hung")
        outcome.expect(ended is None or 0 <= ended < 100, f"{step} crashed: {aftermath.how(ended)}")
    noticed = checked in (1, 2)
    outcome.expect("Traceback" not in said, "a traceback")
    # A table of what is wrong needs no name: it answers a question about this file.
    named = str(path) in said or "the check failed" in said or (file is not None and file.name in said)
    outcome.expect(not noticed or named, "it isn't named")
    if found == "same":
        outcome.ended = "validate reports it" if noticed else "harmless"
    elif found == "refused":
        outcome.ended = "refused when read" + (", validate reports it" if noticed else "")
        outcome.expect(noticed, "validate finds nothing")
    elif found is not None:
        outcome.ended = f"reads otherwise, {'validate reports it' if noticed else 'validate finds nothing'}"
        outcome.expect(noticed, f"other rows, without a word: {found}")
    return outcome


def read_all(path: str, wholes: list[str]) -> str:
    """ "same" if every table is that of one of the whole traces, "refused" if one can't be read, else what differs."""
    try:
        found = reliability.contents(Path(path))
    except InputError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    differing = []
    for whole in wholes:
        theirs = reliability.contents(Path(whole))
        differing.append([name for name in theirs if not found[name].equals(theirs[name])])
    least = min(differing, key=len)
    return ", ".join(least) or "same"
