"""What a recipe is judged by: the plain model, the steered one, and the same edits of experts drawn at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from workbench.errors import InputError, not_negative
from workbench.intervening import Given, Intervened, about_generation, check, in_force, interventions_of
from workbench.interventions import AnyIntervention, Contrast, Delta, OnExperts, Remix, control
from workbench.models import Model
from workbench.recipe import described

PLAIN, STEERED, RANDOM = "plain", "steered", "random"
Conditions = dict[str, tuple[AnyIntervention, ...]]
"""Name -> what is done to the model: plain (nothing), steered, "random 0", "random 1", …, in this order."""


def conditions(model: Model, recipe: Given, n_random: int, seed: int) -> Conditions:
    """The plain model, the recipe, and n_random controls named after their seeds: seed, seed + 1, …

    There are no controls where the recipe names no experts. InputError for a recipe that doesn't fit the model.
    """
    if n_random < 0:
        raise InputError(f"n_random is {n_random}; expected the number of random controls, 0 for none.")
    not_negative(seed=seed)
    steered = interventions_of(recipe, model)
    check(model, steered)
    found: Conditions = {PLAIN: (), STEERED: steered}
    if any(isinstance(one, OnExperts | Delta | Remix) for one in steered):
        found |= {f"{RANDOM} {number}": control(steered, number) for number in range(seed, seed + n_random)}
    return found


def refuse_generation(found: Conditions, what: str) -> None:
    """InputError where an edit of the recipe acts on generated tokens only, of which there are none."""
    late = about_generation(found[STEERED])
    if isinstance(late, Contrast):
        raise InputError(
            f"Contrast is for decoding: it makes all but a few next tokens impossible, so {what} would be infinite. "
            "Compare texts instead: workbench generate --compare."
        )
    if late is not None:
        raise InputError(
            f"{described(late)} acts on generated tokens only, and {what} is of texts that are given. Change its "
            "scope, or compare texts: workbench generate --compare."
        )


@contextmanager
def under(model: Model, applied: Intervened | None) -> Iterator[None]:
    """A condition in force inside the block, which can be entered again and again, so that conditions take turns.

    None is the plain model.
    """
    with nullcontext() if applied is None else in_force(model, applied):
        yield
