"""The directory of one run: its files, its lock, and what a killed run left in it."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from icd_tvm.errors import OutputError
from icd_tvm.files import make_folder, write_atomically
from icd_tvm.runtime.events import EventLog, read_events

CONFIG, EVENTS, METRICS = "config.resolved.yaml", "events.jsonl", "metrics.json"
PERM, GRAPH, GRAPH_AFTER = "perm.json", "W.npz", "W_after.npz"
MEASURED, MODULE, REPORT = "measured.npz", "module.so", "report.csv"
COUNTERS, BUDGET = "counters.json", "budget.json"
NCU, POWER, TILES = "ncu.json", "power.csv", "tiles.npz"
ENVIRONMENT, TRACEBACK = "environment.json", "traceback.txt"
_LOCK, _OWNER = ".lock", ".owner.json"
_NAMES = (
    CONFIG,
    METRICS,
    PERM,
    GRAPH,
    GRAPH_AFTER,
    MEASURED,
    COUNTERS,
    NCU,
    POWER,
    TILES,
    MODULE,
    ENVIRONMENT,
    TRACEBACK,
    BUDGET,
)
LOCK_WAIT_S = 1.0


class RunFolder:
    """A locked run directory; use it as a context manager.

    The lock is the kernel's: it is free again when its process ends, however that happens.

    Parameters
    ----------
    root : Path
        Made with its parents when entered.

    Raises
    ------
    OutputError
        If the folder cannot be made or written, or another process uses it.
    """

    def __init__(self, root: Path, wait_s: float = LOCK_WAIT_S) -> None:
        self.root = root
        self.wait_s = wait_s
        self._lock = FileLock(root / _LOCK)

    def __enter__(self) -> RunFolder:
        """Make and lock the folder, and prove that it can be written."""
        make_folder(self.root)
        try:
            self._lock.acquire(timeout=self.wait_s, poll_interval=0.05)
        except Timeout:
            raise OutputError(
                f"{self.root} is in use{self._owner()}", "wait for it, or choose another --out"
            ) from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot lock {self.root}: {reason}", "choose another --out") from (
                error
            )
        try:
            self._clear_leftovers()
            owner = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            self.write_text(_OWNER, json.dumps(owner))
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock."""
        (self.root / _OWNER).unlink(missing_ok=True)
        self._lock.release()

    def path(self, name: str) -> Path:
        """Return the path of one of the run's files."""
        return self.root / name

    def write_text(self, name: str, text: str) -> Path:
        """Write a file whole."""
        return write_atomically(self.path(name), lambda file: file.write_text(text, "utf-8"))

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file whole."""
        return self.write_text(name, json.dumps(value, indent=1, default=str) + "\n")

    def log(self) -> EventLog:
        """Return the log that appends to this folder's events."""
        return EventLog(self.path(EVENTS))

    def events(self) -> list[dict[str, Any]]:
        """Return the events of all processes that worked here."""
        return read_events(self.path(EVENTS))

    def begun(self) -> bool:
        """Return whether a run has stored its configuration here."""
        return self.path(CONFIG).exists()

    def files(self) -> dict[str, Path]:
        """Return the files that are there by name."""
        return {p.name: p for p in sorted(self.root.iterdir()) if p.name[0] != "." and p.is_file()}

    def _clear_leftovers(self) -> None:
        """Remove the temporary files of a process that was killed while writing."""
        stems = "|".join(re.escape(Path(name).stem) for name in (*_NAMES, REPORT, _OWNER))
        for path in self.root.glob(".*"):
            if re.fullmatch(rf"\.({stems})\.[a-z0-9_]{{8}}(\.\w+)?", path.name):
                path.unlink(missing_ok=True)

    def _owner(self) -> str:
        try:
            owner = json.loads((self.root / _OWNER).read_text("utf-8"))
            return f" by process {owner['pid']} since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""
