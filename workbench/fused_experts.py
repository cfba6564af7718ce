"""Run a model's experts by the workbench's own implementation: `with fused_experts(model): …`.

    with fused_experts(model, "fused") as used, Recorder(model, {"norms"}) as recorder:
        model.module(**inputs)                  # used == "fused"

It stands in transformers' `ExpertsInterface` under the name "workbench" and is what the model's experts run inside the
block; the weights are the checkpoint's own, read where they are. Products are summed in another order than in the
checkpoint's code, so outputs differ in the last bits (docs/kernels.md has how far), and a router may choose another
expert where two are that close. While it computes, it knows the L2 norm of what each expert adds: a `Recorder` of norms
takes them from here instead of running the experts a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from workbench.errors import InputError
from workbench.models import Model

Experts = Literal["auto", "model", "fused"]
"""auto: "fused" where the model is covered and it was measured to be faster, which is on CPUs; else "model".
model: the checkpoint's own code, bit for bit. fused: the workbench's, or an error."""

NAME = "workbench"
_WEIGHTS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_LISTENERS: WeakKeyDictionary[nn.Module, list[Callable[[Tensor], None]]] = WeakKeyDictionary()


@contextmanager
def fused_experts(model: Model, experts: Experts = "auto") -> Iterator[Literal["model", "fused"]]:
    """The implementation of the experts inside the block; yields which it is.

    InputError on entering for "fused" if the model isn't covered, with the reason, or for another word.
    """
    used = which(model, experts)
    if used == "model":
        yield used
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    module: Any = model.module
    before = module.get_experts_implementation()
    module.set_experts_implementation(NAME)
    try:
        yield used
    finally:
        module.set_experts_implementation(before)


def which(model: Model, experts: Experts, device: str | None = None) -> Literal["model", "fused"]:
    """What `experts` means for a model on that device, by default its own. InputError as `fused_experts` has it."""
    if experts not in get_args(Experts):
        raise InputError(f"experts is {experts!r}: expected one of {', '.join(get_args(Experts))}.")
    kind = model.device.type if device is None else torch.device(device).type
    if experts == "model" or (experts == "auto" and kind != "cpu"):
        return "model"
    reason = why_not(model)
    if reason is None:
        return "fused"
    if experts == "auto":
        return "model"
    raise InputError(f"the experts of {model.name} can't be fused: {reason} Take --experts model.")


def why_not(model: Model) -> str | None:
    """Why the model's experts can't be computed here; None if they can."""
    for layer in model.layers:
        if not hasattr(layer.experts, "config") or not hasattr(layer.experts, "_apply_gate"):
            return f"{model.family} doesn't take its experts from transformers' ExpertsInterface."
        try:
            _weights(layer.experts)
        except ValueError as error:
            return str(error)
    return None


def gives_norms(experts: nn.Module) -> bool:
    """Whether an experts module runs the implementation that knows the norms."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) == NAME


def listen(experts: nn.Module, tell: Callable[[Tensor], None]) -> Callable[[], None]:
    """Have `tell` called with the norms, float32 (T, k), whenever the module has run fused; returns what ends that."""
    listeners = _LISTENERS.setdefault(experts, [])
    listeners.append(tell)
    return lambda: listeners.remove(tell)


def _forward(module: nn.Module, hidden: Tensor, ids: Tensor, gate: Tensor) -> Tensor:
    """What transformers calls in place of the family's own experts; (T, H), (T, k), (T, k)."""
    from workbench_kernels.experts import experts

    listeners = _LISTENERS.get(module, [])
    flat = hidden.reshape(-1, hidden.shape[-1])
    ids, gate = ids.reshape(len(flat), -1), gate.reshape(len(flat), -1)
    out, norms = experts(_weights(module), flat, ids, gate, norms=bool(listeners))
    for tell in listeners:
        tell(norms)  # type: ignore[arg-type]
    return out.view(hidden.shape)


def _weights(module: nn.Module) -> Any:
    from workbench_kernels.expert_weights import read

    known = _WEIGHTS.get(module)
    if known is None or known.down_proj is not module.down_proj:
        known = _WEIGHTS[module] = read(module)
    return known
