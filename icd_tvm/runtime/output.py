"""The output folder and file: checked before the work starts, cleaned when the work fails."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icd_tvm.errors import OutputError


@contextmanager
def output_folder(path: Path | None) -> Iterator[Path | None]:
    """Create ``path`` and prove that it can be written; remove it again if the body fails.

    A folder that existed before is never removed.

    Raises
    ------
    OutputError
        If the folder cannot be created or written.
    """
    if path is None:
        yield None
        return
    first_new = _first_missing(path)
    _claim(path)
    try:
        yield path
    except BaseException:
        if first_new is not None:
            shutil.rmtree(first_new, ignore_errors=True)
        raise


def check_writable_file(path: Path | None) -> None:
    """Raise :class:`OutputError` early if ``path`` could not be written at the end."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder", "give a file name")
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {path}: folder {folder} is missing or read-only")


def _first_missing(path: Path) -> Path | None:
    missing = [p for p in [path, *path.parents] if not p.exists()]
    return missing[-1] if missing else None


def _claim(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}: {error.strerror or error}", "choose another --out"
        ) from error
