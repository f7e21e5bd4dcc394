"""Ratios to the fastest of several runtimes, and records; for cpu_peers.py and cpu_decode.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def to_fastest(ours: str, times: Mapping[str, Any], peers: Iterable[str]) -> dict[str, Any]:
    """Return ``times[ours]`` over that of the fastest peer, by medians and by minima.

    Parameters
    ----------
    ours : str
    times : mapping of str to mapping
        Name -> ``median`` and ``min`` in one unit.
    peers : iterable of str
        At least one.

    Returns
    -------
    dict
        ``median`` and ``min``, and under ``fastest_median`` and ``fastest_min`` who it was.
    """
    found: dict[str, Any] = {}
    for key in ("median", "min"):
        fastest = min(peers, key=lambda name: times[name][key])
        found |= {key: times[ours][key] / times[fastest][key], f"fastest_{key}": fastest}
    return found


def keep(path: Path, line: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a line into the record, in place of an older one of the same case and threads.

    Returns
    -------
    list of dict
        All lines of the record.
    """
    lines = json.loads(path.read_text()) if path.exists() else []
    name = (line["case"], line["threads"])
    lines = [old for old in lines if (old["case"], old["threads"]) != name] + [line]
    path.write_text(json.dumps(lines, indent=1) + "\n")
    return lines
