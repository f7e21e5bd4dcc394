"""Do something again after a pause, where trying again can help."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def retried(
    action: Callable[[], Result],
    on: type[Exception] | tuple[type[Exception], ...],
    tell: Callable[[str], object],
    pauses_s: tuple[float, ...],
) -> Result:
    """Return what ``action`` returns; after each failure wait, longer every time.

    Parameters
    ----------
    action : Callable[[], Result]
    on : exception type or tuple of them
        What is worth another try; anything else is raised at once.
    tell : Callable[[str], object]
        Hears of every failure that is followed by another try.
    pauses_s : tuple of float
        Seconds before the second, third, ... try; the failure after the last one is raised.
    """
    for pause in pauses_s:
        try:
            return action()
        except on as error:
            tell(f"{error}; trying again in {pause:g} s")
            time.sleep(pause)
    return action()
