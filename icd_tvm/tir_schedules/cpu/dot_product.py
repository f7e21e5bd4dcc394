"""Products of four unsigned and four signed bytes, summed into 32 bits, on vectors.

``vpdpbusd`` (AVX512_VNNI, AVX-VNNI) does it in one instruction and does not saturate: four
products of at most 255 x 128 fit. Without it the even and the odd bytes are multiplied as 16-bit
numbers with ``pmaddwd``, which is exact too; ``pmaddubsw`` is not used because it saturates at
32767, which two products of full-range bytes exceed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import tirx, tvm
from icd_tvm.errors import ConfigError
from icd_tvm.tir_schedules.cpu.lane_dot import LaneDot
from icd_tvm.tir_schedules.target import vector_bits

_VNNI = "llvm.x86.avx512.vpdpbusd.{bits}"
_MADD = {
    512: "llvm.x86.avx512.pmaddw.d.512",
    256: "llvm.x86.avx2.pmadd.wd",
    128: "llvm.x86.sse2.pmadd.wd",
}
_EVEN_BYTES = 0x00FF00FF


@dataclass(frozen=True)
class DotProduct(LaneDot):
    """How a target multiplies bytes.

    Attributes
    ----------
    intrinsic : str
        Name of the LLVM intrinsic.
    """

    intrinsic: str

    def add(self, total: Any, word: Any, weight: Any) -> Any:
        """Return ``total[j] + sum_b word[b] * weight[j, b]`` as a vector expression.

        Parameters
        ----------
        total : int32 x lanes
        word : int32
            Four uint8, the first in the lowest byte.
        weight : int8 x (4 * lanes)
        """
        return self.multiply(total, T.broadcast(word, self.lanes), weight)

    def multiply(self, total: Any, row: Any, weight: Any) -> Any:
        """Return ``total[j] + sum_b row[j, b] * weight[j, b]`` as a vector expression.

        Parameters
        ----------
        total : int32 x lanes
        row : int32 x lanes
            Four uint8 each, the first in the lowest byte.
        weight : int8 x (4 * lanes)
        """
        if self.native:
            bytes_ = T.reinterpret(f"int8x{4 * self.lanes}", row)
            return self._call(total, bytes_, weight)
        pairs = T.reinterpret(f"int16x{2 * self.lanes}", weight)
        eight = _all(8, f"int16x{2 * self.lanes}")
        even = self._call(_half(row, 0), T.shift_right(T.shift_left(pairs, eight), eight))
        odd = self._call(_half(row, 8), T.shift_right(pairs, eight))
        return total + even + odd

    def _call(self, *args: Any) -> Any:
        number = T.llvm_lookup_intrinsic_id(self.intrinsic)
        return T.call_llvm_pure_intrin(f"int32x{self.lanes}", number, *args)


def dot_product(target: Any) -> DotProduct:
    """Return how ``target`` multiplies bytes.

    Parameters
    ----------
    target : tvm.target.Target

    Raises
    ------
    ConfigError
        If it is no x86 target.
    """
    has = tvm.target.codegen.target_has_features
    bits = vector_bits(target)
    if not has("sse2", target):
        raise ConfigError(f"no int8 dot product for {target}", "compile for an x86-64 CPU")
    if bits == 512 and not has("avx512bw", target):
        bits = 256
    vnni = has("avx512vnni", target) if bits == 512 else has("avxvnni", target)
    return DotProduct(bits // 32, vnni, _VNNI.format(bits=bits) if vnni else _MADD[bits])


def _half(row: Any, shift: int) -> Any:
    """Return every other byte of ``row`` as 16-bit numbers."""
    dtype = str(row.ty.dtype)
    moved = T.shift_right(row, _all(shift, dtype)) if shift else row
    lanes = int(dtype.split("x")[1])
    return T.reinterpret(f"int16x{2 * lanes}", T.bitwise_and(moved, _all(_EVEN_BYTES, dtype)))


def _all(value: int, dtype: str) -> Any:
    element, lanes = dtype.split("x")
    return T.broadcast(tirx.IntImm(element, value), int(lanes))
