"""Convolutions over time with one filter for every channel, on rows of channels."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import i64, te, tirx
from icd_tvm.tir_schedules.cpu.emit import f32


def depthwise_rows(x: Any, weight: Any, bias: Any, *, before: int, after: int, step: int) -> Any:
    """Return the TE stage ``Y[t, c] = bias[c] + sum_k weight[k, c] * X[t + k * step - before, c]``.

    X is zero before its first and after its last row. The sum is written out, so that the stage
    is elementwise: what follows and precedes fuses with it, and vectors run along the channels.

    Parameters
    ----------
    x : te.Tensor
        float32 ``[*lead, rows, channels]``.
    weight : te.Tensor
        float32 ``[taps, channels]``.
    bias : te.Tensor
        float32 ``[channels]``.
    before, after : int
        Rows of zeros that count as part of X.
    step : int
        Rows from one tap to the next.

    Returns
    -------
    te.Tensor
        float32 ``[*lead, rows + before + after - (taps - 1) * step, channels]``.
    """
    *lead, rows, channels = x.shape
    length, taps = int(rows), int(weight.shape[0])

    def at(*index: Any) -> Any:
        *batch, t, c = index
        total = bias[c]
        for k in range(taps):
            row = t + (k * step - before)
            # Both sides of a selection are computed: no row outside X may be read. TVM takes the
            # clamp away under a condition that it can solve for the row, which an xor is not.
            near = te.min(te.max(row, i64(0)), i64(length - 1))
            inside = tirx.EQ(near ^ row, i64(0))
            value = tirx.Select(inside, x[(*batch, near, c)], f32(0.0))
            total = total + weight[k, c] * value
        return total

    shape = (*lead, i64(length + before + after - (taps - 1) * step), channels)
    return te.compute(shape, at, name="depthwise")
