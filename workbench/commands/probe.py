"""What routing knows: `probe`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.edits import numbers
from workbench.commands.options import File, Json, Overwrite, Run, check_output
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
    folds: Annotated[int, typer.Option(help="Of cross-validation over texts.")] = 5,
    controls: Annotated[int, typer.Option(help="Random labellings that the same probe learns, for selectivity.")] = 1,
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
    strength: Annotated[float, typer.Option(help="C of the probe: the larger, the weaker its penalty.")] = 1.0,
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
    from importlib import import_module

    from workbench.export import save_table
    from workbench.figures import save
    from workbench.tracefile import Trace

    options: dict = {"layers": given_layers, "seed": seed}
    if names is not None:
        options["features"] = names[0] if question in ("coefficients", "sequence_map") else names
    if rows is not None:
        options["max_rows"] = rows or None
    if question in ("clusters", "sequence_map"):
        given = {"--unit": unit, "--classes": classes, "--group": group, "--model": model, "--drop-rare": drop_rare}
        unused = [name for name, value in given.items() if value]
        if unused:
            raise InputError(f"{unused[0]} is of probes; --clusters and --map don't take it: leave it out.")
        if method is not None:
            options["method"] = method.value
    else:
        if method is not None:
            raise InputError(f"--method {method.value} is of --clusters and --map; leave it out.")
        options |= {
            "unit": None if unit is None else unit.value, "classes": classes, "group": group, "folds": folds,
            "drop_rare": drop_rare, "strength": strength,
        }  # fmt: skip
        if question != "coefficients":
            options["model"] = model
        if question == "probe":
            options["controls"] = controls
    module = import_module(f"workbench_probes.{question}")
    table = getattr(module, question)(Trace(file, run), target, **options)
    if out is not None:
        save_table(table, out, overwrite=overwrite)
    if figure is not None:
        save(module.figure(table), figure, overwrite=overwrite)
    if as_json or (out is None and figure is None):
        show(table, as_json)
    if not as_json:
        print("\n" + "\n".join(module.findings(table)))
