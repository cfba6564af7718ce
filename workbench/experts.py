"""The weights of routed experts in one form for all families, as views of a model's parameters.

    weights = read(model.layers[3])
    weights.up[5]                      # (I, H): what expert 5 multiplies its input by
    neurons(weights, 5)                # float32 (I, 3 · H): gate row, up row and down column of each neuron

An expert computes down · (act(gate · x) * up · x), or down · act(up · x) where it has no gate; I is its number of
neurons, H the width of its input. Families keep these matrices fused, transposed, interleaved or with biases; `read`
undoes that without copying, so that writing into a view changes the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.layers import Layer, family_of

MATRICES = ("gate", "up", "down")
ALL = "all"
"""Name of what is measured on all matrices of an expert together."""
CHUNK = 1 << 24
"""Numbers of the largest temporary copy."""

# Families whose experts have no flags of their own that say how the fused matrices lie: (transposed, interleaved).
_UNFLAGGED = {"step3p7": (False, False), "llama4": (True, False)}
_REFUSED = {
    "doge": "its experts are single neurons, found by product keys",
    "jetmoe": "its experts are sorted blocks of a module of its own",
    "longcat_flash": "some of its experts have no weights",
    "switch_transformers": "its experts are modules of their own, not one fused parameter",
}
# Where routers keep the matrix with a row an expert, from the most common name on.
_ROUTER_ROWS = (
    "weight", "gate.weight", "proj.weight", "layer.weight", "wg.weight", "classifier.weight",
    "router_mlp.out_proj.weight",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The E experts of one layer; every tensor is a view of the model's own parameter, in its dtype.

    gate       (E, I, H); None where experts have no gate
    up         (E, I, H)
    down       (E, H, I)
    gate_bias  (E, I); up_bias (E, I); down_bias (E, H); None where there are none
    router     (E, D): the row of the router's last linear map that makes an expert's logit; D is H in most families
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    router: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def n_experts(self) -> int:
        return self.up.shape[0]

    @property
    def n_neurons(self) -> int:
        """I, of each expert."""
        return self.up.shape[1]

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Those of MATRICES that there are, each (E, I, H) with a row a neuron: `down` is transposed."""
        found = {"gate": self.gate, "up": self.up, "down": self.down.transpose(1, 2)}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    @property
    def neuron_parts(self) -> list[Tensor]:
        """All that belongs to a neuron, each (E, I) or (E, I, H): what moves when neurons are reordered."""
        biases = [bias for bias in (self.gate_bias, self.up_bias) if bias is not None]
        return [*self.matrices.values(), *biases]


def read(layer: Layer) -> Weights:
    """The expert weights of a layer. InputError for a family whose experts aren't one fused parameter."""
    family = family_of(layer.block)
    if family in _REFUSED:
        raise InputError(
            f"the experts of {layer.name} ({family}) can't be read as matrices: {_REFUSED[family]}. Models whose "
            "experts are fused parameters can: olmoe, mixtral, qwen3_moe, deepseek_v3, gpt_oss, …"
        )
    router = _router_rows(layer)
    if family == "dbrx":
        matrices = [layer.experts.get_parameter(f"mlp.{name}").detach() for name in ("w1", "v1", "w2")]
        gate, up, down = (matrix.view(layer.n_experts, -1, matrix.shape[1]) for matrix in matrices)
        return Weights(gate=gate, up=up, down=down.transpose(1, 2), router=router)
    parameters = {name: parameter.detach() for name, parameter in layer.experts.named_parameters(recurse=False)}
    fused = "gate_up_proj" in parameters
    first = "gate_up_proj" if fused else "up_proj"
    if not {first, "down_proj"} <= parameters.keys() or any(parameters[n].dim() != 3 for n in (first, "down_proj")):
        raise InputError(
            f"the experts of {layer.name} ({family}, {type(layer.experts).__name__}) have no fused gate_up_proj or "
            "up_proj, and no down_proj, of three dimensions: their weights can't be read. Load the model in float "
            "precision, not quantised."
        )
    transposed, interleaved = _UNFLAGGED.get(family) or (
        bool(getattr(layer.experts, "is_transposed", False)),
        not getattr(layer.experts, "is_concatenated", True),
    )
    wide, down = (parameters[name].transpose(1, 2) if transposed else parameters[name] for name in (first, "down_proj"))
    wide_bias = parameters.get(f"{first}_bias")
    gate, up = _halves(wide, interleaved) if fused else (None, wide)
    gate_bias, up_bias = None, wide_bias
    if fused and wide_bias is not None:
        gate_bias, up_bias = _halves(wide_bias, interleaved)
    return Weights(gate, up, down, router, gate_bias, up_bias, parameters.get("down_proj_bias"))


def neurons(weights: Weights, expert: int) -> np.ndarray:
    """Everything of each neuron of one expert, side by side: float32 (I, n_matrices · H), without biases."""
    return np.concatenate([numbers(matrix[expert]) for matrix in weights.matrices.values()], axis=1)


def numbers(tensor: Tensor) -> np.ndarray:
    """A float32 copy."""
    return tensor.detach().to("cpu", torch.float32, copy=True).numpy()


def grams(weights: Weights, others: Weights | None = None) -> dict[str, np.ndarray]:
    """Inner products of flattened experts, for each matrix and for ALL of them: float64 (E, E').

    With `others`, between the experts of two layers of the same sizes; else within the one.
    """
    others = weights if others is None else others
    found = {name: gram(matrix, others.matrices[name]) for name, matrix in weights.matrices.items()}
    return found | {ALL: np.sum(list(found.values()), axis=0)}


def gram(matrix: Tensor, other: Tensor) -> np.ndarray:
    """Inner products of flattened experts, float64 (E, E'), of (E, I, H) and (E', I, H), some neurons at a time."""
    step = max(1, CHUNK // max(1, matrix.shape[0] * matrix.shape[2]))
    total = np.zeros((matrix.shape[0], other.shape[0]))
    for start in range(0, matrix.shape[1], step):
        rows = numbers(matrix[:, start : start + step]).reshape(len(matrix), -1)
        columns = rows if other is matrix else numbers(other[:, start : start + step]).reshape(len(other), -1)
        total += rows @ columns.T
    return total


def reorder_neurons(weights: Weights, expert: int, order: np.ndarray) -> None:
    """Put neuron order[i] at place i of one expert, in the model itself. What the expert computes stays the same."""
    places = torch.as_tensor(np.ascontiguousarray(order), device=weights.up.device)
    with torch.no_grad():
        for part in weights.neuron_parts:
            part[expert] = part[expert][places]


def _halves(wide: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of a fused (E, 2 · I, …)."""
    if interleaved:
        return wide[:, 0::2], wide[:, 1::2]
    half = wide.shape[1] // 2
    return wide[:, :half], wide[:, half:]


def _router_rows(layer: Layer) -> Tensor:
    """(E, D). A router may have further rows behind those of its routed experts (shared ones, a skip)."""
    found = dict(layer.router.named_parameters())
    for name in _ROUTER_ROWS:
        matrix = found.get(name)
        if isinstance(matrix, nn.Parameter) and matrix.dim() == 2 and matrix.shape[0] >= layer.n_experts:
            return matrix.detach()[: layer.n_experts]
    raise InputError(
        f"the router {layer.name} ({type(layer.router).__name__}) has no matrix with a row for each of its "
        f"{layer.n_experts} experts: its weights can't be compared."
    )
