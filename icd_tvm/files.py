"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from icd_tvm.errors import OutputError


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it into place.

    Parameters
    ----------
    path : str or Path
        The file to make; an older one is replaced only by a complete new one. Its folder must
        exist.
    write : Callable[[Path], object]
        Writes to the path it is given, which has the suffix of ``path``.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    OutputError
        If anything about the writing fails; then no temporary file is left.
    """
    final, temporary = Path(path), None
    try:
        handle, name = tempfile.mkstemp(f"{final.suffix}", f".{final.stem}.", final.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        _flush(temporary)
        # A temporary file is private; the final one is an ordinary file.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(final)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"cannot write {str(final)!r}: {reason}", "choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return final


def make_folder(path: Path) -> None:
    """Create ``path`` and its parents; OutputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
