"""Matmul on tensor cores: fp16, bf16, fp8 and int8, dense or with dead blocks of the weight.

A column block of W (64 or 128 outputs) lies in memory as the kernel reads it: tiles of 64 bytes of
K (32 fp16, 64 int8 or fp8) for each of its columns. Where the columns of a block share their zeros,
only live blocks of 16 rows of W are kept, with their list; units that were removed leave a smaller
dense matmul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from icd_tvm.tir_schedules.cuda.archs import HOPPER
from icd_tvm.tir_schedules.cuda.gemm_tile import ROW, GemmTile, choose_tile, tiles_of
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import (
    FP8,
    PLAIN,
    WIDTHS,
    Argument,
    Epilogue,
    Rule,
    SourceKernel,
    cpp_bool,
    operand,
    or_null,
    refused,
)
from icd_tvm.tir_schedules.cuda.turn import turn_kernel

Array = npt.NDArray[np.generic]
SLAB = 16  # rows of W in a block that is live or dead
LIVE_COLUMNS = 64  # columns of W in it, where a model's weights are packed
STRAY_INPUTS = 1 << 16  # a stray has 16 bits for the number of its input
_SCALED = (FP8, "int8")
# What belongs to each row of A: nothing, a scale, or a scale and a zero point.
RowScales = Literal["none", "scale", "zero"]


def live_blocks(weight: Array, columns: int) -> npt.NDArray[np.int32]:
    """Return the live blocks of 16 rows of W for each group of columns, padded with -1.

    Parameters
    ----------
    weight : [K, N]
        Any dtype; a block is dead where all its elements are zero.
    columns : int
        Of a group.

    Returns
    -------
    int32[groups, most live blocks]
        Padded to whole tiles of fp16 and int8 both: a multiple of 4.
    """
    k, n = weight.shape
    padded = np.zeros((-(-k // SLAB) * SLAB, -(-n // columns) * columns), bool)
    padded[:k, :n] = weight != 0
    by_slab = padded.reshape(-1, SLAB, padded.shape[1] // columns, columns)
    alive = np.asarray(by_slab.any((1, 3))).T
    most = max(4, -(-int(alive.sum(1).max(initial=0)) // 4) * 4)
    result = np.full((len(alive), most), -1, np.int32)
    for group, mask in enumerate(alive):
        found = np.flatnonzero(mask)
        result[group, : len(found)] = found
    return result


def pack_weight(
    weight: Array, columns: int, blocks: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.generic]:
    """Return W as the kernel reads it: [column blocks, tiles, columns, 64 bytes of K].

    Parameters
    ----------
    weight : [K, N]
        float16, bfloat16, float8_e4m3fn or int8.
    columns : int
        Of a block.
    blocks : int32[column blocks, live], optional
        From `live_blocks`; what is not listed is left out.
    """
    k, n = weight.shape
    per_tile = ROW // weight.dtype.itemsize
    groups = -(-n // columns)
    padded = np.zeros((-(-k // per_tile) * per_tile, groups * columns), weight.dtype)
    padded[:k, :n] = weight
    by_group = padded.reshape(len(padded), groups, columns).transpose(1, 2, 0)
    if blocks is not None:
        slabs = by_group.reshape(groups, columns, -1, SLAB)
        kept = np.stack([slabs[g][:, np.maximum(blocks[g], 0)] for g in range(groups)])
        by_group = (kept * (blocks >= 0)[:, None, :, None]).astype(weight.dtype)
        by_group = by_group.reshape(groups, columns, -1)
    tiles = by_group.reshape(groups, columns, -1, per_tile).transpose(0, 2, 1, 3)
    return np.asarray(tiles, order="C")


def unpack_weight(
    packed: Array, k: int, n: int, blocks: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.generic]:
    """Return W [k, n] from what `pack_weight` made."""
    groups, tiles, columns, per_tile = packed.shape
    flat = packed.transpose(0, 2, 1, 3).reshape(groups, columns, tiles * per_tile)
    if blocks is not None:
        full = np.zeros((groups, columns, -(-k // SLAB), SLAB), packed.dtype)
        slabs = flat.reshape(groups, columns, -1, SLAB)
        for group, listed in enumerate(blocks):
            full[group][:, listed[listed >= 0]] = slabs[group][:, listed >= 0]
        flat = full.reshape(groups, columns, -1)
    return np.asarray(flat.transpose(2, 0, 1).reshape(-1, groups * columns)[:k, :n], order="C")


def gemm_rule(
    m: int,
    n: int,
    k: int,
    dtype: str,
    *,
    out: str = "float16",
    epilogue: Epilogue = PLAIN,
    arch: str = "sm_90",
    live: int | None = None,
    strays: int | None = None,
    tile: GemmTile | None = None,
    rows: RowScales = "scale",
    codes: RowCodes | None = None,
) -> Rule:
    """Return the kernels of ``act(A[m, k] W[k, n] + bias) + residual``.

    Parameters
    ----------
    m, n, k : int
        Sizes.
    dtype : str
        Of A and W: ``float16``, ``bfloat16``, ``float8_e4m3fn`` (not on sm_80) or ``int8``; sums
        are float32 or int32. fp8 and int8 take ``row_scale`` float32[m] and ``column_scale``
        float32[n].
    out : str
        Of C and the residual: ``float16``, ``bfloat16`` or ``float32``; ``int8`` with ``codes`` and
        without a residual.
    epilogue : Epilogue
    arch : str
        Whose number of multiprocessors decides the tile; ``sm_90a`` has warpgroup products.
    live : int, optional
        Blocks of 16 rows of W in each list of `live_blocks`; None for a dense weight.
    strays : int, optional
        Fours of elements of W outside its live blocks (`pack_strays`), fp16 and bf16 only.
    tile : GemmTile, optional
        Instead of the chosen one.
    rows : str
        For fp8 and int8: ``none`` leaves out ``row_scale``; ``zero`` takes besides ``row_zero``
        float32[m], to be subtracted from the elements of A, and ``column_sums`` float32[n], the
        sums of the columns of W.
    codes : RowCodes, optional
        What the codes of an int8 C stand for, one step for all.

    Returns
    -------
    Rule
        One kernel; with parts of K one more that sums them, with strays one before that turns A.
        Arguments by name: ``a``, ``w`` (`pack_weight`), ``slabs`` (`live_blocks`), ``stray_starts``
        and ``stray_list`` (`pack_strays`), ``bias``, ``residual``, scales, ``c``.
    """
    if reason := _not_coded(out, epilogue, codes):
        return refused(reason)
    if dtype not in ("float16", "bfloat16", *_SCALED):
        return refused(f"no tensor core product of {dtype} here; use float16, bfloat16 or int8")
    if dtype == FP8 and arch == "sm_80":
        return refused("products of fp8 begin with sm_89; use int8 or float16 on sm_80")
    width = int(WIDTHS[dtype])
    if k * width % 16 or n % 8:
        return refused(f"rows of {k} {dtype} or {n} columns are not whole pieces of 16 bytes")
    k_tiles = -(-k * width // ROW) if live is None else live * SLAB * width // ROW
    if live is not None and (live * SLAB * width % ROW or not live):
        return refused(f"{live} live blocks are no whole tiles of {ROW} bytes")
    if strays is not None and (dtype in _SCALED or k > STRAY_INPUTS):
        wanted = f"make them float16, at most {STRAY_INPUTS} inputs"
        return refused(f"strays of {k} inputs of {dtype}: {wanted}")
    tile = tile or choose_tile(m, n, k_tiles, arch, tiles=tiles_of(m, dtype, arch))
    if tile.wgmma and (dtype == FP8 or arch != HOPPER):
        return refused(f"no warpgroup product of {dtype} for {arch} here; use another tile")
    work = _Work(m, n, k, k_tiles, dtype, out, epilogue, live, strays, tile, rows, codes)
    before = () if strays is None else (turn_kernel(m, k, work.turned, dtype),)
    after = () if tile.splits == 1 else (work.reduce(),)
    return Rule((*before, work.main(), *after))


def _not_coded(out: str, epilogue: Epilogue, codes: RowCodes | None) -> str:
    """Return why an output is not written as asked for, or an empty string."""
    if (out == "int8") != (codes is not None):
        return f"an output of {out} and codes {codes}: int8 has codes, other types have none"
    if codes is not None and (epilogue.residual or not codes.step):
        return "codes of C have one step, and no residual is added to them"
    return ""


@dataclass(frozen=True)
class _Work:
    m: int
    n: int
    k: int
    k_tiles: int
    dtype: str
    out: str
    epilogue: Epilogue
    live: int | None
    strays: int | None
    tile: GemmTile
    rows: RowScales
    codes: RowCodes | None

    @property
    def turned(self) -> int:
        """Rows of A in its turned copy: whole blocks, so that no row is asked for."""
        return -(-self.m // self.tile.m) * self.tile.m

    @property
    def _config(self) -> str:
        tile, slab = self.tile, 0 if self.live is None else SLAB * int(WIDTHS[self.dtype]) // 16
        sizes = f"{tile.m}, {tile.n}, {tile.warp_m}, {tile.warp_n}, {tile.stages}"
        return (
            f"icd::GemmConfig<{operand(self.dtype)}, {operand(self.out)}, {sizes}, "
            f"{self.epilogue.flags}, {slab}, {tile.splits}"
            f"{self._options}>"
        )

    @property
    def _options(self) -> str:
        """The template arguments that most kernels leave out."""
        if self.tile.wgmma:
            return f", {cpp_bool(self.strays is not None)}, icd::Wgmma"
        return "" if self.strays is None else ", true"

    @property
    def _extra(self) -> tuple[Argument, ...]:
        """What the epilogue reads."""
        found = self.epilogue.arguments(self.m, self.n, self.out)
        if self.dtype in _SCALED:
            if self.rows != "none":
                found.append(Argument("row_scale", (self.m,), "float32"))
            found.append(Argument("column_scale", (self.n,), "float32"))
            if self._zeros:
                found.append(Argument("row_zero", (self.m,), "float32"))
                found.append(Argument("column_sums", (self.n,), "float32"))
        return tuple(found)

    @property
    def _zeros(self) -> bool:
        return self.dtype in _SCALED and self.rows == "zero"

    @property
    def _end(self) -> tuple[str, ...]:
        """What follows the other arguments of a call: zero points and codes, if there are any."""
        if not self._zeros and self.codes is None:
            return ()
        zeros, sums = (or_null(a, self._zeros, "float") for a in ("row_zero", "column_sums"))
        values = "icd::Codes{}" if self.codes is None else self.codes.values
        return (f"icd::GemmEnd{{{zeros}, {sums}, {values}}}",)

    @property
    def _pair(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.codes is None else self.codes.pair

    @property
    def _finish(self) -> str:
        scaled, float32 = self.dtype in _SCALED, "float"
        return ", ".join(
            (
                self.epilogue.given,
                or_null("row_scale", scaled and self.rows != "none", float32),
                or_null("column_scale", scaled, float32),
            )
        )

    @property
    def _parts(self) -> Argument:
        return Argument("parts", (self.tile.splits, self.m, self.n), "float32")

    @property
    def _stray_arguments(self) -> tuple[Argument, ...]:
        return (
            Argument("stray_starts", (self.n + 1,), "int32"),
            Argument("stray_list", (max(1, self.strays or 0), 4), "uint32"),
            Argument("turned", (self.k, self.turned), self.dtype),
        )

    def main(self) -> SourceKernel:
        tile, groups = self.tile, -(-self.n // self.tile.n)
        width, split = WIDTHS[self.dtype], self.tile.splits > 1
        per_tile = int(ROW // width)
        arguments = [
            Argument("a", (self.m, self.k), self.dtype),
            Argument("w", (groups, self.k_tiles, tile.n, per_tile), self.dtype),
        ]
        if self.live is not None:
            arguments.append(Argument("slabs", (groups, self.live), "int32"))
        last = ["shared"]
        if self.strays is not None:
            arguments += self._stray_arguments
            given = f"stray_list, turned, {self.turned}"
            last.append(f"icd::Strays{{(const int*)stray_starts, {given}}}")
        if not split:
            arguments += self._extra
            last += ["icd::Strays()"] * (self.strays is None and bool(self._end))
            last += self._end
        out = self._parts if split else Argument("c", (self.m, self.n), self.out)
        arguments.append(out)
        finish = "nullptr, nullptr, nullptr, nullptr" if split else self._finish
        slabs = or_null("slabs", self.live is not None)
        kept = self.k_tiles * per_tile
        written = 4 * tile.splits if split else WIDTHS[self.out]
        return SourceKernel(
            family="gemm_wgmma" if tile.wgmma else "gemm",
            config=self._config,
            call=f"icd::gemm<G>({out.name}, a, w, {slabs}, {finish}, {self.m}, {self.n}, {self.k}, "
            f"{self.k_tiles}, {', '.join(last)})",
            arguments=tuple(arguments),
            grid=(groups, -(-self.m // tile.m), tile.splits),
            threads=tile.threads,
            shared=tile.shared,
            flop=2.0 * self.m * (self.n * min(self.k, kept) + 4 * (self.strays or 0)),
            bytes=width * (self.m * self.k + self.n * kept)
            + written * self.m * self.n
            + 16.0 * (self.strays or 0),
            # mma.sync of fp8 becomes products of fp16 on sm_90.
            unit="int8" if self.dtype == "int8" else "fp16",
            activation="none" if split else self.epilogue.activation,
            codes=self._pair,
        )

    def reduce(self) -> SourceKernel:
        splits, size = self.tile.splits, self.m * self.n
        parts, sizes = "(const float*)parts", (str(self.m), str(self.n))
        given = ("c", parts, self._finish, *sizes, *self._end)
        return SourceKernel(
            family="gemm",
            config=self._config,
            call=f"icd::gemm_reduce<G>({', '.join(given)})",
            arguments=(self._parts, *self._extra, Argument("c", (self.m, self.n), self.out)),
            grid=(-(-size // 512), 1, 1),
            threads=256,
            shared=0,
            flop=float(splits * size),
            bytes=size * (4.0 * splits + WIDTHS[self.out]),
            unit="fp32",
            activation=self.epilogue.activation,
            codes=self._pair,
        )
