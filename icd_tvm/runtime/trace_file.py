"""Recorded accesses: ``.npz`` with ``AXIS/windows`` and ``AXIS/indices`` for every axis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from icd_tvm.core.access_graph import w_from_trace
from icd_tvm.core.cost import TileAccess
from icd_tvm.core.npz_file import open_archive, read_array
from icd_tvm.errors import ConfigError

MAX_BYTES = 1 << 30
TILE = 16


def read_trace(path: str | Path, sizes: Mapping[str, int]) -> dict[str, TileAccess]:
    """Read what was touched together on each axis.

    Parameters
    ----------
    path : str or Path
        Event k of an axis touched index ``indices[k]`` in window ``windows[k]``; both int [m].
    sizes : Mapping[str, int]
        Axes of the model and their lengths; a trace of any other axis is refused.

    Raises
    ------
    ConfigError, ShapeError, NonFiniteError
        If the file is missing, damaged, too large or empty, or does not fit the model.
    """
    arrays = _arrays(Path(path))
    axes = sorted({name.rpartition("/")[0] for name in arrays})
    if not axes:
        raise ConfigError(f"trace {str(path)!r} is empty")
    found = {}
    for axis in axes:
        if axis not in sizes:
            raise ConfigError(f"trace {str(path)!r}: the model has no axis {axis!r} that can move")
        windows, indices = (arrays.get(f"{axis}/{part}") for part in ("windows", "indices"))
        if windows is None or indices is None:
            raise ConfigError(f"trace {str(path)!r}: {axis} needs both windows and indices")
        # Checks lengths, types and ranges.
        w_from_trace(windows, indices, sizes[axis], nnz_cap=1)
        found[axis] = _access(windows, indices, sizes[axis])
    return found


def _access(windows: np.ndarray, indices: np.ndarray, n: int) -> TileAccess:
    compact = np.unique(windows, return_inverse=True)[1]
    ones = np.ones(indices.size, dtype=np.bool_)
    touched = sp.csr_matrix((ones, (compact, indices)), shape=(int(compact.max()) + 1, n))
    return TileAccess(touched, TILE, 1.0, "trace")


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with open_archive(path) as archive:
        total = sum(item.file_size for item in archive.infolist())
        if total > MAX_BYTES:
            raise ConfigError(f"trace {str(path)!r} unpacks to {total} bytes, over {MAX_BYTES}")
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        return {name: read_array(archive, name, _is_row, MAX_BYTES) for name in names}


def _is_row(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    return dtype.kind in "iuf" and len(shape) == 1
