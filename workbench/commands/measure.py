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
    reliability = "reliability"
    fuzz = "fuzz"
    soak = "soak"


OWN = {
    "trace": ("app",), "trials": ("reliability",), "inputs": ("fuzz",), "tokens": ("soak",), "figure": ("soak",),
    "seed": ("reliability", "fuzz"), "only": ("reliability", "fuzz"), "page": ("reliability", "fuzz", "soak"),
}  # fmt: skip
"""Options that only these benchmarks have."""


def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")],
    out: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: does it run, not how fast.")] = False,
    trace: Annotated[Path | None, typer.Option(help="`app`: look at this trace instead of making one up.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="`reliability`: how many. [default: 240]")] = None,
    inputs: Annotated[int | None, typer.Option(min=1, help="`fuzz`: how many. [default: 100,000]")] = None,
    tokens: Annotated[int | None, typer.Option(min=4000, help="`soak`: how many. [default: 10 million]")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="`reliability`, `fuzz`: of what is drawn. [default: new; 0]")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="`reliability`, `fuzz`: these kinds, between commas; or KIND:NUMBER, what was told to be so."
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="`soak`: memory and tokens over time, .svg, .png or .html.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="`reliability`, `fuzz`, `soak`: a page (.md) to write the table into.")
    ] = None,
) -> None:
    """Measure speed as ratios in one run, each behind a check of equal results; what learned edits gain; or whether
    the workbench holds when things go wrong."""
    from importlib import import_module

    check_output(out, (".json",), overwrite=True)
    options = {
        "trace": trace, "trials": trials, "inputs": inputs, "tokens": tokens, "seed": seed, "only": only,
        "figure": figure, "page": page,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in given if what.value not in OWN[name]]:
        owners = " and ".join(f"`bench {name}`" for name in OWN[wrong[0]])
        raise InputError(f"--{wrong[0]} is about {owners}; leave it out of `bench {what.value}`.")
    given.pop("page", None)
    module = import_module(f"workbench.bench.{what.value}")
    if page is not None:
        from workbench.bench.page import check, put

        check(page, what.value)
    result = module.run(quick=quick, **given)
    if page is not None:
        put(page, what.value, module.table(result))
    line = json.dumps(result)
    if out is not None:
        out.write_text(line + "\n")
    print(line)
