"""Weight-only int8 by torchao: what `load(…, dtype="int8")` does, and torchao's noise kept off the terminal.

Every weight matrix is rounded to torchao's symmetric int8, one scale a row (an output channel), and turned back:
linear layers, and each expert's gate, up and down matrix. Routers, embeddings, the output head, norms and biases stay
as they are, as in transformers' own use of torchao. **The numerics are int8's, the memory isn't**: torchao's int8
tensors (0.18) don't run in the fused experts of transformers 5 — `grouped_mm` isn't implemented for them, and the eager
experts fail under `inference_mode` — so the rounded weights are kept in the dtype that the model computes in.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workbench import experts
from workbench.errors import InputError
from workbench.layers import Layer, family_of

# Loggers and what they are not to say: torchao's CUDA libraries can't be loaded on other machines, and torch finds
# fault with how torchao registers its enumerations.
_NOISE = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
}


def quantise(module: nn.Module, layers: Collection[Layer]) -> None:
    """Round a model's weights to int8, in place. InputError without torchao, or for experts that can't be read."""
    with quietly():
        try:
            import torchao  # noqa: F401
        except ImportError:
            raise InputError(
                "dtype 'int8' takes the package torchao: pip install 'moe-workbench[quantized]'."
            ) from None
    expert_weights = [experts.read(layer) for layer in layers if family_of(layer.block) != "switch_transformers"]
    kept = {id(part) for layer in layers for part in layer.router.modules()}
    head = getattr(module, "get_output_embeddings", lambda: None)()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear) and id(part) not in kept and part is not head:
                part.weight.copy_(rounded(part.weight))
        for weights in expert_weights:
            for matrix in (weights.gate, weights.up, weights.down):
                if matrix is not None:
                    matrix.copy_(rounded(matrix))


def rounded(matrix: Tensor) -> Tensor:
    """What torchao's weight-only int8 makes of a matrix (…, n_in): each row as integers to ±127 times its scale."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    rows = matrix.detach().reshape(-1, matrix.shape[-1])
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows, requires_grad=False)
    quantize_(linear, Int8WeightOnlyConfig(set_inductor_config=False))
    quantised: torch.Tensor = linear.weight
    return quantised.dequantize().reshape(matrix.shape)


@contextmanager
def quietly() -> Iterator[None]:
    """Drop, of what is logged, exactly what torchao's import says on machines without its CUDA libraries."""

    def wanted(record: logging.LogRecord) -> bool:
        return _NOISE[record.name] not in record.getMessage()

    for name in _NOISE:
        logging.getLogger(name).addFilter(wanted)
    try:
        yield
    finally:
        for name in _NOISE:
            logging.getLogger(name).removeFilter(wanted)
