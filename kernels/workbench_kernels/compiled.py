"""Compile Triton kernels for GPUs that aren't here, and read what they need from the compilers.

    made = compiled(kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 1024}, "sm_90")
    made.registers, made.spills, made.shared, made.text

    logits = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta")
    made = launched(lambda: route(logits, 8, Gating(), backend="triton"), "sm_90")["route_kernel"]

Only for processes without TRITON_INTERPRET: the interpreter's kernels can't be compiled.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory (LDS) that one program may have."""
TENSOR_CORES = {"sm_80": r"mma\.sync", "sm_90": r"wgmma", "sm_100": r"tcgen05\.mma", "gfx942": r"v_mfma"}
"""What instructions of matrix products look like in `Compiled.text`."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """A kernel, compiled for one target.

    text       PTX, or AMD's assembly
    registers  a thread's; on AMD vector registers, those for matrix products included
    spills     bytes a thread spills to memory; on AMD registers
    shared     bytes of shared memory a program
    """

    asm: Mapping[str, Any]
    text: str
    registers: int
    spills: int
    shared: int


def compiled(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Collection[str] = (),
) -> Compiled:
    """The kernel for one of TARGETS. `signature` has the types of the others: "*bf16", "*i64", "i32", "fp32"…

    Pointers count as aligned to 16 bytes, as those of whole tensors are, integers in `divisible` as multiples of 16.
    """
    _check_process()
    names = [parameter.name for parameter in kernel.params]
    if missing := {*signature, *constexprs} ^ set(names):
        raise ValueError(f"arguments of {kernel.__name__} that are missing, or that it doesn't have: {sorted(missing)}")
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in divisible]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=dict(constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},  # type: ignore[arg-type]
    )
    made = triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps, "num_stages": num_stages})
    return _read(made, target)


def launched(call: Callable[[], Any], target: str) -> dict[str, Compiled]:
    """The kernels that a call would launch on one of TARGETS, by name, compiled exactly as that launch compiles them.

    Nothing is launched, so tensors may be on the device "meta", and of any size. Pointers count as aligned.
    """
    _check_process()
    made: dict[str, Compiled] = {}
    with _device(target), _compiling_only(lambda name, kernel: made.update({name: _read(kernel, target)})):
        call()
    return made


@contextmanager
def _compiling_only(tell: Callable[[str, Any], None]) -> Iterator[None]:
    """Inside the block launches end when the kernel is compiled."""
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tell(kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        yield
    finally:
        JITFunction.run = run


@contextmanager
def _device(target: str) -> Iterator[None]:
    """Inside the block Triton compiles for a device that isn't here; a device's number is its name."""
    before = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Absent(target))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = before


@dataclass(frozen=True)
class _Absent:
    """What Triton asks a driver before it compiles."""

    target: str

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]


def _check_process() -> None:
    if triton.knobs.runtime.interpret:  # type: ignore[attr-defined]
        raise RuntimeError("compile kernels in a process without TRITON_INTERPRET.")


def _read(made: Any, target: str) -> Compiled:
    shared = int(made.metadata.shared)
    if target.startswith("sm_"):
        return Compiled(made.asm, made.asm["ptx"], *_ptxas(made.asm["ptx"]), shared)
    text = made.asm["amdgcn"]
    count = {name: int(re.findall(rf"\.{name}:\s+(\d+)", text)[0]) for name in ("vgpr_count", "vgpr_spill_count")}
    return Compiled(made.asm, text, count["vgpr_count"], count["vgpr_spill_count"], shared)


def _ptxas(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes a thread, as NVIDIA's assembler reports them."""
    [architecture] = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    tool = "ptxas-blackwell" if int(re.findall(r"\d+", architecture)[0]) >= 100 else "ptxas"
    run = subprocess.run(
        [_TOOLS / tool, "-v", f"--gpu-name={architecture}", "--output-file=/dev/null", "/dev/stdin"],
        input=ptx, capture_output=True, text=True, check=True,
    )  # fmt: skip
    [registers] = re.findall(r"Used (\d+) registers", run.stderr)
    return int(registers), sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr)))
