"""Measuring the workbench itself: `bench`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import check_output
from workbench.errors import InputError


class Benchmark(Enum):
    trace = "trace"
    store = "store"
    analysis = "analysis"
    learned = "learned"
    app = "app"
    kernels = "kernels"
    scale = "scale"


def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")],
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run, not how fast.")] = False,
    trace: Annotated[Path | None, typer.Option(help="`app`: look at this trace instead of making one up.")] = None,
) -> None:
    """Measure speed as ratios in one run, each behind a check of equal results; or what learned edits gain."""
    from importlib import import_module

    check_output(out, (".json",), overwrite=True)
    if trace is not None and what is not Benchmark.app:
        raise InputError(f"--trace is about `bench app`; `bench {what.value}` makes its own.")
    given = {} if trace is None else {"trace": trace}
    result = import_module(f"workbench.bench.{what.value}").run(quick=quick, **given)
    line = json.dumps(result)
    if out is not None:
        out.write_text(line + "\n")
    print(line)
