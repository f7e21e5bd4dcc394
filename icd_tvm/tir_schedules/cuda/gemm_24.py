"""Matmul on sparse tensor cores: of every four elements of a column of W at most two are not zero.

The two kept elements of every four lie together, with 2 bits each for their places in ascending
order, as ``mma.sp::ordered_metadata.m16n8k32`` of the PTX ISA takes them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import TransformError
from icd_tvm.tir_schedules.cuda.gemm_tile import GemmTile, choose_tile
from icd_tvm.tir_schedules.cuda.source_kernel import (
    PLAIN,
    WIDTHS,
    Argument,
    Epilogue,
    Rule,
    SourceKernel,
    operand,
    refused,
)

Array = npt.NDArray[np.generic]
TILE_K = 64  # elements of K in a tile
STAGES_24 = 3
TILES_24 = (GemmTile(128, 128, 32, 64), GemmTile(64, 64, 32, 32), GemmTile(16, 64, 16, 16))


class TwoFour(NamedTuple):
    """``w`` [column blocks, tiles, columns, 32]; ``meta`` uint32 [..., columns / 16, 2, 8, 2]."""

    w: Array
    meta: npt.NDArray[np.uint32]


def not_two_four(weight: Array) -> str:
    """Return where a weight [K, N] has more than two elements of four in K; empty if nowhere."""
    k, n = weight.shape
    padded = np.zeros((-(-k // 4) * 4, n), bool)
    padded[:k] = weight != 0
    counts = padded.reshape(-1, 4, n).sum(1)
    if not (counts > 2).any():
        return ""
    chunk, column = (int(axis[0]) for axis in np.nonzero(counts > 2))
    return (
        f"{int((counts > 2).sum())} fours hold more than 2 elements, the first in rows {4 * chunk} "
        f"to {4 * chunk + 3} of column {column}: prune with n:m 2:4 along the inputs"
    )


def pack_two_four(weight: Array, columns: int) -> TwoFour:
    """Return the kept elements of W and their places, as the kernel reads them.

    Parameters
    ----------
    weight : float16 or bfloat16 [K, N]
    columns : int
        Of a block: the ``n`` of a tile.

    Raises
    ------
    TransformError
        If more than two of four elements are not zero.
    """
    if reason := not_two_four(weight):
        raise TransformError(reason)
    k, n = weight.shape
    groups, tiles = -(-n // columns), -(-k // TILE_K)
    padded = np.zeros((groups * columns, tiles * TILE_K), weight.dtype)
    padded[:n, :k] = weight.T
    fours = padded.reshape(len(padded), -1, 4)
    places = np.sort(np.argsort(fours == 0, -1, kind="stable")[..., :2], -1)
    kept = np.take_along_axis(fours, places, -1).reshape(groups, columns, tiles, TILE_K // 2)
    nibbles = (places[..., 0] | places[..., 1] << 2).astype(np.uint32)
    # Four nibbles are half a word: of a row, and above it of the row 8 below.
    shifts = np.arange(4, dtype=np.uint32) * 4
    halves = (nibbles.reshape(len(padded), -1, 4) << shifts).sum(-1, dtype=np.uint32)
    rows = halves.reshape(groups, columns // 16, 2, 8, tiles, 2, 2)
    meta = (rows[:, :, 0] | rows[:, :, 1] << 16).transpose(0, 3, 1, 4, 2, 5)
    w = kept.transpose(0, 2, 1, 3)
    return TwoFour(np.asarray(w, order="C"), np.asarray(meta, dtype=np.uint32, order="C"))


def unpack_two_four(packed: TwoFour, k: int, n: int) -> Array:
    """Return W [k, n] from what `pack_two_four` made."""
    groups, tiles, columns, half = packed.w.shape
    words = packed.meta.transpose(0, 2, 4, 1, 3, 5)
    halves = np.stack([words & 0xFFFF, words >> 16], 2).reshape(groups * columns, -1)
    shifts = np.arange(8, dtype=np.uint32) * 2
    places = (halves[..., None] >> shifts & 3).reshape(groups * columns, -1, 2).astype(np.int64)
    full = np.zeros((groups * columns, tiles * half // 2, 4), packed.w.dtype)
    kept = packed.w.transpose(0, 2, 1, 3).reshape(groups * columns, -1, 2)
    np.put_along_axis(full, places, kept, -1)
    return np.asarray(full.reshape(groups * columns, -1).T[:k, :n], order="C")


def gemm_24_rule(
    m: int,
    n: int,
    k: int,
    dtype: str,
    *,
    out: str = "float16",
    epilogue: Epilogue = PLAIN,
    arch: str = "sm_90",
    weight: Array | None = None,
    tile: GemmTile | None = None,
) -> Rule:
    """Return the kernel of ``act(A[m, k] W[k, n] + bias) + residual`` for a 2:4 weight.

    Parameters
    ----------
    m, n, k : int
        Sizes.
    dtype : str
        Of A and W: ``float16`` or ``bfloat16``; sums are float32.
    out : str
        Of C and the residual: ``float16``, ``bfloat16`` or ``float32``.
    epilogue : Epilogue
    arch : str
        Whose number of multiprocessors decides the tile.
    weight : [k, n], optional
        Refused where it is not 2:4.
    tile : GemmTile, optional
        Instead of the chosen one.

    Returns
    -------
    Rule
        Arguments by name: ``a``, ``w`` and ``meta`` (`pack_two_four`), ``bias``, ``residual``,
        ``c``.
    """
    if dtype not in ("float16", "bfloat16"):
        return refused(f"no sparse product of {dtype} here; use float16 or bfloat16")
    if k % 8 or n % 8:
        return refused(f"rows of {k} {dtype} or {n} columns are not whole pieces of 16 bytes")
    if weight is not None and (reason := not_two_four(weight)):
        return refused(reason)
    tiles = -(-k // TILE_K)
    tile = tile or choose_tile(m, n, 2 * tiles, arch, tiles=TILES_24, parts=False)
    return Rule((_kernel(m, n, k, dtype, out, epilogue, tile),))


def _kernel(
    m: int, n: int, k: int, dtype: str, out: str, epilogue: Epilogue, tile: GemmTile
) -> SourceKernel:
    groups, tiles = -(-n // tile.n), -(-k // TILE_K)
    arguments = [
        Argument("a", (m, k), dtype),
        Argument("w", (groups, tiles, tile.n, TILE_K // 2), dtype),
        Argument("meta", (groups, tiles, tile.n // 16, 2, 8, 2), "uint32"),
    ]
    arguments += [*epilogue.arguments(m, n, out), Argument("c", (m, n), out)]
    stage = tile.m * 128 + tile.n * 72
    return SourceKernel(
        family="gemm_24",
        config=f"icd::Gemm24Config<{operand(dtype)}, {operand(out)}, {tile.m}, {tile.n}, "
        f"{tile.warp_m}, {tile.warp_n}, {STAGES_24}, {epilogue.flags}>",
        call=f"icd::gemm_24<G>(c, a, w, meta, {epilogue.given}, {m}, {n}, {k}, {tiles}, shared)",
        arguments=tuple(arguments),
        grid=(groups, -(-m // tile.m), 1),
        threads=tile.threads,
        shared=max(STAGES_24 * stage, 4 * tile.m * (tile.n + 4)),
        # Of the kept elements: those are what sparse tensor cores multiply.
        flop=1.0 * m * n * k,
        bytes=2.0 * m * k + 1.125 * n * tiles * TILE_K + WIDTHS[out] * m * n,
        unit="fp16",
        activation=epilogue.activation,
    )
