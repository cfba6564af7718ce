"""What a fused experts module of transformers holds and computes, in one form for all families and layouts.

    weights = read(model.model.layers[0].mlp.experts)
    weights.gate_up[5], weights.down[5]      # (2 · I, H) and (H, I) of expert 5, however they are stored

An expert of I neurons maps x (H) to y (H):

    gate, up = halves of gate_up · x + bias          gated; else up = gate_up · x + bias alone
    y = down · activate(gate, up) + bias
    y = post_norm(y)                                 where the family has one

Layouts are those of transformers' decorator `use_experts_implementation` (transformers/integrations/moe.py): transposed
(matrices stored (E, in, out)), interleaved (gate and up in turns instead of one after the other), biased, not gated,
with a norm of each expert's output. What lies between the matrices is recognised by what it computes: `read` compares
the module's own `_apply_gate` with the forms below on a grid of values, and refuses it when none agrees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of matrices that can be read."""


@dataclass(frozen=True, slots=True)
class Activation:
    """From gate and up, each (…, I), to what the down matrix takes (…, I).

        act(min(gate, limit)) · (clamp(up, -limit, limit) + shift)
        min(act(gate), limit) · (clamp(up, -limit, limit) + shift)      with limit_after
        cap(gate, c) · sigmoid(gate) · cap(up, d)                       with softcaps (c, d)
        act(up)                                                         without a gate

    cap(x, c) is c · tanh(x / c).
    name   of act: silu, which is x · sigmoid(alpha · x), gelu (by erf), gelu_tanh, relu or relu2 (relu squared)
    alpha  of silu only
    """

    name: str = "silu"
    alpha: float = 1.0
    limit: float = inf
    limit_after: bool = False
    shift: float = 0.0
    softcaps: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PostNorm:
    """RMS norm of an expert's output: z · rsqrt(mean(z²) + eps), with z = y · (1 + weight). weight (H)."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """The E experts of a layer. Tensors are the module's own parameters as they are stored, never copies.

    gate_up_proj       (E, 2 · I, H), or up_proj (E, I, H) where `gated` is False; (E, H, 2 · I) or (E, H, I) transposed
    down_proj          (E, H, I); (E, I, H) transposed
    gate_up_proj_bias  (E, 2 · I) or (E, I); down_proj_bias (E, H)
    interleaved        gate and up of neuron i are outputs 2i and 2i + 1, instead of i and I + i
    activation         between the projections
    post_norm          of an expert's output, before the gate weight; None: there is none
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_proj_bias: Tensor | None = None
    down_proj_bias: Tensor | None = None
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    activation: Activation = Activation()
    post_norm: PostNorm | None = None

    @property
    def gate_up(self) -> Tensor:
        """(E, 2 · I, H), or (E, I, H) where there is no gate: a view, of the parameters' dtype."""
        return self.gate_up_proj.transpose(1, 2) if self.transposed else self.gate_up_proj

    @property
    def down(self) -> Tensor:
        """(E, H, I): a view, of the parameters' dtype."""
        return self.down_proj.transpose(1, 2) if self.transposed else self.down_proj

    @property
    def n_experts(self) -> int:
        """E."""
        return self.down_proj.shape[0]

    @property
    def n_neurons(self) -> int:
        """I, of each expert."""
        return self.down.shape[2]

    @property
    def width(self) -> int:
        """H, of an expert's input and output."""
        return self.down.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is computed with, of the shapes and dtypes above: (E, …) each, but for the weight of `post_norm`."""
        found = [self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias]
        norm = None if self.post_norm is None else self.post_norm.weight
        return [tensor for tensor in (*found, norm) if tensor is not None]

    def halves(self, outputs: Tensor, dim: int = -1) -> tuple[Tensor | None, Tensor]:
        """Gate and up: views of a tensor with the 2 · I outputs of `gate_up` along `dim`; (None, all) without a gate.

        outputs  (…, 2 · I), or (…, I) without a gate, of any dtype; dim: where the outputs are
        """
        if not self.gated:
            return None, outputs
        if self.interleaved:
            gate, up = outputs.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
            return gate, up
        gate, up = outputs.chunk(2, dim)
        return gate, up


def read(module: nn.Module) -> ExpertWeights:
    """The weights of an experts module that transformers' `use_experts_implementation` decorates, or that has its form.

    ValueError with the reason for anything else: modules per expert, quantised or wrapped matrices, an activation or a
    norm that isn't one of the forms above.
    """
    kind = type(module).__name__
    if not hasattr(module, "_apply_gate"):
        raise ValueError(f"{kind} isn't an experts module in the form of transformers' use_experts_implementation.")
    gated = bool(getattr(module, "has_gate", True))
    biased = bool(getattr(module, "has_bias", False))
    interleaved = gated and not getattr(module, "is_concatenated", True)
    first = "gate_up_proj" if gated else "up_proj"
    weights = ExpertWeights(
        gate_up_proj=_parameter(module, first, 3),
        down_proj=_parameter(module, "down_proj", 3),
        gate_up_proj_bias=_parameter(module, f"{first}_bias", 2) if biased else None,
        down_proj_bias=_parameter(module, "down_proj_bias", 2) if biased else None,
        gated=gated,
        transposed=bool(getattr(module, "is_transposed", False)),
        interleaved=interleaved,
        activation=_activation(module, gated, interleaved),
        post_norm=_post_norm(module) if getattr(module, "has_post_expert_norm", False) else None,
    )
    expected = (weights.n_experts, weights.n_neurons * (2 if gated else 1), weights.width)
    if weights.gate_up.shape != expected:
        raise ValueError(
            f"the {first} of {kind} is {tuple(weights.gate_up.shape)}, where its down_proj asks for {expected}."
        )
    return weights


def activate(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """What the down matrix takes (…, I), from gate and up (…, I); gate is None where experts have none."""
    if gate is None:
        return _act(activation, up)
    if activation.softcaps is not None:
        gate_cap, up_cap = activation.softcaps
        return torch.tanh(gate / gate_cap) * gate_cap * torch.sigmoid(gate) * torch.tanh(up / up_cap) * up_cap
    limit = activation.limit
    if limit < inf:
        up = up.clamp(-limit, limit)
        gate = gate if activation.limit_after else gate.clamp(max=limit)
    acted = _act(activation, gate)
    if limit < inf and activation.limit_after:
        acted = acted.clamp(max=limit)
    return acted * (up + activation.shift if activation.shift else up)


def _act(activation: Activation, x: Tensor) -> Tensor:
    match activation.name:
        case "silu":
            return F.silu(x) if activation.alpha == 1 else x * torch.sigmoid(activation.alpha * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
    raise ValueError(f"no activation {activation.name!r}: it has to be silu, gelu, gelu_tanh, relu or relu2.")


def _parameter(module: nn.Module, name: str, dim: int) -> Tensor:
    """A parameter of plain floats. Anything that stands in for one (quantised, sharded, parametrised) is refused."""
    found = module._parameters.get(name)
    if found is None or found.dim() != dim or type(found.data) is not Tensor or found.dtype not in DTYPES:
        is_ = "missing" if found is None else f"{type(found.data).__name__} {found.dtype} {tuple(found.shape)}"
        raise ValueError(
            f"the {name} of {type(module).__name__} is {is_}; a plain parameter of {dim} dimensions was expected, in "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}. Load the model in float precision, "
            "or run the family's own experts."
        )
    return found


def _activation(module: nn.Module, gated: bool, interleaved: bool) -> Activation:
    """The form that computes what the module's own code does."""
    limit, alpha = _number(module, "limit", "swiglu_limit"), _number(module, "alpha", "swiglu_alpha")
    act: object = getattr(module, "act_fn", None)
    plain = [Activation(), Activation(alpha=1.702), *map(Activation, ("gelu", "gelu_tanh", "relu", "relu2"))]
    forms = list(plain)
    if limit is not None:
        forms += [replace(form, limit=limit, limit_after=after) for after in (False, True) for form in plain]
        forms.append(Activation(alpha=alpha or 1.0, limit=limit, shift=1.0))
    caps = [getattr(getattr(act, name, None), "softcap", None) for name in ("gate_softcap", "up_softcap")]
    if None not in caps:
        forms.append(Activation(softcaps=(float(caps[0]), float(caps[1]))))  # type: ignore[arg-type]

    reach = 2 * limit if limit is not None and limit < 1e3 else 0.0
    grid = torch.linspace(-max(reach, 12.0), max(reach, 12.0), 65)
    gate, up = grid.repeat_interleave(len(grid)), grid.repeat(len(grid))
    own: Callable[[Tensor], Tensor] = module._apply_gate if gated else act  # type: ignore[assignment]
    given = up if not gated else torch.stack([gate, up], -1).flatten() if interleaved else torch.cat([gate, up])
    with torch.no_grad():
        computed = own(given.unsqueeze(0)).squeeze(0)
        for form in forms:
            if torch.allclose(activate(form, gate if gated else None, up), computed, rtol=1e-5, atol=1e-5):
                return form
    raise ValueError(
        f"what {type(module).__name__} computes between its matrices (act_fn {act}) is none of the known forms: silu, "
        "gelu, relu, relu2, each with or without a limit, or softcapped. Run the family's own experts."
    )


def _number(module: nn.Module, *names: str) -> float | None:
    found = (getattr(module, name, None) for name in names)
    return next((float(value) for value in found if isinstance(value, int | float)), None)


def _post_norm(module: nn.Module) -> PostNorm:
    norm = module.post_expert_norm
    weight, eps = getattr(norm, "weight", None), getattr(norm, "eps", None)
    if isinstance(norm, nn.Module) and isinstance(weight, Tensor) and isinstance(eps, float):
        found = PostNorm(weight, eps)
        x = torch.linspace(-2, 3, weight.numel(), device=weight.device).unsqueeze(0)
        with torch.no_grad():
            if torch.allclose(norm(x), normalise(found, x), rtol=1e-4, atol=1e-5):
                return found
    raise ValueError(
        f"the post_expert_norm of {type(module).__name__} ({norm}) isn't an RMS norm of the scaled output. Run the "
        "family's own experts."
    )


def normalise(norm: PostNorm, outputs: Tensor) -> Tensor:
    """The norm of experts' outputs (…, H), in their dtype."""
    scaled = outputs * (1 + norm.weight.to(outputs.dtype))
    return scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + norm.eps)
