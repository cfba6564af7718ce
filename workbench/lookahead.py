"""Which experts a router would choose one layer early: what `lookahead` records, and for which families.

Systems that keep experts in slower memory fetch those of layer l + 1 while layer l computes, by asking the router of
layer l + 1 with the input of layer l's router (Eliseev & Mazur 2023, arXiv 2312.17238, section 3.2). Here the family's
own router does it: when layer l + 1's router is called, its `forward` is run once more, on the side, with the hidden
states that layer l's router got and everything else as it is. `forward` and not the module is called: no hook sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.errors import InputError
from workbench.layers import Layer, family_of
from workbench.observation import chosen, decode

NO_LOOKAHEAD: dict[str, str] = {
    "doge": "its router is a part of its experts, so it can't be asked by itself",
}
"""Family -> why `lookahead` can't be recorded."""


def check(layer: Layer) -> None:
    """InputError if the layer's router can't be asked by itself."""
    family = family_of(layer.block)
    if family in NO_LOOKAHEAD:
        raise InputError(f"lookahead can't be recorded for {family}: {NO_LOOKAHEAD[family]}. Record without lookahead.")


def following(layers: Sequence[Layer], layer: Layer) -> Layer | None:
    """The next layer of the same stack; None for the last."""
    return next((other for other in layers[layer.index + 1 :] if other.stack == layer.stack), None)


def hook(layer: Layer, after: Layer, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Hooks that call `keep` with the ids, int64 (T, k of `after`), that `after` would choose given `layer`'s input."""
    held: list[Tensor] = []

    def early(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held[:] = [_hidden(args, kwargs).detach()]

    def late(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _hidden(args, kwargs)
        if not held or held[0].shape != hidden.shape:  # a pass that failed in between
            return
        instead = held.pop()
        args = tuple(instead if value is hidden else value for value in args)
        kwargs = {name: instead if value is hidden else value for name, value in kwargs.items()}
        with torch.no_grad():
            keep(choice(after, after.router.forward(*args, **kwargs)))

    return [
        layer.router.register_forward_pre_hook(early, with_kwargs=True),
        after.router.register_forward_pre_hook(late, with_kwargs=True),
    ]


def choice(layer: Layer, out: Any) -> Tensor:
    """Ids (T, k), -1 where there is none, from what the layer's router returned."""
    module, method = layer.selector
    if method != "forward":  # dbrx: the block selects
        weights, ids = getattr(module, method)(out)
    else:
        ids, weights = decode(layer, chosen(layer, out))
    return ids.masked_fill(weights == 0, -1) if layer.family.skips else ids


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
