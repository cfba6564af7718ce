"""The experts of a layer on the tokens that chose them, and the L2 norm of what each of them gives its token.

    out, norms = experts(read(module), hidden, ids, gate, norms=True)

With y(t, e) = what expert e makes of token t (see `expert_weights`), ids i(t, 1) … i(t, k) and gate weights g(t, r):

    out(t) = sum over r of g(t, r) · y(t, i(t, r))          norms(t, r) = ‖y(t, i(t, r))‖

(Shazeer et al. 2017, "Outrageously large neural networks", equation 1; norms are taken before the gate weight.)
Computed by `reference` in torch, `experts_kernel` in Triton or `cpu_experts` on a CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workbench_kernels.expert_weights import DTYPES, ExpertWeights, activate, normalise
from workbench_kernels.experts_kernel import Config, launch
from workbench_kernels.jit import triton


def experts(
    weights: ExpertWeights,
    hidden: Tensor,
    ids: Tensor,
    gate: Tensor,
    *,
    norms: bool = False,
    backend: Literal["auto", "torch", "cpu", "triton"] = "auto",
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What the experts add for each token (T, H) in hidden's dtype, and the norms (T, k) float32 if they are asked for.

    weights  of the E experts, as from `read`
    hidden   (T, H)
    ids      integers (T, k); what isn't in 0 … E − 1 is no expert: it adds nothing, and its norm is 0
    gate     floats (T, k); an expert of weight 0 adds nothing, whatever it computes, and has its norm all the same
    backend  "auto": "triton" for tensors on a GPU, "cpu" for those on a CPU, and "torch", the reference, where these
             can't: for gradients, float64 and other devices
    config   of the Triton kernels; None takes a default by shape

    ValueError or TypeError where shapes, dtypes or devices don't fit each other, or the backend can't do it.
    """
    _check(weights, hidden, ids, gate)
    if backend == "auto":
        backend = "triton" if hidden.is_cuda else "cpu"
        if _obstacle(backend, weights, hidden, gate):
            backend = "torch"
    elif backend not in ("torch", "cpu", "triton"):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'torch', 'cpu' or 'triton'.")
    elif reason := _obstacle(backend, weights, hidden, gate):
        raise ValueError(f"backend {backend!r}: {reason}. Take backend='torch'.")
    if backend == "triton":
        with torch.cuda.device_of(hidden):
            return launch(weights, hidden, ids, gate, _chosen(weights, ids, gate, norms), norms, config)
    if backend == "cpu":
        from workbench_kernels.cpu_experts import experts_on_cpu  # loads numba, which the others do without

        return experts_on_cpu(weights, hidden, ids, gate, norms=norms)
    return reference(weights, hidden, ids, gate, norms=norms)


def _obstacle(backend: str, weights: ExpertWeights, hidden: Tensor, gate: Tensor) -> str | None:
    """Why a backend can't do it; None if it can. Triton takes tensors of a CPU too: they may be for the interpreter."""
    if backend == "torch":
        return None
    tensors = [hidden, gate, *weights.tensors]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradients, and something here requires them"
    if torch.float64 in {hidden.dtype, *(tensor.dtype for tensor in weights.tensors)}:
        return "it takes float32, float16 and bfloat16, not float64"
    if backend == "triton":
        return "there is no Triton here" if triton is None else None
    if hidden.device.type != "cpu":
        return f"the tensors are on {hidden.device}"
    if hidden.dtype != weights.down_proj.dtype:
        return f"hidden is {hidden.dtype} and the weights are {weights.down_proj.dtype}; it takes one dtype"
    return None


def reference(
    weights: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor, *, norms: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`experts` in torch, one expert after the other; float64 and gradients too.

    Arguments as there: hidden (T, H), ids and gate (T, k), norms whether they are asked for.

    Products are in the weights' dtype, the rest is in float32 (in float64 for float64, the norms too).
    """
    wide = torch.promote_types(weights.down_proj.dtype, torch.float32)
    out = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    sizes = torch.zeros(ids.shape, dtype=wide, device=hidden.device)
    chosen = _chosen(weights, ids, gate, norms)
    for expert in chosen.unique().tolist():
        if expert == weights.n_experts:
            continue
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        output = _output(weights, expert, hidden[token]).to(wide)
        if norms:
            sizes = sizes.index_put((token, rank), output.norm(dim=-1))
        weight = gate[token, rank].to(wide).unsqueeze(1)
        term = weight * output
        out = out.index_add(0, token, term if gate.requires_grad else torch.where(weight == 0, 0, term))
    return out.to(hidden.dtype), sizes if norms else None


def _output(weights: ExpertWeights, expert: int, hidden: Tensor) -> Tensor:
    """What one expert makes of each row (n, H)."""
    dtype = weights.down_proj.dtype
    projected = torch.nn.functional.linear(hidden.to(dtype), weights.gate_up[expert])
    if weights.gate_up_proj_bias is not None:
        projected = projected + weights.gate_up_proj_bias[expert]
    projected = projected.to(torch.promote_types(dtype, torch.float32))
    inner = activate(weights.activation, *weights.halves(projected)).to(dtype)
    output = torch.nn.functional.linear(inner, weights.down[expert])
    if weights.down_proj_bias is not None:
        output = output + weights.down_proj_bias[expert]
    return output if weights.post_norm is None else normalise(weights.post_norm, output)


def _chosen(weights: ExpertWeights, ids: Tensor, gate: Tensor, norms: bool) -> Tensor:
    """int64 (T, k): the expert to compute, E where there is none or none that matters."""
    runs = (ids >= 0) & (ids < weights.n_experts)
    if not norms and not gate.requires_grad:  # a weight of 0 has a gradient
        runs = runs & (gate != 0)
    return torch.where(runs, ids.long(), weights.n_experts)


def _check(weights: ExpertWeights, hidden: Tensor, ids: Tensor, gate: Tensor) -> None:
    if hidden.dim() != 2 or hidden.shape[1] != weights.width:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected (T, {weights.width}), a row a token.")
    if ids.dim() != 2 or len(ids) != len(hidden):
        raise ValueError(f"ids have shape {tuple(ids.shape)}; expected ({len(hidden)}, k), a row a token.")
    if gate.shape != ids.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; expected that of ids, {tuple(ids.shape)}.")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids are {ids.dtype}; expected integers.")
    for name, tensor in (("hidden", hidden), ("gate", gate)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; expected floats: {', '.join(map(str, DTYPES))}.")
    for name, tensor in (("ids", ids), ("gate", gate), *(("the weights", tensor) for tensor in weights.tensors)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name} are on {tensor.device}, hidden on {hidden.device}: move them to one device.")
