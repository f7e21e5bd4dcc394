"""The module attribute ``icd.coaccess_block``: tile accesses that survive save and load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp

from icd_tvm._tvm import tvm
from icd_tvm.core.cost import TileAccess

COACCESS_BLOCK = "icd.coaccess_block"
DEAD_UNITS = "icd.dead_units"
# Whether the accesses are blocks of weights, each of which depends on two orders.
LISTED_BLOCKS = "icd.listed_blocks"
# Key prefix of the private output order of one matmul, beside the ids of axis groups.
OUTPUT_ORDER = "out:"


def to_attr(graphs: Mapping[str, Sequence[TileAccess]]) -> dict[str, Any]:
    """Return TVM containers for the accesses of every group."""
    return {key: [_encode(access) for access in accesses] for key, accesses in graphs.items()}


def read_accesses(mod: Any) -> dict[str, list[TileAccess]]:
    """Read the attribute of ``mod``; an absent attribute reads as no group at all."""
    attrs = mod.attrs
    if attrs is None or COACCESS_BLOCK not in attrs:
        return {}
    return {str(k): [_decode(a) for a in v] for k, v in attrs[COACCESS_BLOCK].items()}


def read_dead_units(mod: Any) -> dict[str, np.ndarray]:
    """Read ``icd.dead_units`` of ``mod``: group -> indices; absent reads as none."""
    attrs = mod.attrs
    if attrs is None or DEAD_UNITS not in attrs:
        return {}
    return {str(group): indices.numpy() for group, indices in attrs[DEAD_UNITS].items()}


def has_listed_blocks(mod: Any) -> bool:
    """Read ``icd.listed_blocks`` of ``mod``; absent reads as False."""
    return mod.attrs is not None and bool(mod.attrs.get(LISTED_BLOCKS, False))


def without(access: TileAccess, indices: np.ndarray) -> TileAccess:
    """Return ``access`` as if some indices were never touched."""
    live = np.ones(access.n, dtype=np.bool_)
    live[indices] = False
    matrix = sp.csr_matrix(access.incidence @ sp.diags_array(live, dtype=np.bool_))
    return replace(access, incidence=matrix)


def _encode(access: TileAccess) -> dict[str, Any]:
    matrix = access.incidence
    counts = np.ones(access.windows) if access.counts is None else access.counts
    return {
        "n": access.n,
        "tile": access.tile,
        "weight": float(access.weight),
        "label": access.label,
        "padded": int(access.padded),
        "lanes": access.lanes,
        "indptr": tvm.runtime.tensor(matrix.indptr.astype(np.int32)),
        "indices": tvm.runtime.tensor(matrix.indices.astype(np.int32)),
        "counts": tvm.runtime.tensor(counts),
    }


def _decode(attr: Any) -> TileAccess:
    indptr, indices = attr["indptr"].numpy(), attr["indices"].numpy()
    shape = (len(indptr) - 1, int(attr["n"]))
    matrix = sp.csr_matrix((np.ones(len(indices), dtype=np.bool_), indices, indptr), shape=shape)
    return TileAccess(
        matrix,
        int(attr["tile"]),
        float(attr["weight"]),
        str(attr["label"]),
        attr["counts"].numpy(),
        padded=bool(attr["padded"]),
        lanes=int(attr["lanes"]),
    )
