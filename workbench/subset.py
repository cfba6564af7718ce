"""A copy of a model with some of its experts, in any order: what pruning, merging and permuting share.

    smaller = subset(model, [np.array([0, 3, 5, 6])] * 3)       # 4 experts in each of 3 layers

Which tensors have an axis over experts is asked of transformers: the same class is built, without weights, for a
configuration with twice the experts, and what grows is such an axis. So router rows, selection biases and per-expert
scales follow their experts in every family.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.layers import Layer, find_layers
from workbench.models import Model

# What configurations call the number of routed experts, and the experts a token.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
)  # fmt: skip
_REFUSED = {
    "doge": "its experts are pairs of product keys, so single ones can't be taken out",
    "ernie4_5_vl_moe": "its text and image experts share one count",
    "jetmoe": "its attention has experts too, under the same count",
    "longcat_flash": "its zero-computation experts share the numbering of the others",
    "switch_transformers": "its experts are modules of their own, not one fused parameter",
    "zaya": "one of its router's classes is no expert",
}


@dataclass(frozen=True, slots=True)
class Axis:
    """Where a tensor keeps experts: `size` entries of `axis` for each, then entries that belong to none."""

    axis: int
    size: int


def subset(model: Model, chosen: Sequence[np.ndarray]) -> Model:
    """A copy with only the chosen experts; the given model isn't changed.

    chosen  one array a layer: ids of the experts that stay, distinct, in their new order; equally many in every layer.
            All ids in another order make a permuted copy, which computes the same.

    A token still gets top_k experts, or as many as are left to choose from. Tensors without an axis over experts are
    shared with the given model, not copied. InputError for ids that aren't as described, families whose experts can't
    be taken apart, and routers that choose among groups of experts if a group would have fewer than others or too few.
    """
    ids = _checked(model, chosen)
    keep = len(ids[0])
    axes = expert_axes(model)
    config = resized(model, keep, top_k(model, keep))
    module: Any = _on_meta(type(model.module), config)
    taken: dict[str, Tensor] = {}
    layer_of = _layers_by_block(model)
    original = dict(_tensors(model.module))
    with torch.no_grad():
        for name, tensor in original.items():
            axis = axes.get(name)
            taken[name] = (
                tensor if axis is None else _take(tensor, axis, ids[layer_of(name)], model.layers[0].n_experts)
            )
    _fill(module, taken)
    module.generation_config = copy.deepcopy(getattr(model.module, "generation_config", None))
    if (conversions := getattr(model.module, "_weight_conversions", None)) is not None:
        module._weight_conversions = conversions  # how its checkpoint names things
    made = replace(model, module=module.eval(), layers=find_layers(module))
    if any((layer.n_experts, layer.top_k) != (keep, top_k(model, keep)) for layer in made.layers):
        raise _unclear(model, "its configuration")
    return made


def top_k(model: Model, keep: int) -> int:
    """Experts a token when each layer has `keep` of them: as before, or all that a router can choose from."""
    found = model.layers[0].top_k
    return min([found, *(keep // n_groups * n_chosen for n_groups, n_chosen in map(groups, model.layers) if n_groups)])


def groups(layer: Layer) -> tuple[int, int]:
    """Of how many equal groups of consecutive experts a router chooses how many; (1, 1) where it has no groups."""
    if "groups" not in layer.gating.split(", "):
        return 1, 1
    found = {name: getattr(layer.router, name, None) for name in ("num_group", "n_group", "topk_group")}
    return found["num_group"] or found["n_group"] or 1, found["topk_group"] or 1


def check(model: Model) -> None:
    """InputError if the model's experts can't be taken apart."""
    if model.family in _REFUSED:
        raise InputError(f"the experts of {model.name} can't be taken apart: {model.family}, {_REFUSED[model.family]}.")
    if any(layer.scoring == "hash" for layer in model.layers):
        raise InputError(
            f"the experts of {model.name} can't be taken apart: its hash layers name experts by number for every token."
        )
    if getattr(model.module, "hf_quantizer", None) is not None:
        raise InputError(f"{model.name} is quantised: load it in float precision, then choose among its experts.")
    counts = sorted({layer.n_experts for layer in model.layers})
    if len(counts) > 1:
        raise InputError(
            f"the layers of {model.name} have {', '.join(map(str, counts))} experts, and a configuration has one count "
            "for all: expected the same number in every layer."
        )


def check_count(model: Model, keep: int) -> None:
    """InputError if `keep` experts a layer isn't possible."""
    n_experts = model.layers[0].n_experts
    if not 1 <= keep <= n_experts:
        raise InputError(f"keep is {keep}; {model.name} has {n_experts} experts a layer: give 1 to {n_experts}.")
    for layer in model.layers:
        if layer.gating == "sparsemixer" and keep < 2:
            raise InputError(f"keep is {keep}; the routers of {model.name} select a second expert: give at least 2.")
        n_groups, _ = groups(layer)
        least = 2 if layer.scoring != "softmax" or "+ bias" in layer.gating else 1  # a group's score: its best two
        if n_groups > 1 and (keep % n_groups or keep // n_groups < min(least, n_experts // n_groups)):
            usable = ", ".join(str(n) for n in range(n_groups * least, n_experts + 1, n_groups))
            raise InputError(
                f"keep is {keep}; the routers of {model.name} choose among {n_groups} equal groups of experts, with at "
                f"least {least} in each: give one of {usable}."
            )


def resized(model: Model, n_experts: int, k: int) -> Any:
    """A copy of the model's configuration with other numbers of experts, and of experts a token."""
    config = copy.deepcopy(getattr(model.module, "config", None))
    if config is None:
        raise InputError(f"{model.name} has no configuration, so its experts can't be counted anew.")
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layer = model.layers[0]
    for part in (text, getattr(text, "ffn_config", None)):
        for names, old, new in ((_COUNTS, layer.n_experts, n_experts), (_TOP_K, layer.top_k, k)):
            for name in names:
                if part is not None and vars(part).get(name) == old:
                    setattr(part, name, new)
    return config


def expert_axes(model: Model) -> dict[str, Axis]:
    """Which parameters and buffers have an axis over experts, by name. InputError where that can't be told."""
    check(model)
    n_experts = model.layers[0].n_experts
    doubled = dict(_tensors(_on_meta(type(model.module), resized(model, 2 * n_experts, model.layers[0].top_k))))
    layer_of = _layers_by_block(model)
    axes = {}
    for name, tensor in _tensors(model.module):
        other = doubled.pop(name, None)
        if other is None or other.dim() != tensor.dim():
            raise _unclear(model, name)
        grown = [(axis, b - a) for axis, (a, b) in enumerate(zip(tensor.shape, other.shape, strict=True)) if a != b]
        if not grown:
            continue
        (axis, growth), *further = grown
        if further or growth % n_experts or growth > tensor.shape[axis] or layer_of(name) is None:
            raise _unclear(model, name)
        axes[name] = Axis(axis, growth // n_experts)
    if doubled or len({layer_of(name) for name in axes}) != len(model.layers):
        raise _unclear(model, next(iter(doubled), model.layers[0].name))
    return axes


def _unclear(model: Model, name: str) -> InputError:
    return InputError(
        f"the experts of {model.name} ({model.family}) can't be taken apart: how {name} depends on their number isn't "
        "clear. Families with fused experts can be: olmoe, mixtral, qwen3_moe, deepseek_v3, gpt_oss, …"
    )


def _checked(model: Model, chosen: Sequence[np.ndarray]) -> list[np.ndarray]:
    check(model)
    ids = [np.asarray(each) for each in chosen]
    if len(ids) != len(model.layers):
        raise InputError(f"chosen names {len(ids)} layers; {model.name} has {len(model.layers)} with experts.")
    n_experts = model.layers[0].n_experts
    for layer, each in enumerate(ids):
        if each.ndim != 1 or each.dtype.kind not in "iu" or len(np.unique(each)) < each.size:
            raise InputError(f"chosen[{layer}] is {each.tolist()}; expected distinct ids of experts.")
        if each.size != ids[0].size:
            raise InputError(
                f"chosen has {ids[0].size} experts in layer 0 and {each.size} in {layer}: give equally many."
            )
        if each.size and not 0 <= each.min() <= each.max() < n_experts:
            raise InputError(f"chosen[{layer}] is {each.tolist()}; {model.name} has experts 0 to {n_experts - 1}.")
    check_count(model, ids[0].size)
    for layer, each in zip(model.layers, ids, strict=True):
        n_groups, _ = groups(layer)
        group = each // (n_experts // n_groups)
        parts = group.reshape(n_groups, -1)
        if (parts != parts[:, :1]).any() or len(np.unique(parts[:, 0])) < n_groups:
            raise InputError(
                f"{layer.name} chooses among {n_groups} groups of consecutive experts, and the experts chosen, "
                f"{each.tolist()}, don't form such groups: take equally many of each group, side by side."
            )
    return ids


def _layers_by_block(model: Model) -> Any:
    """A function from a tensor's name to the index of the layer it is in; None where it is in none."""
    blocks = {layer.name.rpartition(".")[0] + ".": layer.index for layer in model.layers}

    def layer_of(name: str) -> int | None:
        return next((index for prefix, index in blocks.items() if name.startswith(prefix)), None)

    return layer_of


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, tied ones under each of their names, those that aren't saved included."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _on_meta(cls: Any, config: Any) -> nn.Module:
    """The class without weights."""
    with torch.device("meta"):
        return cls(config)


def _take(tensor: Tensor, axis: Axis, ids: np.ndarray, n_experts: int) -> Tensor:
    """The entries of the experts `ids`, in that order, and behind them those that belong to no expert."""
    places = (ids[:, None] * axis.size + np.arange(axis.size)).ravel()
    places = np.append(places, np.arange(n_experts * axis.size, tensor.shape[axis.axis]))
    return tensor.detach().index_select(axis.axis, torch.as_tensor(places, device=tensor.device))


def mix(source: Tensor, target: Tensor, axis: Axis, mixing: np.ndarray) -> None:
    """Write into target, for each of its experts, a mean over the source's: mixing is float32 (n_new, n_old)."""
    n_new, n_old = mixing.shape
    moved = source.detach().float().movedim(axis.axis, 0)[: n_old * axis.size]
    parts = moved.reshape(n_old, axis.size, *moved.shape[1:])
    mean = torch.einsum("ne,e...->n...", torch.as_tensor(mixing, device=source.device), parts)
    with torch.no_grad():
        target.movedim(axis.axis, 0)[: n_new * axis.size] = mean.reshape(-1, *moved.shape[1:]).to(target.dtype)


def _fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of those of a module on the meta device; a parameter stays a parameter."""
    made: dict[int, nn.Parameter] = {}
    for name, empty in list(_tensors(module)):
        owner, _, last = name.rpartition(".")
        tensor = tensors[name]
        if tensor.shape != empty.shape:
            raise InputError(f"{name} would have the shape {tuple(tensor.shape)}; the configuration asks for another.")
        if isinstance(empty, nn.Parameter):
            # One object a tensor, so that tied weights stay tied.
            tensor = made.setdefault(id(tensor), nn.Parameter(tensor.detach(), requires_grad=empty.requires_grad))
        holder: Any = module.get_submodule(owner)
        (holder._parameters if isinstance(empty, nn.Parameter) else holder._buffers)[last] = tensor
