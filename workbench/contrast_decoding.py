"""Contrast a model's next-token logits with those of a pass with weaker routing, as a `Contrast` says.

The weak pass runs on a twin: modules of its own that share the model's parameters, so that recorders and edits of the
model don't see it, and it has a cache of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.interventions import Contrast
from workbench.models import Model


@contextmanager
def contrasting(
    model: Model,
    contrast: Contrast,
    weak: Model,
    intervene: Callable[..., AbstractContextManager[Any]],
    count: Callable[[int], None],
) -> Iterator[None]:
    """Inside the block, the model's logits are contrasted with those of `weak` under the edits of the contrast."""
    caches: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # the model's -> that of the weak pass
    passed: list[Any] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            past = cache.get_seq_length()
            if past == 0:
                caches[cache] = copy.deepcopy(cache)
            elif cache not in caches:
                raise InputError("Contrast: the cache was filled before the interventions: begin with the prompt.")
            elif caches[cache].get_seq_length() > past:  # the model's was cut
                caches[cache].crop(past - caches[cache].get_seq_length())
            kwargs = kwargs | {"past_key_values": caches[cache]}
        passed[:] = [weak.module(*args, **kwargs)]

    def after(_module: nn.Module, _args: Any, out: Any) -> Any:
        other = passed.pop()
        if not hasattr(out, "logits") or getattr(out, "loss", None) is not None:
            raise InputError("Contrast changes the logits: call the model without labels and with return_dict.")
        cache = getattr(out, "past_key_values", None)
        if cache is not None:
            caches[cache] = other.past_key_values
        count(out.logits.shape[0] * out.logits.shape[1])
        out.logits = contrasted(out.logits, other.logits, contrast.alpha, contrast.beta)
        return out

    with intervene(weak, contrast.weak):
        handles = [
            model.module.register_forward_pre_hook(before, with_kwargs=True),
            model.module.register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def contrasted(strong: Tensor, weak: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + beta) · strong - beta · weak, and -inf where strong < ln alpha + max strong; over the last dimension.

    SCMoE, Shi et al. 2024, section 2. alpha = 0 leaves every token possible.
    """
    if alpha == 0:
        return (1 + beta) * strong - beta * weak
    enough = strong >= strong.max(-1, keepdim=True).values + math.log(alpha)
    return ((1 + beta) * strong - beta * weak).masked_fill(~enough, -torch.inf)
