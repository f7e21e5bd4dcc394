"""Move entries of the permutation cache between machines: one zip file, ``KEY.json`` in it."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icd_tvm.errors import ConfigError, IcdError, OutputError, PermutationError
from icd_tvm.files import write_atomically
from icd_tvm.runtime.cache_entry import CacheEntry, decode, encode, is_key
from icd_tvm.runtime.cache_store import MAX_ENTRY_BYTES, CacheStore
from icd_tvm.runtime.perm_cache import PermutationCache

# Of all entries of one archive, unpacked, and how many they may be.
MAX_ARCHIVE_BYTES = 1 << 30
MAX_ENTRIES = 100_000
_SUFFIX = ".json"
_ENCRYPTED = 0x1
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass
class Imported:
    """Keys that an import added, and those that were here already and stay as they are."""

    added: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def export_entries(
    store: CacheStore, path: Path, keys: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Write entries to an archive; all sound ones if no key is given.

    Returns
    -------
    written : list of str
        Keys.
    skipped : dict of str to str
        Key -> why it was left out; always empty if keys were given.

    Raises
    ------
    ConfigError
        If the cache holds no entry of a given key.
    PermutationError
        If a given entry is damaged or of a later format.
    OutputError
        If an entry cannot be read, or the archive not be written.
    """
    found, skipped = {}, {}
    for key in keys or [file.key for file in store.files()]:
        try:
            found[key] = encode(_stored(store, key), key)
        except IcdError as error:
            if keys:
                raise
            skipped[key] = str(error)

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for key, data in found.items():
                # A member without a time: equal entries make equal archives.
                archive.writestr(zipfile.ZipInfo(f"{key}{_SUFFIX}"), data, zipfile.ZIP_DEFLATED)

    write_atomically(path, write)
    return list(found), skipped


def import_entries(cache: PermutationCache, path: Path) -> Imported:
    """Check a whole archive, then take its entries into the cache.

    An entry enters only as what it decodes to, never as the bytes of the archive.

    Raises
    ------
    ConfigError
        If the file is no such archive, is too large, or holds names or members that an export
        never writes; then nothing is taken.
    PermutationError
        If an entry is damaged or of a later format; then nothing is taken.
    OutputError
        If the cache cannot store an entry.
    """
    for _ in _entries(path):
        pass
    result = Imported()
    for key, entry in _entries(path):
        if cache.get(key, lambda _: None) is not None:
            result.kept.append(key)
            continue
        if reason := cache.put(key, entry):
            raise OutputError(f"cannot import {key}: {reason}")
        result.added.append(key)
    return result


def _stored(store: CacheStore, key: str) -> CacheEntry:
    try:
        data = store.read(key) if is_key(key) else None
    except OSError as error:
        raise OutputError(f"cannot read entry {key}: {error.strerror or error}") from error
    if data is None:
        raise ConfigError(f"the cache has no entry {key!r}", "icd cache ls")
    return decode(data, key)


def _entries(path: Path) -> Iterator[tuple[str, CacheEntry]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked(archive.infolist())
            for key, member in members.items():
                yield key, _entry(archive, member, key)
    except _BROKEN as error:
        raise ConfigError(f"cannot read the archive {path}: {error}") from error


def _checked(members: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return key -> member; ConfigError for anything an export does not write."""
    if len(members) > MAX_ENTRIES:
        raise ConfigError(f"the archive holds {len(members)} entries, at most {MAX_ENTRIES}")
    if sum(member.file_size for member in members) > MAX_ARCHIVE_BYTES:
        raise ConfigError(f"the archive unpacks to more than {MAX_ARCHIVE_BYTES} bytes")
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        # The name is only ever compared, never joined to a path.
        key = member.filename.removesuffix(_SUFFIX)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if not member.filename.endswith(_SUFFIX) or not is_key(key) or key in found:
            raise ConfigError(f"the archive holds {member.filename!r}", "wanted: KEY.json, once")
        if kind not in (0, stat.S_IFREG) or member.flag_bits & _ENCRYPTED:
            raise ConfigError(f"{member.filename!r} in the archive is no plain file")
        if member.file_size > MAX_ENTRY_BYTES:
            raise ConfigError(f"{member.filename!r} in the archive is of {member.file_size} bytes")
        found[key] = member
    return found


def _entry(archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> CacheEntry:
    # A member gives no more bytes than the size it declares, which was checked.
    data = archive.read(member)
    try:
        return decode(data, key)
    except PermutationError as error:
        raise PermutationError(f"entry {key[:12]} of the archive: {error}") from error
