"""Apply a sparsity type to one weight: array in, array and metadata out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm.adapters.arrays import Array, Bool, Float64, Index, as_matrix
from icd_tvm.adapters.calibration import Calibration, as_calibration
from icd_tvm.adapters.detect import Detection, Finding, detect_sparsity
from icd_tvm.adapters.grouping import assign_groups, best_rows
from icd_tvm.adapters.hierarchical import Hierarchy, blocks_n_m, inner_bytes, v_n_m, vectors_n_m
from icd_tvm.adapters.masks import block_mask, n_m_mask, unstructured_mask
from icd_tvm.adapters.refit import choose_ridge, refit_groups
from icd_tvm.adapters.saliency import Saliency, weight_saliency
from icd_tvm.adapters.sparsity_spec import VECTOR_RUN, SparsitySpec, make_spec, parse_sparsity
from icd_tvm.adapters.strays import COORDINATES, as_coo, check_strays, stray_values
from icd_tvm.adapters.units import kept_count, select_units, unit_scores, zero_units
from icd_tvm.errors import ConfigError, PermutationError, ShapeError

__all__ = [
    "Calibration",
    "Detection",
    "Finding",
    "SparsitySpec",
    "apply_sparsity",
    "detect_sparsity",
    "parse_sparsity",
    "select_units",
    "unit_scores",
    "zero_units",
]

Groups = Sequence[Sequence[int]] | Index

# Bytes of one row or column number in the packed formats.
INDEX_BYTES = 4


@dataclass
class _Pattern:
    """A mask, and the column groups that share supports (for the refit and the metadata)."""

    mask: Bool
    columns: list[Array]
    kept: Bool
    groups: dict[str, Any]
    packed_bytes: int
    packed_format: str


def apply_sparsity(
    tensor: Array,
    type: str,
    rate: float | None = None,
    *,
    saliency: Saliency = "magnitude",
    calibration: Array | Calibration | None = None,
    groups: Groups | None = None,
    seed: int = 0,
    refit: bool = False,
    n_m: tuple[int, int] | None = None,
    order: Index | None = None,
    strays: float = 0.0,
) -> tuple[Array, dict[str, Any]]:
    """Remove weights of ``y = x @ W``.

    Parameters
    ----------
    tensor : array, shape [K, N], real
        The weight; not modified.
    type : str
        ``unit`` (whole output columns), ``vecV`` (groups of V columns share one set of rows),
        ``blockAxB`` (aligned blocks), ``N:M`` or ``n:m`` (n of m consecutive rows of a column),
        ``V:N:M`` (groups of V columns keep 4 rows of m, each column n of those), ``vecV+N:M`` or
        ``blockAxB+N:M`` (groups or blocks first, N:M inside), ``unstructured`` or ``none``;
        see :func:`parse_sparsity` for the text with the rate inside.
    rate : float, optional
        Share that is removed in all, in [0, 1); implied by N:M and V:N:M.
    saliency : {"magnitude", "wanda", "obs"}
        See :func:`icd_tvm.adapters.saliency.weight_saliency`; all but magnitude need
        ``calibration``. Unstructured magnitude keeps the best overall, the others the same number
        in every column.
    calibration : array or Calibration, optional
        X [tokens, K], column norms [K], Gram matrix [K, K], or those of two halves [2, K, K].
    groups : int array, shape [N / V, V], optional
        Columns of each ``vecV`` or ``vecV+N:M`` group; chosen by saliency similarity when not
        given.
    seed : int
        Seed of the group assignment.
    refit : bool
        Refit the survivors by least squares (needs X or a Gram matrix). With X, or the Gram
        matrices of two halves, the ridge is the one that does best on the half it has not seen
        (:func:`icd_tvm.adapters.refit.choose_ridge`); ``params`` holds it.
    n_m : (int, int), optional
        For type ``n:m``.
    order : int array, shape [K], optional
        Row order that the runs of ``N:M`` and ``V:N:M`` are cut from
        (:func:`icd_tvm.adapters.channel_permutation.permute_channels`); the rows of ``out`` stay
        where they are.
    strays : float
        Share of all elements that ``vecV`` keeps beside its groups, the most salient ones. The
        groups in ``out`` stay closed: ``groups["strays"]`` holds them, a list of rows, columns and
        values to be added to ``out``.

    Returns
    -------
    out : array, shape [K, N], dtype of ``tensor``
    meta : dict
        JSON-serialisable: ``kind, type, rate, density, params, loss, bytes_before, bytes_after,
        format, groups, delta_layout, skipped, why``. ``bytes_after`` counts the packed format
        named by ``format``. ``delta_layout`` says whether the transform changed what a re-ordering
        can exploit. A type that does not fit the shape leaves the weight as it is, warns, and says
        ``why``.

    Raises
    ------
    ConfigError
        Unknown type or saliency, a number out of range, groups that are no partition, an order
        for a type without runs, strays for a type without groups, or missing calibration.
    ShapeError
        Not a matrix, or calibration of another length.
    NonFiniteError
        NaN or infinity inside.
    PermutationError
        ``order`` is no permutation of the rows.
    """
    weight = as_matrix(tensor)
    spec = make_spec(type, rate, n_m)
    data = as_calibration(calibration, weight.shape[0])
    scores = weight_saliency(weight, saliency, data)
    check_strays(strays, spec)
    if refit and (data is None or data.gram is None):
        raise ConfigError("refit needs a Gram matrix", "pass calibration X [tokens, K] or [K, K]")
    params: dict[str, Any] = {"saliency": saliency, "refit": refit, "seed": seed}
    why = _why_not(spec, weight.shape)
    if why:
        if spec.kind != "none" and spec.rate > 0:
            warnings.warn(f"{spec} skipped: {why}", RuntimeWarning, stacklevel=2)
        return weight.copy(), _skipped(spec, weight, params, why)
    rows = _checked_order(order, spec, weight.shape[0])
    ranked = scores if rows is None else scores[rows]
    pattern = _pattern(spec, ranked, weight.dtype.itemsize, groups, seed, saliency != "magnitude")
    if rows is not None:
        _back_in_place(pattern, rows)
    residual = stray_values(weight, scores, pattern.mask, strays)
    if refit and data is not None and data.gram is not None and spec.kind != "unit":
        closed = weight - residual
        params["ridge"] = choose_ridge(closed, data, pattern.columns, pattern.kept)
        out = refit_groups(closed, data.gram, pattern.columns, pattern.kept, params["ridge"])
    else:
        out = np.where(pattern.mask, weight, np.zeros((), weight.dtype))
    if strays:
        params["strays"], pattern.groups["strays"] = strays, as_coo(residual)
        size = weight.dtype.itemsize + COORDINATES
        pattern.packed_bytes += size * len(pattern.groups["strays"]["rows"])
        pattern.packed_format += ", strays as COO"
    return out, _meta(spec, weight, out + residual, data, pattern, params)


def _why_not(spec: SparsitySpec, shape: tuple[int, ...]) -> str:
    length, width = shape
    if spec.kind == "none" or spec.rate == 0:
        return "rate 0 removes nothing"
    if spec.kind == "vec" and width % spec.vector:
        return f"{width} columns are not a multiple of {spec.vector}"
    if spec.kind == "block" and (length % spec.block[0] or width % spec.block[1]):
        return f"shape {length} x {width} is not a multiple of {spec.block[0]} x {spec.block[1]}"
    if spec.kind == "n:m" and length % spec.n_m[1]:
        return f"{length} rows are not a multiple of {spec.n_m[1]}"
    return _hierarchy_why_not(spec, length, width)


def _hierarchy_why_not(spec: SparsitySpec, length: int, width: int) -> str:
    if spec.kind not in ("v:n:m", "hds"):
        return ""
    if spec.vector and width % spec.vector:
        return f"{width} columns are not a multiple of {spec.vector}"
    if spec.vector and length % spec.n_m[1]:
        return f"{length} rows are not a multiple of {spec.n_m[1]}"
    rows, cols = spec.block
    if rows and (length % rows or width % cols):
        return f"shape {length} x {width} is not a multiple of {rows} x {cols}"
    if rows % spec.n_m[1]:
        return f"blocks of {rows} rows are not a multiple of {spec.n_m[1]}"
    return ""


def _checked_order(order: Index | None, spec: SparsitySpec, length: int) -> Index | None:
    if order is None:
        return None
    if spec.kind not in ("n:m", "v:n:m"):
        raise ConfigError(f"order given for {spec}", "only N:M and V:N:M take a row order")
    rows = np.asarray(order)
    if rows.shape != (length,) or not np.array_equal(np.sort(rows), np.arange(length)):
        raise PermutationError(
            f"order {list(rows.shape)} is no permutation of {length} rows", "every row once"
        )
    return rows


def _back_in_place(pattern: _Pattern, rows: Index) -> None:
    """Undo the row order in the masks and record it."""
    place = np.argsort(rows)
    pattern.mask, pattern.kept = pattern.mask[place], pattern.kept[:, place]
    pattern.groups["order"] = rows.tolist()
    pattern.packed_bytes += rows.size * INDEX_BYTES


def _pattern(
    spec: SparsitySpec,
    scores: Float64,
    itemsize: int,
    groups: Groups | None,
    seed: int,
    per_column: bool,
) -> _Pattern:
    takes_groups = spec.kind == "vec" or (spec.kind == "hds" and spec.vector > 0)
    if groups is not None and not takes_groups:
        raise ConfigError(f"groups given for {spec}", "only vecV takes groups")
    if spec.kind == "unit":
        return _unit(spec, scores, itemsize)
    if spec.kind == "vec":
        return _vec(spec, scores, itemsize, groups, seed)
    if spec.kind == "block":
        return _block(spec, scores, itemsize)
    if spec.kind == "n:m":
        return _n_m(spec, scores, itemsize)
    if spec.kind in ("v:n:m", "hds"):
        return _two_levels(spec, scores, itemsize, groups, seed)
    mask = unstructured_mask(scores, spec.rate, per_column)
    kept, width = int(mask.sum()), scores.shape[1]
    packed = kept * (itemsize + INDEX_BYTES) + (width + 1) * INDEX_BYTES
    return _Pattern(mask, _single_columns(width), mask.T, {}, packed, "csc")


def _unit(spec: SparsitySpec, scores: Float64, itemsize: int) -> _Pattern:
    kept = select_units(scores.sum(axis=0), spec.rate)
    mask = np.broadcast_to(kept, scores.shape).copy()
    groups = {"kept": np.flatnonzero(kept).tolist(), "count": int(kept.sum())}
    return _Pattern(mask, [], mask.T, groups, int(mask.sum()) * itemsize, "dense, kept columns")


def _vec(
    spec: SparsitySpec, scores: Float64, itemsize: int, groups: Groups | None, seed: int
) -> _Pattern:
    count = kept_count(scores.shape[0], spec.rate)
    if groups is None:
        columns = assign_groups(scores, spec.vector, count, seed)
    else:
        columns = _checked_groups(groups, spec.vector, scores.shape[1])
    kept = best_rows(scores, columns, count)
    mask = np.zeros(scores.shape, dtype=np.bool_)
    mask[:, columns.ravel()] = np.repeat(kept, spec.vector, axis=0).T
    info = {
        "size": spec.vector,
        "count": len(columns),
        "rows_kept": count,
        "columns": columns.tolist(),
        "rows": [np.flatnonzero(row).tolist() for row in kept],
    }
    packed = len(columns) * count * (spec.vector * itemsize + INDEX_BYTES)
    return _Pattern(mask, list(columns), kept, info, packed, "packed groups and row lists")


def _block(spec: SparsitySpec, scores: Float64, itemsize: int) -> _Pattern:
    rows, cols = spec.block
    mask = block_mask(scores, spec.block, spec.rate)
    columns = list(np.arange(scores.shape[1]).reshape(-1, cols))
    blocks = int(mask.sum()) // (rows * cols)
    info = {"rows": rows, "cols": cols, "count": blocks}
    packed = blocks * (rows * cols * itemsize + INDEX_BYTES) + (len(columns) + 1) * INDEX_BYTES
    return _Pattern(mask, columns, mask.T[::cols], info, packed, "bsr by block column")


def _n_m(spec: SparsitySpec, scores: Float64, itemsize: int) -> _Pattern:
    n, m = spec.n_m
    mask = n_m_mask(scores, n, m)
    kept = int(mask.sum())
    bits = kept * max(1, int(np.ceil(np.log2(m))))
    packed = kept * itemsize + -(-bits // 8)
    columns = _single_columns(scores.shape[1])
    return _Pattern(mask, columns, mask.T, {"n": n, "m": m}, packed, "values and positions")


def _two_levels(
    spec: SparsitySpec, scores: Float64, itemsize: int, groups: Groups | None, seed: int
) -> _Pattern:
    found = _hierarchy(spec, scores, groups, seed)
    # V:N:M chooses among the rows that its outer level keeps.
    run = VECTOR_RUN if spec.kind == "v:n:m" else spec.n_m[1]
    packed = found.index_bytes + inner_bytes(found.mask, itemsize, run)
    columns = _single_columns(scores.shape[1])
    return _Pattern(
        found.mask, columns, found.mask.T, found.groups, packed, "outer index, values and positions"
    )


def _hierarchy(spec: SparsitySpec, scores: Float64, groups: Groups | None, seed: int) -> Hierarchy:
    if spec.kind == "v:n:m":
        return v_n_m(scores, spec.vector, *spec.n_m)
    if not spec.vector:
        return blocks_n_m(scores, spec.block, spec.outer_rate, *spec.n_m)
    columns = None if groups is None else _checked_groups(groups, spec.vector, scores.shape[1])
    return vectors_n_m(scores, spec.vector, spec.outer_rate, *spec.n_m, columns, seed)


def _single_columns(width: int) -> list[Array]:
    return list(np.arange(width).reshape(-1, 1))


def _checked_groups(groups: Groups, size: int, width: int) -> Index:
    try:
        columns = np.asarray(groups, dtype=np.int64)
    except (ValueError, TypeError) as error:
        raise ShapeError("groups is not a rectangular integer array", str(error)) from error
    if columns.ndim != 2 or columns.shape != (width // size, size):
        raise ShapeError(
            f"groups has shape {list(columns.shape)}", f"expected [{width // size}, {size}]"
        )
    if not np.array_equal(np.sort(columns.ravel()), np.arange(width)):
        raise ConfigError(
            f"groups is no partition of {width} columns", "every column belongs to one group"
        )
    return columns.astype(np.int32)


def _meta(
    spec: SparsitySpec,
    weight: Array,
    out: Array,
    data: Calibration | None,
    pattern: _Pattern,
    params: dict[str, Any],
) -> dict[str, Any]:
    before = weight.astype(np.float64)
    norm = float(np.linalg.norm(before))
    lost = float(np.linalg.norm(out.astype(np.float64) - before))
    return {
        "kind": "sparsity",
        "type": spec.type_name,
        "rate": spec.rate,
        "shape": list(weight.shape),
        "density": float(np.count_nonzero(out)) / out.size,
        "params": params,
        "loss": {
            "frobenius": lost / norm if norm else 0.0,
            "output": data.output_error(weight, out) if data else None,
        },
        "bytes_before": int(weight.nbytes),
        "bytes_after": int(pattern.packed_bytes),
        "format": pattern.packed_format,
        "groups": pattern.groups,
        "delta_layout": spec.kind in ("unit", "vec", "block", "hds") or "order" in pattern.groups,
        "skipped": False,
        "why": _layout_reason(spec, pattern),
    }


def _layout_reason(spec: SparsitySpec, pattern: _Pattern) -> str:
    if "order" in pattern.groups:
        return "rows of one run are scattered: the order makes them contiguous"
    if spec.kind == "unit":
        return "dropped units can be moved to the end and cut off"
    if spec.kind == "vec" or (spec.kind == "hds" and spec.vector):
        return "groups that share rows can be made contiguous"
    if spec.kind in ("block", "hds"):
        return "whole blocks can be skipped"
    return "every kernel tile still holds a kept element: no order helps"


def _skipped(spec: SparsitySpec, weight: Array, params: dict[str, Any], why: str) -> dict[str, Any]:
    return {
        "kind": "sparsity",
        "type": spec.type_name,
        "rate": spec.rate,
        "shape": list(weight.shape),
        "density": float(np.count_nonzero(weight)) / weight.size,
        "params": params,
        "loss": {"frobenius": 0.0, "output": None},
        "bytes_before": int(weight.nbytes),
        "bytes_after": int(weight.nbytes),
        "format": "dense",
        "groups": {},
        "delta_layout": False,
        "skipped": True,
        "why": why,
    }
