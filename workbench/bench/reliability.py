"""What becomes of a trace when things go wrong, tried at random points: `workbench bench reliability`.

Each trial lets something happen to `workbench trace` in a process of its own (`workbench.bench.troubled`), at a random
moment, and then asks: is the file whole, is everything in it that the run said was written, did the message say what
to do, and is the trace after --resume, row for row, that of a run that nothing happened to? The model is a small OLMoE
with random weights, the texts are of a bundled corpus. What can happen is in `workbench.bench.trials`.
"""

import itertools
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from workbench import connection, schema
from workbench.bench import troubled
from workbench.errors import InputError
from workbench.validate import validate

TRIALS = 240
N_TEXTS = 48
RECORDED = ("--record", "ids,weights,entropy,profiles")
COUNTED = ("--counts-by", "lang")
BEFORE, WRITING, AFTER = "before the first rows", "while writing", "when all was written"


@dataclass
class Outcome:
    """What happened in one trial.

    what    what was done, and when
    ended   how the process ended: "exit 0", "signal 9"
    moment  BEFORE, WRITING or AFTER; "" where that means nothing
    wrong   what should not have been; nothing in a good trial
    said    the last line that was printed
    """

    what: str
    ended: str = ""
    moment: str = ""
    wrong: list[str] = field(default_factory=list)
    said: str = ""

    def expect(self, good: bool, otherwise: str) -> None:
        if not good:
            self.wrong.append(otherwise)


@dataclass(frozen=True)
class Ground:
    """What all trials share: a checkpoint, texts, and the traces of runs that nothing happened to.

    whole    options -> the uninterrupted trace
    commits  options -> transactions it took
    """

    folder: Path
    whole: dict[tuple[str, ...], Path] = field(default_factory=dict)
    commits: dict[tuple[str, ...], int] = field(default_factory=dict)

    @property
    def texts(self) -> Path:
        return self.folder / "texts.jsonl"

    def command(self, out: Path, options: Sequence[str] = RECORDED, *more: str, texts: Path | None = None) -> list[str]:
        corpus = texts or self.texts
        model = self.folder / "model"
        return ["trace", str(model), "--corpus", str(corpus), "--out", str(out), "--batch-tokens", "512",
                "--long", "split", *options, *more]  # fmt: skip


def run(
    quick: bool = False, *, trials: int | None = None, seed: int | None = None, only: str | None = None
) -> dict[str, Any]:
    """What `workbench bench reliability` prints.

    trials  how many; each of the kinds in turn
    seed    of what is drawn; None: a new one
    only    kinds, between commas; or KIND:SEED, the one trial that had this seed
    """
    from workbench.bench.trials import TROUBLES

    started = time.perf_counter()
    names, single = chosen(only, TROUBLES)
    first = _seed(seed) if single is None else single
    n = trials or (len(names) if quick else TRIALS) if single is None else 1
    found: dict[str, list[tuple[int, Outcome]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="reliability.") as temporary:
        ground = prepare(Path(temporary))
        for number, name in zip(range(n), itertools.cycle(names), strict=False):
            place = ground.folder / "trial"
            outcome = attempt(ground, place, name, first + number)
            found[name].append((first + number, outcome))
            told = f"{name}:{first + number}  {outcome.what}; {outcome.ended}"
            bad = f"  WRONG: {'; '.join(outcome.wrong)}  ({outcome.said})" if outcome.wrong else ""
            print(told + bad, file=sys.stderr, flush=True)
    return {
        "bench": "reliability",
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "seed": first,
        "trials": n,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "troubles": {name: _summary(outcomes) for name, outcomes in found.items() if outcomes},
    }


def chosen(only: str | None, known: Iterable[str]) -> tuple[list[str], int | None]:
    """What `--only` names, all of `known` by default; and the number behind a colon. InputError for anything else."""
    if only is None:
        return list(known), None
    wanted, colon, number = only.partition(":")
    names = wanted.split(",")
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--only {unknown[0]!r}: choose from {', '.join(known)}.")
    if colon and not (number.isascii() and number.isdigit() and len(names) == 1):
        raise InputError(f"--only {only!r}: expected one name and a number, as in {names[0]}:17.")
    return names, int(number) if colon else None


def _seed(seed: int | None) -> int:
    return random.SystemRandom().randrange(10**6) if seed is None else seed


def attempt(ground: Ground, place: Path, name: str, seed: int) -> Outcome:
    """One trial, in the folder `place`, which is made and removed."""
    import shutil

    from workbench.bench.trials import TROUBLES

    place.mkdir()
    try:
        return TROUBLES[name](ground, place, random.Random(f"{name}:{seed}"))
    finally:
        shutil.rmtree(place)


def prepare(folder: Path) -> Ground:
    """Make the model, the texts and the uninterrupted traces."""
    import torch
    from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM
    from transformers.utils import logging

    from workbench import bundled, corpus

    logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    config = OlmoeConfig(
        **sizes, vocab_size=8192, num_experts=8, num_experts_per_tok=2, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(bundled.path("models/demo")).save_pretrained(folder / "model")
    ground = Ground(folder)
    write_texts(ground.texts, itertools.islice(corpus.read("udhr"), N_TEXTS))
    for name, options in {"recorded": RECORDED, "counted": COUNTED}.items():
        out, log = folder / f"{name}.duckdb", folder / f"{name}.log"
        code = troubled.ended(troubled.start(ground.command(out, options), log))
        if code != 0 or not validate(out).empty:
            raise AssertionError(f"the run that nothing happens to ended with {code}: {log.read_text()}")
        ground.whole[options], ground.commits[options] = out, len(told(log))
    return ground


def write_texts(path: Path, rows: Iterable[Any]) -> None:
    lines = (json.dumps({"text": row.text, "lang": row.lang}, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def told(log: Path) -> list[int]:
    """After each transaction of a run, how many sequences it said were written."""
    path = Path(f"{log}.told")
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [int(line) for line in lines]


def contents(path: Path) -> dict[str, pa.Table]:
    """Every table, in one order, but for what says when the run was."""
    with connection.reading(path) as con:
        return {
            table: con.sql(
                f"SELECT * {'EXCLUDE (started, finished)' if table == 'runs' else ''} FROM {table} ORDER BY ALL"
            ).to_arrow_table()
            for table in schema.TABLES
        }


def differing(path: Path, whole: Path) -> list[str]:
    """Tables in which two traces are not row for row the same."""
    mine, theirs = contents(path), contents(whole)
    return [table for table in theirs if not mine[table].equals(theirs[table])]


def _summary(outcomes: list[tuple[int, Outcome]]) -> dict[str, Any]:
    return {
        "trials": len(outcomes),
        "ended": dict(Counter(outcome.ended for _, outcome in outcomes).most_common()),
        "moments": dict(Counter(outcome.moment for _, outcome in outcomes if outcome.moment)),
        "wrong": {
            str(seed): {"what": outcome.what, "wrong": outcome.wrong, "said": outcome.said}
            for seed, outcome in outcomes
            if outcome.wrong
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    from workbench.bench.trials import TROUBLES

    lines = ["| what was tried | trials | how it ended | when it was hit | went wrong |", "|---|---|---|---|---|"]
    for name, one in result["troubles"].items():
        what = " ".join((TROUBLES[name].__doc__ or "").split())
        ended, moments = (", ".join(f"{n} × {key}" for key, n in one[part].items()) for part in ("ended", "moments"))
        wrong = "; ".join(f"{name}:{seed} {', '.join(w['wrong'])}" for seed, w in one["wrong"].items())
        lines.append(f"| **{name}**: {what} | {one['trials']} | {ended} | {moments} | {wrong or '0'} |")
    n_wrong = sum(len(one["wrong"]) for one in result["troubles"].values())
    head = (
        f"{result['date']}, {result['device']}, seed {result['seed']}: {result['trials']} trials in "
        f"{result['minutes']} minutes, {n_wrong} went wrong."
    )
    return "\n".join([head, "", *lines])
