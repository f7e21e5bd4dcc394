"""The points of a sweep: a base configuration, and values for some of its keys."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icd_tvm.config import Config
from icd_tvm.config_file import make_config, merged, read_mapping, to_yaml
from icd_tvm.errors import ConfigError

BASE, GRID = "base", "grid"
MAX_POINTS = 10_000
OUT_DIR = "report.out_dir"
KEY = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes
    ----------
    name : str
        Its values in short, and eight digits that stand for the whole configuration: a folder of
        this name holds a run of this configuration and no other.
    keys : dict
        Grid key -> value.
    config : Config
    """

    name: str
    keys: dict[str, Any]
    config: Config


def read_sweep(path: str | Path, overrides: Sequence[str] = ()) -> list[Point]:
    """Read a sweep and check every point.

    Parameters
    ----------
    path : str or Path
        YAML or JSON: ``base``, a configuration or the file of one, seen from this file; ``grid``,
        a list of values for each key path.
    overrides : sequence of str
        ``key=value`` for every point; the grid wins.

    Returns
    -------
    list of Point
        The last key varies fastest.

    Raises
    ------
    ConfigError
        If a file or any point is refused; the text names the point and the nearest known key.
    """
    content = read_mapping(path)
    _check_names(content, str(path))
    grid = _grid(content[GRID])
    base = content[BASE]
    if isinstance(base, str):
        base = read_mapping(Path(path).parent / base)
    if not isinstance(base, dict):
        raise ConfigError(f"bad value: {BASE} {base!r:.80}", "a file name, or keys and values")
    base = merged(base, {"report": {"out_dir": None}})
    return _distinct([_point(base, keys, overrides) for keys in _combinations(grid)])


def _check_names(content: Mapping[str, Any], label: str) -> None:
    for name in content:
        if name not in (BASE, GRID):
            close = difflib.get_close_matches(name, (BASE, GRID), n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {BASE}, {GRID}"
            raise ConfigError(f"{label}: unknown key {name}", hint)
    for name in (BASE, GRID):
        if name not in content:
            raise ConfigError(f"{label}: {name} is missing", "see icd sweep --help")


def _grid(grid: Any) -> dict[str, list[Any]]:
    if not isinstance(grid, dict) or not grid:
        raise ConfigError(f"bad value: {GRID} {grid!r:.80}", "write KEY: [VALUE, ...]")
    for key, values in grid.items():
        if not KEY.fullmatch(key):
            raise ConfigError(f"{GRID} {key} is no key", "write section.key")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"bad value: {GRID} {key} {values!r:.80}", "write a list of values")
        if len({json.dumps(value, sort_keys=True) for value in values}) < len(values):
            raise ConfigError(f"{GRID} {key}: a value stands twice")
        if key == OUT_DIR:
            raise ConfigError(f"{GRID} {key}: the sweep names the folders", "give --out DIR")
        inner = [other for other in grid if other.startswith(f"{key}.")]
        if inner:
            raise ConfigError(f"{GRID} {inner[0]} is part of {key}", "give one of them")
    if math.prod(map(len, grid.values())) > MAX_POINTS:
        raise ConfigError(f"{GRID} has more than {MAX_POINTS} points", "split the sweep")
    return grid


def _combinations(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    rows = itertools.product(*grid.values())
    return [dict(zip(grid, values, strict=True)) for values in rows]


def _point(base: Mapping[str, Any], keys: dict[str, Any], overrides: Sequence[str]) -> Point:
    label = "point " + ", ".join(f"{key}={value!r:.40}" for key, value in keys.items())
    # As JSON every value is read back as what it is.
    own = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    config = make_config(base, [*overrides, *own], label)
    digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()[:8]
    return Point(f"{_short(keys)}-{digest}", keys, config)


def _short(keys: Mapping[str, Any]) -> str:
    parts = (f"{key.rpartition('.')[2]}-{json.dumps(value)}" for key, value in keys.items())
    return "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts)[:80]


def _distinct(points: list[Point]) -> list[Point]:
    seen: dict[str, Point] = {}
    for point in points:
        twin = seen.setdefault(to_yaml(point.config), point)
        if twin is not point:
            raise ConfigError(f"points {twin.keys} and {point.keys} are the same configuration")
    return points
