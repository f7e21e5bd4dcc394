"""Find the sparsity structure that a weight already has."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

from icd_tvm.adapters.arrays import Array, Bool, Index, as_matrix

Kind = Literal["dense", "unit", "vec", "vec-strays", "block", "n:m", "unstructured"]

# Chance events expected less often than this count as structure.
CHANCE = 1e-3
# A core at least this full is dense.
FULL = 0.999
# Two columns belong together when their masks correlate (phi coefficient) at least this much.
ALIKE = 0.7
# Near-closed groups need this many rows, so that chance correlation stays far below ALIKE.
LEAST_ROWS = 48
# Leaders tried before giving up on near-closed groups.
TRIALS = 12
# Block sides tried, largest area first.
SIDES = (128, 64, 32, 16, 8, 4)
# Longest N:M run tried, and the runs needed to call it a pattern.
LONGEST_RUN = 32
LEAST_RUNS = 64


@dataclass(frozen=True)
class Finding:
    """One structure that a weight has.

    Parameters
    ----------
    kind : str
        ``unit``, ``vec``, ``vec-strays``, ``block`` or ``n:m``.
    confidence : float
        In [0, 1]: 1 for an exact pattern that chance cannot make, less for a pattern with
        exceptions.
    reason : str
        What was seen, in one line.
    params : dict
        JSON-serialisable numbers of the pattern. Groups are lists of indices in ``groups`` (of
        columns for axis 1, of rows for axis 0) with the kept opposite indices in ``supports``.
    """

    kind: Kind
    confidence: float
    reason: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Detection:
    """What :func:`detect_sparsity` found; ``findings`` has the most useful structure first."""

    shape: tuple[int, int]
    density: float
    findings: tuple[Finding, ...]

    @property
    def kind(self) -> Kind:
        """Kind of the first finding, else ``dense`` or ``unstructured``."""
        if self.findings:
            return self.findings[0].kind
        return "dense" if self.density >= FULL else "unstructured"

    @property
    def structured(self) -> bool:
        """Whether anything was found that a kernel can use."""
        return bool(self.findings)

    @property
    def summary(self) -> str:
        """One line for people."""
        if self.findings:
            return "; ".join(f"{f.kind}: {f.reason}" for f in self.findings)
        if self.density >= FULL:
            return "dense: no structure"
        return f"unstructured: density {self.density:.3f}, no structure"

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and numbers for a JSON file."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "density": self.density,
            "summary": self.summary,
            "findings": [asdict(f) for f in self.findings],
        }


def detect_sparsity(tensor: Array) -> Detection:
    """Look for zero units, groups that share a support, blocks and N:M runs.

    Exact groups are found by hashing the zero pattern of every column and every row, groups
    with stray non-zeros by correlating the patterns with a few leaders. What chance alone would
    make in a random mask of the same size and density is not reported.

    Parameters
    ----------
    tensor : array, shape [K, N], real
        A weight; an element is zero when it equals 0.

    Returns
    -------
    Detection

    Raises
    ------
    ShapeError
        Not a non-empty matrix of real numbers.
    NonFiniteError
        NaN or infinity inside.
    """
    weight = as_matrix(tensor)
    mask = np.asarray(weight != 0)
    shape = (mask.shape[0], mask.shape[1])
    density = float(np.count_nonzero(mask)) / mask.size
    if density >= FULL and mask.any(axis=0).all() and mask.any(axis=1).all():
        return Detection(shape, density, ())
    if not mask.any():
        reason = "every element is zero"
        zero = {"zero_rows": [*range(shape[0])], "zero_columns": [*range(shape[1])]}
        found = Finding("unit", 1.0, reason, zero)
        return Detection(shape, density, (found,))
    rows, cols = np.asarray(mask.any(axis=1)), np.asarray(mask.any(axis=0))
    core = mask[np.ix_(rows, cols)]
    units = _units(rows, cols, density)
    inside = [] if float(core.mean()) >= FULL else _core_structures(mask, core, rows, cols)
    # Whatever skips more elements comes first.
    units_first = mask.size - core.size >= core.size - np.count_nonzero(core)
    findings = [*units, *inside] if units_first else [*inside, *units]
    return Detection(shape, density, tuple(findings))


def _core_structures(mask: Bool, core: Bool, rows: Bool, cols: Bool) -> list[Finding]:
    runs = _n_m(mask, rows, cols)
    if runs is not None:
        return [runs]
    block = _blocks(mask)
    row_ids, col_ids = np.flatnonzero(rows), np.flatnonzero(cols)
    by_columns = _groups(core, row_ids, col_ids, axis=1)
    by_rows = _groups(np.ascontiguousarray(core.T), col_ids, row_ids, axis=0)
    if block is None and by_columns and by_rows:
        block = _scattered_block(by_columns, by_rows)
    found = [f for f in (block, by_columns, by_rows) if f is not None]
    return found or [f for f in (_near_groups(core, row_ids, col_ids),) if f is not None]


def _units(rows: Bool, cols: Bool, density: float) -> list[Finding]:
    parts = []
    params: dict[str, Any] = {}
    for name, live, span in (("columns", cols, rows.size), ("rows", rows, cols.size)):
        zero = np.flatnonzero(~live)
        # As many zero lines as this, if the non-zeros were thrown in at random?
        chance = float(stats.binom.sf(zero.size - 1, live.size, (1 - density) ** span))
        if zero.size and chance < CHANCE:
            parts.append(f"{zero.size} of {live.size} {name} are zero")
            params[f"zero_{name}"] = zero.tolist()
    return [Finding("unit", 1.0, ", ".join(parts), params)] if parts else []


def _groups(core: Bool, rows: Index, cols: Index, axis: int) -> Finding | None:
    """Group equal columns of ``core``, [rows, cols]; ``axis`` is the weight's grouped axis."""
    labels, sizes = _equal_columns(core)
    size = int(np.bincount(sizes).argmax())
    # Dead units make some groups smaller; a column alone belongs to no group.
    closed = float(sizes[sizes >= max(2, size / 2)].sum()) / len(cols)
    if size < 2 or len(sizes) < 2 or closed < 0.9 or _chance_pairs(core) > CHANCE:
        return None
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(sizes) - sizes
    members = np.split(order, starts[1:])
    supports = [rows[core[:, int(order[s])]].tolist() for s in starts]
    kept = sorted({len(s) for s in supports})
    groups = [cols[m].tolist() for m in members]
    contiguous = all(g[-1] - g[0] == len(g) - 1 for g in groups)
    params = {
        "axis": axis,
        "size": size,
        "count": len(groups),
        "kept": kept,
        "contiguous": contiguous,
        "groups": groups,
        "supports": supports,
    }
    across, along = ("columns", "rows") if axis == 1 else ("rows", "columns")
    where = "contiguous" if contiguous else "scattered"
    reason = (
        f"{len(groups)} closed {where} groups of {size} {across} "
        f"with {_span(kept)} of {core.shape[0]} {along} kept"
    )
    return Finding("vec", closed, reason, params)


def _equal_columns(core: Bool) -> tuple[Index, Index]:
    """Label the columns by their pattern, labels in order of first appearance."""
    packed = np.ascontiguousarray(np.packbits(core, axis=0).T)
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, labels, sizes = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank[labels.ravel()], sizes[order]


def _chance_pairs(core: Bool) -> float:
    """Expected pairs of equal columns in a random mask with the same row densities."""
    width = core.shape[1]
    density = core.mean(axis=1)
    agree = np.prod(density**2 + (1 - density) ** 2)
    return float(0.5 * width * (width - 1) * agree)


def _near_groups(core: Bool, rows: Index, cols: Index) -> Finding | None:
    """Group columns whose patterns almost agree, and count what disagrees."""
    length, width = core.shape
    if length < LEAST_ROWS or width < 8:
        return None
    unit = _standardised(core)
    # A column's group gets a label; -1 is not yet grouped.
    labels = np.full(width, -1)
    count = 0
    for trial, leader in enumerate(np.random.default_rng(0).permutation(width)):
        if labels[leader] >= 0:
            continue
        if trial >= TRIALS and 2 * np.count_nonzero(labels >= 0) < trial:
            return None
        alike = (unit[leader] @ unit.T >= ALIKE) & (labels < 0)
        if np.count_nonzero(alike) < 2:
            continue
        labels[alike] = count
        count += 1
    if np.count_nonzero(labels >= 0) < 0.9 * width or count < 2:
        return None
    return _near_finding(core, labels, count, rows, cols)


def _near_finding(
    core: Bool, labels: Index, count: int, rows: Index, cols: Index
) -> Finding | None:
    sizes = np.bincount(labels[labels >= 0], minlength=count)
    size = int(np.median(sizes))
    if size < 4:
        return None
    groups, supports, extra, missing = [], [], 0, 0
    for g in range(count):
        members = np.flatnonzero(labels == g)
        cells = core[:, members]
        shared = 2 * cells.sum(axis=1) > members.size
        extra += int(cells[~shared].sum())
        missing += int((~cells[shared]).sum())
        groups.append(cols[members].tolist())
        supports.append(rows[shared].tolist())
    kept = int(core.sum())
    strays = (extra + int(core[:, labels < 0].sum())) / kept
    params = {
        "axis": 1,
        "size": size,
        "count": count,
        "strays": strays,
        "holes": missing / kept,
        "groups": groups,
        "supports": supports,
        "ungrouped": cols[labels < 0].tolist(),
    }
    reason = (
        f"{count} nearly closed groups of about {size} columns; {100 * strays:.2f} % of the "
        f"non-zeros are strays and {100 * params['holes']:.2f} % are missing"
    )
    return Finding("vec-strays", max(0.0, 1 - strays - params["holes"]), reason, params)


def _standardised(core: Bool) -> Array:
    """Return the columns as rows of zero mean and unit norm, float32 [cols, rows]."""
    values = core.T.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(norms > 0, norms, 1))


def _blocks(mask: Bool) -> Finding | None:
    """Find aligned full-or-empty blocks, the largest area first."""
    least = SIDES[-1]
    if mask.shape[0] % least or mask.shape[1] % least:
        return None
    # Every side is a multiple of the least one, so larger blocks are read off the finest grid.
    counts = _block_counts(mask, least, least)
    grid = counts == least * least
    if not np.all(grid | (counts == 0)):
        return None
    shapes = sorted(((r, c) for r in SIDES for c in SIDES), key=lambda s: (-s[0] * s[1], -min(s)))
    for rows, cols in shapes:
        full = _coarser(grid, rows // least, cols // least)
        if full is None:
            continue
        if full[np.ix_(full.any(axis=1), full.any(axis=0))].all():
            # Zero rows and columns alone explain it.
            return None
        count = int(full.sum())
        params = {"rows": rows, "cols": cols, "count": count, "aligned": True}
        reason = f"{count} of {full.size} aligned {rows}x{cols} blocks are full, none is mixed"
        return Finding("block", 1.0, reason, params)
    return None


def _coarser(grid: Bool, rows: int, cols: int) -> Bool | None:
    """Return which ``rows`` x ``cols`` blocks of ``grid`` are full, None when any is mixed."""
    height, width = grid.shape
    if height % rows or width % cols or min(height // rows, width // cols) < 2:
        return None
    counts = _block_counts(grid, rows, cols)
    full = np.asarray(counts == rows * cols)
    return full if np.all(full | (counts == 0)) else None


def _block_counts(mask: Bool, rows: int, cols: int) -> Index:
    by_rows = mask.reshape(mask.shape[0] // rows, rows, mask.shape[1]).sum(axis=1, dtype=np.int32)
    return np.asarray(by_rows.reshape(len(by_rows), -1, cols).sum(axis=2))


def _scattered_block(by_columns: Finding, by_rows: Finding) -> Finding | None:
    cols, rows = int(by_columns.params["size"]), int(by_rows.params["size"])
    params = {"rows": rows, "cols": cols, "aligned": False}
    reason = f"rows and columns both form closed groups: scattered {rows}x{cols} blocks"
    return Finding("block", 1.0, reason, params)


def _n_m(mask: Bool, rows: Bool, cols: Bool) -> Finding | None:
    """Find the shortest run length of which every run keeps the same number."""
    found = (_runs(mask[:, cols], 0), _runs(mask[rows].T, 1))
    return min((f for f in found if f is not None), key=lambda f: int(f.params["m"]), default=None)


def _runs(view: Bool, axis: int) -> Finding | None:
    counts = view.astype(np.uint8)
    m = 1
    while len(counts) % 2 == 0 and m < LONGEST_RUN:
        counts = counts[0::2] + counts[1::2]
        m *= 2
        n = int(counts.max())
        if not 0 < n < m or counts.size < LEAST_RUNS:
            continue
        exact = float(np.mean(counts == n))
        if exact < 0.9:
            continue
        reason = f"{n} of {m} along axis {axis} in {100 * exact:.1f} % of the runs, never more"
        return Finding("n:m", exact, reason, {"n": n, "m": m, "axis": axis})
    return None


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
