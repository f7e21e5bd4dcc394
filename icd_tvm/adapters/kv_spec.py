"""What to drop from a KV cache, as text and as a checked record."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from icd_tvm.adapters.kv_quant import STATE_TYPES, StateDtype
from icd_tvm.adapters.kv_select import SCOPES, SCORES, Scope, Score
from icd_tvm.errors import ConfigError

EXAMPLE = "drop=0.3,block=128,score=attention_mass"


@dataclass(frozen=True)
class KVSpec:
    """A request of :func:`icd_tvm.adapters.kvcache.apply_kvcache` without its arrays.

    Parameters
    ----------
    drop : float
        Share of the cached tokens of every head to drop, in [0, 1); 0 asks for nothing.
    block : int
        Tokens of a page.
    score : {"attention_mass", "key_norm", "recency"}, optional
        ``attention_mass`` where attention is given, else ``key_norm``.
    scope : {"per_head", "shared"}
    keep_sinks, keep_recent : int
        First and last tokens that are never dropped.
    room : int, optional
        Tokens that can still be appended; as many as before if omitted, and at least one.
    dtype : {"int8", "fp16", "bf16"}, optional
        Storage of a decode step's cache; int8 has a float32 scale for every token of every head.

    Raises
    ------
    ConfigError
        Unknown name or a number out of range.
    """

    drop: float
    block: int = 128
    score: Score | None = None
    scope: Scope = "per_head"
    keep_sinks: int = 4
    keep_recent: int = 16
    room: int | None = None
    dtype: StateDtype | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop < 1.0:
            raise ConfigError(
                f"drop {self.drop!r} is outside [0, 1)", "0.3 drops three tokens in ten"
            )
        for name, value, known in (
            ("score", self.score, (None, *SCORES)),
            ("scope", self.scope, SCOPES),
            ("dtype", self.dtype, (None, *STATE_TYPES)),
        ):
            if value not in known:
                names = ", ".join(str(item) for item in known if item)
                raise ConfigError(f"unknown kv {name} {value!r}", f"known: {names}")
        for name, size, least in (
            ("block", self.block, 1),
            ("keep_sinks", self.keep_sinks, 0),
            ("keep_recent", self.keep_recent, 0),
            ("room", 1 if self.room is None else self.room, 1),
        ):
            if not isinstance(size, int) or size < least:
                raise ConfigError(f"{name} {size!r} is not an integer of at least {least}")

    def __str__(self) -> str:
        """Canonical text; ``parse_kv(str(spec)) == spec``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)


_READ: dict[str, Any] = {
    "drop": float, "block": int, "score": str, "scope": str,
    "keep_sinks": int, "keep_recent": int, "room": int, "dtype": str,
}  # fmt: skip


def parse_kv(text: str) -> KVSpec:
    """Read a KV-cache request.

    Parameters
    ----------
    text : str
        ``none``, or ``name=value`` pairs of `KVSpec` with commas between, ``drop`` or ``dtype``
        among them: ``drop=0.3,block=128,score=attention_mass``, ``dtype=bf16``.

    Returns
    -------
    KVSpec

    Raises
    ------
    ConfigError
        Unknown or repeated name, unreadable value, neither ``drop`` nor ``dtype``, or a number
        out of range.
    """
    clean = text.strip().lower()
    if clean == "none":
        return KVSpec(0.0)
    values: dict[str, Any] = {}
    for part in clean.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in _READ or not equals:
            raise _unknown(part.strip(), name, text)
        if name in values:
            raise ConfigError(f"kv {text!r} gives {name} twice", "give it once")
        values[name] = _read(name, value, text)
    if not values.keys() & {"drop", "dtype"}:
        raise ConfigError(f"kv {text!r} has no drop and no dtype", f"e.g. {EXAMPLE}")
    return KVSpec(**{"drop": 0.0, **values})


def _read(name: str, value: str, text: str) -> Any:
    try:
        return _READ[name](value)
    except ValueError:
        kind = "a number" if _READ[name] is float else "an integer"
        raise ConfigError(
            f"kv {text!r}: {name} {value!r} is not {kind}", f"e.g. {EXAMPLE}"
        ) from None


def _unknown(part: str, name: str, text: str) -> ConfigError:
    near = difflib.get_close_matches(name, _READ, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}=? " if near else ""
    return ConfigError(f"unknown part {part!r} in kv {text!r}", f"{hint}e.g. {EXAMPLE}")
