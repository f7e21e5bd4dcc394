"""Dense matmul on weights packed into register-tile panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import ScheduleRule, i64, te
from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cpu.prefetch import prefetch_next_panel
from icd_tvm.tir_schedules.cpu.tile import (
    Lead,
    Tile,
    flat_rows,
    is_prim_func,
    schedule_tiled,
    tile_attrs,
)

# FuseOps lets elementwise consumers join a kernel of this kind (kOutEWiseFusable).
OUT_EWISE_FUSABLE = 4


def dense_matmul(m: int, k: int, n: int, tile: Tile, lead: Lead = ()) -> Any:
    """Return the TIR function of ``Y = X @ W`` for a packed weight.

    Parameters
    ----------
    m, k, n : int
        Rows of X, the reduced axis, columns of W; none needs to divide by the tile.
    tile : Tile
        Register tile for the rows `flat_rows` returns; it fixes the panel width of the weight.
    lead : tuple of int, optional
        Leading batch axes of X and Y.

    Returns
    -------
    PrimFunc
        ``(X: f32[*lead, m, k], W: f32[ceil(n / P), k, P], Y: f32[*lead, m, n])`` with
        ``P = tile.columns``, marked so that FuseOps fuses an epilogue into it.
    """
    panels = -(-n // tile.columns)
    x = te.placeholder(shape64((*lead, m, k)), "float32", name="X")
    w = te.placeholder(shape64((panels, k, tile.columns)), "float32", name="W")
    axis = te.reduce_axis((i64(0), i64(k)), "k")
    width = tile.columns

    def product(row: Lead, j: Any) -> Any:
        return te.sum(x[(*row, axis)] * w[j // width, axis, j % width], axis=axis)

    return tiled_func(product, (x, w), (*lead, m, n), tile, "dense")


def pack_dense(weight: npt.NDArray[Any], columns: int) -> npt.NDArray[np.float32]:
    """Return ``weight`` cut into panels of ``columns`` columns, the last one zero-padded.

    Parameters
    ----------
    weight : array [K, N] of float32
    columns : int
        Panel width P.

    Returns
    -------
    array [ceil(N / P), K, P] of float32

    Raises
    ------
    ShapeError
        If ``weight`` is not a matrix.
    """
    return pack_panels(weight.astype(np.float32), columns)


def pack_panels(weight: npt.NDArray[Any], columns: int, run: int = 1) -> npt.NDArray[Any]:
    """Return ``weight`` cut into panels of columns and runs of rows, zero where it is padded.

    Parameters
    ----------
    weight : array [K, N]
    columns : int
        Panel width P.
    run : int
        Rows of a column that are neighbours.

    Returns
    -------
    array [ceil(N / P), ceil(K / run), P * run]

    Raises
    ------
    ShapeError
        If ``weight`` is not a matrix.
    """
    k, n = matrix_shape(weight)
    runs, panels = -(-k // run), -(-n // columns)
    padded = np.zeros((runs * run, panels * columns), weight.dtype)
    padded[:k, :n] = weight
    split = padded.reshape(runs, run, panels, columns).transpose(2, 0, 3, 1)
    return np.ascontiguousarray(split).reshape(panels, runs, columns * run)


class DenseRule(ScheduleRule):
    """Schedule rule for functions that hold one `dense_matmul` and its epilogue."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """Return the schedule of ``func``, or None if it holds no packed dense matmul."""
        sch = schedule_tiled(func, target, ("dense",)) if is_prim_func(func) else None
        return sch and prefetch_next_panel(sch)


def tiled_func(product: Any, inputs: tuple[Any, ...], shape: Lead, tile: Tile, kernel: str) -> Any:
    """Return a TIR function with a padded accumulator stage and an output stage.

    The accumulator covers whole tiles; rows past the end recompute the last row and columns
    past the end multiply padding, and the output stage drops both. Batches of a few rows each
    are accumulated as one run of rows (`flat_rows`).

    Parameters
    ----------
    product : callable
        Maps (index of a row of X, column of Y) to the reduction.
    inputs : tuple of te.Tensor
        Parameters of the function, X first.
    shape : tuple of int
        Shape of Y.
    tile : Tile
    kernel : str
        Name by which the schedule rules recognise the accumulator.
    """
    *lead, m, n = shape
    acc_lead, acc_m = flat_rows(tuple(lead), m)
    rows, columns = tile.padded(acc_m, n)
    flat = len(acc_lead) != len(lead)

    def accumulate(*index: Any) -> Any:
        *batch, i, j = index
        i = i if rows == acc_m else te.min(i, i64(acc_m - 1))
        return product(unravel_index(i, (*lead, m)) if flat else (*batch, i), j)

    def output(*index: Any) -> Any:
        *row, j = index
        return acc[ravel_index(row, (*lead, m)), j] if flat else acc[index]

    attrs = tile_attrs(tile, kernel)
    acc = te.compute(shape64((*acc_lead, rows, columns)), accumulate, name="acc", attrs=attrs)
    y = te.compute(shape64(shape), output, name="Y")
    func = te.create_prim_func([*inputs, y])
    return func.without_attr("global_symbol").with_attr("op_pattern", OUT_EWISE_FUSABLE)


def ravel_index(index: Sequence[Any], shape: Lead) -> Any:
    """Return the row-major position of ``index`` in ``shape``."""
    flat = index[0]
    for position, extent in zip(index[1:], shape[1:], strict=True):
        flat = flat * extent + position
    return flat


def unravel_index(flat: Any, shape: Lead) -> tuple[Any, ...]:
    """Return the index in ``shape`` of row-major position ``flat``."""
    index = []
    for extent in reversed(shape[1:]):
        index.append(flat % extent)
        flat = flat // extent
    return (flat, *reversed(index))


def shape64(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return ``shape`` as int64 immediates."""
    return tuple(i64(extent) for extent in shape)


def matrix_shape(weight: npt.NDArray[Any]) -> tuple[int, int]:
    """Return the shape of a matrix.

    Raises
    ------
    ShapeError
        If ``weight`` does not have two axes.
    """
    if weight.ndim != 2:
        raise ShapeError(f"a weight must have two axes, not shape {weight.shape}", "pass [K, N]")
    return int(weight.shape[0]), int(weight.shape[1])
