"""One timed run at a time on a machine, across processes."""

from __future__ import annotations

import fcntl
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icd_tvm.errors import OutputError
from icd_tvm.files import default_cache, make_folder


def lock_path() -> Path:
    """Return the lock file of this machine; home folders may be shared by many."""
    return default_cache() / f"timing-{platform.node() or 'host'}.lock"


@contextmanager
def machine_lock(exclusive: bool) -> Iterator[int]:
    """Wait until this machine is free for the body.

    The lock is the kernel's: it is free again when its process and those that inherited the
    descriptor have ended.

    Parameters
    ----------
    exclusive : bool
        True for a run that times: nothing else runs beside it. Others share the machine.

    Yields
    ------
    int
        The descriptor, for a child process that keeps the lock if this one is killed.

    Raises
    ------
    OutputError
        If the file cannot be made.
    """
    path = lock_path()
    make_folder(path.parent)
    try:
        file = path.open("a")
    except OSError as error:
        raise OutputError(f"cannot lock {str(path)!r}: {error.strerror or error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield file.fileno()
