"""Files that are either whole or not there, and the folder that caches live in."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from icd_tvm.errors import OutputError

CACHE_VARIABLE = "ICD_CACHE_DIR"


def default_cache() -> Path:
    """Return the folder of everything that may be deleted and made again.

    The environment variable ``ICD_CACHE_DIR`` wins; otherwise it is ``icd_tvm`` in the user's cache
    folder (``XDG_CACHE_HOME`` if that is absolute, else ``~/.cache``).

    Raises
    ------
    OutputError
        If no variable is set and the user has no home folder.
    """
    if chosen := os.environ.get(CACHE_VARIABLE, ""):
        return Path(chosen).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification tells readers to ignore relative paths.
    if base.is_absolute():
        return base / "icd_tvm"
    try:
        return Path.home() / ".cache" / "icd_tvm"
    except RuntimeError as error:
        raise OutputError("the user has no home folder", f"set {CACHE_VARIABLE}") from error


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
        _flush_folder(final.parent)
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


def source_digest(root: Path, parts: Iterable[str]) -> str:
    """Return the sha256 of Python sources, names and contents.

    The version of a package stands still while its code is changed in a working tree.

    Parameters
    ----------
    root : Path
        Folder of the package.
    parts : iterable of str
        Files and folders in it; of a folder every ``.py`` below it counts.
    """
    digest = hashlib.sha256()
    for part in parts:
        place = root / part
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make a rename survive a power loss, where the system can flush folders at all."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
