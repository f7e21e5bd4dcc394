"""Stage names on a terminal with a spinner or bars, plain lines otherwise; all stages are timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from icd_tvm.runtime.bars import Bars
from icd_tvm.steps import shown_by


@dataclass
class Stage:
    """One stage: its name, start and end in seconds since the epoch, and a remark.

    The end is the start plus what a monotonic clock counted: a clock that is set meanwhile
    changes no duration.
    """

    stage: str
    t_start: float
    t_end: float = 0.0
    ok: bool = False
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds that the stage took."""
        return self.t_end - self.t_start

    def remark(self) -> str:
        """Return the stage's metadata as one short phrase."""
        return ", ".join(f"{key} {value}" for key, value in self.meta.items())


@contextmanager
def timed(name: str, began: float | None = None) -> Iterator[Stage]:
    """Time the body; ``began`` is an earlier ``time.perf_counter()`` to count from."""
    clock = time.perf_counter() if began is None else began
    current = Stage(name, time.time() - (time.perf_counter() - clock))
    try:
        yield current
        current.ok = True
    finally:
        current.t_end = current.t_start + time.perf_counter() - clock


class Progress:
    """Shows the stages of a run and keeps their times.

    Parameters
    ----------
    quiet : bool
        Show nothing but warnings; the times are kept all the same.
    console : rich.console.Console, optional
        Where to show it; stderr if omitted.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.stages: list[Stage] = []
        self._quiet = quiet
        self._console = console or Console(file=sys.stderr, highlight=False)

    @contextmanager
    def stage(self, name: str, began: float | None = None) -> Iterator[Stage]:
        """Time a stage; what is put into its ``meta`` is shown when it ends."""
        current: Stage | None = None
        try:
            with timed(name, began) as current:
                self.stages.append(current)
                with self._shown(f"{len(self.stages)} {name}"):
                    yield current
        finally:
            if current is not None:
                self._report(current)

    @contextmanager
    def _shown(self, title: str) -> Iterator[None]:
        """Show a spinner, or bars where the body counts its steps; nothing but on a terminal."""
        if self._quiet or not self._console.is_terminal:
            with shown_by(None):
                yield
            return
        with self._console.status(title) as spinner, shown_by(Bars(self._console, spinner).row):
            yield

    @staticmethod
    def now() -> float:
        """Return the clock that stages are timed by, for ``began``."""
        return time.perf_counter()

    def warn(self, text: str) -> None:
        """Show a warning; also when quiet."""
        self._console.print(f"warning: {text}", soft_wrap=True, markup=False)

    def _report(self, stage: Stage) -> None:
        if self._quiet:
            return
        verdict = "" if stage.ok else " FAILED"
        line = f"{stage.seconds:7.2f} s  {stage.stage}{verdict}"
        remark = stage.remark()
        self._console.print(line + (f": {remark}" if remark else ""), soft_wrap=True, markup=False)
