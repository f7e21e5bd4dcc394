"""Orders of both axes of a mask at once, for kernels that work on two-dimensional blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from icd_tvm.core.cost import TileAccess
from icd_tvm.core.permutation import Constraint, Perm, as_permutation, identity
from icd_tvm.core.solver import fit_permutation
from icd_tvm.errors import ConfigError, ShapeError

Orders = tuple[Perm, Perm]
# No solve of one axis may take more of the budget than one part in so many: the four solves of
# the starts leave as much for the alternation.
_SLICES = 8


@dataclass
class JointStats:
    """What :func:`fit_rows_columns` did.

    Attributes
    ----------
    blocks, blocks_before : int
        Blocks with a non-zero, after and before.
    total : int
        Blocks of the mask.
    starts : dict of str to int
        Blocks of each start.
    winner : str
    rounds : int
        Alternations of rows and columns.
    elapsed_s : float
    improved, deterministic : bool
    """

    blocks: int
    blocks_before: int
    total: int
    starts: dict[str, int] = field(default_factory=dict)
    winner: str = "start"
    rounds: int = 0
    elapsed_s: float = 0.0
    improved: bool = False
    deterministic: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as a dictionary that JSON can hold."""
        return asdict(self)


def block_count(
    mask: NDArray[np.bool_], row_tile: int, col_tile: int, rows: ArrayLike, cols: ArrayLike
) -> int:
    """Return the number of ``row_tile`` x ``col_tile`` blocks with a non-zero, permuted."""
    row_order, col_order = (
        as_permutation(p, n) for p, n in zip((rows, cols), mask.shape, strict=True)
    )
    return int(_merged(_merged(mask, row_order, row_tile).T, col_order, col_tile).sum())


def _merged(mask: NDArray[np.bool_], order: Perm, tile: int) -> NDArray[np.bool_]:
    """Order the rows and join each run of ``tile`` rows with or."""
    return np.logical_or.reduceat(mask[order], np.arange(0, mask.shape[0], tile), axis=0)


def fit_rows_columns(
    mask: NDArray[np.bool_],
    row_tile: int,
    col_tile: int,
    *,
    time_budget_s: float = 300.0,
    refine_steps: int = 2_000,
    rng_seed: int = 0,
    row_constraint: Constraint | None = None,
    col_constraint: Constraint | None = None,
    max_rounds: int = 8,
) -> tuple[Perm, Perm, JointStats]:
    """Order rows and columns of a mask so that few of its blocks hold a non-zero.

    Rows are solved for the columns' tiles, columns for the rows', in turn, from several starts
    (given order, both sorted by size, each axis alone, columns first, rows first). Never worse
    than the given order.

    Parameters
    ----------
    mask : ndarray of bool, shape [rows, cols]
        True where the matrix is non-zero.
    row_tile, col_tile : int
        Shape of a block; the last block of an axis may be partial.
    time_budget_s : float
        Wall clock limit, seconds.
    refine_steps : int
        Limit of local search steps of each solve.
    rng_seed : int
    row_constraint, col_constraint : Constraint, optional
    max_rounds : int
        Limit of alternations.

    Returns
    -------
    row_perm : int32[rows]
    col_perm : int32[cols]
    stats : JointStats

    Raises
    ------
    ShapeError, ConfigError, PermutationError
        If an argument is invalid.
    """
    began = time.perf_counter()
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype != np.bool_ or array.size == 0:
        raise ShapeError(f"mask {array.dtype}{array.shape} must be a non-empty bool matrix")
    if row_tile < 1 or col_tile < 1 or max_rounds < 1:
        raise ConfigError(
            f"tiles {row_tile} x {col_tile}, max_rounds={max_rounds} must be positive"
        )
    rules = (row_constraint or Constraint.free(), col_constraint or Constraint.free())
    for rule, length in zip(rules, array.shape, strict=True):
        rule.check_length(length)
    task = _Joint(
        array,
        (row_tile, col_tile),
        rules,
        began + time_budget_s,
        time_budget_s / _SLICES,
        refine_steps,
        rng_seed,
    )
    orders, stats = task.solve(max_rounds)
    stats.elapsed_s = time.perf_counter() - began
    return *orders, stats


@dataclass
class _Joint:
    mask: NDArray[np.bool_]
    tiles: tuple[int, int]
    rules: tuple[Constraint, Constraint]
    deadline: float
    slice_s: float
    steps: int
    seed: int
    deterministic: bool = True

    def solve(self, max_rounds: int) -> tuple[Orders, JointStats]:
        rows, cols = self.mask.shape
        best: Orders = (identity(rows), identity(cols))
        before = self._blocks(best)
        total = -(-rows // self.tiles[0]) * -(-cols // self.tiles[1])
        stats = JointStats(before, before, total)
        for name, orders in self._starts(best):
            stats.starts[name] = self._blocks(orders)
            if stats.starts[name] < stats.blocks:
                best, stats.blocks, stats.winner = orders, stats.starts[name], name
            if not self._time_left():
                break
        for stats.rounds in range(1, max_rounds + 1):
            if not self._time_left():
                break
            orders = self._axis(self._axis(best, 0), 1)
            if self._blocks(orders) >= stats.blocks:
                break
            best, stats.blocks = orders, self._blocks(orders)
        stats.improved = stats.blocks < before
        stats.deterministic = self.deterministic
        return best, stats

    def _blocks(self, orders: Orders) -> int:
        return block_count(self.mask, *self.tiles, *orders)

    def _time_left(self) -> bool:
        left = time.perf_counter() < self.deadline
        self.deterministic &= left
        return left

    def _starts(self, given: Orders) -> Iterator[tuple[str, Orders]]:
        if all(rule.kind == "free" for rule in self.rules):
            by_size = [
                np.argsort(-self.mask.sum(axis=1 - axis), kind="stable").astype(np.int32)
                for axis in (0, 1)
            ]
            yield "norm", (by_size[0], by_size[1])
        # Against single rows (columns): their tiles mean nothing yet.
        rows_alone, cols_alone = (self._axis(given, axis, merge=False) for axis in (0, 1))
        yield "each alone", (rows_alone[0], cols_alone[1])
        yield "columns first", self._axis(cols_alone, 0)
        yield "rows first", self._axis(rows_alone, 1)

    def _axis(self, orders: Orders, axis: int, *, merge: bool = True) -> Orders:
        """Solve one axis with the other one fixed."""
        left = min(self.deadline - time.perf_counter(), self.slice_s)
        if left <= 0:
            return orders
        other = orders[1 - axis]
        mask = self.mask if axis == 1 else self.mask.T
        windows = _merged(mask, other, self.tiles[1 - axis]) if merge else mask
        order, stats = fit_permutation(
            accesses=[TileAccess(sp.csr_matrix(windows), self.tiles[axis])],
            time_budget_s=left,
            refine_steps=self.steps,
            rng_seed=self.seed,
            start=orders[axis],
            constraint=self.rules[axis],
        )
        self.deterministic &= stats.deterministic
        return (order, other) if axis == 0 else (other, order)
