"""A copy of a matrix with its rows side by side, for kernels that gather columns of it."""

from __future__ import annotations

from icd_tvm.tir_schedules.cuda.source_kernel import Argument, SourceKernel

_TILE, _THREADS = 64, 128


def turn_kernel(m: int, k: int, stride: int, dtype: str) -> SourceKernel:
    """Return the kernel that makes ``turned`` [k, stride] of ``a`` [m, k], zeros beyond m."""
    return SourceKernel(
        family="turn",
        config="icd::TurnConfig",
        call=f"icd::turn<G>(turned, a, {m}, {k}, {stride}, shared)",
        arguments=(Argument("a", (m, k), dtype), Argument("turned", (k, stride), dtype)),
        grid=(-(-k // _TILE), -(-stride // _TILE), 1),
        threads=_THREADS,
        shared=2 * _TILE * (_TILE + 2),
        flop=0.0,
        bytes=2.0 * k * (m + stride),
        unit="fp32",
    )
