"""The files of the permutation cache: locks, atomic writes, the size cap and the quarantine.

Knows nothing of what is in an entry, except that those of a later version are never deleted.
Relies on ``rename`` and ``flock`` only, which NFS has; never on hard links or access times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock

from icd_tvm.errors import IcdError, OutputError, PermutationError
from icd_tvm.files import make_folder, write_atomically
from icd_tvm.runtime.cache_entry import NewerFormatError, decode, is_key

# A permutation of a million indices is 5 MB of text.
MAX_ENTRY_BYTES = 64 << 20
_SUFFIX = ".json"
_STORE = "store"
_STORE_TIMEOUT_S = 60.0
_POLL_S = 0.02
# Writing an entry takes milliseconds; what is older was left by a killed process.
_STALE_S = 3600.0
# Clocks of machines that share a folder differ by less.
_CLOCK_SLACK_S = 120.0
_QUARANTINED = 64


@dataclass(frozen=True)
class EntryFile:
    """One file of the cache: its size in bytes and when it was last used, seconds since 1970."""

    key: str
    path: Path
    size: int
    used: float


class CacheStore:
    """A folder of entries, made on the first write.

    What a run calls returns the reason of a failure; what lists raises OutputError.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        self.entries, self.aside = root / "entries", root / "quarantine"
        self.locks = root / "locks"

    def path(self, key: str) -> Path:
        """Return the file of an entry."""
        return self.entries / f"{key}{_SUFFIX}"

    def lock(self, name: str, timeout_s: float) -> ExitStack | str:
        """Return an exclusive lock, held until the stack closes, or why there is none.

        The system releases it when its process dies, however that happens.
        """
        try:
            make_folder(self.locks)
            lock = FileLock(str(self.locks / f"{name}.lock"))
            lock.acquire(timeout=timeout_s, poll_interval=_POLL_S)
        except TimeoutError:
            return f"another process has held the lock {name[:12]!r} for {timeout_s:g} s"
        except (OSError, RuntimeError, IcdError) as error:
            return f"cannot lock {name[:12]!r} in {self.locks}: {_reason(error)}"
        stack = ExitStack()
        stack.callback(_release, lock)
        return stack

    def read(self, key: str) -> bytes | None:
        """Return the bytes of an entry, None if there is none.

        Raises
        ------
        PermutationError
            If it is no regular file, or larger than any entry.
        OSError
            If it cannot be read.
        """
        for _ in range(3):
            try:
                return _read_regular(self.path(key))
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                # NFS: the entry was replaced between open and read.
                if error.errno != errno.ESTALE:
                    raise
        return None

    def touch(self, key: str) -> None:
        """Note that an entry was used; a folder that is read-only keeps no such notes."""
        with contextlib.suppress(OSError):
            os.utime(self.path(key))

    def write(self, key: str, data: bytes) -> str:
        """Store an entry, then delete those unused for longest beyond the size cap.

        To be called with the lock of the key. Returns why it was not stored, or "".
        """
        if len(data) > min(self.max_bytes, MAX_ENTRY_BYTES):
            return f"an entry of {len(data)} bytes is more than the cache may hold"
        lock = self.lock(_STORE, _STORE_TIMEOUT_S)
        if isinstance(lock, str):
            return lock
        with lock:
            try:
                make_folder(self.entries)
                write_atomically(self.path(key), lambda temporary: temporary.write_bytes(data))
                self._shrink(self.max_bytes, key)
            except (OSError, OutputError) as error:
                return _reason(error)
        return ""

    def prune(self, max_bytes: int) -> list[str]:
        """Delete entries beyond ``max_bytes``, unused ones first, and all that is put aside.

        Returns the keys of the deleted entries.

        Raises
        ------
        OutputError
            If the store cannot be locked or listed.
        """
        lock = self.lock(_STORE, _STORE_TIMEOUT_S)
        if isinstance(lock, str):
            raise OutputError(lock)
        with lock:
            removed = self._shrink(max_bytes)
            self._remove_old_locks()
            for path in self.quarantined():
                _remove(path)
        return removed

    def files(self) -> list[EntryFile]:
        """Return all entries, the one unused for longest first."""
        found = []
        for path in _listed(self.entries):
            with contextlib.suppress(OSError):
                if key := _key(path):
                    status = path.lstat()
                    found.append(EntryFile(key, path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda file: (file.used, file.key))

    def strangers(self) -> list[Path]:
        """Return what lies among the entries and is neither one nor a file being written."""
        return [
            path
            for path in _listed(self.entries)
            if not _key(path) and not path.name.startswith(".")
        ]

    def quarantine(self, name: str) -> str:
        """Move an entry (by key or file name) out of the way; return why it stays, or ""."""
        source = self.entries / (f"{name}{_SUFFIX}" if is_key(name) else name)
        try:
            make_folder(self.aside)
            target = self.aside / f"{source.stem[:80]}.{time.time_ns()}.{os.getpid()}"
            source.rename(target)
            # From now on its age is the time it has been here; another user's file keeps its own.
            with contextlib.suppress(OSError):
                os.utime(target, follow_symlinks=False)
            for old in _by_age(_listed(self.aside))[:-_QUARANTINED]:
                _remove(old)
        except FileNotFoundError:
            return ""
        except (OSError, OutputError) as error:
            return _reason(error)
        return ""

    def quarantined(self) -> list[Path]:
        """Return the files put aside, the oldest first."""
        return _by_age(_listed(self.aside))

    def remove_stale(self) -> int:
        """Delete what killed writers left behind; return how many files."""
        stale = [path for path in _listed(self.entries) if path.name.startswith(".")]
        return sum(_remove(path) for path in stale if _age(path) > _STALE_S)

    def _shrink(self, max_bytes: int, keep: str = "") -> list[str]:
        """Delete entries beyond ``max_bytes``; to be called with the lock of the store."""
        self.remove_stale()
        files, removed = self._by_use(), []
        excess = sum(file.size for file in files) - max_bytes
        for file in files:
            if excess <= 0:
                break
            if file.key != keep and not self._is_newer(file.key) and _remove(file.path):
                removed.append(file.key)
                excess -= file.size
        return removed

    def _by_use(self) -> list[EntryFile]:
        """Return the entries by use; one used in the future counts as used now, from now on."""
        now = time.time()
        for file in self.files():
            if file.used > now + _CLOCK_SLACK_S:
                self.touch(file.key)
        return self.files()

    def _is_newer(self, key: str) -> bool:
        try:
            decode(self.read(key) or b"", key)
        except NewerFormatError:
            return True
        except (PermutationError, OSError):
            return False
        return False

    def _remove_old_locks(self) -> None:
        """Delete lock files without an entry that nobody holds and nobody used for an hour."""
        for path in _listed(self.locks):
            name = path.name.removesuffix(".lock")
            if not is_key(name) or self.path(name).exists() or _age(path) <= _STALE_S:
                continue
            lock = self.lock(name, 0.0)
            if not isinstance(lock, str):
                with lock:
                    _remove(path)


def _read_regular(path: Path) -> bytes:
    # A fifo would block the reader, a link would take it elsewhere.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise PermutationError("it is no regular file") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise PermutationError("it is no regular file")
    with open(handle, "rb") as file:
        data = file.read(MAX_ENTRY_BYTES + 1)
    if len(data) > MAX_ENTRY_BYTES:
        raise PermutationError(f"it is larger than {MAX_ENTRY_BYTES} bytes")
    return data


def _key(path: Path) -> str:
    """Return the key of an entry's file, "" for any other."""
    key = path.name.removesuffix(_SUFFIX)
    return key if path.suffix == _SUFFIX and is_key(key) else ""


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot list {folder}: {_reason(error)}") from error


def _by_age(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (-_age(path), path.name))


def _age(path: Path) -> float:
    """Seconds since, or until, the last change: after a clock jump a file may be of the future."""
    try:
        return abs(time.time() - path.lstat().st_mtime)
    except OSError:
        return 0.0


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _release(lock: BaseFileLock) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        lock.release()


def _reason(error: BaseException) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or str(error) or type(error).__name__
