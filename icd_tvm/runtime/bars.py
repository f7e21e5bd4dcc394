"""Progress bars with the time that is left, on a terminal.

No thread draws them: it would run beside the calls that are timed. A bar is drawn when a step
is done, at most twice a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Rows
from rich.status import Status

PAUSE_S = 0.5


class Bars:
    """One row for each loop that is under way, in place of the spinner of its stage.

    Parameters
    ----------
    console : rich.console.Console
    spinner : rich.status.Status
        Stopped while there are bars.
    """

    def __init__(self, console: Console, spinner: Status) -> None:
        self._spinner = spinner
        self._drawn = 0.0
        self._rows = Rows(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
        )

    @contextmanager
    def row(self, label: str, total: int) -> Iterator[Callable[[], object]]:
        """Show a row for the body; gives what is to be called after each step."""
        if outermost := not self._rows.tasks:
            self._spinner.stop()
            self._rows.start()
        task = self._rows.add_task(label, total=total)
        self._draw()

        def advance() -> None:
            self._rows.advance(task)
            if time.monotonic() - self._drawn > PAUSE_S:
                self._draw()

        try:
            yield advance
        finally:
            self._rows.remove_task(task)
            if outermost:
                self._rows.stop()
                self._spinner.start()

    def _draw(self) -> None:
        self._rows.refresh()
        self._drawn = time.monotonic()
