"""Checkpoints, described and changed: `models`, `place`, `prune`, `merge-experts`."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import Checkpoint, File, Json, Overwrite, Revision, Run, Trust, check_output
from workbench.printing import listing, show


class Placement(Enum):
    table = "table"
    vllm = "vllm"
    sglang = "sglang"


class Likeness(Enum):
    neurons = "neurons"
    router = "router"


class RouterRow(Enum):
    dominant = "dominant"
    mean = "mean"


Scores = Annotated[
    Path, typer.Option(help="Table with layer, expert and a score: `workbench analyze importance FILE --out T.csv`.")
]
Score = Annotated[str, typer.Option(help="Its column that says how important an expert is.")]
Keep = Annotated[int, typer.Option(help="Experts that each layer has afterwards.")]
Folder = Annotated[Path, typer.Option(help="The folder to make, which plain `from_pretrained` loads.")]
Losses = Annotated[
    str | None, typer.Option(help="Also compare losses on this corpus: the original, the result, random choices.")
]
MaxTokens = Annotated[int, typer.Option(help="Tokens of that corpus.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest text of it in tokens; longer ones are cut.")]


def models(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Describe this checkpoint.")] = None,
    as_json: Json = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """The model families that can be traced, with their caveats; or what one checkpoint is made of."""
    if model is None:
        from workbench.families import families

        table = families()
        if as_json:
            show(table, as_json)
        for row in [] if as_json else table.to_dict("records"):
            print(f"{row['family']:<22} {row['gating'] if row['traced'] else 'refused'}")
            if row["note"]:
                print(f"{'':<22} {row['note']}")
        return
    from workbench.models import describe

    facts = describe(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        routers = facts.pop("layers")
        facts = {name: value for name, value in facts.items() if value != ""}
        print(listing({"model": facts.pop("model"), "routers": len(routers), **facts}), end="\n\n")
        for row in routers:
            shared = f" + {row['n_shared']} shared" if row["n_shared"] else ""
            size = f"top-{row['top_k']} of {row['n_experts']}{shared}"
            print(f"{row['layer']:>3}  {row['name']:<40} {size:<24} {row['gating']}  ({row['stack']})")


def place(
    file: File,
    devices: Annotated[int, typer.Option(help="Devices to share the experts of every layer, equally.")],
    out: Annotated[Path, typer.Option(help="The file to write: .json, or .csv and .parquet as a table.")],
    form: Annotated[Placement, typer.Option("--format", help="What reads it.")] = Placement.table,
    balance: Annotated[
        float, typer.Option(help="What a straggler factor of 2 instead of 1 costs, in shares of transitions.")
    ] = 1.0,
    time_limit: Annotated[float, typer.Option(help="Seconds to search, about.")] = 60.0,
    run: Run = None,
    overwrite: Overwrite = False,
) -> None:
    """Place experts on devices so that tokens move little and devices are equally busy."""
    from workbench.analysis.placement import assign
    from workbench.placements import export_placement
    from workbench.tracefile import Trace

    check_output(out, (".json", ".csv", ".parquet"), overwrite)
    placed = assign(Trace(file, run), devices=devices, balance=balance, time_limit=time_limit)
    export_placement(placed, out, form.value, overwrite=overwrite)
    print(f"{out}: {len(placed):,} experts on {devices} devices")
    print(f"next:  workbench analyze placement {file} --set devices={devices}   # against contiguous and random")


def prune(
    model: Checkpoint,
    importance: Scores,
    keep: Keep,
    out: Folder,
    score: Score = "frequency",
    corpus: Losses = None,
    max_tokens: MaxTokens = 20_000,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with only the most important experts of each layer."""
    from workbench.prune import prune as write

    write(model, importance, keep, out, score=score, overwrite=overwrite)
    _compare(model, out, keep, corpus, max_tokens, max_length)


def merge_experts(
    model: Checkpoint,
    importance: Scores,
    keep: Keep,
    out: Folder,
    score: Score = "frequency",
    by: Annotated[Likeness, typer.Option(help="What makes an expert like the one that it joins.")] = Likeness.neurons,
    router: Annotated[RouterRow, typer.Option(help="The router's row of a merged expert.")] = RouterRow.dominant,
    corpus: Losses = None,
    max_tokens: MaxTokens = 20_000,
    max_length: MaxLength = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint in which less important experts are merged into the most important ones of their layer."""
    from workbench.merge_experts import merge_experts as write

    write(model, importance, keep, out, score=score, by=by.value, router=router.value, overwrite=overwrite)
    _compare(model, out, keep, corpus, max_tokens, max_length)


def _compare(model: str, out: Path, keep: int, corpus: str | None, max_tokens: int, max_length: int | None) -> None:
    print(f"{out}: {keep} experts a layer")
    if corpus is None:
        return
    from workbench.losses import compare_losses, findings

    losses = compare_losses(model, {out.name: out}, corpus, max_tokens=max_tokens, max_length=max_length)
    show(losses, as_json=False)
    print("", *findings(losses), sep="\n")
