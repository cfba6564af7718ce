"""One text as an importer reads it, and the check that its routing can be what a router chose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.routing import NO_EXPERT

NONE = -1
"""In `Text.experts`: no expert, as for a token that the router didn't see."""

DENSE_TOKENS = 16
"""As many tokens that all have expert 0 of a top-1 router mean that nothing was recorded there."""


@dataclass(frozen=True)
class Text:
    """One sequence of a dump: n tokens, L routers, k ids each.

    where        file and line or name, for messages
    experts      integers (n, L, k): ids as the file has them; -1 where there is no expert
    weights      float32 (n, L, k): gate weights
    logits       float32 (n, L, E): router logits
    token_ids    integers (n,); -1 where unknown
    predictions  integers (n,): the token that the model would put next
    nll          float (n,): nats, NaN where unknown
    fields       lang, domain, source, n_prompt, … and any metadata, as in the columns of a corpus
    vocabulary   texts of token ids
    model        the model's name, where the file tells it
    n_experts    E, where the file tells it
    layers       numbers of the routers in the model, L of them; None: 0, 1, …
    """

    where: str
    experts: np.ndarray
    weights: np.ndarray | None = None
    logits: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    predictions: np.ndarray | None = None
    nll: np.ndarray | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Mapping[int, str] = field(default_factory=dict)
    model: str | None = None
    n_experts: int | None = None
    layers: Sequence[int] | None = None

    @property
    def numbers(self) -> list[int]:
        """Number of each router's layer in the model."""
        return list(range(self.experts.shape[1])) if self.layers is None else list(self.layers)


def integers(where: str, name: str, value: Any, ndim: int) -> np.ndarray:
    """`value`, nested lists or an array, as integers of `ndim` dimensions; InputError if it can't be."""
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):
        array = None
    if array is None or array.ndim != ndim or (array.dtype.kind not in "iu" and array.size):
        found = type(value).__name__ if array is None else f"{array.dtype} of shape {array.shape}"
        raise InputError(
            f"{where}: {name} is {found}; expected whole numbers in {ndim} dimension{'s'[: ndim > 1]}, "
            "as many in each row."
        )
    return array.astype(np.int64) if not array.size else array


def token_ids(where: str, value: Any, n: int) -> np.ndarray:
    """int64 (n,): ids of tokens, -1 where unknown. InputError if `value` isn't n of them."""
    found = integers(where, "the list of token ids", value, 1)
    if len(found) != n:
        raise InputError(f"{where}: {len(found)} token ids for {n} tokens with routing.")
    if n and (found.min() < -1 or found.max() > np.iinfo(np.int32).max):
        raise InputError(f"{where}: token ids range from {found.min()} to {found.max()}; expected 0 to 2147483647.")
    return found.astype(np.int64)


def checked(text: Text, n_experts: int, shape: tuple[int, int], dense: Sequence[int]) -> np.ndarray:
    """The ids of a text, uint16 (n, L - dense, k), NO_EXPERT where none, if they can be what a router chose.

    shape  (L, k) that the text must have; dense: layers of the model that have no router, left out

    InputError names the token and the layer: ids not below `n_experts`, an id twice, a layer of nothing but zeros, ids
    that a too small integer type has cut, and texts without routing.
    """
    experts = text.experts
    if experts.shape[1:] != shape:
        raise InputError(
            f"{text.where}: {experts.shape[1]} layers of top-{experts.shape[2]}; the first text has {shape[0]} of "
            f"top-{shape[1]}. Import what other models or settings made into a file of its own."
        )
    if not len(experts):
        raise InputError(f"{text.where}: no token has routing. Leave such a text out.")
    _check_type(text, n_experts)
    numbers = text.numbers
    kept = [layer for layer, number in enumerate(numbers) if number not in dense]
    _check_dense(text, [layer for layer in range(len(numbers)) if layer not in kept])
    ids = experts[:, kept]
    if bad := _first(ids < NONE):
        raise _wrong(text, numbers[kept[bad[1]]], bad, f"the id {ids[bad]}, below 0", _small(n_experts, 128))
    if bad := _first(ids >= n_experts):
        raise _wrong(
            text, numbers[kept[bad[1]]], bad, f"the id {ids[bad]}; the model has {n_experts} experts, 0 to "
            f"{n_experts - 1}", " Give the right --n-experts.",
        )  # fmt: skip
    ordered = np.sort(ids, axis=2)
    if bad := _first((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NONE)):
        row = ids[bad[0], bad[1]]
        if not row.any():
            raise _nothing(text, numbers[kept[bad[1]]])
        raise _wrong(
            text, numbers[kept[bad[1]]], bad, f"the ids {row.tolist()}: an expert is chosen at most once",
            _small(n_experts, 256),
        )  # fmt: skip
    return np.where(ids == NONE, NO_EXPERT, ids).astype(np.uint16)


def check_top_1(seen: Sequence[int], largest: Sequence[int], numbers: Sequence[int]) -> None:
    """InputError for a top-1 router that gave all of its `seen` tokens expert 0, `largest` being its largest id."""
    for n, most, number in zip(seen, largest, numbers, strict=True):
        if n >= DENSE_TOKENS and most == 0:
            raise InputError(f"layer {number} is 0 for all {n:,} tokens. {_NOTHING.format(number)}")


def _check_type(text: Text, n_experts: int) -> None:
    """Refuse integer types that can't hold the ids of so many experts."""
    kind = text.experts.dtype
    if n_experts - 1 > np.iinfo(kind).max:
        raise InputError(
            f"{text.where}: ids of {n_experts} experts were saved as {kind}, which ends at {np.iinfo(kind).max}: "
            "larger ids have become others. Save them in a wider type and import again."
        )


def _check_dense(text: Text, layers: Sequence[int]) -> None:
    for layer in layers:
        if (text.experts[:, layer] > 0).any():
            raise InputError(f"{text.where}: layer {text.numbers[layer]} has routing: take it out of --dense-layers.")


def _first(bad: np.ndarray) -> tuple[int, ...]:
    """Where the first True is; empty if there is none."""
    return tuple(int(at) for at in np.unravel_index(np.argmax(bad), bad.shape)) if bad.any() else ()


def _wrong(text: Text, number: int, at: tuple[int, ...], what: str, hint: str) -> InputError:
    return InputError(f"{text.where}: token {at[0]}, layer {number} has {what}.{hint}")


def _small(n_experts: int, size: int) -> str:
    """What to say where an integer type that is too small may be the cause."""
    if n_experts <= 128:
        return ""
    way = "128 becomes -128" if size == 128 else "ids that differ by 128 or 256 become the same"
    return (
        f" Was it saved as {'int8' if size == 128 else 'int8 or uint8'}? Of {n_experts} experts {way}: save the ids in "
        "a wider type and import again."
    )


_NOTHING = (
    "Either the engine recorded nothing there, or it is a dense layer without a router: then name it, --dense-layers {}"
)


def _nothing(text: Text, number: int) -> InputError:
    return InputError(f"{text.where}: layer {number} is all zeros. {_NOTHING.format(number)}")
