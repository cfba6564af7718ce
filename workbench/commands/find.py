"""From a trace to a recipe: `find`."""

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.commands.edits import numbers
from workbench.commands.options import File, Json, Overwrite, Run, check_output
from workbench.errors import InputError
from workbench.printing import plain, show

if TYPE_CHECKING:
    import pandas as pd

    from workbench.recipe import Recipe


class Method(Enum):
    risk_difference = "risk_difference"
    npmi = "npmi"
    rate_difference = "rate_difference"
    importance = "importance"


class Side(Enum):
    group = "group"
    versus = "versus"
    both = "both"


class Edit(Enum):
    ablate = "ablate"
    forbid = "forbid"
    force = "force"
    bias = "bias"
    scale = "scale"


class Level(Enum):
    logits = "logits"
    selection = "selection"
    output = "output"


def find(
    file: File,
    out: Annotated[Path, typer.Option(help="The recipe to write, a .json file.")],
    method: Annotated[Method, typer.Option(help="How experts are scored.")] = Method.risk_difference,
    group: Annotated[
        str | None, typer.Option(help="The tokens asked about: lang=de, domain=code-c & phase=prompt, text~<think>, …")
    ] = None,
    versus: Annotated[
        str | None,
        typer.Option(help="The tokens compared with. Default: all others; for importance none, or `rest`."),
    ] = None,
    score: Annotated[str | None, typer.Option(help="Of importance: frequency, weighted_norm, easy_ep, …")] = None,
    languages: Annotated[
        str, typer.Option(help="Of rate_difference: the languages, as in en,de, in all of which they serve the task.")
    ] = "en",
    by: Annotated[str, typer.Option(help="Of rate_difference: the column that holds the language.")] = "lang",
    layers: Annotated[str | None, typer.Option(help="Only these, as in 2-5 or 0,3. Default: all.")] = None,
    top: Annotated[
        int | None, typer.Option(help="The highest over all layers, on each side. Default: 10, if nothing is said.")
    ] = None,
    per_layer: Annotated[int | None, typer.Option(help="The highest of each layer, on each side.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Only scores above this.")] = None,
    fdr: Annotated[float, typer.Option(help="False-discovery rate; with 1 everything passes.")] = 0.05,
    side: Annotated[
        Side, typer.Option(help="Whose experts; both: those of versus get the opposite edit (as SteerMoE does).")
    ] = Side.group,
    edit: Annotated[Edit, typer.Option(help="What the recipe does with them.")] = Edit.ablate,
    level: Annotated[Level | None, typer.Option(help="Of ablate and force. Default: logits.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Of bias: standard deviations of a token's logits, 0.5 by default; of scale: a factor, 64."),
    ] = None,
    scope: Annotated[str, typer.Option(help="Where it acts: phase=generated, position=4-15, text~<think>, …")] = "all",
    permutations: Annotated[int, typer.Option(help="For p; with 0 nothing is tested.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of permutations and resamples.")] = 0,
    table: Annotated[
        Path | None, typer.Option(help="Also write the scores of all experts: .csv, .parquet or .tex.")
    ] = None,
    run: Run = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the experts of a language, a domain or a pattern, and make a recipe that edits them."""
    check_output(out, (".json",), overwrite)  # before the analysis takes its time
    check_output(table, (".csv", ".parquet", ".tex"), overwrite)
    wanted = None if layers is None else numbers(layers)
    if wanted == ():
        raise InputError(f"--layers {layers!r}: expected numbers and ranges, as in 2-5 or 0,3.")
    from workbench import finding
    from workbench.export import save_table
    from workbench.recipe import write_recipe
    from workbench.tracefile import Trace

    found, recipe = finding.find(
        Trace(file, run),
        method.value,
        group=group,
        versus=versus,
        score=score,
        languages=[language.strip() for language in languages.split(",") if language.strip()],
        by=by,
        layers=wanted,
        top=top,
        per_layer=per_layer,
        threshold=threshold,
        fdr=fdr,
        side=side.value,
        edit=edit.value,
        level=None if level is None else level.value,
        strength=strength,
        scope=scope,
        n_permutations=permutations,
        seed=seed,
    )
    write_recipe(recipe, out, overwrite=overwrite)
    if table is not None:
        save_table(found, table, overwrite=overwrite)
    chosen = found[found["chosen"]].sort_values("score", ascending=False, kind="stable")
    shown = chosen[["side", "layer", "expert", "score", "low", "high", "q", "value", "value_versus"]]
    show(shown, as_json)
    if not as_json:
        kinds = " and ".join(dict.fromkeys(type(edit).__name__ for edit in recipe.interventions))
        print(f"\n{out}: {kinds} on {len(chosen)} of {len(found)} experts, in layers {_listed(chosen['layer'])}")
        _print_next(recipe, out)


def _listed(layers: "pd.Series") -> str:
    return ", ".join(map(str, sorted(layers.unique())))


def _print_next(recipe: "Recipe", out: Path) -> None:
    """Commands that try the recipe: on other texts, since on its own it looks better than it is."""
    model = shlex.quote(plain(recipe.model["name"])) if recipe.model else "MODEL"
    print(f"next:  workbench evaluate {model} --corpus OTHER-TEXTS --recipe {shlex.quote(str(out))}")
    print(f"       workbench generate {model} 'PROMPT' --recipe {shlex.quote(str(out))} --compare")
