"""The loop points at which an access happens, all of them or those of a sample of windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icd_tvm.errors import ConfigError
from icd_tvm.tir_schedules.index_eval import Constants, Loop, Points, variables
from icd_tvm.tir_schedules.tensor_access import THREADS, Access

# Points evaluated at a time.
_CHUNK = 1 << 20
# Chance that the error bound of a sampled incidence fails for a given entry.
_SAMPLING_RISK = 1e-3


class Domain:
    """The loops an access depends on, apart from those that only repeat it.

    Attributes
    ----------
    main : list of Loop
        Loops connected with the indices by a common index, guard or loop bound.
    repeats : int
        Distinct windows that the other window loops make of one; 0: the access never happens.
    scale, error : float
        Windows each evaluated one stands for, and the bound of Incidence.error.
    """

    def __init__(
        self, access: Access, chosen: Sequence[Loop], by_warp: bool, consts: Constants
    ) -> None:
        self.access, self.consts = access, consts
        self.window_vars = {loop.var for loop in chosen}
        groups = _connected(access, by_warp)
        self.main = [p for p in access.loops if p.var in groups[0]]
        self.scale, self.error = 1.0, 0.0
        self.repeats = math.prod(self._repeats(group) for group in groups[1:])
        for predicate in access.predicates:
            if not variables([predicate]) and not np.all(Points(consts).value(predicate)):
                self.repeats = 0

    def _guards(self, group: set[Any]) -> list[Any]:
        return [p for p in self.access.predicates if variables([p]) & group]

    def _repeats(self, group: set[Any]) -> int:
        loops = [p for p in self.access.loops if p.var in group]
        guards = self._guards(group)
        if not guards and len(loops) == 1 and (extent := loops[0].constant_extent) is not None:
            return extent if loops[0].var in self.window_vars else min(extent, 1)
        points = Points(self.consts)
        points.expand_all(loops, guards)
        if points.size == 0:
            return 0
        columns = [points.env[p.var] for p in loops if p.var in self.window_vars]
        return len(np.unique(np.stack(columns, axis=1), axis=0)) if columns else 1

    def points(self, by_address: bool, cap: int, seed: int) -> Iterator[Points]:
        """Yield all points, or those of a sample of windows, in chunks."""
        if self.repeats == 0:
            return
        # An extent that varies counts as 1 here, for want of an estimate.
        total = math.prod(p.constant_extent or 1 for p in self.main)
        if total <= cap:
            yield from self._chunks(Points(self.consts), self.main)
            return
        if by_address:
            raise ConfigError(
                f"{self.access.name}: {total} points exceed point_cap {cap}",
                "windows by address cannot be sampled; raise point_cap or use another window",
            )
        sample, inner = self._sample(total, cap, seed)
        yield from self._chunks(sample, inner)

    def _chunks(self, points: Points, loops: Sequence[Loop]) -> Iterator[Points]:
        pending = self._guards({p.var for p in self.main})
        points.filter(pending)
        rest = math.prod(p.constant_extent or 1 for p in loops)
        if not loops or points.size * rest <= _CHUNK:
            points.expand_all(loops, pending)
            yield points
            return
        points.expand(loops[0])
        rest //= loops[0].constant_extent or 1
        for chunk in points.chunks(max(1, _CHUNK // max(rest, 1))):
            yield from self._chunks(chunk, loops[1:])

    def _sample(self, total: int, cap: int, seed: int) -> tuple[Points, list[Loop]]:
        """Bind the window loops to a random set of windows; return the loops left to bind."""
        outer = [p for p in self.main if p.var in self.window_vars]
        inner = [p for p in self.main if p.var not in self.window_vars]
        if any(p.constant_extent is None or variables([p.minimum]) for p in outer):
            raise ConfigError(
                f"{self.access.name}: windows of varying loops cannot be sampled", "raise point_cap"
            )
        windows = math.prod(p.constant_extent or 0 for p in outer)
        number = min(cap // max(1, total // windows), windows)
        if number < 1:
            raise ConfigError(
                f"{self.access.name}: one window exceeds point_cap {cap}", "raise point_cap"
            )
        ids = np.sort(np.random.default_rng(seed).choice(windows, number, replace=False))
        points = Points(self.consts, {}, number)
        for loop in reversed(outer):
            ids, digit = np.divmod(ids, int(loop.extent))
            points.env[loop.var] = digit + int(loop.minimum)
        self.scale = windows / number
        self.error = math.sqrt(math.log(2 / _SAMPLING_RISK) / (2 * number))
        return points, inner


def _connected(access: Access, by_warp: bool) -> list[set[Any]]:
    """Group the loop variables by common indices, guards and bounds; the indices' group first."""
    loops = {loop.var for loop in access.loops}
    cliques = [variables(access.indices) & loops]
    if by_warp:
        cliques[0] |= {p.var for p in access.loops if p.tag in THREADS}
    groups = [
        *(variables([p]) & loops for p in access.predicates),
        *(variables([p.minimum, p.extent]) & loops | {p.var} for p in access.loops),
    ]
    for clique in groups:
        if not clique:
            continue
        touching = [k for k, group in enumerate(cliques) if group & clique]
        merged = clique.union(*(cliques[k] for k in touching))
        first = 0 if 0 in touching else len(cliques)
        kept = [g for k, g in enumerate(cliques) if k not in touching]
        cliques = [merged, *kept] if first == 0 else [*kept, merged]
    return cliques
