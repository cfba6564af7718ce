"""How far the routed experts of a layer turn the residual stream: what `shift` records, and for which families.

shift = max(0, 1 - cos(x, x + r)), with x the residual stream before the MoE block and r what the routed experts add to
it, without shared experts: the token weight of EASY-EP (Dong et al. 2025, arXiv 2504.06792, section 3.2).

x is the input of the layer norm whose output enters the block: found while the model runs, as the norm of the decoder
layer that returned the very tensor that the block is called with. r is the experts' combined output times what the
model multiplies it by on its way into the stream. Both are exact where a layer computes x + block(norm(x)) and the
block adds the routed output to the shared one; families that do otherwise are in `NO_SHIFT`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.errors import InputError, RunError
from workbench.layers import Layer, family_of

_POST_NORM = "its layers pass the experts' output through a norm before they add it to the residual stream"
_STREAMS = "its layers mix several residual streams"

NO_SHIFT: dict[str, str] = {
    "afmoe": _POST_NORM,
    "axk1": _POST_NORM,
    "beam": _POST_NORM,
    "deepseek_v4": _STREAMS,
    "diffusion_gemma": _POST_NORM,
    "doge": "the output of its routed experts can't be told from that of its dense part",
    "flex_olmo": _POST_NORM,
    "gemma4": _POST_NORM,
    "glm5_next": _STREAMS,
    "hy_v4": _STREAMS,
    "inkling": "its layers pass the experts' output through a convolution before they add it to the residual stream",
    "inkling2": "its layers pass the experts' output through a convolution before they add it to the residual stream",
    "jetmoe": "its attention has experts too, whose output isn't added to the residual stream as it is",
    "kolibri1": _POST_NORM,
    "longcat_flash": "its layers add the experts' output to the residual stream a sublayer later than they read it",
    "minimax": "its layers add the experts' output to the normed input, not to the residual stream",
    "muse_spark": _POST_NORM,
    "qwen4_exp": _STREAMS,
    "zaya": "its layers scale the residual stream, channel by channel, when they add to it",
}
"""Family -> why `shift` can't be recorded."""


def check(layer: Layer) -> None:
    """InputError if the layer's residual stream, or what its experts add to it, can't be read exactly."""
    family = family_of(layer.block)
    why = NO_SHIFT.get(family)
    if why is None and isinstance(getattr(layer.block, "fc2_latent_proj", None), nn.Linear):  # nemotron_h
        why = "its experts work in a latent space, behind which their output is projected"
    if why is None and not _norms(layer):
        why = f"{layer.name} has no norm before it"
    if why is not None:
        raise InputError(f"shift can't be recorded for {family}: {why}. Record without shift.")


def gain(layer: Layer) -> float:
    """What the routed experts' output is multiplied by on its way into the residual stream."""
    block: Any = layer.block
    factor = float(getattr(layer.around, "residual_multiplier", 1.0))  # granitemoe and its kin
    family = family_of(block)
    if family == "minimax_m3_vl":
        factor *= block.routed_scaling_factor
    elif family == "openai_privacy_filter":
        factor *= layer.top_k
    elif family == "cohere2_moe" and block.num_shared_experts and block.shared_expert_combination_strategy == "average":
        factor /= 2
    return factor


def hook(layer: Layer, keep: Callable[[Tensor], None]) -> list[RemovableHandle]:
    """Hooks that call `keep` with the layer's shift, float32 (T,), each time its experts have run."""
    factor = gain(layer)
    normed: list[tuple[Tensor, Tensor]] = []  # outputs and inputs of the norms that ran in this decoder layer
    residual: list[Tensor] = []

    def begins(_module: nn.Module, _args: Any) -> None:
        normed.clear()
        residual.clear()

    def norm_ran(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if args and isinstance(out, Tensor):
            normed.append((out, args[0]))

    def block_runs(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        residual.extend(before for out, before in normed if out is given)
        normed.clear()

    def experts_ran(_module: nn.Module, _args: Any, out: Any) -> None:
        if not residual:
            raise RunError(f"no norm feeds the block of {layer.name}: shift can't be recorded. Record without it.")
        x = residual.pop().detach()
        residual.clear()
        added = out.detach()
        if layer.family.layout == "dense":  # (E · T, H): every expert's output for every token
            added = added.view(layer.n_experts, -1, added.shape[-1]).sum(0)
        keep(turn(x.reshape(-1, x.shape[-1]), added.reshape(-1, x.shape[-1]) * factor))

    return [
        layer.around.register_forward_pre_hook(begins),
        *(norm.register_forward_hook(norm_ran) for norm in _norms(layer)),
        layer.block.register_forward_pre_hook(block_runs, with_kwargs=True),
        layer.experts.register_forward_hook(experts_ran),
    ]


def turn(x: Tensor, added: Tensor) -> Tensor:
    """max(0, 1 - cos(x, x + added)) over the last dimension, float32 in [0, 2]; 1 where either vector is 0.

    As half the squared distance of the two unit vectors, which keeps its digits where the cosine is near 1.
    """
    before, after = x.float(), x.float() + added.float()
    lengths = before.norm(dim=-1, keepdim=True), after.norm(dim=-1, keepdim=True)
    apart = before / lengths[0] - after / lengths[1]
    return torch.where((lengths[0] * lengths[1]).squeeze(-1) > 0, apart.square().sum(-1) / 2, 1.0)


def _norms(layer: Layer) -> list[nn.Module]:
    """Whatever may be a norm in the decoder layer, outside the block."""
    inside = set(layer.block.modules())
    found = [module for module in layer.around.modules() if "norm" in type(module).__name__.lower()]
    return [module for module in found if module not in inside]
