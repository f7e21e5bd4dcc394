"""Accept the new order or roll back to the one before it; after a failure, to what still works."""

from __future__ import annotations

from icd_tvm.errors import VerificationError
from icd_tvm.measure.gates import worse_counter
from icd_tvm.relax_passes.verify_layout import difference, order_tolerance
from icd_tvm.runtime.arms import DENSE, IDENTITY, ITERATIVE, LINEAR, Arm, linear_arm
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.decide import Verdict, decide
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.order_file import BEFORE
from icd_tvm.runtime.states import State


def settle(job: Job) -> None:
    """Set the verdict; a roll back is an event of its own."""
    if job.compilation is None:
        return
    if job.failure is None:
        result, seed = job.result, job.config.seed
        ratio = result.measured.ratio(ITERATIVE, LINEAR, seed) if result.measured else None
        result.verdict = decide(
            result.equivalence,
            result.no_opportunity,
            ratio,
            iterative=job.iterative,
            tolerance=result.tolerance.value,
            worse=worse_counter(result.counters.by_arm(), ITERATIVE, LINEAR),
        )
        if not result.verdict.rolled_back:
            return
    with job.log.state(State.ROLLBACK) as event:
        if job.failure is not None:
            arm = _restored(job)
            reason = f"rolled back: {job.failure.stage} failed: {job.failure.message}"
            job.result.verdict = Verdict(arm, False, reason, rolled_back=True)
        event.meta |= {"restored": job.result.verdict.arm, "reason": job.result.verdict.reason}


def _restored(job: Job) -> str:
    """Return the last arm before the failure that builds and computes what it should."""
    for name in (LINEAR, IDENTITY, DENSE):
        try:
            arm = _previous(job, name)
            if arm is None:
                continue
            job.result.arms[name] = arm
            _check(job, name, _built(job, name))
            return name
        except Exception as error:
            job.warn("roll back", f"arm {name} cannot be restored: {error}")
    job.result.arms.setdefault(DENSE, Arm(DENSE, job.result.imported.mod))
    return DENSE


def _previous(job: Job, name: str) -> Arm | None:
    """Return an arm as far as the run came, or None if it did not come to it."""
    arms = job.result.arms
    if name in arms or name == DENSE:
        return arms.get(name) or Arm(DENSE, job.result.imported.mod)
    before = job.perms.get(BEFORE)
    if name == LINEAR and IDENTITY in arms and before is not None:
        return linear_arm(arms[IDENTITY].mod, before)
    return None


def _built(job: Job, name: str) -> Built:
    built = job.result.built
    if name not in built:
        built[name] = build(job.result.arms[name].mod, job.target, job.config.pipeline.tune)
    return built[name]


def _check(job: Job, name: str, candidate: Built) -> None:
    if name != LINEAR or LINEAR in job.result.verified or IDENTITY not in job.result.arms:
        return
    feeds = job.result.inputs(job.config.seed)
    expected = candidate.comparable(_built(job, IDENTITY).run_all(feeds))
    found = difference(expected, candidate.run_all(feeds))
    if not found.within(order_tolerance(job.result.arms[IDENTITY].mod).value):
        raise VerificationError(f"it differs by {found.max_rel:.1e} relative")
