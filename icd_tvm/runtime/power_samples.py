"""``power.csv``: power and clocks of the GPU while the arms are timed, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from icd_tvm.errors import MeasurementError
from icd_tvm.measure.nvml import NvmlDevice, power_csv
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.run_folder import POWER

NOT_A_GPU = "the target is a CPU; only NVML samples power, and RAPL counts energy"


@contextmanager
def sampled_power(job: Job) -> Iterator[None]:
    """Sample the device's power while the body runs and keep the samples in the run folder."""
    if job.cuda is None:
        job.result.counters.reasons["power.csv"] = NOT_A_GPU
        yield
        return
    try:
        device = NvmlDevice()
    except MeasurementError as error:
        job.result.counters.reasons["power.csv"] = str(error)
        yield
        return
    with device.sampling(job.config.measure.power_sample_hz) as samples:
        yield
    if job.folder is not None and samples:
        job.folder.write_text(POWER, power_csv(samples))
