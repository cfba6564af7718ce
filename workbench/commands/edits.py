"""Options that make interventions, as in `--ablate 3:5,7` and `--bias "2-5:1=0.5"`.

They come in this order, whatever their order in the command, and each kind in its own: what a recipe file has, then
bias, ablate, forbid, force, top-k, top-p, scale, contrast. Where two say different things of one expert, the later
wins.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import InputError
from workbench.interventions import (
    Ablate,
    AnyIntervention,
    Bias,
    Contrast,
    Forbid,
    Force,
    Layers,
    Scale,
    SetTopK,
    TopP,
)
from workbench.recipe import Recipe, read_recipe

RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="A recipe, as `find` writes it.")]
_AT = "LAYER is a number, 2-5, 1,4 or * for all; may be given several times."
Ablated = Annotated[list[str] | None, typer.Option("--ablate", metavar="L:E,E", help=f"Take experts away. {_AT}")]
Forced = Annotated[list[str] | None, typer.Option("--force", metavar="L:E,E", help="Always select experts.")]
Forbidden = Annotated[
    list[str] | None, typer.Option("--forbid", metavar="L:E,E", help="Never select experts; others' scores stay.")
]
Biased = Annotated[
    list[str] | None,
    typer.Option("--bias", metavar="L:E,E=λ", help="Add λ standard deviations of a token's logits to experts' logits."),
]
Scaled = Annotated[
    list[str] | None, typer.Option("--scale", metavar="L:E,E=β", help="Multiply experts' weights where selected.")
]
TopKs = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Select K experts a token.")]
TopPs = Annotated[float | None, typer.Option("--top-p", metavar="P", help="As many experts as reach probability P.")]
Contrasted = Annotated[
    bool, typer.Option("--contrast", help="Decode against the same model with only its second-best experts (SCMoE).")
]
Scoped = Annotated[
    str | None,
    typer.Option("--scope", help="Where the edits by options act: phase=prompt, phase=generated, position=4-15, …"),
]


def recipe_of(
    file: Path | None,
    *,
    ablate: Sequence[str] | None = None,
    force: Sequence[str] | None = None,
    forbid: Sequence[str] | None = None,
    bias: Sequence[str] | None = None,
    scale: Sequence[str] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    contrast: bool = False,
    scope: str | None = None,
) -> Recipe | None:
    """A recipe file and the options above as one recipe; None if there is neither. InputError says what was expected.

    No model is needed: what doesn't fit one is found out later.
    """
    at = "all" if scope is None else scope
    made: list[AnyIntervention] = []
    for text in bias or []:
        layer, experts, strength = _valued(text, "--bias", "3:5,7=0.5")
        made.append(Bias(layer=layer, experts=experts, strength=strength, scope=at))
    for option, kind, texts in (("--ablate", Ablate, ablate), ("--forbid", Forbid, forbid), ("--force", Force, force)):
        for text in texts or []:
            layer, experts = _placed(text, option, "3:5,7", text)
            made.append(kind(layer=layer, experts=experts, scope=at))
    if top_k is not None:
        made.append(SetTopK(k=top_k, scope=at))
    if top_p is not None:
        made.append(TopP(p=top_p, scope=at))
    for text in scale or []:
        layer, experts, factor = _valued(text, "--scale", "3:5=2")
        made.append(Scale(layer=layer, experts=experts, factor=factor, scope=at))
    if scope is not None and not made:
        raise InputError(f"--scope {scope!r} says where edits by options act; add one, such as --ablate 3:5.")
    if contrast:
        made.append(Contrast())
    found = None if file is None else read_recipe(file)
    if found is None:
        return Recipe(tuple(made)) if made else None
    return Recipe((*found.interventions, *made), found.model, found.source)


def _placed(text: str, option: str, example: str, whole: str) -> tuple[Layers, tuple[int, ...]]:
    """Layers and experts of LAYER:EXPERT,EXPERT."""
    layer, colon, experts = text.partition(":")
    layers, named = numbers(layer), numbers(experts)
    if not colon or not named or not (layers or layer.strip() == "*"):
        raise InputError(
            f"{option} {whole!r}: expected LAYER:EXPERTS, as in `{option} {example}`; LAYER is a number, a range 2-5, "
            "several 1,4, or * for all, and so are EXPERTS but for *."
        )
    return (None if not layers else layers[0] if len(layers) == 1 else layers), named


def _valued(text: str, option: str, example: str) -> tuple[Layers, tuple[int, ...], float]:
    """Layers, experts and value of LAYER:EXPERT,EXPERT=VALUE."""
    place, equals, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        equals = ""
    if not equals:
        raise InputError(f"{option} {text!r}: expected LAYER:EXPERTS=NUMBER, as in `{option} {example}`.")
    return *_placed(place, option, example, text), number


def numbers(text: str) -> tuple[int, ...]:
    """Numbers and ranges, such as 1,4-6; () for anything else."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            return ()
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)
