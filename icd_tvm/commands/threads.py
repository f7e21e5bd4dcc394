"""TVM reads its thread settings when it is first imported."""

from __future__ import annotations

import os


def set_threads(threads: int | None) -> None:
    """Give TVM ``threads`` workers; before it is imported.

    If omitted, what ``TVM_NUM_THREADS`` says stands, and without it one worker for each CPU that
    this process may use.
    """
    if threads:
        os.environ["TVM_NUM_THREADS"] = str(threads)
        return
    usable = getattr(os, "sched_getaffinity", None)
    count = len(usable(0)) if usable else os.cpu_count() or 1
    os.environ.setdefault("TVM_NUM_THREADS", str(count))
