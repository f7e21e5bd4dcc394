"""The states of a run and the order in which they follow each other."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """What has been reached; a failure leads to ``ROLLBACK``, and everything to ``REPORTED``."""

    READY = "READY"
    W_BUILT = "W_BUILT"
    PERMUTED = "PERMUTED"
    TRANSFORMED = "TRANSFORMED"
    REPERMUTED = "REPERMUTED"
    MEASURED = "MEASURED"
    ROLLBACK = "ROLLBACK"
    REPORTED = "REPORTED"


# Without ROLLBACK, which may stand before REPORTED.
FORWARD = tuple(state for state in State if state is not State.ROLLBACK)
