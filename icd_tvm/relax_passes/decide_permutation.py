"""DecidePermutation: solve for the order of every axis from what its kernels touch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from icd_tvm._tvm import tvm
from icd_tvm.core.access_graph import build_w, is_uniform
from icd_tvm.core.cost import TileAccess, tile_cost
from icd_tvm.core.problem import columns_of
from icd_tvm.core.solver import FitStats, fit_permutation
from icd_tvm.core.starts import stacked_items, support_labels
from icd_tvm.relax_passes.attach_layout_tags import tagged_groups
from icd_tvm.relax_passes.axis_structure import AxisStructure, axis_index, positions
from icd_tvm.relax_passes.build_access_graph import listed_blocks
from icd_tvm.relax_passes.coaccess_attr import (
    OUTPUT_ORDER,
    has_listed_blocks,
    read_accesses,
    read_dead_units,
    without,
)
from icd_tvm.relax_passes.cuda_accesses import Blocks
from icd_tvm.relax_passes.settle_orders import settle

LAYOUT_PERM = "icd.layout_perm"
# One gathered element takes about one cycle, in which a core with two 512-bit FMA units does 64.
GATHER_FLOP = 64.0
# Share of the time that axes are solved in one by one, where blocks depend on two.
_FIRST = 0.6


@dataclass(frozen=True)
class Decision:
    """The order decided for one axis.

    Attributes
    ----------
    group : str
        Id of the axis group, or ``out:NODE`` for the private output order of one matmul.
    perm : numpy.ndarray
        int32 [n], new[i] = old[perm[i]].
    stats : dict
        The solver's figures: U, C, Q before and after, winner, reason, elapsed seconds.
    w_nnz : int
        Non-zeros of the co-access graph W [n, n].
    """

    group: str
    perm: np.ndarray
    stats: dict[str, Any]
    w_nnz: int

    @property
    def improved(self) -> bool:
        """Whether the order costs less than the one it replaces."""
        return bool(self.stats["improved"])


@tvm.transform.module_pass(opt_level=0, name="DecidePermutation")
class DecidePermutation:
    """Decide an order for every axis in ``icd.coaccess_block``; write ``icd.layout_perm``.

    The attribute is a map from group to int32 [n]; only improved axes appear in it. The
    decisions, improved or not, stay on the pass as ``decisions``.

    Parameters
    ----------
    time_budget_s : float
        Seconds for all axes together.
    seed : int
        Seed of the solver.
    refine_steps, k_blocks : int, int or None
        As of :func:`icd_tvm.core.solver.fit_permutation`.
    """

    def __init__(
        self,
        *,
        time_budget_s: float = 30.0,
        seed: int = 0,
        refine_steps: int = 2_000,
        k_blocks: int | None = None,
    ) -> None:
        self.time_budget_s = time_budget_s
        self.seed = seed
        self.refine_steps = refine_steps
        self.k_blocks = k_blocks
        self.decisions: list[Decision] = []

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with the attribute; the functions are unchanged."""
        graphs, dead = read_accesses(mod), read_dead_units(mod)
        listed, began = has_listed_blocks(mod), time.perf_counter()
        deadline = began + self.time_budget_s * (_FIRST if listed else 1)
        self.decisions = []
        axes = _output_axes(mod, graphs)
        # An output order competes with what the orders of the groups leave of its columns.
        for done, group in enumerate(sorted(graphs, key=axes.__contains__)):
            accesses = graphs[group]
            share = max(0.05, (deadline - time.perf_counter()) / (len(graphs) - done))
            if group in axes:
                self.decisions.append(self._output(group, accesses[0], axes[group], dead, share))
                continue
            perm, stats = self._solve(accesses, dead.get(group, np.empty(0, np.int64)), share)
            self.decisions.append(Decision(group, perm, _as_dict(stats), _graph_nnz(accesses)))
        if listed:
            self._settle(mod, dead, began + self.time_budget_s)
        chosen = {d.group: tvm.runtime.tensor(d.perm) for d in self.decisions if d.improved}
        return mod.with_attr(LAYOUT_PERM, chosen)

    def _settle(self, mod: Any, dead: Mapping[str, np.ndarray], deadline: float) -> None:
        """Decide again where the orders together leave other blocks than each one expected."""
        decided = {one.group: one.perm for one in self.decisions if one.improved}
        if not decided:
            return
        blocks = listed_blocks(mod["main"], tagged_groups(mod), dead)
        settled = settle(blocks, decided, self._fit, deadline)
        for place, one in enumerate(self.decisions):
            if settled.get(one.group) is not decided.get(one.group):
                self.decisions[place] = _settled(one, settled, blocks)

    def _output(
        self,
        key: str,
        access: TileAccess,
        axis: AxisStructure,
        dead: Mapping[str, np.ndarray],
        budget_s: float,
    ) -> Decision:
        """Solve for the columns of one matmul, from where the orders of their groups leave them."""
        moved = {decision.group: decision.perm for decision in self.decisions if decision.improved}
        groups = set(axis.groups())
        start = axis_index(axis, moved).astype(np.int32)
        gone = [positions(axis, group)[dead[group]].ravel() for group in groups & dead.keys()]
        live = without(access, np.concatenate(gone)) if gone else access
        own = columns_of(live, start) if groups & moved.keys() else live
        perm, stats = self._fit([own], budget_s)
        figures = _as_dict(stats)
        _charge_gather(figures, access)
        return Decision(key, start[perm], figures, _graph_nnz([access]))

    def _solve(
        self, accesses: Sequence[TileAccess], dead: np.ndarray, budget_s: float
    ) -> tuple[np.ndarray, FitStats]:
        """Solve with dead units moved out of the way, and with them left in their groups.

        A few dead units are better left where they fill a group up to whole tiles; many are
        better gathered, so that whole tiles go. What counts is the cost without them.
        """
        live = [without(access, dead) for access in accesses]
        perm, stats = self._fit(live, budget_s)
        if not dead.size or stats.stopped_by == "bound":
            return perm, stats
        filled, other = self._fit(accesses, budget_s)
        cost = tile_cost(live, filled)
        if stats.U is None or cost >= stats.U:
            return perm, stats
        # The figures stay those of the live units, whichever order is taken.
        improved = stats.U_before is not None and cost < stats.U_before
        winner = f"{other.winner}, dead units left in place"
        return filled, replace(
            other, U=cost, U_before=stats.U_before, improved=improved, winner=winner
        )

    def _fit(
        self, accesses: Sequence[TileAccess], budget_s: float, start: np.ndarray | None = None
    ) -> tuple[np.ndarray, FitStats]:
        return fit_permutation(
            accesses=accesses,
            start=start,
            time_budget_s=budget_s,
            refine_steps=self.refine_steps,
            k_blocks=self.k_blocks,
            rng_seed=self.seed,
        )


def _output_axes(mod: Any, graphs: Mapping[str, Sequence[TileAccess]]) -> dict[str, AxisStructure]:
    """Return how the columns of every matmul that may have an order of its own are built."""
    keys = [key for key in graphs if key.startswith(OUTPUT_ORDER)]
    known = tagged_groups(mod).value_axes if keys else {}
    axes = {OUTPUT_ORDER + str(var.name): own[-1] for var, own in known.items() if own}
    return {key: axes.get(key, AxisStructure("leaf", graphs[key][0].n)) for key in keys}


def read_permutations(mod: Any) -> dict[str, np.ndarray]:
    """Read ``icd.layout_perm`` of ``mod``; absent reads as no permutation."""
    attrs = mod.attrs
    if attrs is None or LAYOUT_PERM not in attrs:
        return {}
    return {str(group): perm.numpy() for group, perm in attrs[LAYOUT_PERM].items()}


def _as_dict(stats: FitStats) -> dict[str, Any]:
    return json.loads(json.dumps(stats.to_dict(), default=float))


def _settled(decision: Decision, orders: Mapping[str, np.ndarray], blocks: Blocks) -> Decision:
    """Return the decision for an axis whose order was changed for the blocks of all orders."""
    group, kept = decision.group, np.arange(len(decision.perm), dtype=np.int32)
    perm, improved = orders.get(group, kept), group in orders
    figures = {
        "U": tile_cost(blocks.accesses(group, orders), perm),
        "U_before": tile_cost(blocks.accesses(group, {}), kept),
        "winner": f"{decision.stats['winner']}, settled" if improved else "start",
        "reason": "" if improved else "with all orders decided blocks would be more",
        "improved": improved,
    }
    return Decision(group, perm, {**decision.stats, **figures}, decision.w_nnz)


def _charge_gather(figures: dict[str, Any], access: TileAccess) -> None:
    """Refuse a private output order whose run-time gather costs more than it saves.

    A model, in FLOP: the weight of a unit is 2 M tile FLOP, so M follows from it.
    """
    outputs = access.weight / (2 * access.tile) * access.n
    saved, cost = figures["U_before"] - figures["U"], GATHER_FLOP * outputs
    figures["gather_flop"] = cost
    if figures["improved"] and saved <= cost:
        figures["improved"] = False
        figures["reason"] = (
            f"undoing the order would cost {cost:.1e} FLOP (modelled) and save {saved:.1e}"
        )


def _graph_nnz(accesses: Sequence[TileAccess]) -> int:
    """Return the non-zeros of W, which is formed of one index of each support."""
    n = accesses[0].n
    if is_uniform(accesses=accesses):
        return n * (n - 1)
    items, weights = stacked_items(accesses)
    items = items[:, np.flatnonzero(weights)]
    _, first, sizes = np.unique(support_labels(items), return_index=True, return_counts=True)
    graph = build_w("tir", accesses=[columns_of(access, first) for access in accesses])
    touched = np.diff(items.indptr)[first] > 0
    pairs = graph.astype(np.bool_) @ sizes
    return int(sizes @ pairs + (sizes * (sizes - 1)) @ touched)
