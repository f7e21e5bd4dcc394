"""The state machine: READY to MEASURED, a roll back where it must be, REPORTED in any case."""

from __future__ import annotations

from collections.abc import Callable

from icd_tvm.errors import OutputError
from icd_tvm.runtime.job import Failure, Job
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.stages.load import load
from icd_tvm.runtime.stages.measure import measure
from icd_tvm.runtime.stages.order import build_graph, first_order
from icd_tvm.runtime.stages.repermute import repermute
from icd_tvm.runtime.stages.report import report
from icd_tvm.runtime.stages.settle import settle
from icd_tvm.runtime.stages.transform import transform
from icd_tvm.runtime.states import State

# What is done to reach each state.
STAGES: dict[State, Callable[[Job, Stage], None]] = {
    State.READY: load,
    State.W_BUILT: build_graph,
    State.PERMUTED: first_order,
    State.TRANSFORMED: transform,
    State.REPERMUTED: repermute,
    State.MEASURED: measure,
}


def execute(job: Job) -> None:
    """Run a job through its states.

    With a run directory every failure is reported there and does not raise, but for two: the
    directory cannot be written, or it is continued with another model. Without one every failure
    raises.

    Raises
    ------
    OutputError
        If results cannot be written.
    IcdError
        If a stage fails and there is no run directory.
    """
    for state, stage in STAGES.items():
        try:
            _enter(job, state, stage)
        except OutputError:
            raise
        except Exception as error:
            if job.folder is None or (state is State.READY and job.resumed):
                raise
            job.failure = Failure.of(state, error)
            break
    settle(job)
    _enter(job, State.REPORTED, report)


def _enter(job: Job, state: State, stage: Callable[[Job, Stage], None]) -> None:
    steps, flags = len(job.progress.stages), len(job.flags)
    with job.log.state(state) as event:
        try:
            stage(job, event)
        finally:
            event.meta["steps"] = {
                s.stage: round(s.seconds, 4) for s in job.progress.stages[steps:]
            }
            if job.flags[flags:]:
                event.meta["flags"] = [flag.reason for flag in job.flags[flags:]]
