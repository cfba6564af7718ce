"""The MoE layers of a loaded model: one `Layer` a router, found by structure, read by its family's table entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from workbench.errors import InputError
from workbench.families import FAMILIES, Family

# A router is a child of its block under one of these names, and its class says so. `gate` alone is no proof: in most
# dense models it is the gate of a gated linear unit.
_ROUTER_NAMES = ("gate", "router")
_ROUTER_CLASS = re.compile(r"(Router|Gate|Gating)$")
# Parts of multimodal models that text doesn't pass.
_OTHER_MODALITIES = re.compile(r"(^|\.)[^.]*(vision|visual|audio|talker|code2wav)[^.]*(\.|$)")
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")


@dataclass(frozen=True, eq=False)
class Layer:
    """One router over experts, and the modules that a recorder reads.

    index      0-based over the model's routers, in order of execution
    name       module path of the router
    n_experts  ids are 0 … n_experts - 1
    top_k      most experts a token can have here
    n_shared   experts that every token passes besides
    gating     the router's steps, in the vocabulary of `workbench.families`
    stack      "decoder" or "encoder"
    scoring    "softmax", "sigmoid" or "sqrt-softplus"; "hash" where the token id selects

    For those who write recorders: family (see `workbench.families`); the modules router, experts, block, around (the
    layer that the block is in) and owner (the stack of layers); selector, the module and method that select.
    """

    index: int
    name: str
    n_experts: int
    top_k: int
    n_shared: int
    gating: str
    stack: str
    scoring: str
    family: Family = field(repr=False)
    router: nn.Module = field(repr=False)  # returns the logits
    selector: tuple[nn.Module, str] = field(repr=False)  # module and method within which the selection is made
    experts: nn.Module = field(repr=False)  # for standard, one-hot and dense layouts; else the block
    block: nn.Module = field(repr=False)
    around: nn.Module = field(repr=False)  # the decoder (or encoder) layer that the block is in
    owner: nn.Module = field(repr=False)  # the stack of layers; its inputs tell batch and sequence


def find_layers(module: nn.Module) -> tuple[Layer, ...]:
    """All routers over experts that text passes, in order of execution; () for a dense model.

    InputError for a family that is refused, with the reason, and for one that isn't known.
    """
    blocks = [
        (name, block)
        for name, block in module.named_modules()
        if _router(block) is not None and not _OTHER_MODALITIES.search(name)
    ]
    # Modules come in order of execution but for jetmoe's, whose layers list their MLP before their attention.
    order = {prefix: i for i, prefix in enumerate(dict.fromkeys(_in_stack(name)[1] for name, _ in blocks))}
    blocks.sort(key=lambda item: (order[_in_stack(item[0])[1]], "attention" not in item[0]))
    return tuple(_layer(module, name, block, index) for index, (name, block) in enumerate(blocks))


def family_of(module: nn.Module) -> str:
    """The package of `transformers.models` that the module's class comes from, or its own package's name."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else parts[0]


def _router(block: nn.Module) -> tuple[nn.Module, str] | None:
    """The block's router, and the name of the method of its selector; None where the block is no MoE block."""
    children = dict(block.named_children())
    if "router_gate" in children and "down_embed" in children:  # doge: experts are rows of embeddings
        return children["router_gate"], "forward"
    for name in _ROUTER_NAMES:
        router = children.get(name)
        if router is None or not _ROUTER_CLASS.search(type(router).__name__):
            continue
        if "experts" in children or "output_linear" in children:
            return router, "route_tokens_to_experts" if hasattr(block, "route_tokens_to_experts") else "forward"
    return None


def _in_stack(name: str) -> tuple[str, str]:
    """Module paths of the stack that a block is in, and of its place there: `model` and `model.layers.3`."""
    parts = name.split(".")
    position = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: max(position - 1, 0)]), ".".join(parts[: position + 1])


def _layer(model: nn.Module, name: str, block: nn.Module, index: int) -> Layer:
    found = _router(block)
    assert found is not None
    router, selects_in = found
    family_name = family_of(block)
    family = FAMILIES.get(family_name)
    if family is None:
        raise InputError(
            f"{type(block).__name__}: a mixture of experts of a family that isn't known ({family_name}). "
            "`workbench models` lists the families that can be traced."
        )
    if family.refused:
        raise InputError(f"{family_name} can't be traced: {family.refused}.")
    experts = dict(block.named_children()).get("experts", block)
    text_config = _text_config(model)
    config = next((m.config for m in (router, experts, block) if hasattr(m, "config")), text_config)
    if family.layout == "product keys":
        n_experts: int = block.num_keys**2  # type: ignore[operator]
    else:
        n_experts = _first((router, "n_routed_experts"), (router, "num_experts"), (experts, "num_experts"))
        n_experts = n_experts or _first((config, "num_experts"))
    hash_layer = hasattr(router, "tid2eid")
    scoring = _scoring(family, config, text_config)
    stack, place = _in_stack(name)
    two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return Layer(
        index=index,
        name=f"{name}.{next(child for child, module in block.named_children() if module is router)}",
        n_experts=n_experts,
        top_k=_first((router, "top_k"), (block, "top_k"), (config, "top_k_experts")) or 1,
        n_shared=1 if family.layout == "product keys" else _shared(model, name, config),
        gating=_gating(family, scoring, hash_layer, router, block, config),
        stack="encoder" if two_stacks and "encoder" in stack.split(".") else "decoder",
        scoring="hash" if hash_layer else scoring,
        family=family,
        router=router,
        selector=(router if selects_in == "forward" and family.layout != "product keys" else block, selects_in),
        experts=experts,
        block=block,
        around=model.get_submodule(place),
        owner=model.get_submodule(stack),
    )


def _first(*places: tuple[Any, str]) -> Any:
    return next((value for place, name in places if isinstance(value := getattr(place, name, None), int)), None)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _scoring(family: Family, *configs: Any) -> str:
    if not family.scoring.startswith("config:"):
        return family.scoring
    name = family.scoring.removeprefix("config:")
    value = next((getattr(config, name) for config in configs if hasattr(config, name)), "unknown")
    return {"sqrtsoftplus": "sqrt-softplus"}.get(value, value)


def _gating(family: Family, scoring: str, hash_layer: bool, router: nn.Module, block: nn.Module, config: Any) -> str:
    """The family's gating with its `?` resolved by what this router has and does."""
    if hash_layer:
        return f"hash, {scoring}, renormalised, scaled"

    def says(*names: str) -> bool:
        return any(getattr(place, name, None) for place in (router, block, config) for name in names)

    gating = family.gating.format(scoring=scoring)
    steps = {
        # A softmax over the selected sums to 1 anyway.
        "renormalised?": says("norm_topk_prob", "moe_normalize_expert_weights") and "top-k, softmax" not in gating,
        "groups?": says("topk_method") and getattr(router, "topk_method", "") != "greedy",
        "sigmoid + bias?": says("use_expert_bias"),
    }
    kept = []
    for step in gating.split(", "):
        if step.endswith("?"):
            if steps[step]:
                kept.append(step.removesuffix("?"))
            elif " + " in step:
                kept.append(step.split(" + ")[0])
        else:
            kept.append(step)
    return ", ".join(kept)


def _shared(model: nn.Module, block: str, config: Any) -> int:
    """Experts that every token passes: counted by the configuration, if the block or its parent has any at all."""
    for name in (block, block.rpartition(".")[0]):
        for child, module in model.get_submodule(name).named_children():
            if "shared" in child and "kv" not in child and any(True for _ in module.parameters()):
                return _first(*((config, count) for count in _SHARED_COUNTS)) or 1
    return 0


def expert_parameters(layer: Layer) -> tuple[int, float]:
    """Parameters of a layer's routed experts: of all of them, and of the k that a token uses.

    Zero-computation experts have none, so the second number is an upper bound where a family has such experts.
    """
    total, active = 0, 0.0
    for rows, size in _expert_sizes(layer):
        total += size
        active += size / rows * min(layer.top_k, rows)
    return total, active


def _expert_sizes(layer: Layer) -> Iterator[tuple[int, int]]:
    """(experts, parameters) for every parameter of the routed experts."""
    if layer.family.layout == "product keys":
        modules = [layer.block.get_submodule(name) for name in ("down_embed", "up_embed")]
    elif layer.family.layout == "sorted":
        modules = [layer.block.get_submodule(name) for name in ("input_linear", "output_linear")]
    else:
        modules = [layer.experts]
    for module in modules:
        fused = not isinstance(module, nn.ModuleDict | nn.ModuleList)
        for parameter in module.parameters():
            if fused and parameter.dim() == 1:
                continue  # a norm that all experts share
            rows = parameter.shape[0] if fused and parameter.dim() == 3 else layer.n_experts
            yield rows, parameter.numel()
