"""Nsight Compute on compiled arms, each in a process of its own; ``ncu.json`` of a run."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import IcdError
from icd_tvm.measure import ncu
from icd_tvm.runtime.loaded import MODULE, SIGNATURE
from icd_tvm.runtime.profile_worker import INPUTS

# Title -> how caches are treated: as they are after other calls, or flushed before each kernel.
WARM = "warm caches"
MODES: Mapping[str, tuple[ncu.CacheControl, ncu.Replay]] = {
    WARM: ("none", "application"),
    "cold caches": ("all", "kernel"),
}
NOT_A_GPU = "the target is a CPU; Nsight Compute counts kernels of NVIDIA GPUs"
NOT_ASKED = "not asked for (measure.ncu)"
WORKER = ("-m", "icd_tvm.runtime.profile_worker")


def profile_arms(
    libraries: Mapping[str, Path],
    signature: Mapping[str, Any],
    feeds: Mapping[str, NDArray[Any]],
    *,
    metrics: Sequence[str] = (),
    capability: tuple[int, int] | None = None,
    owners: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> tuple[dict[str, Any], str]:
    """Profile one call of each arm, with warm and with cold caches.

    Parameters
    ----------
    libraries : mapping of str to Path
        Arm -> its library.
    signature : mapping
        See :class:`icd_tvm.runtime.loaded.LoadedModel`.
    feeds : mapping of str to ndarray
        Inputs of the call.
    metrics : sequence of str
        Asked for beside those that are always collected.
    capability : (int, int), optional
        Compute capability of the device.
    owners : mapping, optional
        Arm -> :func:`icd_tvm.relax_passes.kernel_calls.owners` of the module of its library.

    Returns
    -------
    dict
        ``ARM, MODE`` -> record of :func:`icd_tvm.measure.ncu.as_json`.
    str
        Why something is missing; empty if nothing is.
    """
    found: dict[str, Any] = {}
    try:
        # A wrong name and a missing program are told before anything is copied.
        chosen, notes = ncu.resolve_metrics(metrics, capability)
        if reason := ncu.missing_ncu():
            return {}, reason
        for arm, library in libraries.items():
            with tempfile.TemporaryDirectory(prefix="icd-ncu-") as folder:
                _fill(Path(folder), library, signature, feeds)
                for title, mode in MODES.items():
                    kernels = _one(Path(folder), chosen, mode)
                    record = ncu.as_json(kernels, (owners or {}).get(arm, ()))
                    found[f"{arm}, {title}"] = {**record, "notes": notes}
    except (IcdError, OSError) as error:
        return found, str(error)
    return found, ""


def _fill(
    folder: Path, library: Path, signature: Mapping[str, Any], feeds: Mapping[str, NDArray[Any]]
) -> None:
    shutil.copyfile(library, folder / MODULE)
    (folder / SIGNATURE).write_text(json.dumps(signature), "utf-8")
    arrays: dict[str, Any] = dict(feeds)
    np.savez(folder / INPUTS, **arrays)


def _one(
    folder: Path, metrics: Sequence[str], mode: tuple[ncu.CacheControl, ncu.Replay]
) -> list[ncu.KernelProfile]:
    control, replay = mode
    line = ncu.command(
        [sys.executable, *WORKER, str(folder)],
        metrics=metrics,
        cache_control=control,
        replay=replay,
        from_start=False,
    )
    return ncu.profile(line)


def capability_of(target: str) -> tuple[int, int] | None:
    """Return (9, 0) of a target that names ``sm_90``, None where it names none."""
    found = re.search(r"sm_(\d+)(\d)", target)
    return (int(found[1]), int(found[2])) if found else None
