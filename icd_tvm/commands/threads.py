"""TVM reads its thread settings when it is first imported."""

from __future__ import annotations

import os


def set_threads(threads: int | None) -> None:
    """Give TVM ``threads`` workers, or one for each core; before it is imported."""
    os.environ["TVM_NUM_THREADS"] = str(threads or os.cpu_count() or 1)
