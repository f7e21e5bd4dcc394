"""Products of pairs of bfloat16 numbers, summed into float32, on vectors.

``vdpbf16ps`` (AVX512_BF16) does it in one instruction: it takes subnormal numbers as zero and
rounds every product's sum to nearest. Without it both halves of a pair are widened by a shift
and multiplied as float32, which costs about as much as a float32 product.

bfloat16 is kept as ``uint16`` everywhere: TVM 0.27 turns its own bfloat16 into float32 before
code is made. LLVM's intrinsics want real bfloat16, so they are called by functions of LLVM IR.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import tirx, tvm
from icd_tvm.errors import ConfigError
from icd_tvm.tir_schedules.cpu.emit import splat
from icd_tvm.tir_schedules.cpu.lane_dot import LaneDot
from icd_tvm.tir_schedules.target import vector_bits

_DOT, _ROUND = "icd_dpbf16ps", "icd_cvtneps2bf16"
_LLVM = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define <16 x float> @icd_dpbf16ps(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define <16 x i16> @icd_cvtneps2bf16(<16 x float> %a) {
  %x = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %a)
  %r = bitcast <16 x bfloat> %x to <16 x i16>
  ret <16 x i16> %r
}
"""
_HIGH_HALF = -65536


@dataclass(frozen=True)
class Bf16Dot(LaneDot):
    """How a target multiplies pairs of bfloat16; native is ``vdpbf16ps``."""

    def imported(self) -> AbstractContextManager[Any]:
        """Return the scope in which `add` and `rounded` may be emitted."""
        if not self.native:
            return super().imported()
        scope: AbstractContextManager[Any] = T.attr(
            0, "pragma_import_llvm", tvm.ir.StringImm(_LLVM)
        )
        return scope

    def add(self, total: Any, word: Any, weight: Any) -> Any:
        """Return ``total[j] + word[0] * weight[j][0] + word[1] * weight[j][1]``.

        Parameters
        ----------
        total : float32 x lanes
        word : int32
            Two bfloat16, the first in the low half.
        weight : int32 x lanes, or uint16 x (2 * lanes)
            Two bfloat16 a lane.
        """
        weight = T.reinterpret(f"int32x{self.lanes}", weight)
        row = T.broadcast(word, self.lanes)
        if self.native:
            return tirx.call_pure_extern("float32x16", _DOT, total, row, weight)
        for half in (_high, _low):
            total = total + half(row, self.lanes) * half(weight, self.lanes)
        return total

    def rounded(self, values: Any) -> Any:
        """Return the bits (uint16 x lanes) of float32 x lanes, rounded to the nearest even."""
        if self.native:
            bits = tirx.call_pure_extern("int16x16", _ROUND, values)
            return T.reinterpret("uint16x16", bits)
        return round_bits(values, self.lanes)


def bf16_dot(target: Any) -> Bf16Dot:
    """Return how ``target`` multiplies bfloat16.

    Parameters
    ----------
    target : tvm.target.Target

    Raises
    ------
    ConfigError
        If it is no LLVM target.
    """
    return Bf16Dot(vector_bits(target) // 32, has_bf16(target))


def has_bf16(target: Any) -> bool:
    """Tell whether ``target`` multiplies bfloat16 in one instruction (AVX512_BF16)."""
    has = tvm.target.codegen.target_has_features
    return vector_bits(target) == 512 and bool(has("avx512bf16", target))


def require_bf16(target: Any) -> None:
    """Raise ConfigError, with the reason, where `has_bf16` is false."""
    if not has_bf16(target):
        raise ConfigError(
            f"no bfloat16 dot product for {target}", "compile for a CPU with AVX512_BF16"
        )


def round_bits(value: Any, lanes: int = 1) -> Any:
    """Return the bits of float32 rounded to bfloat16, to nearest even, as uint16; NaN stays NaN.

    Parameters
    ----------
    value : float32, or float32 x lanes
    lanes : int
    """
    kind = "uint32" if lanes == 1 else f"uint32x{lanes}"

    def number(of: int) -> Any:
        one = tirx.const(of, "uint32")
        return one if lanes == 1 else T.broadcast(one, lanes)

    bits = tirx.reinterpret(kind, value)
    top = tirx.shift_right(bits, number(16))
    even = tirx.bitwise_and(top, number(1))
    nearest = tirx.shift_right(bits + even + number(0x7FFF), number(16))
    quiet = tirx.bitwise_or(top, number(0x40))
    is_number = tirx.bitwise_and(bits, number(0x7FFFFFFF)) <= number(0x7F800000)
    return tirx.Select(is_number, nearest, quiet).astype(kind.replace("32", "16", 1))


def _low(pairs: Any, lanes: int) -> Any:
    return T.reinterpret(f"float32x{lanes}", T.shift_left(pairs, splat(16, lanes)))


def _high(pairs: Any, lanes: int) -> Any:
    return T.reinterpret(f"float32x{lanes}", T.bitwise_and(pairs, splat(_HIGH_HALF, lanes)))
