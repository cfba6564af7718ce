"""What one router did in one forward pass, decoded from what a recorder's hooks kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import RunError
from workbench.layers import Layer


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One router in one forward pass: batch B, sequence S (padding included), k experts a token, E experts in all.

    experts        int64   (B, S, k)  ids in the router's own rank order; -1 where there is no expert
    weights        float32 (B, S, k)  0 where there is no expert
    entropy        float32 (B, S)     nats
    margin         float32 (B, S)
    logits         float32 (B, S, E)
    norms          float32 (B, S, k)  0 where there is no expert
    probabilities  float32 (B, S, E)
    shift          float32 (B, S)     in [0, 2]
    lookahead      int64   (B, S, k') ids of the next layer's experts, top-k' there; -1 where there is none. None in the
                                      last layer of a stack
    broken         bool    (B, S)     whether a weight is NaN or infinite, as padding may have it
    """

    experts: Tensor
    weights: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    logits: Tensor | None = None
    norms: Tensor | None = None
    probabilities: Tensor | None = None
    shift: Tensor | None = None
    lookahead: Tensor | None = None
    broken: Tensor | None = None


@dataclass(slots=True)
class Seen:
    """What the hooks of one layer kept of one pass. `selection` is as the family has it; `Recorder.take` decodes it."""

    shape: tuple[int, int]
    selection: tuple[Any, ...]
    extras: dict[str, Tensor]


def unsort(order: Tensor, values: Tensor) -> Tensor:
    """Undo values = original[order]."""
    return torch.empty_like(values).scatter_(0, order, values)


def chosen(layer: Layer, out: Any) -> tuple[Any, ...]:
    """The part of what the layer's router returned that `decode` takes."""
    layout = layer.family.layout
    if layout == "dense":  # every score that isn't 0 is a selected expert's, and no other expert contributes
        weights, ids = out[0].detach().topk(layer.top_k, dim=-1)
        return ids.masked_fill(weights == 0, -1), weights
    if layout == "sorted":
        return out[0], out[2], out[3]
    if layout == "one-hot":
        return out[0], out[1]
    return out[2], out[1]


def decode(layer: Layer, selection: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Ids and weights, both (T, k), from what the layout's hook kept."""
    if layer.family.layout == "sorted":
        order, weights, sizes = selection
        experts = torch.arange(len(sizes), device=order.device)
        ids = experts.repeat_interleave(torch.tensor(sizes, device=order.device))
        return unsort(order, ids).view(-1, layer.top_k), unsort(order, weights.detach()).view(-1, layer.top_k)
    ids, weights = selection
    if layer.family.layout == "one-hot":
        mask = ids.reshape(-1, layer.n_experts)
        best = mask.max(-1)
        return best.indices.masked_fill(best.values == 0, -1).unsqueeze(-1), weights.reshape(-1, 1)
    return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])


def observation(layer: Layer, seen: Seen, record: frozenset[str], *, zeroed: bool = False) -> Observation:
    """Decode and check what one layer saw in one pass.

    zeroed  whether a weight of 0 means that the token doesn't have the expert, as under some interventions
    """
    ids, weights = decode(layer, seen.selection)
    batch, length = seen.shape
    if length >= 0 and len(ids) != batch * length:
        raise RunError(
            f"{layer.name} routed {len(ids)} of {batch * length} tokens (batch {batch} × length {length}): only some "
            "of the input goes through it, as when images have experts of their own. Trace text without images."
        )
    extras = dict(seen.extras)
    if layer.family.skips or zeroed:
        ids = ids.masked_fill(weights == 0, -1)
    if zeroed:  # the experts that are left come first, and every pass is as wide as any
        order = (ids < 0).to(torch.int8).argsort(dim=-1, stable=True)
        ids = _wide(ids.gather(-1, order), layer.top_k, -1)
        weights = _wide(weights.gather(-1, order), layer.top_k, 0)
        if "norms" in extras:
            extras["norms"] = _wide(extras["norms"].gather(-1, order), layer.top_k, 0)
    none = ids < 0
    if layer.top_k > 1:
        ranked = ids.sort(-1).values
        if bool(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any()):
            raise RunError(f"{layer.name} gave a token the same expert twice: the record can't be what the router did.")
    if len(ids) and not bool(none.all()) and not bool(weights.any()):
        raise RunError(f"{layer.name} gave every expert the weight 0: the record can't be what the router did.")
    extras["broken"] = (~weights.isfinite() & ~none).any(-1)
    if "weights" in record:
        extras["weights"] = weights.float().masked_fill(none, 0.0)
    if "norms" in extras:
        extras["norms"] = extras["norms"].masked_fill(none, 0.0)
    shaped = {name: x.reshape(batch, length, *x.shape[1:]) for name, x in extras.items()}
    if "margin" in record and "margin" not in shaped:  # hash layers
        shaped["margin"] = torch.full((batch, length), torch.nan, device=ids.device)
    return Observation(experts=ids.long().reshape(batch, length, -1), **shaped)


def _wide(values: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(values, (0, width - values.shape[-1]), value=fill)
