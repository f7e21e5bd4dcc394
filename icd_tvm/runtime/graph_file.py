"""``W.npz`` of a run: the graphs of all axes as the blocks of one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from icd_tvm.core.access_graph import build_w, is_uniform, save_w
from icd_tvm.core.cost import Csr, TileAccess
from icd_tvm.files import write_atomically

# The specification's largest density of W.
MAX_DENSITY = 0.05


def graph_of(accesses: list[TileAccess]) -> Csr:
    """Return W of one axis, the strongest entries of it; empty where all entries are equal."""
    n = accesses[0].n
    if is_uniform(accesses=accesses):
        return _empty(n)
    return build_w("tir", accesses=accesses, nnz_cap=max(1, int(MAX_DENSITY * n * n)))


def save_graphs(
    path: Path, graphs: Mapping[str, Csr], source: str, seed: int | None
) -> dict[str, list[int]]:
    """Write all graphs into one file that :func:`icd_tvm.core.access_graph.load_w` reads.

    Parameters
    ----------
    path : Path
    graphs : Mapping[str, csr_matrix]
        Axis -> W [n, n].
    source : str
        ``tir``, ``trace`` or ``mock``.
    seed : int or None
        Of a mock graph.

    Returns
    -------
    dict of str to [start, stop]
        The rows of each axis in the file.
    """
    rows, start = {}, 0
    for axis, graph in graphs.items():
        rows[axis] = [start, start + graph.shape[0]]
        start += graph.shape[0]
    blocks = list(graphs.values()) or [_empty(0)]
    whole = sp.csr_matrix(sp.block_diag(blocks, format="csr"), dtype=np.float32)
    write_atomically(path, lambda file: save_w(file, whole, source, seed))
    return rows


def _empty(n: int) -> Csr:
    return sp.csr_matrix(np.zeros((n, n), dtype=np.float32))
