"""Ratios to the fastest of several runtimes; shared by cpu_peers.py and cpu_decode.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
