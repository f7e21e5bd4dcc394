"""The permutation cache: a decision is taken once for each model, task, target and version.

A folder with ``entries`` (one JSON file for each key), ``quarantine`` (damaged ones) and
``locks``. Readers take no lock: an entry appears and goes by a rename. Nothing that is wrong with
the folder fails a run; then the run has no cache and is told why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from icd_tvm.errors import ConfigError, IcdError, PermutationError
from icd_tvm.files import default_cache
from icd_tvm.runtime.cache_entry import CacheEntry, NewerFormatError, decode, encode, is_key
from icd_tvm.runtime.cache_store import CacheStore

LOGGER = logging.getLogger("icd_tvm")
MAX_BYTES = 256 << 20
LOCK_TIMEOUT_S = 900.0

Validate = Callable[[CacheEntry], object]


@dataclass(frozen=True)
class _Found:
    """What lies under a key: ``newer`` and ``unreadable`` files are left as they are."""

    state: Literal["hit", "absent", "damaged", "newer", "unreadable"]
    entry: CacheEntry | None = None
    reason: str = ""


def cache_folder() -> Path:
    """Return where permutations are kept unless a user says otherwise."""
    return default_cache() / "permutations"


class PermutationCache:
    """Keeps what was decided, verifies it before use, and shares it between processes.

    Parameters
    ----------
    root : str or Path, optional
        Folder of the cache, made when first written; :func:`cache_folder` if omitted.
    max_bytes : int
        Size of all entries together; the ones not used for longest go first.
    lock_timeout_s : float
        Seconds to wait for another process that decides the same key. After that the run decides
        for itself and says so.

    Attributes
    ----------
    remarks : list of str
        Everything this object had to say: entries put aside, reasons for having no cache.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        if max_bytes < 0 or not lock_timeout_s >= 0:
            raise ConfigError(f"max_bytes={max_bytes}, lock_timeout_s={lock_timeout_s}")
        folder = cache_folder() if root is None else Path(root)
        self.store = CacheStore(folder, max_bytes)
        self.lock_timeout_s = lock_timeout_s
        self.remarks: list[str] = []

    def get(self, key: str, validate: Validate) -> CacheEntry | None:
        """Return the verified entry of a key, or None.

        Parameters
        ----------
        key : str
            Of :func:`icd_tvm.runtime.cache_key.cache_key`.
        validate : Callable[[CacheEntry], object]
            Raises if the entry does not fit the model at hand (an ``IcdError``, or anything);
            see :meth:`CacheEntry.check_model`.
        """
        found = self._find(_checked(key), validate)
        if found.state == "damaged":
            lock = self.store.lock(key, self.lock_timeout_s)
            if isinstance(lock, str):
                self._say(f"{found.reason}; it cannot be put aside: {lock}")
                return None
            with lock:
                found = self._put_aside(key, validate)
        if found.reason:
            self._say(found.reason)
        return found.entry

    def put(self, key: str, entry: CacheEntry) -> str:
        """Store an entry; return why it was not stored, or an empty string."""
        lock = self.store.lock(_checked(key), self.lock_timeout_s)
        if isinstance(lock, str):
            return self._say(lock)
        with lock:
            return self._say(self._write(key, entry))

    def get_or_compute(
        self, key: str, validate: Validate, compute: Callable[[], CacheEntry]
    ) -> tuple[CacheEntry, str]:
        """Return the verified entry of a key, computing and storing it if need be.

        While one process computes, others that ask for the same key wait for it.

        Parameters
        ----------
        key, validate
            As for :meth:`get`.
        compute : Callable[[], CacheEntry]
            What it raises is not caught, and nothing is stored then.

        Returns
        -------
        entry : CacheEntry
        how : str
            ``"hit"``, ``"computed"`` (and stored), or ``"no cache: reason"``.
        """
        found = self._find(_checked(key), validate)
        if found.entry is not None:
            return found.entry, "hit"
        lock = self.store.lock(key, self.lock_timeout_s)
        if isinstance(lock, str):
            entry, reason = compute(), lock
        else:
            with lock:
                found = self._put_aside(key, validate)
                if found.entry is not None:
                    return found.entry, "hit"
                entry = compute()
                reason = found.reason or _refused(entry, validate) or self._write(key, entry)
        return entry, f"no cache: {self._say(reason)}" if reason else "computed"

    def verify(self) -> dict[str, Any]:
        """Check every entry without its model; put damaged ones aside.

        Returns
        -------
        dict
            ``sound``: number of entries; ``damaged``, ``left``: name -> reason, of what was put
            aside, and of what is newer or cannot be read; ``stale``: unfinished files removed.

        Raises
        ------
        OutputError
            If the folder cannot be listed.
        """
        damaged: dict[str, str] = {}
        left: dict[str, str] = {}
        sound = 0
        for key in [file.key for file in self.store.files()]:
            found = self._find(key, _anything, touch=False)
            if found.state == "damaged":
                said = len(self.remarks)
                self.get(key, _anything)
                # Nothing new was said where another process replaced it meanwhile.
                if len(self.remarks) > said:
                    damaged[key] = self.remarks[-1]
            elif found.reason:
                left[key] = found.reason
            sound += found.state == "hit"
        for path in self.store.strangers():
            failure = self.store.quarantine(path.name)
            damaged[path.name] = "no name of an entry" + (f"; it stays: {failure}" * bool(failure))
        return {
            "sound": sound,
            "damaged": damaged,
            "left": left,
            "stale": self.store.remove_stale(),
        }

    def _find(self, key: str, validate: Validate, *, touch: bool = True) -> _Found:
        """Read and verify; a damaged entry stays where it is."""
        try:
            data = self.store.read(key)
            if data is None:
                return _Found("absent")
            entry = decode(data, key)
        except NewerFormatError as error:
            return _Found("newer", reason=f"cache entry {key[:12]}: {error}")
        except PermutationError as error:
            return _Found("damaged", reason=f"cache entry {key[:12]} is damaged: {error}")
        except OSError as error:
            reason = f"cannot read cache entry {key[:12]}: {error.strerror or error}"
            return _Found("unreadable", reason=reason)
        if reason := _refused(entry, validate):
            return _Found("damaged", reason=f"cache entry {key[:12]} is refused: {reason}")
        if touch:
            self.store.touch(key)
        return _Found("hit", entry)

    def _put_aside(self, key: str, validate: Validate) -> _Found:
        """Read again under the lock of the key, and move a damaged entry out of the way."""
        found = self._find(key, validate)
        if found.state != "damaged":
            return found
        failure = self.store.quarantine(key)
        if failure:
            return _Found("unreadable", reason=f"{found.reason}; it stays: {failure}")
        self._say(f"{found.reason}; moved to {self.store.aside}")
        return _Found("absent")

    def _write(self, key: str, entry: CacheEntry) -> str:
        try:
            decode(self.store.read(key) or b"", key)
        except NewerFormatError as error:
            return str(error)
        except (PermutationError, OSError):
            pass
        try:
            return self.store.write(key, encode(entry, key))
        except PermutationError as error:
            return str(error)

    def _say(self, text: str) -> str:
        if text:
            self.remarks.append(text)
            LOGGER.warning("%s", text)
        return text


def _checked(key: str) -> str:
    if not is_key(key):
        raise ConfigError(f"{key!r} is no cache key", "64 hexadecimal digits")
    return key


def _anything(entry: CacheEntry) -> None:
    """Accept an entry where no model is at hand."""


def _refused(entry: CacheEntry, validate: Validate) -> str:
    """Return why an entry does not fit its model, or an empty string.

    An entry comes from a stranger: whatever it makes a validator raise is a refusal.
    """
    try:
        validate(entry)
    except IcdError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
