"""Measuring the workbench itself: `bench`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import check_output


class Benchmark(Enum):
    trace = "trace"
    store = "store"
    analysis = "analysis"
    learned = "learned"


def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")],
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run, not how fast.")] = False,
) -> None:
    """Measure speed as ratios in one run, each behind a check of equal results; or what learned edits gain."""
    from importlib import import_module

    check_output(out, (".json",), overwrite=True)
    result = import_module(f"workbench.bench.{what.value}").run(quick=quick)
    line = json.dumps(result)
    if out is not None:
        out.write_text(line + "\n")
    print(line)
