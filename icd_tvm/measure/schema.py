"""A validator for the part of JSON Schema that this package's own schemas use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list, tuple),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def violations(value: Any, schema: Schema, root: Schema, path: str = "") -> Iterator[str]:
    """Yield what is wrong with ``value``, one line each, the path first.

    Supports ``type, const, enum, minimum, maximum, required, properties, additionalProperties,
    items`` and ``$ref`` into ``$defs``. NaN and infinity are refused everywhere.

    Parameters
    ----------
    value : object
        A value that ``json.dumps`` accepts.
    schema : mapping
    root : mapping
        The schema that holds ``$defs``.
    path : str
        Where ``value`` stands, for the texts.
    """
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    name = path or "record"
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}, not a finite number"
        return
    if "type" in schema and not _has_type(value, schema["type"]):
        yield f"{name} is {type(value).__name__}, expected {_names(schema['type'])}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{name} is {value!r}, expected {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{name} is {value!r}, expected one of {', '.join(map(repr, schema['enum']))}"
    yield from _bounds(value, schema, name)
    if isinstance(value, dict):
        yield from _object(value, schema, root, path)
    elif isinstance(value, list | tuple):
        items = schema.get("items", {})
        for i, item in enumerate(value):
            yield from violations(item, items, root, f"{path}[{i}]")


def _object(value: dict[Any, Any], schema: Schema, root: Schema, path: str) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{prefix}{name} is missing"
    known = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    for name, item in value.items():
        if not isinstance(name, str):
            yield f"{path or 'record'} has the key {name!r}, which is no string"
        elif name in known:
            yield from violations(item, known[name], root, prefix + name)
        elif rest is False:
            yield f"{prefix}{name} is unknown"
        else:
            yield from violations(item, {} if rest is True else rest, root, prefix + name)


def _bounds(value: Any, schema: Schema, name: str) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{name} is {value}, below {schema['minimum']}"
    if "maximum" in schema and value > schema["maximum"]:
        yield f"{name} is {value}, above {schema['maximum']}"


def _has_type(value: Any, wanted: str | list[str]) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    if isinstance(value, bool):
        # bool is a subclass of int in Python, but no JSON number.
        return "boolean" in names
    return isinstance(value, tuple(kind for name in names for kind in TYPES[name]))


def _names(wanted: str | list[str]) -> str:
    return wanted if isinstance(wanted, str) else " or ".join(wanted)
