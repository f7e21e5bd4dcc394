"""A kernel written in CUDA C: its text for nvcc and the emulator, and as a TIR function.

The kernels are CUDA C and not TIR with PTX intrinsics, because the same text can then be compiled
as C++ and executed on a CPU, and because those intrinsics of TVM 0.27 change between releases and
``Schedule.tensorize`` to some of them ends the process.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SOURCES = Path(__file__).with_name("src")
ACTIVATIONS = {"none": 0, "gelu": 1, "relu": 2, "silu": 3}
# numpy and TVM dtype -> the operand type of the sources, and its bytes.
FP8 = "float8_e4m3fn"
TYPES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "int8": "S8",
    "int4": "S4",
    FP8: "F8",
    "float32": "F32",
}
WIDTHS = {"float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5, FP8: 1.0, "float32": 4.0}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of an argument."""
    return np.dtype(getattr(ml_dtypes, name) if name in ("bfloat16", FP8) else name)


@dataclass(frozen=True)
class Argument:
    """One array of a kernel: its name in the call, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Epilogue:
    """What follows a product before it is written: a bias, an activation, then a residual.

    Attributes
    ----------
    activation : str
        A key of `ACTIVATIONS`.
    bias : bool
        Add float32[N].
    residual : bool
        Add a tensor of the output's shape and dtype, after the activation.
    """

    activation: str = "none"
    bias: bool = False
    residual: bool = False

    @property
    def flags(self) -> str:
        """The template arguments."""
        return f"{ACTIVATIONS[self.activation]}, {cpp_bool(self.bias)}, {cpp_bool(self.residual)}"

    @property
    def given(self) -> str:
        """What the call passes for it."""
        return f"{or_null('bias', self.bias)}, {or_null('residual', self.residual)}"

    def arguments(self, m: int, n: int, out: str) -> list[Argument]:
        """Return the arguments that it reads, for an output [m, n] of dtype ``out``."""
        found = [Argument("bias", (n,), "float32")] if self.bias else []
        return [*found, Argument("residual", (m, n), out)] if self.residual else found


PLAIN = Epilogue()


@dataclass(frozen=True)
class SourceKernel:
    """One kernel for one shape.

    Attributes
    ----------
    family : str
        File in ``src`` without its suffix.
    config : str
        C++ type that the call names ``G``.
    call : str
        The call of the device function, with the names of the arguments and ``shared``.
    arguments : tuple of Argument
        Inputs, then outputs.
    outputs : int
        How many of them, from the end, are written.
    grid : tuple of three int
        Blocks.
    threads : int
        Of a block, a multiple of 32.
    shared : int
        Bytes of shared memory of a block.
    flop, bytes : float
        Useful floating-point (or integer) operations, and bytes that must cross DRAM once.
    unit : str
        ``fp16`` or ``int8`` for tensor cores, ``fp32`` for the others.
    activation : str
        Of the epilogue, where there is one.
    eps : float
        What a norm adds to the mean square.
    codes : tuple of (float, float)
        Step and code of 0.0 of an int8 output; a step of 0 where each row has its own.
    """

    family: str
    config: str
    call: str
    arguments: tuple[Argument, ...]
    grid: tuple[int, int, int]
    threads: int
    shared: int
    flop: float
    bytes: float
    unit: str
    outputs: int = 1
    activation: str = "none"
    eps: float = 0.0
    codes: tuple[float, float] = (0.0, 0.0)

    @property
    def name(self) -> str:
        """A C identifier, the same for the same kernel."""
        text = f"{self.config}{self.call}{self.arguments}"
        return f"icd_{self.family}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def body(self) -> str:
        """Return the device function that calls the family's template."""
        names = ", ".join(f"void* {argument.name}" for argument in self.arguments)
        return (
            f"ICD_DEVICE void {self.name}_body({names}, void* shared) {{\n"
            f"  typedef {self.config} G;\n  {self.call};\n}}\n"
        )

    def source(self) -> str:
        """Return everything the device function needs, once for each text that holds it."""
        return "\n".join((source_of("common"), *map(source_of, _files(self.family)), self.body()))

    def cuda(self) -> str:
        """Return a ``__global__`` function of the kernel's name; needs `source` before it."""
        names = [argument.name for argument in self.arguments]
        return (
            f'extern "C" __global__ void __launch_bounds__({self.threads}) '
            f"{self.name}({', '.join(f'void* {name}' for name in names)}) {{\n"
            "  extern __shared__ __align__(16) unsigned char icd_shared[];\n"
            f"  {self.name}_body({', '.join(names)}, icd_shared);\n}}\n"
        )

    def primfunc(self) -> Any:
        """Return the kernel as a scheduled TIR function that fusion leaves alone."""
        from tvm.script import tirx

        from icd_tvm._tvm import tvm

        return tvm.script.from_source(self._script(), {"T": tirx, "SOURCE": self.source()})

    def _script(self) -> str:
        buffers = ", ".join(f"{a.name}: T.Buffer({a.shape}, {a.dtype!r})" for a in self.arguments)
        data = ", ".join(f"{a.name}.data" for a in self.arguments)
        lines = ["@T.prim_func(private=True, s_tir=True)", f"def {self.name}({buffers}):"]
        lines.append(
            ' T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})'
        )
        bindings = [
            *zip(self.grid, ("blockIdx.x", "blockIdx.y", "blockIdx.z"), strict=True),
            (self.threads, "threadIdx.x"),
        ]
        for depth, (extent, thread) in enumerate(bindings):
            indent = " " * (depth + 1)
            lines.append(f"{indent}for i{depth} in T.thread_binding({extent}, thread={thread!r}):")
        body = " " * (len(bindings) + 1)
        lines += [
            f'{body}with T.sblock("block"):',
            f"{body} T.reads()",
            f"{body} T.writes()",
            f"{body} shared = T.sblock_alloc_buffer(({max(self.shared, 16)},), 'uint8', "
            "scope='shared.dyn')",
            f"{body} T.evaluate(T.cuda.func_call('{self.name}_body', {data}, shared.data, "
            "source_code=SOURCE))",
        ]
        return "\n".join(lines) + "\n"


class Rule(NamedTuple):
    """Kernels to be run one after another; none, with the reason, where the family does not fit."""

    kernels: tuple[SourceKernel, ...]
    reason: str = ""


def refused(reason: str) -> Rule:
    """Return a rule that does not fit."""
    return Rule((), reason)


def operand(dtype: str) -> str:
    """Return the operand type of the sources for a dtype."""
    return f"icd::{TYPES[dtype]}"


def or_null(name: str, there: bool, kind: str = "") -> str:
    """Return an argument of a call: the array, cast if need be, or a null pointer."""
    if not there:
        return "nullptr"
    return f"(const {kind}*){name}" if kind else name


def cpp_bool(value: bool) -> str:
    """Return a truth value as C++ writes it."""
    return "true" if value else "false"


def _files(family: str) -> tuple[str, ...]:
    """Return the files of a family, what they need first; `common` is in all."""
    before = {"gemm_24": "gemm", "gemm_wgmma": "gemm", "quantize": "norm"}.get(family)
    return (family,) if before is None else (before, family)


@cache
def source_of(family: str) -> str:
    """Return the text of a file in ``src``."""
    return (SOURCES / f"{family}.cuh").read_text("utf-8")


def whole_text(kernels: list[SourceKernel], *, wrap: bool = True) -> str:
    """Return one text with all kernels; ``wrap`` adds their ``__global__`` functions."""
    families = dict.fromkeys(name for kernel in kernels for name in _files(kernel.family))
    parts = [source_of("common"), *(source_of(family) for family in families)]
    for kernel in {kernel.name: kernel for kernel in kernels}.values():
        parts += [kernel.body(), kernel.cuda() if wrap else ""]
    return "\n".join(parts)
