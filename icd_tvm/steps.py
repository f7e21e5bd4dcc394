"""Long loops say how far they are, to whoever shows it; nobody does unless asked to.

Deep code has no terminal at hand, and should not: it wraps its loop, and a display listens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Advance = Callable[[], object]
# Takes a label and the number of steps; gives what is to be called after each.
Display = Callable[[str, int], AbstractContextManager[Advance]]

_DISPLAY: ContextVar[Display | None] = ContextVar("display", default=None)


def _unseen() -> None:
    """Show nothing."""


def counted(label: str, total: int) -> AbstractContextManager[Advance]:
    """Announce ``total`` steps; call what is given after each of them.

    Examples
    --------
    >>> with counted("rounds", 2) as advance:
    ...     for _ in range(2):
    ...         advance()
    """
    display = _DISPLAY.get()
    return nullcontext(_unseen) if display is None else display(label, total)


def steps(items: Collection[Item], label: str) -> Iterator[Item]:
    """Yield the items; each is a step that is done when the next one is asked for.

    Examples
    --------
    >>> [2 * item for item in steps([1, 2], "numbers")]
    [2, 4]
    """
    with counted(label, len(items)) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def shown_by(display: Display | None) -> Iterator[None]:
    """Let ``display`` show the steps of the body; None shows nothing."""
    token = _DISPLAY.set(display)
    try:
        yield
    finally:
        _DISPLAY.reset(token)
