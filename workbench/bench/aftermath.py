"""What has to be so after a trial of `workbench bench reliability`; an Outcome is told what isn't."""

from pathlib import Path

from workbench.bench import reliability, troubled
from workbench.bench.reliability import Ground, Outcome
from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench.validate import validate


def how(code: int | None) -> str:
    return "hung" if code is None else f"signal {-code}" if code < 0 else f"exit {code}"


def last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:400] if lines else ""


def clear(outcome: Outcome, log: Path, out: Path | None, says: tuple[str, ...], every: bool = True) -> None:
    """The message names the file, says these words, and is no traceback."""
    said = log.read_text(errors="replace")
    outcome.expect("Traceback" not in said, "a traceback")
    outcome.expect(out is None or str(out) in said, "the message doesn't name the file")
    found = [word for word in says if word.lower() in said.lower()]
    outcome.expect(not says or (len(found) == len(says) if every else bool(found)), f"the message lacks {says}")
    outcome.expect(len(said) < 4000, "a message of pages")


def kept(outcome: Outcome, out: Path, log: Path) -> None:
    """What a run left is a trace without faults, and has all that was reported as written."""
    reported = max(reliability.told(log), default=0)
    if not out.exists():
        outcome.expect(not reported, f"{reported} sequences were reported as written, and there is no file")
        return
    problems = validate(out)
    outcome.expect("error" not in set(problems["severity"]), f"not whole: {problems.to_string()}")
    kept = Trace(out).n_sequences
    outcome.expect(kept >= reported, f"{reported} sequences were reported as written, {kept} are there")


def finish(
    ground: Ground, outcome: Outcome, out: Path, log: Path, options: tuple[str, ...], mode: str,
    texts: Path | None = None,
) -> None:  # fmt: skip
    """The same command with --resume makes what an uninterrupted run makes, and leaves nothing else behind."""
    again = log.with_name("again")
    code = troubled.ended(troubled.start(ground.command(out, options, mode, texts=texts), again))
    outcome.expect(code == 0, f"{mode} ended with {how(code)}: {last(again)}")
    if code == 0:
        same(ground, outcome, out, options)


def same(ground: Ground, outcome: Outcome, out: Path, options: tuple[str, ...]) -> None:
    if options not in ground.whole:
        made = ground.folder / f"{'.'.join(options).strip('-')}.duckdb"
        log = made.with_suffix(".log")
        if troubled.ended(troubled.start(ground.command(made, options), log)) != 0:
            raise AssertionError(log.read_text())
        ground.whole[options] = made
    wrong = differ(out, ground.whole[options])
    outcome.expect(not wrong, f"not what an uninterrupted run writes: {', '.join(wrong)}")
    outcome.expect(validate(out).empty, "validate reports something")
    known = {"t.duckdb", ".t.duckdb.lock", "texts.jsonl", "disk"}
    left = [one.name for one in out.parent.iterdir() if one.name not in known and not _is_log(one)]
    outcome.expect(not left, f"left behind: {', '.join(left)}")


def _is_log(path: Path) -> bool:
    return path.name.removesuffix(".told") in ("log", "other", "again")


def differ(out: Path, whole: Path) -> list[str]:
    try:
        return reliability.differing(out, whole)
    except InputError as error:
        return [str(error)]
