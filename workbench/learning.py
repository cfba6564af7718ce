"""What learned edits of routing share: token ids checked, and a loss whose gradient reaches the edits and nothing else.

A loss is a mean over predicted tokens, in nats. The parameters of a model never get a gradient and never change: while
something is learned they are marked as needing none, and afterwards as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from workbench.errors import InputError, RunError
from workbench.forward import predicts_next, reads_twice
from workbench.models import Model


def as_ids(
    model: Model, token_ids: Sequence[int] | np.ndarray | Tensor, name: str = "the prompt", least: int = 2
) -> Tensor:
    """int64 (1, n) on the model's device. InputError for fewer than `least` tokens, ids that the model doesn't have."""
    if reads_twice(model) or not predicts_next(model):
        raise InputError(f"{model.family} doesn't predict the next token of a text, so there is no loss to learn from.")
    ids = (token_ids if isinstance(token_ids, Tensor) else torch.from_numpy(np.array(token_ids))).flatten()
    if len(ids) < least:
        raise InputError(f"{name} is {['empty', 'one token'][len(ids)]}; expected at least {least} tokens.")
    if ids.is_floating_point():
        raise InputError(f"{name} is numbers of {ids.dtype}; expected token ids, whole numbers.")
    n: int = model.module.get_input_embeddings().num_embeddings  # type: ignore[operator,assignment]
    outside = ids[(ids < 0) | (ids >= n)]
    if len(outside):
        raise InputError(f"{name} has token id {int(outside[0])}; {model.name} knows ids from 0 to {n - 1}.")
    if model.max_length is not None and len(ids) > model.max_length:
        raise InputError(f"{name} has {len(ids)} tokens; {model.name} is made for at most {model.max_length}.")
    # Cloned: a tensor made in inference_mode couldn't be used where gradients are.
    with torch.inference_mode(False):
        return ids.long().to(model.device)[None].clone()


def loss(model: Model, ids: Tensor, first: int = 1) -> Tensor:
    """Mean nats of the tokens from position `first` on, each given all before it: float32 scalar; ids int64 (1, n)."""
    module: Any = model.module
    logits = module(input_ids=ids, use_cache=False).logits[0, first - 1 : -1]
    return cross_entropy(logits.float(), ids[0, first:])


@contextmanager
def gradients(model: Model) -> Iterator[None]:
    """Gradients on, also within inference_mode, but for none of the model's parameters."""
    needing = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    try:
        for parameter in needing:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in needing:
            parameter.requires_grad_(True)


def gradient(of: Tensor, vectors: Sequence[Tensor]) -> None:
    """Put the gradient of a loss into `.grad` of the vectors, for an optimiser. RunError where none reaches them."""
    found = torch.autograd.grad(of, list(vectors), allow_unused=True) if of.requires_grad else ()
    if not any(one is not None for one in found):
        raise RunError("no gradient reaches the router in these layers: the loss doesn't depend on the weights there.")
    for vector, one in zip(vectors, found, strict=True):
        vector.grad = torch.zeros_like(vector) if one is None else one


def whole(value: int, name: str, least: int) -> None:
    """InputError unless value is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} is {value!r}; expected a whole number from {least}.")


def some_layers(model: Model, layers: Sequence[int]) -> list[int]:
    """The numbers of layers, ascending; InputError for one that the model hasn't, or that has no logits to edit."""
    found = sorted(set(layers))
    if not found:
        raise InputError("layers is empty; expected the number of at least one layer, or none for the default.")
    for number in found:
        if not 0 <= number < len(model.layers):
            raise InputError(f"layer {number}: {model.name} has layers 0 to {len(model.layers) - 1}.")
        if model.layers[number].scoring == "hash":
            raise InputError(
                f"layer {number} of {model.name} selects by token id: it has no logits to edit. Layers that do: "
                f"{', '.join(str(layer.index) for layer in scored(model))}."
            )
    return found


def scored(model: Model) -> list:
    """The layers whose router has scores."""
    return [layer for layer in model.layers if layer.scoring != "hash"]
