"""Stages and loops on a terminal, in a log, and in silence."""

from __future__ import annotations

import io
import threading
import time

import numpy as np
import pytest
from rich.console import Console

from icd_tvm.measure.latency import interleave
from icd_tvm.runtime import bars
from icd_tvm.runtime.progress import Progress
from icd_tvm.steps import counted, steps


def progress_on(terminal: bool, quiet: bool = False) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False)
    return Progress(quiet, console), stream


def test_loops_are_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "PAUSE_S", 0.0)
    progress, stream = progress_on(terminal=True)
    with progress.stage("work"):
        for _ in steps("ab", "outer"):
            assert list(steps(range(7), "inner")) == list(range(7))
    text = stream.getvalue()
    assert all(part in text for part in ("outer", "inner", "0/2", "1/2", "6/7", "0:00:0"))
    assert text.rstrip().endswith("s  work")


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, True), (False, True)])
def test_no_bars_elsewhere(terminal: bool, quiet: bool) -> None:
    progress, stream = progress_on(terminal, quiet)
    with progress.stage("work"):
        assert list(steps([1, 2], "loop")) == [1, 2]
    assert "loop" not in stream.getvalue()
    assert stream.getvalue().count("\n") == (0 if quiet else 1)


def test_a_quiet_stage_silences_the_one_around_it() -> None:
    loud, stream = progress_on(terminal=True)
    quiet, _ = progress_on(terminal=True, quiet=True)
    with loud.stage("outer"), quiet.stage("inner"):
        list(steps([1], "loop"))
    assert "loop" not in stream.getvalue()


def started(before: set[threading.Thread]) -> bool:
    """Tell whether a thread runs that did not before; other tests' threads may end meanwhile."""
    return not set(threading.enumerate()) <= before


def settled(before: set[threading.Thread]) -> bool:
    """Wait until no thread is left but these: one that was told to stop needs a moment."""
    deadline = time.monotonic() + 10
    while started(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not started(before)


def test_nothing_draws_beside_calls_that_are_timed() -> None:
    progress, stream = progress_on(terminal=True)
    alone = set(threading.enumerate())
    calm: list[bool] = []
    with progress.stage("measure"):
        assert started(alone)
        samples = interleave({"a": lambda: calm.append(settled(alone))}, repeats=40, warmup=1)
        assert started(alone)
    assert all(calm)
    assert samples["a"].shape == (40,)
    assert "measuring rounds" in stream.getvalue()


def test_a_failure_inside_a_bar_leaves_the_terminal_as_it_was() -> None:
    progress, stream = progress_on(terminal=True)
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), progress.stage("work"), counted("loop", 3):
        _ = 1 / np.int64(0).item()
    assert settled(before)
    # The cursor is shown again.
    assert stream.getvalue().count("\x1b[?25h") >= stream.getvalue().count("\x1b[?25l")
    with progress.stage("more"):
        list(steps([1], "again"))
    assert "again" in stream.getvalue()


def test_without_a_display_steps_are_the_items() -> None:
    assert list(steps([3, 1], "loop")) == [3, 1]
    with counted("loop", 2) as advance:
        advance()
