"""What routing knows: `probe`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.edits import numbers
from workbench.commands.options import File, Json, Layout, Overwrite, Run, check_layout, check_output
from workbench.errors import InputError
from workbench.printing import show


class Unit(Enum):
    token = "token"
    sequence = "sequence"


class Method(Enum):
    kmeans = "kmeans"
    agglomerative = "agglomerative"
    tsne = "tsne"
    umap = "umap"


OF_PROBES = ("unit", "classes", "group", "folds", "drop_rare", "strength")
TAKES = {
    "probe": (*OF_PROBES, "controls", "permutations", "model"),
    "learning_curve": (*OF_PROBES, "model"),
    "coefficients": OF_PROBES,
    "clusters": ("method",),
    "sequence_map": ("method",),
}
"""The options that each question takes, beside those of all."""


def strengths(text: str) -> list[float]:
    """Numbers with commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--strength {text!r}: expected numbers above 0 with commas, as in 0.1,1,10.") from None


def probe(
    file: File,
    target: Annotated[
        str,
        typer.Option(
            help="What to predict: a column of the sequences (lang, domain, any metadata), token_class, position, "
            "phase or loss, which is that of the next token."
        ),
    ],
    features: Annotated[
        str | None,
        typer.Option(
            help="From what: any of choices, weights, probabilities, tokens (their identity alone) and hidden (states "
            "of the model), with commas. [default: choices,tokens; only choices where experts or maps are asked for]"
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these, as in 2-5 or 0,3. Default: all.")] = None,
    unit: Annotated[
        Unit | None, typer.Option(help="A row is a token or a sequence. [default: what the target is a property of]")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="Predict a number (the loss) as so many quantile classes.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="A further column whose equal values are never split, such as source.")
    ] = None,
    folds: Annotated[int | None, typer.Option(help="Of cross-validation over texts. [default: 5]")] = None,
    controls: Annotated[
        int | None,
        typer.Option(help="Random labellings that the same probe learns, for selectivity. [default: 1]"),
    ] = None,
    permutations: Annotated[
        int | None,
        typer.Option(help="Of the labels over texts, for a p value; each takes as long as the probe. [default: 0]"),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            help="At most so many tokens or sequences, drawn at random; 0 for all. [default: 20000; clusters 5000, "
            "maps 2000]"
        ),
    ] = None,
    drop_rare: Annotated[
        bool, typer.Option("--drop-rare", help="Leave out classes that are in fewer texts than there are folds.")
    ] = False,
    strength: Annotated[
        str | None,
        typer.Option(
            help="C of the probe: the larger, the weaker its penalty. Of several, as in 0.01,0.1,1,10, the best by "
            "cross-validation inside the training texts. [default: 1]"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of hidden: the model that was traced. [default: the name in the trace]")
    ] = None,
    learning_curve: Annotated[
        bool, typer.Option("--learning-curve", help="Instead: scores by number of texts to learn from.")
    ] = False,
    coefficients: Annotated[
        bool, typer.Option("--coefficients", help="Instead: which experts speak for a label, layer by expert.")
    ] = False,
    clusters: Annotated[
        bool, typer.Option("--clusters", help="Instead: cluster sequences, and compare with the column.")
    ] = False,
    sequence_map: Annotated[
        bool, typer.Option("--map", help="Instead: a map of the sequences, coloured by the column.")
    ] = False,
    method: Annotated[
        Method | None, typer.Option(help="Of clusters: kmeans (default), agglomerative; of maps: tsne (default), umap.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of splits, control labels, draws and maps.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table: .csv, .parquet or .tex.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the figure: .html, .svg, .png or .pdf.")] = None,
    layout: Layout = "screen",
    run: Run = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Ask what routing knows: predict a label from it with linear probes, on texts they weren't trained on."""
    asked = {
        "learning_curve": learning_curve,
        "coefficients": coefficients,
        "clusters": clusters,
        "sequence_map": sequence_map,
    }
    chosen = [name for name, wanted in asked.items() if wanted] or ["probe"]
    if len(chosen) > 1:
        raise InputError("--learning-curve, --coefficients, --clusters and --map are questions of their own: ask one.")
    question = chosen[0]
    given_layers = None if layers is None else numbers(layers)
    if given_layers == ():
        raise InputError(f"--layers {layers!r}: expected numbers and ranges, as in 2-5 or 0,3.")
    names = None if features is None else [name.strip() for name in features.split(",") if name.strip()]
    if names is not None and not names:
        raise InputError(f"--features {features!r}: expected names with commas, as in choices,tokens.")
    if names is not None and len(names) > 1 and question in ("coefficients", "sequence_map"):
        raise InputError(f"--features {features}: this question is of one set of features; give one.")
    check_output(out, (".csv", ".parquet", ".tex"), overwrite)  # before the probes take their time
    from workbench.figures import FORMATS

    check_output(figure, FORMATS, overwrite)
    check_layout(layout, figure)
    from importlib import import_module

    from workbench.export import save_table
    from workbench.figures import save
    from workbench.tracefile import Trace

    options: dict = {"layers": given_layers, "seed": seed}
    if names is not None:
        options["features"] = names[0] if question in ("coefficients", "sequence_map") else names
    if rows is not None:
        options["max_rows"] = rows or None
    for name, value in {
        "unit": unit and unit.value, "classes": classes, "group": group, "folds": folds, "controls": controls,
        "permutations": permutations, "drop_rare": drop_rare or None, "model": model, "method": method and method.value,
        "strength": None if strength is None else strengths(strength),
    }.items():  # fmt: skip
        if value is None:
            continue
        if name not in TAKES[question]:
            asked_for = (
                "probes alone" if question == "probe" else "--" + question.removeprefix("sequence_").replace("_", "-")
            )
            raise InputError(f"--{name.replace('_', '-')} has no part in {asked_for}; leave it out.")
        options[name] = value
    module = import_module(f"workbench_probes.{question}")
    table = getattr(module, question)(Trace(file, run), target, **options)
    if out is not None:
        save_table(table, out, overwrite=overwrite)
    if figure is not None:
        save(module.figure(table), figure, layout=layout, overwrite=overwrite)
    if as_json or (out is None and figure is None):
        show(table, as_json)
    if not as_json:
        print("\n" + "\n".join(module.findings(table)))
