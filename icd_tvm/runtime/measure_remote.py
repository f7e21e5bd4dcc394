"""Time the arms on another machine, after proving that they compute the same there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.config import Config
from icd_tvm.errors import VerificationError
from icd_tvm.measure.rpc import (
    Device,
    RemoteArm,
    check_cpu,
    interleave_remotely,
    lent_device,
    load_arm,
    set_remote_threads,
)
from icd_tvm.relax_passes.verify_layout import FP32_TOLERANCE, difference
from icd_tvm.runtime.build import Built
from icd_tvm.runtime.measure_arms import Measured


def measure_remotely(
    built: Mapping[str, Built], feeds: Mapping[str, np.ndarray], config: Config, target: Any
) -> Measured:
    """Time all arms on the device of ``measure.rpc`` and ``measure.rpc_key``.

    Parameters
    ----------
    built : Mapping[str, Built]
        The arms, compiled for ``target``; this machine must be able to run them too.
    feeds : Mapping[str, numpy.ndarray]
        The inputs of every call.
    config : Config
    target : tvm.target.Target

    Raises
    ------
    MeasurementError
        See :func:`icd_tvm.measure.rpc.lent_device`.
    VerificationError
        If an arm computes something else on the device than here.
    """
    keys = config.pipeline
    with lent_device(str(config.measure.rpc), str(config.measure.rpc_key)) as device:
        check_cpu(device, target)
        if config.threads:
            set_remote_threads(device, config.threads)
        arms = _loaded(device, built, feeds)
        samples = interleave_remotely(
            arms, repeats=keys.repeats, warmup=keys.warmup_iter, seed=config.seed
        )
        return Measured(samples, feeds, device=device.record(target))


def _loaded(
    device: Device, built: Mapping[str, Built], feeds: Mapping[str, np.ndarray]
) -> dict[str, RemoteArm]:
    arms: dict[str, RemoteArm] = {}
    with tempfile.TemporaryDirectory(prefix="icd-rpc-") as folder:
        for name, item in built.items():
            library = Path(folder) / f"{name}.so"
            item.export(str(library))
            arms[name] = load_arm(device, library, [feeds[n] for n in item.input_names])
            library.unlink()
            found = difference(item.run_all(feeds), arms[name].outputs)
            if not found.within(FP32_TOLERANCE):
                raise VerificationError(
                    f"arm {name!r} differs by {found.max_rel:.1e} relative on the device",
                    "it needs the same TVM as this machine",
                )
    return arms
