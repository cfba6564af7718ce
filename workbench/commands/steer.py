"""Steering, and seeing what it does: `generate`."""

import json
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

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
from workbench.commands.options import Device, Dtype, Json, Revision, Trust, model_and_prompt
from workbench.errors import InputError
from workbench.printing import paragraphs, plain
from workbench.recipe import to_json

if TYPE_CHECKING:
    from workbench.generation import Generated


class Control(Enum):
    random = "random"


def generate(
    words: Annotated[
        list[str], typer.Argument(metavar="[MODEL] PROMPT", help="A model (default: `demo`), and text to continue.")
    ],
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
    compare: Annotated[bool, typer.Option("--compare", help="Also continue it without edits; mark what differs.")] = (
        False
    ),
    control: Annotated[
        Control | None, typer.Option(help="Compare also with the same edits of as many random experts.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, else tokens are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of drawn tokens, and of the control's experts.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message: apply the chat template.")] = False,
    as_json: Json = False,
    revision: Revision = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue a text under edits of the routing, and compare with how it goes on without them.

    Edits act in this order: the recipe's, then those by options: bias, ablate, forbid, force, top-k, top-p, scale,
    contrast. Where two say different things of one expert, the later wins.
    """
    model, prompt = model_and_prompt(words)
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
    compare = compare or control is not None
    if compare and edited is None:
        raise InputError("nothing to compare with: give --recipe, or an edit such as --ablate 3:5.")
    from workbench import continuations, generation
    from workbench.models import load

    loaded = load(model, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "chat": chat}
    random = seed if control is not None else None
    try:
        if compare and edited is not None:
            found = generation.compare(loaded, prompt, edited, control=random, **options)
        else:
            name = "plain" if edited is None else "steered"
            show = None if as_json else lambda step: print(paragraphs(step.text), end="", flush=True)
            found = {name: generation.generate(loaded, prompt, edited, on_step=show, **options)}
    except KeyboardInterrupt:
        print(file=sys.stdout if not as_json else sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        given = None if edited is None else to_json(edited)
        print(json.dumps(continuations.result(model, prompt, options, given, found), indent=2))
    elif compare:
        _print_compared(found)
    else:
        print()


def _print_compared(found: "dict[str, Generated]") -> None:
    from workbench import continuations

    differences = continuations.differences(found)
    marks = {**differences, "plain": differences["steered"]}
    for name, one in found.items():
        mark = marks[name]
        print(f"{name}\n{paragraphs(one.text) if mark is None else _marked(one, mark['at'])}\n")
    for name, one in differences.items():
        if one is None:
            print(f"{name}: the same tokens as plain")
        else:
            became = " became ".join(_quoted(one[each]) for each in ("plain", "token"))
            print(f"{name}: from token {one['at']} on (counted from 0), where {became}")


def _quoted(token: str | None) -> str:
    return "the end" if token is None else f'"{plain(token)}"'


def _marked(one: "Generated", at: int) -> str:
    """The text with the token at this place in brackets; a piece of a character with the whole of it."""
    texts = [step.text for step in one.steps]
    last = next((place for place in range(at, len(texts)) if texts[place]), len(texts))
    parts = "".join(texts[:at]), "".join(texts[at : last + 1]), "".join(texts[last + 1 :])
    before, marked, after = map(paragraphs, parts)
    return f"{before}[[{marked}]]{after}"
