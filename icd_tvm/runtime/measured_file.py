"""``measured.npz``: the samples of a finished measurement, so that a resumed run keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.core.npz_file import open_archive, read_array, read_text
from icd_tvm.errors import ConfigError
from icd_tvm.files import write_atomically
from icd_tvm.runtime.measure_arms import Measured

MAX_META_BYTES = 1 << 24
MAX_BYTES = 1 << 30


def save_measured(
    path: Path, measured: Measured | None, quality: dict[str, Any] | None, flags: list[str]
) -> None:
    """Write samples as float64 [rounds] by arm, and the rest as JSON text; no pickle."""
    meta = {
        "measured": measured is not None,
        "arms": list(measured.samples) if measured else [],
        "peer_info": measured.peer_info if measured else {},
        "peer_differences": measured.peer_differences if measured else {},
        "conditions": measured.conditions if measured else {},
        "device": measured.device if measured else None,
        "quality": quality,
        "flags": flags,
    }
    arrays: dict[str, Any] = {}
    if measured is not None:
        arrays = {f"s{i}": samples for i, samples in enumerate(measured.samples.values())}
    text = np.array(json.dumps(meta, default=float))

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            np.savez(stream, meta=text, **arrays)

    write_atomically(path, write)


def read_measured(path: Path) -> tuple[Measured | None, dict[str, Any] | None, list[str]]:
    """Read a file of :func:`save_measured`: the measurement, the quality and the flags.

    Raises
    ------
    ConfigError
        If the file is damaged.
    """
    try:
        with open_archive(path) as archive:
            meta = json.loads(read_text(archive, "meta", MAX_META_BYTES))
            samples = {
                str(name): read_array(archive, f"s{i}", _is_samples, MAX_BYTES)
                for i, name in enumerate(meta["arms"])
            }
        if not meta["measured"]:
            return None, meta["quality"], meta["flags"]
        found = Measured(samples, {}, meta["peer_info"], {}, meta["peer_differences"])
        found.conditions = meta["conditions"]
        found.device = meta.get("device")
        return found, meta["quality"], meta["flags"]
    except (ConfigError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"cannot read {str(path)!r}: {error}", "remove it to measure again"
        ) from error


def _is_samples(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    return dtype == np.float64 and len(shape) == 1
