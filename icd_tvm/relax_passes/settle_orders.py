"""Orders of several axes whose kernels list blocks: each again, the others as they now are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from icd_tvm.core.cost import TileAccess
from icd_tvm.core.permutation import identity
from icd_tvm.core.solver import FitStats
from icd_tvm.relax_passes.cuda_accesses import Blocks

Found = dict[str, NDArray[np.int32]]
# (accesses, seconds, order to begin with) -> order and figures.
Fit = Callable[[Sequence[TileAccess], float, NDArray[np.int32]], tuple[NDArray[np.int32], FitStats]]
_ROUNDS = 4


def settle(blocks: Blocks, decided: Found, fit: Fit, deadline: float) -> Found:
    """Return orders that cost no more than those decided one by one, and no more than none.

    Where both axes of a weight are ordered, its rows were expected to find equal ones. Where they
    do not, blocks hold more than that, perhaps more than those of the incoming order. So the better
    of the two is taken, and each axis solved again for the tiles that the others really have, in
    turn, until nothing improves. As `fit_rows_columns` does for a single mask.

    Parameters
    ----------
    blocks : Blocks
    decided : dict of str to int32[n]
        Group -> order; those without one keep the incoming order.
    fit : callable
        The solver; it never returns an order worse than that to begin with.
    deadline : float
        Of ``time.perf_counter``; at least the first comparison is made.
    """
    best = min((decided, Found()), key=blocks.flop)
    for _ in range(_ROUNDS):
        before = best
        for group in blocks.places:
            left = deadline - time.perf_counter()
            if left <= 0:
                return best
            accesses = blocks.accesses(group, best)
            start = best.get(group, identity(accesses[0].n))
            perm, stats = fit(accesses, left, start)
            tried = {**best, group: perm}
            if stats.improved and blocks.flop(tried, group) < blocks.flop(best, group):
                best = tried
        if best is before:
            break
    return best
