"""REPERMUTED: the order is decided again, every arm is rewritten, built and found equal."""

from __future__ import annotations

from icd_tvm.errors import VerificationError
from icd_tvm.relax_passes.permutation_file import model_hash
from icd_tvm.relax_passes.rewrite_layout import lanes_of
from icd_tvm.relax_passes.verify_layout import Difference, difference, order_tolerance, worse
from icd_tvm.runtime.arms import DENSE, IDENTITY, ITERATIVE, LINEAR, Arm, ordered_arms
from icd_tvm.runtime.build import build
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.order_file import AFTER, BEFORE
from icd_tvm.runtime.orders import NOTHING, decided, permutations
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.stages.order import keep_graph, keep_order
from icd_tvm.runtime.stages.transform import changed_accesses, unchanged_because
from icd_tvm.steps import steps
from icd_tvm.tir_schedules.cpu.time_kernels import comparisons

VERIFICATION_RUNS = 3


def repermute(job: Job, event: Stage) -> None:
    """Decide the second order where the mode asks for it; make, build and verify all arms."""
    second_order(job, event)
    _make_arms(job)
    before = comparisons()
    _build_arms(job)
    event.meta |= comparisons() - before
    verify(job)
    event.meta["arms"] = list(job.result.arms)
    event.meta["max_rel"] = job.result.equivalence.max_rel


def second_order(job: Job, event: Stage) -> None:
    """Decide the order after the transform, or say why the first one stands."""
    result = job.result
    job.perms[AFTER] = None
    if not job.iterative:
        event.meta["skipped"] = "linear: the order decided before the transform is kept"
        return
    kept = _keeps_first(job)
    if kept:
        event.meta["skipped"] = kept
        job.perms[AFTER] = job.perms[BEFORE]
        return
    mod = result.arms[IDENTITY].mod
    if job.transforms:
        keep_graph(job, AFTER, mod, event)
    result.after, how = decided(job, AFTER, mod)
    keep_order(job, AFTER, result.after, event, how)
    job.perms[AFTER] = permutations(result.after)
    if how == NOTHING:
        job.perms[AFTER] = job.perms[BEFORE]
        result.no_opportunity = "the first order stays, because the second was not decided"


def _keeps_first(job: Job) -> str:
    """Return why the first order need not be decided again, or an empty string."""
    policy = job.config.pipeline.post_transform_repermute
    # Without a transform no order has been decided yet: what there is came with the model.
    if policy == "always" or not job.transforms or job.result.transform["delta_layout"]:
        return ""
    if policy == "delta":
        return "no transform reports a changed layout"
    arms = job.result.arms
    if changed_accesses(arms[DENSE].mod, arms[IDENTITY].mod):
        return ""
    return "the transform changed no access"


def _make_arms(job: Job) -> None:
    result, before, after = job.result, job.perms[BEFORE] or {}, job.perms[AFTER]
    with job.progress.stage("rewrite") as stage:
        transformed = result.arms[IDENTITY].mod
        lanes = lanes_of(job.order_target)
        result.arms |= ordered_arms(transformed, before, after, job.config.seed, lanes)
        result.no_opportunity = result.no_opportunity or _no_opportunity(job)
        dense = result.arms[DENSE]
        unchanged = result.no_opportunity and not before
        if unchanged and model_hash(transformed["main"]) == job.model_hash:
            # One function in one order: what is left is a comparison of equal builds.
            result.arms = {DENSE: dense, LINEAR: Arm(LINEAR, dense.mod, same_as=DENSE)}
        stage.meta = {"arms": ", ".join(result.arms)}


def _no_opportunity(job: Job) -> str:
    result = job.result
    arm = result.arms.get(ITERATIVE)
    if arm is None or arm.changed:
        return ""
    if arm.same_as == LINEAR:
        return "the order decided before the transform is the best one after it"
    sparsity = result.transform.get("sparsity")
    if sparsity is not None and not sparsity["entries"]:
        reason = sparsity.get("why") or f"it changed nothing: {unchanged_because(sparsity)}"
        return f"sparsity {job.config.transform.sparsity}: {reason}"
    reasons = [decision.stats.get("reason", "") for decision in result.after]
    return next(filter(None, reasons), "no matmul weight has structure on a free axis")


def _build_arms(job: Job) -> None:
    result, tune = job.result, job.config.pipeline.tune
    with job.progress.stage("compile") as stage:
        for arm in steps(result.arms.values(), "compiling arms"):
            same = result.built.get(arm.same_as)
            result.built[arm.name] = same or build(arm.mod, job.target, tune)
        stage.meta = {"builds": len({id(built) for built in result.built.values()})}


def verify(job: Job) -> None:
    """Run every arm on random inputs; an arm that no decision hangs on must be equal.

    Raises
    ------
    VerificationError
        If such an arm differs; the decisive one may, and is rolled back.
    """
    result = job.result
    decisive = ITERATIVE if ITERATIVE in result.built else LINEAR
    reference = IDENTITY if IDENTITY in result.built else DENSE
    result.tolerance = order_tolerance(result.arms[reference].mod)
    allowed = result.tolerance.value
    found: dict[str, Difference] = {}
    with job.progress.stage("verify") as stage:
        for run in range(VERIFICATION_RUNS):
            feeds = result.inputs(job.config.seed + run)
            expected = result.built[reference].run_all(feeds)
            for name in sorted(set(result.built) - {DENSE, IDENTITY}):
                built = result.built[name]
                gap = difference(built.comparable(expected), built.run_all(feeds))
                found[name] = worse(found.get(name, Difference(0.0, 0.0)), gap)
        result.equivalence = found[decisive]
        stage.meta = {"largest relative difference": f"{result.equivalence.max_rel:.1e}"}
        for name, gap in found.items():
            if name != decisive and not gap.within(allowed):
                raise VerificationError(
                    f"arm {name} differs by {gap.max_rel:.1e} relative, more than {allowed:.1e}",
                    result.tolerance.reason,
                )
    if "slots" in result.transform.get("kv", {}):
        _note_loss(job)
    result.verified = [name for name, gap in found.items() if gap.within(allowed)]


def _note_loss(job: Job) -> None:
    """Record how far dropped tokens move the outputs; nothing hangs on it, the cache is random."""
    result = job.result
    feeds = result.inputs(job.config.seed)
    dense, small = (result.built[name].run_all(feeds) for name in (DENSE, IDENTITY))
    # Scales of a quantised cache come last and have no counterpart.
    both = zip(dense, small, strict=False)
    pairs = [(a, b) for a, b in both if (a.shape, a.dtype) == (b.shape, b.dtype)]
    gap = difference([a for a, _ in pairs], [b for _, b in pairs])
    slots = result.transform["kv"]["slots"]["before"]
    result.transform["kv"]["against_dense"] = {
        "max_abs": gap.max_abs,
        "max_rel": gap.max_rel,
        "cache": f"random values, {slots - 1} of {slots} slots filled",
    }
