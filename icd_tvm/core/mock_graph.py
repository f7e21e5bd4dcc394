"""A graph with planted blocks, for tests and demonstrations."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from icd_tvm.core.cost import Csr
from icd_tvm.errors import ConfigError


def mock_w(
    n: int = 2560,
    blocks: int = 16,
    density: float = 0.04,
    noise: float = 0.1,
    seed: int = 0,
    shuffle: bool = True,
) -> Csr:
    """Return a graph of ``blocks`` equal planted blocks, hidden by :func:`planted_order`.

    Edges get weights in [0.5, 1.5). ``noise`` is the share of edges that ignore the blocks.

    Raises
    ------
    ConfigError
        If an argument is out of range or the density cannot be reached inside the blocks.
    """
    checks = {
        f"n={n}": n >= 2,
        f"blocks={blocks}": 1 <= blocks <= n,
        f"density={density}": 0 < density <= 0.05,
        f"noise={noise}": 0 <= noise <= 1,
    }
    for text, good in checks.items():
        if not good:
            raise ConfigError(f"mock W: {text} is out of range", "density is at most 0.05")
    rng = np.random.default_rng(seed)
    edges = int(density * n * n / 2)
    outside = round(noise * edges)
    label = np.arange(n) * blocks // n
    capacity = int(sum(size * (size - 1) // 2 for size in np.bincount(label)))
    if edges - outside > capacity:
        raise ConfigError(
            f"mock W: density {density} does not fit into {blocks} blocks of {n}",
            "fewer blocks, a lower density or more noise",
        )
    inside = _block_edges(label, edges - outside, rng)
    row, col = (rng.integers(n, size=outside) for _ in range(2))
    rows, cols = np.concatenate([inside[0], row]), np.concatenate([inside[1], col])
    if shuffle:
        hidden = planted_order(n, seed)
        rows, cols = hidden[rows], hidden[cols]
    low, high = np.minimum(rows, cols), np.maximum(rows, cols)
    unique = np.unique(low[low != high] * n + high[low != high])
    weights = rng.uniform(0.5, 1.5, unique.size).astype(np.float32)
    half = sp.coo_matrix((weights, (unique // n, unique % n)), shape=(n, n))
    return sp.csr_matrix(half + half.T)


def planted_order(n: int, seed: int) -> NDArray[np.int32]:
    """Return the order under which the blocks of ``mock_w(n, seed=seed)`` are contiguous."""
    return np.random.default_rng([seed, n]).permutation(n).astype(np.int32)


def _block_edges(
    label: NDArray[np.int64], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw ``count`` distinct pairs inside the blocks, uniformly."""
    sizes = np.bincount(label)
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    pairs = sizes * (sizes - 1) // 2
    ends = np.cumsum(pairs)
    drawn = rng.choice(int(ends[-1]), size=count, replace=False)
    block = np.searchsorted(ends, drawn, side="right")
    rank = drawn - (ends - pairs)[block]
    # Pair number rank of a triangle: row r holds the ranks r (r - 1) / 2 .. r (r + 1) / 2 - 1.
    row = ((1 + np.sqrt(1 + 8 * rank.astype(np.float64))) / 2).astype(np.int64)
    row -= row * (row - 1) // 2 > rank
    row += row * (row + 1) // 2 <= rank
    return start[block] + row, start[block] + rank - row * (row - 1) // 2
