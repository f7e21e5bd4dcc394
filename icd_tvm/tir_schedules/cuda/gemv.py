"""Matrix times vector: fp16, bf16, fp8, int8 and int4 weights, dense or with dead blocks.

Every output's weights lie together and are read once, 16 bytes a thread and 512 a warp. int4 is
packed two to a byte, element i of a 32-bit word in its nibble i, in two's complement.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from icd_tvm.tir_schedules.cuda.gemm import SLAB
from icd_tvm.tir_schedules.cuda.source_kernel import (
    FP8,
    PLAIN,
    WIDTHS,
    Argument,
    Epilogue,
    Rule,
    SourceKernel,
    operand,
    or_null,
    refused,
)

Array = npt.NDArray[np.generic]
ROWS, WARPS = 4, 4
_SCALED = (FP8, "int8", "int4")


def pack_vectors(
    weight: Array, dtype: str, blocks: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.generic]:
    """Return W as the kernel reads it: [N, bytes / width], rows padded to 16 bytes.

    Parameters
    ----------
    weight : [K, N]
        In the stored dtype; int4 as int8 in -8..7.
    dtype : str
        ``float16``, ``bfloat16``, ``float8_e4m3fn``, ``int8`` or ``int4`` (which gives uint8 [N,
        bytes]).
    blocks : int32[groups, live], optional
        Live blocks of 16 rows of W for each group of N / groups columns, -1 where padded.
    """
    rows = np.asarray(weight.T, order="C")
    if blocks is not None:
        rows = _live_rows(rows, blocks)
    per_chunk = int(16 / WIDTHS[dtype])
    padded = np.zeros((len(rows), -(-rows.shape[1] // per_chunk) * per_chunk), rows.dtype)
    padded[:, : rows.shape[1]] = rows
    if dtype != "int4":
        return padded
    nibbles = padded.astype(np.int8).view(np.uint8) & 15
    return np.asarray(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)


def unpack_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Return the int8 values [N, K] of packed int4 rows."""
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)


def _live_rows(rows: Array, blocks: npt.NDArray[np.int32]) -> npt.NDArray[np.generic]:
    n, k = rows.shape
    padded = np.zeros((n, -(-k // SLAB) * SLAB), rows.dtype)
    padded[:, :k] = rows
    per_group = n // len(blocks)
    slabs = padded.reshape(len(blocks), per_group, -1, SLAB)
    kept = np.stack([slabs[g][:, np.maximum(blocks[g], 0)] for g in range(len(blocks))])
    kept = (kept * (blocks >= 0)[:, None, :, None]).astype(rows.dtype)
    return np.asarray(kept.reshape(n, -1))


def gemv_rule(
    n: int,
    k: int,
    dtype: str,
    *,
    x: str = "float16",
    out: str | None = None,
    epilogue: Epilogue = PLAIN,
    group: int = 0,
    live: tuple[int, int] | None = None,
) -> Rule:
    """Return the kernel of ``act(W x + bias) + residual`` for one vector.

    Parameters
    ----------
    n, k : int
        Outputs and inputs.
    dtype : str
        Of W: ``float16``, ``bfloat16``, ``float8_e4m3fn``, ``int8`` or ``int4``.
    x : str
        Of x: ``float16`` or ``bfloat16``.
    out : str, optional
        Of y and the residual: that of x, or ``float32``.
    epilogue : Epilogue
    group : int
        Elements of K that share a scale in ``scales`` float32[n, k / group], where W holds
        integers; 0: float32[n] where it holds integers or fp8.
    live : (groups, blocks), optional
        Shape of the lists of live blocks, as `pack_vectors` takes them; None: dense.

    Returns
    -------
    Rule
        Arguments by name: ``x``, ``w``, ``blocks``, ``scales``, ``bias``, ``residual``, ``y``.
    """
    if dtype not in ("float16", "bfloat16", *_SCALED) or x not in ("float16", "bfloat16"):
        return refused(f"no kernel for {dtype} times {x}")
    if out not in (None, x, "float32"):
        return refused(f"no kernel for {x} that writes {out}")
    per_chunk = int(16 / WIDTHS[dtype])
    if dtype in ("float16", "bfloat16") and dtype != x:
        return refused(f"{dtype} weights times {x}: cast one of them")
    if group and (dtype not in ("int8", "int4") or (live is not None and group % SLAB)):
        return refused(f"scales of groups of {group} {dtype} with live blocks: {live is not None}")
    if live is not None and (n % (live[0] * ROWS) or k % SLAB):
        return refused(
            f"live blocks need groups of a multiple of {ROWS} rows and inputs of a multiple of "
            f"{SLAB}"
        )
    length = k if live is None else live[1] * SLAB
    if length % per_chunk or k % 8 or (group and (group % per_chunk or k % group)):
        return refused(f"{length} elements of {dtype} in groups of {group} are no whole 16 bytes")
    types = (dtype, x, out or x)
    return Rule((_kernel(n, k, length // per_chunk, types, epilogue, group, live),))


def _kernel(
    n: int,
    k: int,
    chunks: int,
    types: tuple[str, str, str],
    epilogue: Epilogue,
    group: int,
    live: tuple[int, int] | None,
) -> SourceKernel:
    dtype, x, out = types
    scaled, width = dtype in _SCALED, WIDTHS[dtype]
    # Warps share a row where it is long enough for all.
    split = min(WARPS, max(1, 1 << (max(1, chunks // 32).bit_length() - 1)))
    stored = ("uint8", chunks * 16) if dtype == "int4" else (dtype, int(chunks * 16 / width))
    arguments = [Argument("x", (1, k), x), Argument("w", (n, stored[1]), stored[0])]
    if live is not None:
        arguments.append(Argument("blocks", live, "int32"))
    if scaled:
        arguments.append(Argument("scales", (n, k // group) if group else (n,), "float32"))
    arguments += [*epilogue.arguments(1, n, out), Argument("y", (1, n), out)]
    rows = WARPS // split * ROWS
    call = ", ".join(
        (
            "y, x, w",
            or_null("blocks", live is not None),
            or_null("scales", scaled, "float"),
            epilogue.given,
            f"{n}, {chunks}, {n // live[0] if live else n}, {k // group if group else 1}, shared",
        )
    )
    return SourceKernel(
        family="gemv",
        config=f"icd::GemvConfig<{operand(dtype)}, {operand(x)}, {operand(out)}, {ROWS}, {WARPS}, "
        f"{split}, {epilogue.flags}, {SLAB if live else 0}, {group}>",
        call=f"icd::gemv<G>({call})",
        arguments=tuple(arguments),
        grid=(-(-n // rows), 1, 1),
        threads=WARPS * 32,
        shared=4 * WARPS * ROWS,
        flop=2.0 * n * chunks * 16 / width,
        bytes=n * chunks * 16.0 + 2 * (k + n) + (64.0 * n * chunks / width / group if group else 0),
        unit="fp32",
        activation=epilogue.activation,
    )
