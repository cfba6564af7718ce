"""`triton` and `triton.language`, where they can be installed; elsewhere kernels can be imported, but not launched."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no wheel: there the references are what runs
    triton: Any = None
    tl: Any = None


def jit(kernel: Any) -> Any:
    """`triton.jit` where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)
