"""Causal evidence: `patch`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import (
    Demo,
    Device,
    Dtype,
    Json,
    Layout,
    Overwrite,
    Revision,
    Trust,
    check_layout,
    check_output,
)
from workbench.errors import InputError

ROWS = 10
"""Patches that are printed: those with the largest effects."""


class What(Enum):
    experts = "experts"
    routers = "routers"


def patch(
    model: Demo = "demo",
    source: Annotated[str | None, typer.Option(help="The prompt to take from.")] = None,
    target: Annotated[str | None, typer.Option(help="The prompt to change, as long in tokens.")] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help='Two tokens that could follow: the effect is on the logit of A minus that of B, as in " Paris, Rome".',
        ),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="A file of pairs instead: rows with source, target and answers (two texts).")
    ] = None,
    what: Annotated[What, typer.Option(help="Each expert's contribution, or each router's choice.")] = What.experts,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be given several times.")] = None,
    each_position: Annotated[
        bool, typer.Option("--each-position", help="Patch one position at a time, not all at once.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only the fast estimate from one gradient: no patch is run.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the table: .csv, .parquet or .tex.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the figure: .html, .svg, .png or .pdf.")] = None,
    layout: Layout = "screen",
    overwrite: Overwrite = False,
    as_json: Json = False,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in one forward pass, at most.")] = 4096,
    remote: Annotated[
        bool, typer.Option("--remote", help="Run on NDIF instead of here; takes the key NDIF_API_KEY.")
    ] = False,
    revision: Revision = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Which experts a prediction depends on: patch them from one run into another and see the logits move."""
    from workbench import patch_effects
    from workbench.export import save_table
    from workbench.figures import FORMATS, save
    from workbench.printing import plain, print_table, show
    from workbench.prompt_pairs import Pair, read_pairs
    from workbench.remote import check_revision

    check_output(out, (".csv", ".parquet", ".tex"), overwrite)
    check_output(figure, FORMATS, overwrite)
    check_layout(layout, figure)
    if pairs is not None:
        if source is not None or target is not None or answers is not None:
            raise InputError("--pairs goes without --source, --target and --answers: give one or the other.")
        wanted = read_pairs(pairs)
    elif source is None or target is None or answers is None:
        raise InputError("expected --source, --target and --answers, or --pairs FILE.")
    else:
        first, comma, second = answers.partition(",")
        if not comma or not first or not second or "," in second:
            raise InputError(f"--answers {answers!r}: expected two texts with a comma between, as in ' Paris, Rome'.")
        wanted = [Pair(source, target, (first, second))]
    from workbench import causal
    from workbench.models import load

    if remote:
        check_revision(revision)
    loaded = load(model, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    frame = causal.patch(
        loaded,
        wanted,
        what=what.value,
        layers=layer,
        each_position=each_position,
        exact=not estimate,
        batch_tokens=batch_tokens,
        remote=remote,
    )
    if out is not None:
        save_table(frame, out, overwrite=overwrite)
    if figure is not None:
        save(patch_effects.figure(frame), figure, layout=layout, overwrite=overwrite)
    if as_json:
        show(frame, as_json)
        return
    print(*(plain(sentence) for sentence in patch_effects.findings(frame)), sep="\n")
    if out is None and figure is None:
        size = frame["estimate" if estimate else "effect"].abs()
        print()
        print_table(frame.loc[size.nlargest(ROWS).index].drop(columns=["source", "target"]))
