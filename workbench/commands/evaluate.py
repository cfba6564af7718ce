"""What a recipe does: `evaluate`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.edits import (
    Ablated,
    Biased,
    Contrasted,
    Forbidden,
    Forced,
    RecipeFile,
    Scaled,
    Scoped,
    TopKs,
    TopPs,
    recipe_of,
)
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
    pair,
)
from workbench.commands.record import LongTexts
from workbench.errors import InputError
from workbench.printing import plain, print_table, show
from workbench.recipe import Recipe


class Control(Enum):
    random = "random"
    none = "none"


def evaluate(
    model: Demo = "demo",
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Texts whose loss to compare, as of `trace`; may be given several times. [default: demo]"),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(help="Instead: tasks of lm-eval, YAML files with local data; may be given several times."),
    ] = None,
    recipe: RecipeFile = None,
    ablate: Ablated = None,
    force: Forced = None,
    forbid: Forbidden = None,
    bias: Biased = None,
    scale: Scaled = None,
    top_k: TopKs = None,
    top_p: TopPs = None,
    contrast: Contrasted = False,
    scope: Scoped = None,
    control: Annotated[Control, typer.Option(help="Compare with the same edits of random experts.")] = Control.random,
    controls: Annotated[int, typer.Option(help="How many random draws of experts.")] = 5,
    by: Annotated[str | None, typer.Option(help="Group texts by this column: lang, domain, … or any metadata.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Stop after the text that reaches this many tokens.")] = 20_000,
    max_length: Annotated[int | None, typer.Option(help="Longest text. [default: what the model allows]")] = None,
    long: Annotated[LongTexts, typer.Option(help="What to do with a text longer than that.")] = LongTexts.cut,
    limit: Annotated[int | None, typer.Option(help="Of a task: only its first items.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Map a column, as in `text=content`; may be given several times.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in one forward pass, at most.")] = 4096,
    resamples: Annotated[int, typer.Option(help="Of texts or items, for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the first draw and of the resamples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the whole table: .csv, .parquet or .tex.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Write the figure: .html, .svg, .png or .pdf.")] = None,
    layout: Layout = "screen",
    overwrite: Overwrite = False,
    as_json: Json = False,
    revision: Revision = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Compare plain, steered, and random experts: loss, next-token distributions, routing, or accuracy on tasks."""
    from workbench.figures import FORMATS

    check_output(out, (".csv", ".parquet", ".tex"), overwrite)  # before the model loads
    check_output(figure, FORMATS, overwrite)
    check_layout(layout, figure)
    if corpus and tasks:
        raise InputError("--corpus and --tasks are two tables: give one of them.")
    if limit is not None and not tasks:
        raise InputError("--limit is for --tasks; of a corpus --max-tokens says how much is read.")
    edited = recipe_of(
        recipe,
        ablate=ablate,
        force=force,
        forbid=forbid,
        bias=bias,
        scale=scale,
        top_k=top_k,
        top_p=top_p,
        contrast=contrast,
        scope=scope,
    )
    if edited is None:
        raise InputError("there is nothing to evaluate: give --recipe FILE, or an edit such as --ablate 3:5.")
    from workbench import accuracy, evaluation
    from workbench import corpus as corpora
    from workbench.export import save_table
    from workbench.figures import save
    from workbench.models import load

    options = {"n_random": controls if control is Control.random else 0, "n_resamples": resamples, "seed": seed}
    columns = dict(pair(option, "--column", "text=content") for option in column or [])
    sources = [] if tasks else [corpora.read(name, columns=columns) for name in corpus or ["demo"]]
    loaded = load(model, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if tasks:
        subject = accuracy
        table = accuracy.accuracy(loaded, tasks, edited, limit=limit, trust_code=trust_remote_code, **options)
    else:
        subject = evaluation
        table = evaluation.evaluate(
            loaded,
            sources,
            edited,
            by=by,
            max_tokens=max_tokens,
            max_length=max_length,
            long_texts=long.value,
            batch_tokens=batch_tokens,
            progress=True,
            **options,
        )
    if out is not None:
        save_table(table, out, overwrite=overwrite)
    if figure is not None:
        save(subject.figure(table), figure, layout=layout, overwrite=overwrite)
    if as_json:
        show(table, as_json)
        return
    print_table(subject.summary(table))
    print()
    for sentence in subject.findings(table):
        print(plain(sentence))
    known = _found_on(edited, [source.name for source in sources])
    if known:
        print(
            f"The experts were found on {plain(', '.join(known))} too, so this flatters the recipe: take other texts."
        )


def _found_on(recipe: Recipe, corpora: list[str]) -> list[str]:
    """The evaluated corpora on whose texts the recipe was found, as far as its source says."""
    from workbench.corpus import BUNDLED, SAMPLES

    source = recipe.source.get("corpus")
    names = set(source.get("names", [])) if isinstance(source, dict) else set()
    sampled = names & set(SAMPLES)  # a sample has texts of all bundled corpora
    return [
        name
        for name in corpora
        if name in names or (sampled and name in BUNDLED) or (name in SAMPLES and names & {*BUNDLED, *SAMPLES})
    ]
