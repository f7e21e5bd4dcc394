"""Read configurations: YAML or JSON, overrides, one clear line for what is wrong with them.

A configuration is untrusted: no tags, no anchors, a size limit, no value is executed. YAML is
read as version 1.2 has it, where ``2:4`` and ``no`` are texts and ``1e-3`` is a number.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from icd_tvm.config import Config
from icd_tvm.errors import ConfigError

MAX_BYTES = 256 << 10
MAX_DEPTH = 32

_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]{1,4000}", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


def _resolvers() -> dict[str, Any]:
    """Return PyYAML's table: first character ("" of an empty text) -> [(tag, pattern)]."""
    table: dict[str, Any] = {}
    for kind, pattern, first in _SCALARS:
        for letter in first:
            entry = (f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"))
            table.setdefault(letter, []).append(entry)
    table[""] = table["~"]
    return table


class _Loader(yaml.SafeLoader):
    """Plain values only: no alias, no anchor, no tag, no key twice, no deep nesting."""

    yaml_implicit_resolvers = _resolvers()

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"line {event.start_mark.line + 1}: anchors and aliases are refused")
        if getattr(event, "tag", None):
            raise ConfigError(f"line {event.start_mark.line + 1}: tags are refused")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _check_keys(keys)
        return super().construct_mapping(node, deep)


def _integer(loader: yaml.SafeLoader, node: Any) -> int:
    # SafeLoader reads 010 as octal.
    return int(str(loader.construct_scalar(node)))


def _number(loader: yaml.SafeLoader, node: Any) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", str(loader.construct_scalar(node)).lower()))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that :class:`_Loader` would read as something else."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def load_config(
    path: str | Path, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Read a configuration file.

    Parameters
    ----------
    path : str or Path
        ``.json``, else YAML.
    overrides : sequence of str
        ``pipeline.mode=iterative``; the value is read as YAML.
    base : mapping, optional
        Values that the file replaces.

    Raises
    ------
    ConfigError
        If the file is missing, too large or malformed, or a key or value is refused.
    """
    return make_config(merged(base or {}, read_mapping(path)), overrides, str(path))


def make_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), label: str = "configuration"
) -> Config:
    """Check values, with overrides, against the documented keys.

    Raises
    ------
    ConfigError
        Naming the key in full, its nearest match where it is unknown, and the value.
    """
    for text in overrides:
        values = merged(values, _override(text))
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise _refusal(error, values, label) from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Return the top level of a YAML or JSON file as plain values."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {str(path)!r}: {reason}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{str(path)!r} is larger than {MAX_BYTES} bytes")
    try:
        content = _parse(data.decode("utf-8"), json_text=file.suffix == ".json")
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error.message}", error.hint) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not UTF-8 text") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} holds no keys", "see icd schema")
    return content


def to_yaml(config: BaseModel) -> str:
    """Return every key of a configuration with its value; reading it gives the same again."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def differences(old: Config, new: Config) -> list[str]:
    """Return ``key: old -> new`` for every key that differs, but for where results go."""
    first, second = _flat(old.model_dump()), _flat(new.model_dump())
    return [
        f"{key}: {first.get(key)!r} -> {second.get(key)!r}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and key != "report.out_dir"
    ]


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``first`` with the values of ``second``, sections merged key by key."""
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _parse(text: str, *, json_text: bool) -> Any:
    try:
        if json_text:
            return json.loads(text, object_pairs_hook=_object, parse_constant=_not_finite)
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{where}{problem}") from error
    except RecursionError as error:
        raise ConfigError(f"nested deeper than {MAX_DEPTH}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"unreadable: {str(error).splitlines()[0]}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_keys([key for key, _ in pairs])
    return dict(pairs)


def _check_keys(keys: Sequence[Any]) -> None:
    seen: set[str] = set()
    for key in keys:
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} is no text")
        if key in seen:
            raise ConfigError(f"key {key!r} stands twice")
        seen.add(key)


def _not_finite(text: str) -> Any:
    raise ConfigError(f"{text} is not a number of JSON")


def _override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or len(keys) > MAX_DEPTH:
        raise ConfigError(f"bad value: --override {text}", "write --override pipeline.mode=linear")
    try:
        tree: Any = _parse(value, json_text=False)
    except ConfigError as error:
        raise ConfigError(f"--override {path}: {error.message}", error.hint) from error
    for key in reversed(keys[1:]):
        tree = {key: tree}
    return {keys[0]: tree}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _refusal(error: ValidationError, values: Mapping[str, Any], label: str) -> ConfigError:
    """Turn the first finding into one line; unknown keys first, they explain the others."""
    found = error.errors(include_url=False, include_context=False)
    found.sort(key=lambda item: item["type"] != "extra_forbidden")
    first = found[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{label}: unknown key {path}{more}", _nearest(path))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing" or isinstance(first["input"], Mapping):
        return ConfigError(
            f"{label}: {path + ': ' if path else ''}{reason}{more}", "see icd schema"
        )
    return ConfigError(f"{label}: bad value: {path} {first['input']!r:.80}{more}", reason)


def _nearest(path: str) -> str:
    known = list(_flat(_defaults()))
    tail = path.rpartition(".")[2]
    close = [key for key in known if key.rpartition(".")[2] == tail][:1]
    if not close:
        sections = {key.rpartition(".")[0] for key in known} - {""}
        close = difflib.get_close_matches(path, [*known, *sections], n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "icd schema prints every key"


def _defaults() -> dict[str, Any]:
    return Config.model_validate({"model": {"name": ""}}).model_dump()
