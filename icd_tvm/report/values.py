"""Read a record that may lack anything, and print its figures: absent stays absent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

ABSENT = "–"
MINUS = "\N{MINUS SIGN}"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Control characters, lone surrogates, and marks that reverse the text around them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping: ``value`` itself, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: Any) -> list[Any]:
    """Return a list: ``value`` itself, or an empty one."""
    return value if isinstance(value, list) else []


def as_number(value: Any) -> float | None:
    """Return a finite number as float, None for anything else (a truth value included)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def dig(value: Any, *keys: str) -> Any:
    """Follow keys through mappings; None where one is missing."""
    for key in keys:
        value = as_mapping(value).get(key)
    return value


def text(value: Any) -> str:
    """Return any value as one printable line."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or ABSENT
    if isinstance(value, Mapping):
        return ", ".join(f"{text(key)} {text(item)}" for key, item in value.items()) or ABSENT
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


def fixed(value: Any, digits: int) -> str:
    """Return a number with so many decimals."""
    found = as_number(value)
    return ABSENT if found is None else f"{found:,.{digits}f}".replace("-", MINUS)


def signed(value: Any, digits: int) -> str:
    """Return a number with its sign."""
    found = as_number(value)
    return ABSENT if found is None else ("+" if found >= 0 else "") + fixed(found, digits)


def binary(value: Any) -> str:
    """Return bytes in KiB or MiB, as caches are sized."""
    found = as_number(value)
    if found is None:
        return ABSENT
    kib = found / 1024
    return f"{kib:.4g} KiB" if kib < 1024 else f"{kib / 1024:.4g} MiB"


def si(value: Any, unit: str = "") -> str:
    """Return a number with four figures and a decimal prefix."""
    found = as_number(value)
    if found is None:
        return ABSENT
    for size, prefix in _PREFIXES:
        if abs(found) >= size:
            return f"{found / size:.4g} {prefix}{unit}"
    return f"{found:.4g} {unit}".rstrip()


def interval(low: Any, high: Any, digits: int) -> str:
    """Return ``[low, high]``, or nothing where either is absent."""
    if as_number(low) is None or as_number(high) is None:
        return ""
    return f"[{fixed(low, digits)}, {fixed(high, digits)}]"


def clip(value: Any, length: int) -> str:
    """Return text shortened in its middle; the ends of a node's name tell more."""
    line = text(value)
    if len(line) <= length:
        return line
    head = (length - 1) // 2
    return f"{line[:head]}…{line[len(line) - (length - 1 - head) :]}"


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of every leaf of nested mappings."""
    for key, value in as_mapping(values).items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                yield from flat({str(index): item}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
