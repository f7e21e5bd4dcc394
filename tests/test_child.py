"""Work in a child process: its result, its errors, and every way it can end without one."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icd_tvm.errors import PermutationError
from icd_tvm.runtime.child import ChildError, in_child


def asked(work: Any, memory_mb: int | None = None, limit_s: float = 60.0) -> Any:
    return in_child(work, memory_mb=memory_mb, limit_s=limit_s)


def test_the_result_comes_back_and_nothing_else_changes() -> None:
    kept: list[int] = []
    found = asked(lambda: (kept.append(1), {"perm": list(range(100_000)), "u": np.float32(0.5)}))
    assert found == [None, {"perm": list(range(100_000)), "u": 0.5}]
    assert kept == []


def refusing() -> None:
    raise PermutationError("not a permutation", "sort it")


def test_errors_come_back_with_their_trace() -> None:
    with pytest.raises(PermutationError, match=r"not a permutation \(sort it\)") as found:
        asked(refusing)
    assert found.value.hint == "sort it"
    assert "in refusing" in str(found.value.__cause__)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
        asked(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL, as by a system without memory"),
        (os.abort, "ended by SIGABRT$"),
        (lambda: os._exit(3), "exit status 3"),
        (lambda: np.ones(1 << 48), "ran out of memory"),
    ],
)
def test_a_child_without_a_result(work: Any, reason: str) -> None:
    with pytest.raises(ChildError, match=reason):
        asked(work)


def test_the_memory_is_limited_beyond_what_is_there() -> None:
    here = np.ones(64 << 20, np.uint8)

    def size(megabytes: int) -> int:
        return int(np.ones(megabytes << 20, np.uint8).size) + int(here[0])

    assert asked(lambda: size(16), memory_mb=64) == (16 << 20) + 1
    with pytest.raises(ChildError, match="ran out of memory"):
        asked(lambda: size(256), memory_mb=64)


def test_a_child_that_hangs_is_killed() -> None:
    with pytest.raises(ChildError, match=r"killed after 0\.2 s"):
        asked(lambda: time.sleep(60), limit_s=0.2)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(ChildError, match="could not be started: Resource"):
        asked(lambda: 1)


PARENT = """
import fcntl, sys, time
from icd_tvm.runtime.child import in_child
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
def work():
    print("begun", flush=True)
    time.sleep(60)
in_child(work, memory_mb=None, limit_s=60)
"""


def test_a_child_holds_no_lock_and_dies_with_its_parent(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", PARENT, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"begun\n"
        parent.kill()
        # The end of the pipe: the child, which has it too, is gone.
        assert parent.stdout.read() == b""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
