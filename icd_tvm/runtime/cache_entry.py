"""One entry of the permutation cache: what it holds, its bytes, and older formats of it.

An entry is JSON: ``{"format", "checksum", "body"}``. The checksum is the sha256 of the format and
the canonical body (sorted keys, no spaces), and stays so in every later format. It finds damage,
not forgery: what keeps a forged entry from doing harm is that the permutations in it are checked
as those of a stranger.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np

from icd_tvm.core.permutation import Constraint, Perm, as_permutation
from icd_tvm.errors import IcdError, PermutationError

VERSION = 2
_FORMAT = "icd/perm-cache/v"
_KEY = re.compile(r"[0-9a-f]{64}")

Body = dict[str, Any]


class NewerFormatError(PermutationError):
    """The entry is sound but of a later version of this package."""


def is_key(text: str) -> bool:
    """Say whether ``text`` is a key of :func:`icd_tvm.runtime.cache_key.cache_key`."""
    return _KEY.fullmatch(text) is not None


@dataclass
class CacheEntry:
    """Permutations decided for one model, and how they came about.

    Attributes
    ----------
    perms : dict of str to numpy.ndarray
        Group id -> int32[n], ``new[i] = old[perm[i]]``.
    model_hash : str
        Of the model that they belong to.
    constraints : dict of str to Constraint
        What a permutation of a group must obey; free where absent.
    meta : dict
        Whatever else JSON can hold: the solver's figures of each group.
    versions : dict of str to str
        Of the packages that decided.
    created : str
        UTC, ISO 8601.
    """

    perms: dict[str, Perm]
    model_hash: str
    constraints: dict[str, Constraint] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: _now())

    def check(self) -> None:
        """Raise PermutationError unless every permutation is one and obeys its constraint."""
        for group in self.constraints:
            _require(group in self.perms, f"group {group!r} has a constraint and no permutation")
        for group, perm in self.perms.items():
            try:
                self.perms[group] = self.constraints.get(group, Constraint.free()).check(perm)
            except IcdError as error:
                raise PermutationError(f"group {group!r}: {error.message}", error.hint) from None

    def check_model(self, model_hash: str, sizes: Mapping[str, int]) -> None:
        """Raise PermutationError unless the entry fits a model.

        Parameters
        ----------
        model_hash : str
            What `model_hash` must be.
        sizes : mapping of str to int
            Group id -> length. A group of the entry that is not here is refused; one that the
            entry lacks keeps its order.
        """
        if self.model_hash != model_hash:
            raise PermutationError(
                f"permutations of another model: hash {self.model_hash[:12]}, not {model_hash[:12]}"
            )
        for group, perm in self.perms.items():
            _require(group in sizes, f"the model has no group {group!r}")
            as_permutation(perm, sizes[group])


def encode(entry: CacheEntry, key: str) -> bytes:
    """Return the file of an entry.

    Raises
    ------
    PermutationError
        If a permutation is invalid, or JSON cannot hold the meta data.
    """
    entry.check()
    body = {
        "key": key,
        "model_hash": entry.model_hash,
        "groups": {group: _group(entry, group) for group in entry.perms},
        "meta": entry.meta,
        "versions": entry.versions,
        "created": entry.created,
    }
    try:
        # Only after a round trip do keys sort in the order that the reader will see.
        body = json.loads(json.dumps(body, default=_plain, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PermutationError(f"the meta data cannot be stored: {error}") from error
    name = f"{_FORMAT}{VERSION}"
    return json.dumps({"format": name, "checksum": _checksum(name, body), "body": body}).encode()


def decode(data: bytes, key: str) -> CacheEntry:
    """Return the entry in a file after checking all that can be checked without its model.

    Parameters
    ----------
    data : bytes
        Untrusted.
    key : str
        The key that it must be of.

    Raises
    ------
    NewerFormatError
        If the entry is whole and of a later format than this package knows.
    PermutationError
        If it is damaged, of another key, or holds an invalid permutation.
    """
    version, body = _unwrap(data)
    if version > VERSION:
        raise NewerFormatError(
            f"the entry has format {version}, newer than {VERSION}", "update icd-tvm"
        )
    for old in range(version, VERSION):
        body = _migrate(old, body)
    _require(body.get("key") == key, "it is the entry of another key")
    entry = _entry(body)
    entry.check()
    return entry


def _unwrap(data: bytes) -> tuple[int, Body]:
    """Return the version of the format and the body; the checksum holds."""
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise PermutationError(f"it is not JSON: {error}") from None
    _require(isinstance(content, dict) and set(content) == {"format", "checksum", "body"}, "fields")
    name, body = content["format"], content["body"]
    found = re.fullmatch(rf"{_FORMAT}([1-9]\d{{0,3}})", name) if isinstance(name, str) else None
    if found is None or not isinstance(body, dict):
        raise PermutationError("it is no entry of a permutation cache")
    _require(content["checksum"] == _checksum(name, body), "the checksum does not match")
    return int(found[1]), body


def _checksum(name: str, body: Body) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    # A lone surrogate, which JSON can spell, has no UTF-8 form.
    return hashlib.sha256(f"{name}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _group(entry: CacheEntry, group: str) -> Body:
    perm, rule = entry.perms[group], entry.constraints.get(group, Constraint.free())
    return {
        "n": perm.size,
        "perm": base64.b64encode(perm.astype("<i4").tobytes()).decode("ascii"),
        "constraint": {
            "kind": rule.kind,
            "lengths": list(rule.lengths),
            "blocks": rule.blocks,
            "inside": rule.inside,
        },
    }


def _entry(body: Body) -> CacheEntry:
    types = {"model_hash": str, "groups": dict, "meta": dict, "versions": dict, "created": str}
    for name, kind in types.items():
        _require(isinstance(body.get(name), kind), f"{name} is missing or malformed")
    perms, constraints = {}, {}
    for group, record in body["groups"].items():
        try:
            perms[group] = _perm(record)
            constraints[group] = _constraint(record["constraint"])
        except (IcdError, KeyError, TypeError, ValueError) as error:
            raise PermutationError(f"group {group!r} is malformed: {error}") from None
    return CacheEntry(
        perms, body["model_hash"], constraints, body["meta"], body["versions"], body["created"]
    )


def _perm(record: Body) -> Perm:
    _require(type(record["n"]) is int, "n is no integer")
    values = np.frombuffer(base64.b64decode(record["perm"], validate=True), dtype="<i4")
    return as_permutation(values, record["n"])


def _constraint(record: Body) -> Constraint:
    kind, lengths = record["kind"], record["lengths"]
    _require(all(type(length) is int for length in lengths), "a length is no integer")
    if kind == "segments":
        return Constraint.segments(lengths)
    if kind == "factored":
        outer, inner = lengths
        return Constraint.factored(
            outer, inner, blocks=bool(record["blocks"]), inside=record["inside"]
        )
    _require(kind in ("free", "pairs"), f"unknown constraint {kind!r}")
    return Constraint.free() if kind == "free" else Constraint.pairs()


def _from_v1(body: Body) -> Body:
    """Format 1 held permutations as lists, as ``icd/group_perms/v1`` does, and no constraints."""
    groups = {}
    for group, perm in body["perms"].items():
        free = {"kind": "free", "lengths": []}
        raw = as_permutation(perm).astype("<i4").tobytes()
        groups[group] = {"n": len(perm), "perm": base64.b64encode(raw), "constraint": free}
    kept = {name: body[name] for name in ("key", "model_hash", "versions", "created")}
    return {**kept, "groups": groups, "meta": body.get("stats", {})}


_MIGRATIONS: dict[int, Callable[[Body], Body]] = {1: _from_v1}


def _migrate(version: int, body: Body) -> Body:
    try:
        return _MIGRATIONS[version](body)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PermutationError(f"its format {version} is malformed: {error!r}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise PermutationError(reason)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
