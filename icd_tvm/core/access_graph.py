"""The co-access graph W of one axis: W[i, j] says how often i and j are touched together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike

from icd_tvm.core.correlation import collect_correlations, strongest
from icd_tvm.core.cost import Csr, TileAccess, check_accesses
from icd_tvm.core.mock_graph import mock_w
from icd_tvm.core.npz_file import open_archive, read_row, read_text
from icd_tvm.errors import ConfigError, NonFiniteError, ShapeError
from icd_tvm.files import write_atomically

Source = Literal["tir", "trace", "mock"]
NORMALIZE = ("none", "row", "sym")
_META_KEYS = {"shape", "format", "nnz", "source", "seed"}
_META_BYTES = 1 << 16
# Non-zeros of the largest W read from a file: a dense one of 16,384 indices, 2 GB.
MAX_NNZ = 1 << 28
# Bytes of one dense block of rows of W while it is being built.
_BLOCK_BYTES = 1 << 28
# A multiply-add of a dense product costs about a 500th of one of a sparse product.
_DENSE_SHARE = 0.002


def build_w(source: Source = "tir", **cfg: Any) -> Csr:
    """Build the co-access graph of an axis.

    Symmetric, non-negative, zero diagonal, sorted indices, deterministic.

    Parameters
    ----------
    source : {"tir", "trace", "mock"}
        ``tir``: ``accesses`` (sequence of TileAccess): W = sum weight_w over the windows that
        touch both i and j.
        ``trace``: ``windows`` and ``indices`` (int arrays of one length), ``n``: W[i, j] is the
        number of windows with both. Or ``activations`` (float arrays [samples, n], such as
        :func:`icd_tvm.collect_activations` returns) and ``correlation`` (mapping, optional):
        W[i, j] is the absolute correlation of i and j, see
        :func:`icd_tvm.core.correlation.collect_correlations`.
        ``mock``: ``n`` (2560), ``blocks`` (16), ``density`` (0.04, at most 0.05), ``noise``
        (0.1: share of the edges outside blocks), ``seed`` (0), ``shuffle`` (True): planted
        blocks hidden by a permutation; see :func:`planted_order`.
    normalize : {"none", "row", "sym"}, keyword
        ``row``: W / row sums, then symmetrised as (W + W^T) / 2. ``sym``: D^-1/2 W D^-1/2.
    nnz_cap : int, keyword
        Keep only the strongest entries of each row, then those that two rows agree on or either
        keeps, so that no more than about ``nnz_cap`` entries remain.

    Returns
    -------
    csr_matrix of float32, shape [n, n]

    Raises
    ------
    ConfigError, ShapeError, NonFiniteError
        If a key is unknown or a value invalid.

    Examples
    --------
    Two windows touch the indices 0 and 1, and 1 and 2:

    >>> graph = build_w("trace", windows=[0, 0, 1, 1], indices=[0, 1, 1, 2], n=3)
    >>> graph.toarray().tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    normalize = cfg.pop("normalize", "none")
    nnz_cap = cfg.pop("nnz_cap", None)
    builders: dict[str, Callable[..., Csr]] = {
        "tir": lambda **kw: w_from_accesses(nnz_cap=nnz_cap, **kw),
        "trace": lambda **kw: _from_trace(nnz_cap=nnz_cap, **kw),
        "mock": mock_w,
    }
    if source not in builders:
        raise ConfigError(f"build_w: source={source!r} is unknown", "tir, trace or mock")
    if normalize not in NORMALIZE:
        raise ConfigError(f"build_w: normalize={normalize!r}", ", ".join(NORMALIZE))
    if nnz_cap is not None and nnz_cap < 1:
        raise ConfigError(f"build_w: nnz_cap={nnz_cap} must be at least 1")
    try:
        graph = builders[source](**cfg)
    except TypeError as error:
        raise ConfigError(f"build_w: bad keys for source {source!r}: {error}") from error
    return _capped(normalized(graph, normalize), nnz_cap)


def w_from_accesses(accesses: Sequence[TileAccess], nnz_cap: int | None = None) -> Csr:
    """Return W = sum_l B_l^T diag(weight_l counts_l) B_l without its diagonal.

    Built in blocks of rows, so the memory is that of the result, after ``nnz_cap``, and one
    block. O(sum of squared window sizes), or a dense product where that is faster.
    """
    n = check_accesses(accesses)
    rows = max(1, min(n, _BLOCK_BYTES // (8 * max(n, 1))))
    keep = n if nnz_cap is None else max(1, nnz_cap // max(n, 1))
    parts = [_operand(access) for access in accesses]
    blocks = [
        _strongest(_product_rows(parts, first, min(first + rows, n)), keep)
        for first in range(0, n, rows)
    ]
    graph = sp.csr_matrix(sp.vstack(blocks, format="csr"))
    del blocks
    weights = np.concatenate([access.unit_weights for access in accesses])
    if nnz_cap is not None or np.any(weights != np.rint(weights)):
        # Sums of fractions differ in rounding between (i, j) and (j, i).
        graph = sp.csr_matrix(graph.maximum(graph.T))
    return _capped(_clean(graph), nnz_cap)


def _operand(access: TileAccess) -> Any:
    """Return (diag(weights) B, B), dense where the dense product is the faster one."""
    scaled = sp.csr_matrix(sp.diags(access.unit_weights) @ access.incidence.astype(np.float64))
    degrees = access.degrees().astype(np.float64)
    dense = degrees @ degrees > _DENSE_SHARE * access.n**2 * access.windows
    if dense and access.windows * access.n * 8 <= _BLOCK_BYTES * 8:
        return scaled.toarray(), access.incidence.toarray().astype(np.float64)
    return sp.csc_matrix(scaled), access.incidence.astype(np.float64)


def _product_rows(parts: Sequence[Any], first: int, last: int) -> Csr:
    products = [left[:, first:last].T @ right for left, right in parts]
    total = products[0]
    for product in products[1:]:
        total = total + product
    block = sp.coo_matrix(total, dtype=np.float32)
    off = (block.row + first != block.col) & (block.data > 0)
    return sp.csr_matrix((block.data[off], (block.row[off], block.col[off])), shape=block.shape)


def _from_trace(
    *,
    nnz_cap: int | None,
    activations: Any = None,
    correlation: Mapping[str, Any] | None = None,
    **events: Any,
) -> Csr:
    if activations is None:
        return w_from_trace(nnz_cap=nnz_cap, **events)
    if events:
        raise ConfigError(
            f"build_w: {sorted(events)[0]!r} does not go with activations",
            "pass events or activations",
        )
    return collect_correlations(activations, correlation)[0]


def w_from_trace(windows: ArrayLike, indices: ArrayLike, n: int, nnz_cap: int | None = None) -> Csr:
    """Return W of a trace of events: event k touched ``indices[k]`` in window ``windows[k]``.

    Raises
    ------
    ShapeError, ConfigError
        If the arrays differ in length, are not integers, or an index is outside 0..n-1.
    """
    window, index = np.asarray(windows), np.asarray(indices)
    if window.shape != index.shape or window.ndim != 1:
        raise ShapeError(f"trace: windows {window.shape} and indices {index.shape} differ")
    if not window.size:
        raise ConfigError("trace: no events", "record some, or use source='mock'")
    for name, array in (("windows", window), ("indices", index)):
        if np.issubdtype(array.dtype, np.floating) and not np.all(np.isfinite(array)):
            raise NonFiniteError(f"trace: {name} hold NaN or infinity")
        if not np.issubdtype(array.dtype, np.integer):
            raise ShapeError(f"trace: {name} have dtype {array.dtype}, expected integers")
    if index.min() < 0 or index.max() >= n:
        raise ConfigError(f"trace: an index is outside 0..{n - 1}")
    compact = np.unique(window, return_inverse=True)[1]
    touched = sp.csr_matrix(
        (np.ones(index.size, dtype=np.bool_), (compact, index)), shape=(int(compact.max()) + 1, n)
    )
    return w_from_accesses([TileAccess(touched, 1)], nnz_cap)


def validate_w(graph: Csr) -> None:
    """Raise unless ``graph`` is a valid W.

    Raises
    ------
    ShapeError
        If it is not square.
    NonFiniteError
        If it holds NaN or infinity.
    ConfigError
        If it is not symmetric, or holds a negative weight or a diagonal entry.
    """
    if not sp.issparse(graph) or graph.format != "csr":
        raise ShapeError(f"W is a {type(graph).__name__}, expected a csr_matrix")
    if len(graph.shape) != 2 or graph.shape[0] != graph.shape[1]:
        raise ShapeError(f"W {graph.shape} is not square")
    if not np.all(np.isfinite(graph.data)):
        raise NonFiniteError("W holds NaN or infinity")
    if graph.nnz and graph.data.min() < 0:
        raise ConfigError("W holds a negative weight")
    if graph.diagonal().any():
        raise ConfigError("W has a non-zero diagonal")
    gap = abs(graph - graph.T)
    if gap.nnz and gap.max() > 1e-5 * graph.data.max():
        raise ConfigError("W is not symmetric", "use (W + W.T) / 2")


def is_uniform(graph: Csr | None = None, *, accesses: Sequence[TileAccess] = ()) -> bool:
    """Say whether all off-diagonal entries of W are equal, so that no order can matter.

    From ``graph`` in O(nnz). From ``accesses`` without forming W: True when every window
    touches all indices, or at most one; that is sufficient, not necessary.
    """
    if graph is None:
        degrees = [(a.degrees(), a.n) for a in accesses]
        return all(bool(np.all((d <= 1) | (d == n))) for d, n in degrees)
    n = graph.shape[0]
    if graph.count_nonzero() == 0:
        return True
    return graph.nnz == n * (n - 1) and bool(np.ptp(graph.data) <= 1e-6 * graph.data.max())


def normalized(graph: Csr, how: str) -> Csr:
    """Return W normalised as :func:`build_w` says; rows that sum to zero stay zero."""
    if how == "none" or graph.nnz == 0:
        return _clean(graph)
    degree = np.asarray(graph @ np.ones(graph.shape[0]))
    inverse = np.divide(1.0, degree, out=np.zeros_like(degree), where=degree > 0)
    if how == "row":
        scaled = sp.diags(inverse) @ graph
        return _clean((scaled + scaled.T) / 2)
    root = sp.diags(np.sqrt(inverse))
    return _clean(root @ graph @ root)


def _clean(graph: Any) -> Csr:
    result = sp.csr_matrix(graph, dtype=np.float32)
    result.sum_duplicates()
    result.eliminate_zeros()
    result.sort_indices()
    return result


def _capped(graph: Csr, cap: int | None) -> Csr:
    """Keep the ``cap`` strongest entries, both directions of an edge or none."""
    if cap is None or graph.nnz <= cap:
        return graph
    half = sp.triu(graph, k=1).tocoo()
    chosen = np.flatnonzero(strongest(half.data[None, :], cap // 2)[0])
    kept = sp.coo_matrix(
        (half.data[chosen], (half.row[chosen], half.col[chosen])), shape=graph.shape
    )
    return _clean(kept + kept.T)


def _strongest(rows: Csr, keep: int) -> Csr:
    """Keep the ``keep`` strongest entries of each row, the lower column first among equals."""
    if np.diff(rows.indptr).max(initial=0) <= keep:
        return rows
    dense = rows.toarray()
    return sp.csr_matrix(np.where(strongest(dense, keep), dense, np.float32(0)))


def save_w(path: str | Path, graph: Csr, source: str, seed: int | None = None) -> None:
    """Write ``W.npz``: data, indices, indptr and ``meta`` as JSON text; no pickle.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    meta = {
        "shape": list(graph.shape),
        "format": "csr",
        "nnz": int(graph.nnz),
        "source": source,
        "seed": seed,
    }

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(
                file,
                data=graph.data,
                indices=graph.indices,
                indptr=graph.indptr,
                meta=np.array(json.dumps(meta)),
            )

    write_atomically(path, write)


def load_w(path: str | Path) -> tuple[Csr, dict[str, Any]]:
    """Read a file of :func:`save_w`: W and its meta data.

    The file is untrusted: nothing in it is executed, and no array is read before its size is
    known to fit the number of non-zeros, at most ``MAX_NNZ``.

    Raises
    ------
    ConfigError
        If the file is missing, truncated, too large, or its meta data do not match its arrays.
    ShapeError, NonFiniteError
        If the matrix is no valid W.
    """
    with open_archive(path, {"data", "indices", "indptr", "meta"}) as archive:
        try:
            meta = json.loads(read_text(archive, "meta", _META_BYTES))
            n, nnz = _sizes(meta)
            parts = (
                read_row(archive, "data", nnz, "f", (4,)),
                read_row(archive, "indices", nnz, "i", (4, 8)),
                read_row(archive, "indptr", n + 1, "i", (4, 8)),
            )
            graph = sp.csr_matrix(parts, shape=(n, n))
            graph.check_format()
        except (ConfigError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read W from {path}: {error}") from error
    validate_w(graph)
    return graph, meta


def _sizes(meta: Any) -> tuple[int, int]:
    """Return n and the number of non-zeros that the meta data promise."""
    if not isinstance(meta, dict) or set(meta) != _META_KEYS:
        raise ConfigError("the meta data are no record of shape, format, nnz, source and seed")
    shape, nnz = meta["shape"], meta["nnz"]
    sizes = [*shape, nnz] if isinstance(shape, list) else []
    if len(sizes) != 3 or any(type(size) is not int or size < 0 for size in sizes):
        raise ConfigError(f"meta data: shape {shape}, nnz {nnz}")
    if shape[0] != shape[1]:
        raise ShapeError(f"W {tuple(shape)} is not square")
    if not nnz <= min(shape[0] ** 2, MAX_NNZ) or shape[0] > MAX_NNZ:
        raise ConfigError(f"meta data: {nnz} non-zeros of {shape}, at most {MAX_NNZ} are read")
    return shape[0], nnz
