"""Work in a child process with a memory limit: what ends the child does not end the run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from icd_tvm import errors
from icd_tvm.errors import IcdError

_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 16


class ChildError(Exception):
    """The child ended without a result: no memory, killed, or out of time."""


class _ChildTrace(Exception):
    """Shows the child's traceback as the cause of what is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def in_child(work: Callable[[], Any], *, memory_mb: int | None, limit_s: float) -> Any:
    """Return what ``work`` returns in a forked child.

    The child starts with all that this process has and changes nothing of it. It holds none of
    its locks, dies with it, and is the first that the system ends when memory runs out.

    Parameters
    ----------
    work : Callable[[], Any]
        Its result is plain JSON; numpy scalars become numbers.
    memory_mb : int or None
        MiB that the child may take beyond what this process has; None for no limit.
    limit_s : float
        Seconds after which the child is killed.

    Raises
    ------
    ChildError
        If the child ends without a result; the text says why.
    IcdError
        The class and text that ``work`` raised.
    RuntimeError
        For any other exception of ``work``, with its type and text.
    """
    receiver, sender = os.pipe()
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError as error:
        os.close(receiver)
        os.close(sender)
        raise ChildError(f"it could not be started: {error.strerror}") from error
    if child == 0:
        _run(work, sender, parent, memory_mb)
    os.close(sender)
    try:
        data = _received(receiver, limit_s)
    finally:
        os.close(receiver)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    return _result(data, status)


def _run(work: Callable[[], Any], sender: int, parent: int, memory_mb: int | None) -> NoReturn:
    """Be the child: write the result, or what went wrong, and end without any clean-up."""
    try:
        # Ours must not be collected here: their destructors would give up the parent's locks.
        gc.freeze()
        _isolate(sender, parent)
        if memory_mb is not None:
            _limit(memory_mb)
        answer = {"result": work()}
    except MemoryError:
        answer = {"memory": "it ran out of memory"}
    except BaseException as error:
        answer = {"error": _told(error), "trace": traceback.format_exc()}
    with contextlib.suppress(BaseException), os.fdopen(sender, "wb", closefd=False) as stream:
        stream.write(json.dumps(answer, default=float).encode())
    os._exit(0)


def _told(error: BaseException) -> list[str]:
    kind = type(error).__name__
    return [kind, error.message, error.hint] if isinstance(error, IcdError) else [kind, str(error)]


def _isolate(sender: int, parent: int) -> None:
    # An inherited descriptor would keep a lock beyond the death of the process that took it.
    os.closerange(3, sender)
    os.closerange(sender + 1, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _limit(memory_mb: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (memory_mb << 20)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _received(receiver: int, limit_s: float) -> bytes:
    """Return all that the child writes; ChildError once it is out of time."""
    deadline = time.monotonic() + limit_s
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ChildError(f"it was killed after {limit_s:g} s")
        part = os.read(receiver, _READ_BYTES)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _result(data: bytes, status: int) -> Any:
    try:
        answer = json.loads(data)
    except ValueError:
        raise ChildError(_ended(status)) from None
    if "memory" in answer:
        raise ChildError(answer["memory"])
    if "error" in answer:
        raise _raised(*answer["error"]) from _ChildTrace(answer["trace"])
    return answer["result"]


def _ended(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"it ended with exit status {os.waitstatus_to_exitcode(status)}"
    ended = signal.Signals(os.WTERMSIG(status))
    return f"it was ended by {ended.name}" + (
        ", as by a system without memory" if ended is signal.SIGKILL else ""
    )


def _raised(kind: str, message: str, *hint: str) -> Exception:
    known = getattr(errors, kind, None)
    if hint and isinstance(known, type) and issubclass(known, IcdError):
        return known(message, *hint)
    return RuntimeError(f"{kind}: {message}")
