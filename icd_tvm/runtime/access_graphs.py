"""W of every axis of a module: from the scheduled kernels, from a trace, or planted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from icd_tvm._tvm import apply_pass
from icd_tvm.config import MockKeys
from icd_tvm.core.cost import Csr
from icd_tvm.core.mock_graph import mock_w
from icd_tvm.errors import IcdError
from icd_tvm.relax_passes.axis_groups import AxisGroup
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.coaccess_attr import (
    COACCESS_BLOCK,
    LISTED_BLOCKS,
    read_accesses,
    to_attr,
)
from icd_tvm.runtime.graph_file import MAX_DENSITY, graph_of
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.order_file import AFTER
from icd_tvm.runtime.trace_file import read_trace


@dataclass(frozen=True)
class AccessGraphs:
    """What the axes of one module are ordered by.

    Attributes
    ----------
    source : str
        ``tir``, ``trace`` or ``mock``.
    mod : tvm.IRModule
        With ``icd.coaccess_block``, unless the graphs are planted.
    planted : dict of str to csr_matrix, or None
        Axis -> W [n, n] of a mock.
    """

    source: str
    mod: Any
    planted: dict[str, Csr] | None = None

    def matrices(self) -> dict[str, Csr]:
        """Return W of every axis, for the file."""
        if self.planted is not None:
            return self.planted
        return {axis: graph_of(accesses) for axis, accesses in read_accesses(self.mod).items()}


def access_graphs(job: Job, when: str, mod: Any) -> AccessGraphs:
    """Build the graphs of ``mod`` once; ``when`` is ``before`` or ``after`` the transform."""
    if when not in job.graphs:
        with job.progress.stage(f"access graph {when} the transform"):
            job.graphs[when] = _build(job, when, mod)
    graphs: AccessGraphs = job.graphs[when]
    return graphs


def _build(job: Job, when: str, mod: Any) -> AccessGraphs:
    keys = job.config.graph
    if keys.source == "mock":
        return _planted(job, when, mod)
    graphed = apply_pass(BuildAccessGraph(job.order_target), mod)
    if keys.source == "tir":
        return AccessGraphs("tir", graphed)
    accesses = read_accesses(graphed)
    try:
        traced = read_trace(str(keys.trace), {axis: a[0].n for axis, a in accesses.items()})
    except IcdError as error:
        if keys.on_broken_trace == "stop":
            raise
        job.warn("access graph", f"{error}; planted graphs stand in, as graph.on_broken_trace says")
        return _planted(job, when, mod)
    attribute = to_attr({axis: [traced[axis]] for axis in accesses if axis in traced})
    graphed = graphed.with_attr(COACCESS_BLOCK, attribute).with_attr(LISTED_BLOCKS, False)
    return AccessGraphs("trace", graphed)


def _planted(job: Job, when: str, mod: Any) -> AccessGraphs:
    """Plant communities in every axis that a matmul writes and that may move freely.

    A transform changes the accesses, so the graph after one has communities of its own.
    """
    keys = job.config.graph.mock
    seed = keys.seed + (when == AFTER and bool(job.transforms))
    groups = job.result.groups.free
    return AccessGraphs(
        "mock", mod, {g.id: _mock(g.size, keys, seed) for g in groups if _movable(g)}
    )


def _movable(group: AxisGroup) -> bool:
    makers = (use for use in group.weights if use.side == "N" and use.structure.is_leaf)
    return group.constraint == "free" and group.size >= 2 and any(makers)


def _mock(n: int, keys: MockKeys, seed: int) -> Csr:
    blocks = min(keys.blocks, n // 2)
    size = n // blocks
    # Communities must have room for their edges.
    fits = 0.8 * blocks * size * (size - 1) / n**2
    return mock_w(n, blocks, min(0.8 * MAX_DENSITY, fits), keys.noise, seed)
