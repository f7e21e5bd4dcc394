"""``events.jsonl``: one line for each state of a run, written before the next one begins.

A line survives the death of its process. It may not survive a power cut: then its state is made
again, from artifacts that do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from icd_tvm.errors import OutputError
from icd_tvm.runtime.progress import Stage, timed
from icd_tvm.runtime.states import State

Event = dict[str, Any]


class EventLog:
    """Appends ``{stage, t_start, t_end, ok, meta}`` to a file.

    Parameters
    ----------
    path : Path or None
        None keeps the events in memory only.

    Attributes
    ----------
    events : list of dict
        Those of this process.
    overhead_s : float
        Seconds spent on writing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.events: list[Event] = []
        self.overhead_s = 0.0

    @contextmanager
    def state(self, state: State) -> Iterator[Stage]:
        """Time a state and record it however it ends; what is put into ``meta`` goes along."""
        current: Stage | None = None
        try:
            with timed(state.value) as current:
                yield current
        except BaseException as error:
            if current is not None:
                current.meta["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            if current is not None:
                self.append(current)

    def append(self, stage: Stage) -> None:
        """Write one event; OutputError if the disk is full or gone."""
        began = time.perf_counter()
        event = {
            "stage": stage.stage,
            "t_start": stage.t_start,
            "t_end": stage.t_end,
            "ok": stage.ok,
            "meta": stage.meta,
        }
        self.events.append(event)
        if self.path is not None:
            _append(self.path, json.dumps(event, default=str) + "\n")
        self.overhead_s += time.perf_counter() - began


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a+b") as file:
            # A line that a killed process left unfinished must not swallow this one.
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def read_events(path: Path) -> list[Event]:
    """Return the whole events of a file; an unfinished line counts for nothing."""
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [event for event in map(_event, lines) if event is not None]


def _event(line: str) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("stage"), str) else None
