"""MEASURED: latency of every arm, a peer beside them, task quality; what fails is flagged."""

from __future__ import annotations

from functools import partial

from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.peers import PeerError
from icd_tvm.measure.statistics import cross_check
from icd_tvm.relax_passes.verify_layout import difference
from icd_tvm.runtime.arms import DENSE
from icd_tvm.runtime.counters import count, not_counted, read_counters
from icd_tvm.runtime.cross_compile import NOT_MEASURED
from icd_tvm.runtime.evaluate import evaluate
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.measure_arms import Measured, measure_arms
from icd_tvm.runtime.measure_remote import measure_remotely
from icd_tvm.runtime.measured_file import read_measured, save_measured
from icd_tvm.runtime.power_samples import sampled_power
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.retry import retried
from icd_tvm.runtime.run_folder import COUNTERS, MEASURED
from icd_tvm.runtime.states import State

# Seconds before the second and the third try.
PAUSES_S = (0.5, 2.0)
# Calls of each arm that TVM's own timer takes, as a check of our clock.
EVALUATOR_REPEATS = 20


def measure(job: Job, event: Stage) -> None:
    """Measure once; an earlier process's finished measurement is read back."""
    if _finished_before(job) and job.folder is not None:
        job.result.measured, job.result.quality, flags = read_measured(job.folder.path(MEASURED))
        for reason in flags:
            job.warn("measure", reason)
        job.result.counters = read_counters(job.folder.path(COUNTERS))
        event.meta["from"] = "file"
        return
    before = len(job.flags)
    _time_arms(job)
    _evaluate(job)
    _count(job)
    if job.config.pipeline.fixed_clock:
        _check_clock(job)
    if job.folder is not None:
        flags = [flag.reason for flag in job.flags[before:]]
        job.folder.write_json(COUNTERS, job.result.counters.as_json())
        save_measured(job.folder.path(MEASURED), job.result.measured, job.result.quality, flags)
    event.meta["rounds"] = job.result.measured.rounds if job.result.measured else 0


def _finished_before(job: Job) -> bool:
    if job.folder is None or not job.folder.path(MEASURED).exists():
        return False
    return any(e["stage"] == State.MEASURED and e.get("ok") for e in job.folder.events())


def _time_arms(job: Job) -> None:
    """Time all arms beside the peers; without those that fail; not at all where that fails."""
    keys = job.config.measure
    if not keys.enabled:
        return
    if job.cuda is not None:
        job.warn("measure", NOT_MEASURED)
        reasons = not_counted(NOT_MEASURED) | {"power.csv": NOT_MEASURED}
        job.result.counters.reasons |= reasons
        return
    if job.foreign is not None:
        reason = f"not measured: compiled for {job.config.target} and untested here"
        job.warn("measure", f"{reason}: this machine cannot run it; the host's code was verified")
        job.result.counters.reasons |= not_counted(reason)
        return
    # A peer is a process of this machine: nothing to compare with what another one does.
    peers = list(keys.peer) if keys.rpc is None else []
    with job.progress.stage("measure") as stage:
        while job.result.measured is None:
            try:
                with sampled_power(job):
                    job.result.measured = retried(
                        partial(_timed, job, peers),
                        MeasurementError,
                        lambda text: job.progress.warn(f"measure: {text}"),
                        PAUSES_S,
                    )
                stage.meta = {"rounds": job.result.measured.rounds}
            except (IcdError, OSError) as error:
                failed = [error.backend] if isinstance(error, PeerError) else list(peers)
                who = f"peer {' and '.join(failed)}" if failed else "our arms"
                job.warn("measure", f"{who} could not be timed: {error}")
                if not failed:
                    return
                peers = [name for name in peers if name not in failed]


def _timed(job: Job, peers: list[str]) -> Measured:
    result = job.result
    feeds = result.inputs(job.config.seed)
    if job.config.measure.rpc is not None:
        return measure_remotely(result.built, feeds, job.config, job.target)
    callers = {name: built.caller(feeds) for name, built in result.built.items()}
    measured = measure_arms(callers, result.imported.model, feeds, job.config, peers)
    measured.conditions["time_evaluator"] = {
        name: cross_check(built.evaluate_time(feeds, EVALUATOR_REPEATS), measured.samples[name])
        for name, built in result.built.items()
        if name in measured.samples
    }
    if measured.peer_outputs:
        dense = result.built[DENSE].run_all(feeds)
        measured.peer_differences = {
            name: difference([outputs[n] for n in result.imported.outputs], dense).max_rel
            for name, outputs in measured.peer_outputs.items()
        }
    return measured


def _count(job: Job) -> None:
    """Count beside the clock; what is missing there is never an error."""
    result, keys = job.result, job.config.measure
    if result.measured is None:
        return
    if keys.rpc is not None:
        reason = "counted on this machine only, not on a device behind RPC"
        result.counters.reasons |= not_counted(reason)
        return
    with job.progress.stage("count") as stage:
        feeds = result.inputs(job.config.seed)
        power = result.counters.reasons
        result.counters = count(result.built, feeds, keys, job.target, result.groups)
        result.counters.reasons |= power
        stage.meta = dict(result.counters.reasons)


def _evaluate(job: Job) -> None:
    metric = job.config.quality.metric
    if metric is None:
        return
    with job.progress.stage("quality") as stage:
        try:
            found = evaluate(metric, job.result.imported, job.result.built)
        except IcdError as error:
            job.warn("quality", str(error))
            return
        job.result.quality = found
        stage.meta = {"metric": found["metric"], "n": found["n"]}


def _check_clock(job: Job) -> None:
    found = fingerprint()
    governor = found["cpu"]["governor"]
    if governor != "performance":
        reason = found["reasons"].get("cpu.governor", f"the governor is {governor!r}")
        job.warn("measure", f"the clock is not known to be fixed: {reason}")
