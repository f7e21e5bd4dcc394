"""Communities of an access or correlation graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from icd_tvm.core.cost import Csr, label_modularity, shuffled_graph
from icd_tvm.errors import ConfigError, MissingDependencyError, NonFiniteError, ShapeError

METHODS = ("louvain", "leiden")


def cluster_graph(matrix: Csr, cfg: Mapping[str, Any] | None = None) -> NDArray[np.int64]:
    """Return the community of each node, numbered by size, the largest 0.

    Louvain's and Leiden's methods, of scikit-network. Deterministic for a seed.
    Source: Blondel et al. (2008); Traag, Waltman and van Eck (2019).

    Parameters
    ----------
    matrix : csr_matrix of float, shape [n, n]
        Symmetric, non-negative; its diagonal is ignored.
    cfg : mapping, optional
        ``method`` ("louvain" or "leiden"), ``resolution`` (float > 0, default 1), ``seed``
        (int, default 0).

    Returns
    -------
    ndarray of int64, shape [n]

    Raises
    ------
    ShapeError, NonFiniteError, ConfigError
        If the matrix or a key of ``cfg`` is invalid.
    MissingDependencyError
        If scikit-network is not installed.

    Examples
    --------
    >>> from scipy.sparse import block_diag, csr_matrix
    >>> pair = [[0.0, 1.0], [1.0, 0.0]]
    >>> found = cluster_graph(csr_matrix(block_diag([pair, pair])))
    >>> bool(found[0] == found[1] != found[2] == found[3])
    True
    """
    options = {"method": "louvain", "resolution": 1.0, "seed": 0, **(cfg or {})}
    if unknown := set(options) - {"method", "resolution", "seed"}:
        raise ConfigError(f"cluster_graph: unknown key {sorted(unknown)[0]!r}")
    if options["method"] not in METHODS:
        raise ConfigError(f"cluster_graph: method={options['method']!r}", " or ".join(METHODS))
    if not np.isfinite(options["resolution"]) or options["resolution"] <= 0:
        raise ConfigError(f"cluster_graph: resolution={options['resolution']} must be positive")
    graph = _checked(matrix)
    if graph.nnz == 0:
        return np.arange(graph.shape[0], dtype=np.int64)
    labels = _solver(options).fit_predict(graph)
    return _by_size(np.asarray(labels, dtype=np.int64))


def null_modularity(matrix: Csr, cfg: Mapping[str, Any] | None = None) -> float:
    """Return the modularity of the communities found where there are none.

    :func:`cluster_graph` finds communities in any sparse graph, so the modularity of those of
    ``matrix`` means something only as far as it exceeds this value, which is that of a graph with
    the same degrees and weights, its edges re-paired at random.

    Parameters and errors are those of :func:`cluster_graph`; ``seed`` also seeds the re-pairing.
    """
    options = {"seed": 0, **(cfg or {})}
    null = shuffled_graph(_checked(matrix), options["seed"])
    return label_modularity(null, cluster_graph(null, options), options.get("resolution", 1.0))


def _checked(matrix: Csr) -> Csr:
    if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"cluster_graph: matrix {matrix.shape} is not square")
    graph = sp.csr_matrix(matrix, dtype=np.float64, copy=True)
    if not np.all(np.isfinite(graph.data)):
        raise NonFiniteError("cluster_graph: matrix holds NaN or infinity")
    if graph.nnz and graph.data.min() < 0:
        raise ConfigError("cluster_graph: matrix holds a negative weight")
    graph.setdiag(0.0)
    graph.eliminate_zeros()
    return graph


def _solver(options: Mapping[str, Any]) -> Any:
    try:
        from sknetwork.clustering import Leiden, Louvain
    except ImportError as error:
        raise MissingDependencyError(
            "scikit-network is not installed", "pip install scikit-network"
        ) from error
    kind = Leiden if options["method"] == "leiden" else Louvain
    return kind(resolution=options["resolution"], random_state=options["seed"])


def _by_size(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, compact, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(sizes.size, dtype=np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(sizes.size)
    return rank[compact]
