"""Find CUDA machine code inside a file, without a tool of the toolkit.

A fatbin starts with a 16-byte header (magic, version, header size, size of what follows); each
entry has a header of its own that says kind (PTX or ELF), size and architecture. The layout is the
one that ``fatbinary`` of CUDA 11 to 13 writes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

MAGIC = struct.pack("<I", 0xBA55ED50)
_FILE = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQIIHHIIIQ")
# Of its flags: code for what one compute capability alone has, as nvcc of CUDA 13 marks it.
_SPECIFIC = 1 << 20
_KINDS = {1: "ptx", 2: "elf"}


class CodeEntry(NamedTuple):
    """One entry of a fatbin: ``elf`` (machine code) or ``ptx``, and e.g. ``sm_90a``."""

    kind: str
    arch: str
    size: int


def fatbin_entries(data: bytes) -> list[CodeEntry]:
    """Return the entries of every fatbin in ``data``, in order."""
    found: list[CodeEntry] = []
    start = data.find(MAGIC)
    while start >= 0:
        found += _entries(data, start)
        start = data.find(MAGIC, start + 4)
    return found


def machine_code(path: Path) -> list[CodeEntry]:
    """Return the machine code entries of a library; empty where it holds source or PTX only."""
    return [entry for entry in fatbin_entries(path.read_bytes()) if entry.kind == "elf"]


def _entries(data: bytes, start: int) -> list[CodeEntry]:
    if start + _FILE.size > len(data):
        return []
    _, _, header, size = _FILE.unpack_from(data, start)
    at, end = start + header, start + header + size
    found = []
    while at + _ENTRY.size <= min(end, len(data)):
        kind, _, own, payload, _, _, _, _, arch, _, _, flags = _ENTRY.unpack_from(data, at)
        if kind not in _KINDS or own < _ENTRY.size:
            break
        suffix = "a" if flags & _SPECIFIC else ""
        found.append(CodeEntry(_KINDS[kind], f"sm_{arch}{suffix}", payload))
        at += own + payload
    return found
