"""Read GGUF model files: metadata, and tensors in F32, F16, Q4_1 and Q8_0.

Every length in the file is checked against the file before it is used.

Notes
-----
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ModelFileError
from icd_tvm.models.onnx_file import printable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_STRING = 1 << 20
MAX_ITEMS = 1 << 22
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
MAX_ELEMENTS = 1 << 40

STRING, ARRAY, BOOL = 8, 9, 7
# Metadata type -> numpy dtype of a scalar.
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", BOOL: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorType:
    """Elements of a block, and the bytes it takes."""

    name: str
    elements: int
    nbytes: int


TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    3: TensorType("Q4_1", 32, 20),
    8: TensorType("Q8_0", 32, 34),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes
    ----------
    name : str
    shape : tuple of int
        In numpy's order, the fastest axis last.
    kind : int
        Number of the type in the file; `GGUFFile.array` reads those of `TENSOR_TYPES`.
    offset : int
        From the beginning of the file's data section.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def type_name(self) -> str:
        """Name of the type, or its number if it is not supported."""
        known = TENSOR_TYPES.get(self.kind)
        return known.name if known else f"type {self.kind}"


class GGUFFile(Mapping[str, NDArray[np.float32]]):
    """A GGUF file; indexing it dequantises one tensor to float32.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    metadata : dict
        Numbers, booleans, strings, numpy arrays of numbers, lists of strings.
    entries : dict of str to TensorEntry

    Raises
    ------
    ModelFileError
        The file is missing, unreadable, no GGUF, truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is a folder, not a file" if self.path.is_dir() else "does not exist"
            raise ModelFileError(f"model file {self.path} {what}", "give the path of a .gguf file")
        try:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise ModelFileError(f"cannot read {self.path}: {error}") from error
        cursor = _Cursor(self._bytes, str(self.path))
        tensors, keys = cursor.header()
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = cursor.string("a metadata key")
            self.metadata[name] = cursor.value(name)
        self.entries: dict[str, TensorEntry] = {}
        for _ in range(tensors):
            entry = cursor.entry()
            if entry.name in self.entries:
                raise cursor.damaged(f"two tensors are called {printable(entry.name)!r}")
            self.entries[entry.name] = entry
        self._data = cursor.aligned(self.metadata.get("general.alignment", 32))
        for entry in self.entries.values():
            self._check(entry)

    def _check(self, entry: TensorEntry) -> None:
        """Refuse a tensor that leaves the file."""
        kind = TENSOR_TYPES.get(entry.kind)
        last = entry.offset if kind is None else entry.offset + _nbytes(entry, kind)
        if self._data + last > len(self._bytes):
            raise ModelFileError(
                f"{self.path} is truncated: tensor {printable(entry.name)!r} ends "
                f"{self._data + last - len(self._bytes)} bytes behind it",
                "check the download",
            )

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def array(self, name: str) -> NDArray[np.float32]:
        """Return a tensor in float32.

        Raises
        ------
        ModelFileError
            No such tensor, or a type that is not supported.
        """
        if name not in self.entries:
            raise ModelFileError(f"{self.path} holds no tensor {name!r}")
        entry = self.entries[name]
        kind = TENSOR_TYPES.get(entry.kind)
        if kind is None:
            known = ", ".join(t.name for t in TENSOR_TYPES.values())
            raise ModelFileError(
                f"tensor {printable(name)!r} has unsupported {entry.type_name}",
                f"supported: {known}",
            )
        start = self._data + entry.offset
        raw = np.asarray(self._bytes[start : start + _nbytes(entry, kind)])
        return _decode(raw, kind).reshape(entry.shape)


def _nbytes(entry: TensorEntry, kind: TensorType) -> int:
    return math.prod(entry.shape) // kind.elements * kind.nbytes


def _decode(raw: NDArray[np.uint8], kind: TensorType) -> NDArray[np.float32]:
    if kind.name == "F32":
        return raw.view("<f4").astype(np.float32)
    if kind.name == "F16":
        return raw.view("<f2").astype(np.float32)
    blocks = raw.reshape(-1, kind.nbytes)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    if kind.name == "Q8_0":
        return scale * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    least = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
    # Low halves of the bytes are the first 16 elements, high halves the last 16.
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return scale * codes + least


class _Cursor:
    """Reads forward and never past the end."""

    def __init__(self, data: NDArray[np.uint8], label: str) -> None:
        self.data = data
        self.label = label
        self.place = 0

    def damaged(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self.label} is damaged: {what}", "check the download")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ModelFileError(
                f"{self.label} is truncated: {count} bytes wanted at {self.place}, "
                f"it has {len(self.data)}",
                "check the download",
            )
        self.place += count
        return self.data[self.place - count : self.place].tobytes()

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def count(self, limit: int, what: str) -> int:
        found = self.number("Q")
        if found > limit:
            raise self.damaged(f"{found} {what}, more than {limit}")
        return found

    def header(self) -> tuple[int, int]:
        """Return the numbers of tensors and of metadata entries."""
        if self.take(4) != MAGIC:
            raise ModelFileError(f"{self.label} is not a GGUF file")
        version = self.number("I")
        if version not in VERSIONS:
            raise ModelFileError(
                f"{self.label} has GGUF version {version}",
                f"known: {', '.join(map(str, VERSIONS))}",
            )
        return self.count(MAX_TENSORS, "tensors"), self.count(MAX_KEYS, "metadata entries")

    def string(self, what: str) -> str:
        raw = self.take(self.count(MAX_STRING, f"bytes in {what}"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def value(self, name: str) -> Any:
        kind = self.number("I")
        label = printable(name)
        if kind == STRING:
            return self.string(label)
        if kind == ARRAY:
            return self.array(label)
        found = self.numbers(kind, 1, label)[0].item()
        return bool(found) if kind == BOOL else found

    def array(self, name: str) -> Any:
        kind, items = self.number("I"), self.count(MAX_ITEMS, f"items in {name}")
        if kind == STRING:
            return [self.string(name) for _ in range(items)]
        return self.numbers(kind, items, name)

    def numbers(self, kind: int, items: int, name: str) -> NDArray[Any]:
        if kind not in SCALARS:
            raise self.damaged(f"metadata {name} has unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(items * dtype.itemsize), dtype)

    def entry(self) -> TensorEntry:
        name = self.string("a tensor's name")
        label = printable(name)
        rank = self.number("I")
        if not 1 <= rank <= MAX_DIMS:
            raise self.damaged(f"tensor {label!r} has {rank} dimensions")
        shape = tuple(self.number("Q") for _ in range(rank))[::-1]
        entry = TensorEntry(name, shape, self.number("I"), self.number("Q"))
        kind = TENSOR_TYPES.get(entry.kind)
        if not 0 < math.prod(shape) <= MAX_ELEMENTS:
            raise self.damaged(f"tensor {label!r} has shape {list(shape)}")
        if kind is not None and shape[-1] % kind.elements:
            raise self.damaged(
                f"tensor {label!r} has {shape[-1]} columns, no multiple of {kind.elements}"
            )
        return entry

    def aligned(self, alignment: Any) -> int:
        """Return where the tensors begin."""
        if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT:
            raise self.damaged(f"alignment is {alignment!r}")
        return -(-self.place // alignment) * alignment
