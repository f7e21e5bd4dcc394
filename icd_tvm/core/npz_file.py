"""Read ``.npz`` archives of strangers: every size is known and allowed before memory is taken."""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError

# Magic, version and header of an array; numpy writes 128 bytes for what is stored here.
_HEADER_BYTES = 1024
# What the standard library and numpy raise on damaged archives, encrypted members, odd headers.
_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_text(archive: zipfile.ZipFile, name: str, max_bytes: int) -> str:
    """Return the 0-d text array ``name`` of at most ``max_bytes`` bytes in its file."""
    return str(
        read_array(archive, name, lambda dtype, shape: dtype.kind == "U" and shape == (), max_bytes)
    )


def read_row(
    archive: zipfile.ZipFile, name: str, length: int, kind: str, item_bytes: tuple[int, ...]
) -> NDArray[Any]:
    """Return the 1-d array ``name`` of exactly ``length`` items of the numpy ``kind``.

    Raises
    ------
    ConfigError
        If it has another shape, kind or item size, or its file another size than these give.
    """

    def wanted(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
        return dtype.kind == kind and dtype.itemsize in item_bytes and shape == (length,)

    return read_array(archive, name, wanted, max(item_bytes) * length + _HEADER_BYTES)


def open_archive(path: str | Path, names: set[str] | None = None) -> zipfile.ZipFile:
    """Open an archive that must hold the arrays ``names`` and nothing else; any if omitted.

    Raises
    ------
    ConfigError
        If it cannot be read or holds other members.
    """
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    found = archive.namelist()
    if names is not None and sorted(found) != sorted(f"{name}.npy" for name in names):
        archive.close()
        listed = ", ".join(found[:6]) or "nothing"
        raise ConfigError(f"cannot read {path}: it holds {listed}", f"wanted: {sorted(names)}")
    return archive


def read_array(
    archive: zipfile.ZipFile,
    name: str,
    wanted: Callable[[np.dtype[Any], tuple[int, ...]], bool],
    max_bytes: int,
) -> NDArray[Any]:
    """Return the array ``name``.

    Parameters
    ----------
    archive : zipfile.ZipFile
    name : str
        Without ``.npy``.
    wanted : Callable[[dtype, shape], bool]
        Says from its header whether it is what the caller expects.
    max_bytes : int
        Largest size of its file.

    Raises
    ------
    ConfigError
        If it is damaged, too large, or not wanted.
    """
    try:
        info = archive.getinfo(f"{name}.npy")
        if info.file_size > max_bytes:
            raise ValueError(f"{info.file_size} bytes, at most {max_bytes} expected")
        # A member gives no more bytes than the size it declares.
        data = archive.read(info)
        shape, dtype, start = _header(data)
        if dtype.hasobject or not dtype.isnative or not wanted(dtype, shape):
            raise ValueError(f"it has dtype {dtype} and shape {shape}")
        if len(data) - start != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError("its size does not match its header")
    except _BROKEN as error:
        raise ConfigError(f"cannot read array {name!r}: {error}") from error
    # A copy: callers sort and clean the arrays in place.
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).copy()


def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and where the values start."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"array format {version} is not (1, 0)")
    # Literals only (``ast.literal_eval``), and at most 10,000 characters of them.
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype, file.tell()
