"""Turn a compilation into the record of ``metrics.json``; what was not measured is null."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.gates import evaluate_gates
from icd_tvm.measure.metrics import SCHEMA, arm_record
from icd_tvm.relax_passes.axis_groups import AxisGroup
from icd_tvm.relax_passes.decide_permutation import Decision
from icd_tvm.runtime.compilation import Compilation
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.measure_arms import Measured
from icd_tvm.runtime.run_folder import TRACEBACK

NO_COUNTER = "no hardware counter was read on this target"


def make_record(job: Job) -> dict[str, Any]:
    """Return the metrics record (schema ``icd/metrics/v1``) of whatever was reached."""
    result, seed = job.compilation, job.config.seed
    measured = result.measured if result else None
    record = {
        "schema": SCHEMA,
        "model": model_record(result, job.config.source),
        "target": job.target_text,
        "env": fingerprint(),
        "arms": _arms(result) if result else {},
        "counted": _counted_untimed(result) if result else {},
        "ratios": measured.ratios(seed) if measured else {},
        "equivalence": _equivalence(result),
        "quality": _quality(job),
        "groups": _groups(result) if result else [],
        "decision": _decision(job),
        "transform": result.transform if result else {},
        "graph_source": _source(job),
        "conditions": measured.conditions if measured else {},
        "device": measured.device if measured else None,
        "peers": _peers(job, measured),
        "energy": result.counters.energy if result else {},
        "roofline": result.counters.roof if result else {},
        "stages": [
            {"stage": s.stage, "seconds": s.seconds, "ok": s.ok, "meta": s.meta}
            for s in job.progress.stages
        ],
        "flags": [{"stage": flag.stage, "reason": flag.reason} for flag in job.flags],
        "failure": _failure(job),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seed": seed,
        "not_measured": _not_measured(job),
    }
    gates = evaluate_gates(record, quality_reference="identity", **job.config.gates.model_dump())
    return {**record, "gates": gates}


def _quality(job: Job) -> dict[str, Any] | None:
    found = job.compilation.quality if job.compilation else None
    return found if job.budget is None else {**(found or {}), "budget": job.budget}


def _peers(job: Job, measured: Measured | None) -> dict[str, Any] | None:
    if job.config.measure.rpc is not None:
        return None
    return measured.peer_info if measured else {}


def _failure(job: Job) -> dict[str, str] | None:
    if job.failure is None:
        return None
    return {
        "stage": job.failure.stage,
        "code": job.failure.code,
        "message": job.failure.message,
        "traceback": TRACEBACK,
    }


def _decision(job: Job) -> dict[str, Any]:
    if job.compilation is None:
        reason = job.failure.message if job.failure else "no model is loaded"
        return {"accepted": None, "arm": None, "reason": reason}
    verdict = job.compilation.verdict
    return {"accepted": verdict.accepted, "arm": verdict.arm, "reason": verdict.reason}


def _source(job: Job) -> str:
    sources = {graphs.source for graphs in job.graphs.values()}
    sources |= {str(d.stats["W"]) for items in job.decided.values() for d in items}
    return " + ".join(sorted(sources)) or job.config.graph.source


def _equivalence(result: Compilation | None) -> dict[str, Any] | None:
    if result is None or not result.verified:
        return None
    return {
        "max_abs": result.equivalence.max_abs,
        "max_rel": result.equivalence.max_rel,
        "tolerance": result.tolerance.value,
        "tolerance_reason": result.tolerance.reason,
        "dense_vs_peer": result.measured.peer_differences if result.measured else {},
    }


def model_record(result: Compilation | None, source: str) -> dict[str, Any]:
    """Return what is known of a model: name, source, inputs, outputs and kind of weights."""
    if result is None:
        return {"name": None, "source": source}
    return {
        "name": result.imported.name,
        "source": source,
        "inputs": _tensors([spec.name for spec in result.imported.inputs], _params(result)),
        "outputs": _tensors(result.imported.outputs, _returned(result)),
        "weights": {p.key: p.value for p in result.imported.model.metadata_props}.get("weights"),
    }


def _main(result: Compilation) -> Any:
    """Return what the library runs: a transform may have changed the sizes and types of states."""
    arm = result.arms.get(result.verdict.arm)
    return (result.imported.mod if arm is None else arm.mod)["main"]


def _params(result: Compilation) -> dict[str, Any]:
    func = _main(result)
    count = int((func.attrs or {}).get("num_input", len(func.params)))
    return {param.name: param.ty for param in func.params[:count]}


def _returned(result: Compilation) -> dict[str, Any]:
    returned = _main(result).ret_ty
    fields = getattr(returned, "fields", [returned])
    added = [f"output_{i}" for i in range(len(result.imported.outputs), len(fields))]
    return dict(zip([*result.imported.outputs, *added], fields, strict=True))


def _tensors(names: Sequence[str], types: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe tensors by the model's names, and those that a transform has added by their own."""
    added = list(types)[len(names) :]
    return [
        {"name": name, "shape": _sizes(kind.shape), "dtype": str(kind.dtype)}
        for name, kind in zip([*names, *added], types.values(), strict=True)
    ]


def _sizes(shape: Any) -> list[int] | None:
    """Return the sizes of a static shape, or None where values decide it (NonZero)."""
    try:
        return [int(size) for size in shape]
    except TypeError:
        return None


def _arms(result: Compilation) -> dict[str, Any]:
    if result.measured is None:
        return {}
    tokens = _tokens(result)
    arms = {}
    for name, samples in result.measured.samples.items():
        arms[name] = {**arm_record(samples, tokens_per_call=tokens, **_counted(result, name))}
        if name in result.counters.caches:
            arms[name]["cache_model"] = result.counters.caches[name]
        arms[name] |= _work(result, name)
        if name in result.arms:
            arm = result.arms[name]
            kernels = result.built[name].kernels if name in result.built else {}
            more = {"same_module_as": arm.same_as, "removed_units": arm.removed, "kernels": kernels}
            arms[name] |= more
    return arms


def _work(result: Compilation, arm: str) -> dict[str, Any]:
    """Return what a call computes and moves, and the times of its kernels, where known."""
    counters, found = result.counters, {}
    if arm in counters.work:
        work = counters.work[arm]
        found = {"flop": work["flop"], "least_bytes": work["bytes"]}
        found["least_bytes_source"] = work["source"]
    if arm in counters.kernels:
        found["kernel_times"] = counters.kernels[arm]
    return found


def _counted(result: Compilation, arm: str) -> dict[str, float]:
    """Return the joules per token, L2 hits and DRAM bytes of an arm, where they were counted."""
    counted, tokens = result.counters.energy.get(arm), _tokens(result)
    profile = result.counters.ncu.get(arm, {})
    found = {"l2_hit_pct": profile.get("l2_read_hit_pct"), "dram_bytes": profile.get("dram_bytes")}
    if counted and tokens:
        found["ept_j_per_tok"] = counted["joules_per_call"] / tokens
    return {name: value for name, value in found.items() if value is not None}


def _counted_untimed(result: Compilation) -> dict[str, Any]:
    """Return what was counted of arms that were not timed and so have no record in ``arms``."""
    timed = result.measured.samples if result.measured else {}
    names = [name for name in result.counters.ncu if name not in timed]
    return {name: _counted(result, name) for name in names}


def _tokens(result: Compilation) -> int | None:
    """Return the tokens of one call: the elements of the first integer input, if there is one."""
    ids = [s for s in result.imported.inputs if np.issubdtype(np.dtype(s.dtype), np.integer)]
    return int(np.prod(ids[0].shape)) if ids else None


def _groups(result: Compilation) -> list[dict[str, Any]]:
    before = {decision.group: decision for decision in result.before}
    after = {decision.group: decision for decision in result.after}
    free = [_group(g, before.get(g.id), after.get(g.id)) for g in result.groups.free]
    private = [
        {"id": key, "kind": "output order", "size": len(decision.perm), **_solved(None, decision)}
        for key, decision in after.items()
        if key not in result.groups.by_id
    ]
    return free + private + [_pinned(group) for group in result.groups.pinned]


def _group(group: AxisGroup, before: Decision | None, after: Decision | None) -> dict[str, Any]:
    return {
        "id": group.id,
        "kind": "free",
        "size": group.size,
        "constraint": group.constraint,
        "role": group.role,
        "tensors": sorted({m.name for m in group.members if m.kind != "value" and m.name}),
        **_solved(before, after),
    }


def _solved(before: Decision | None, after: Decision | None) -> dict[str, Any]:
    last = after or before
    if last is None:
        return {"reason": "no kernel consumes an order inside this axis"}
    stats = last.stats
    return {
        "w_nnz": last.w_nnz,
        "w_nnz_before_transform": before.w_nnz if before else None,
        **{k: {"before": stats.get(f"{k}_before"), "after": stats.get(k)} for k in "UCQ"},
        "U_bound": stats.get("U_bound"),
        "gather_flop": stats.get("gather_flop"),
        "winner": stats.get("winner"),
        "W": stats.get("W"),
        "improved": last.improved,
        "elapsed_s": stats.get("elapsed_s"),
        "reason": stats.get("reason", ""),
    }


def _pinned(group: AxisGroup) -> dict[str, Any]:
    return {
        "id": group.id,
        "kind": "pinned",
        "size": group.size,
        "reason": "; ".join(f"{pin.op} at {pin.node}: {pin.reason}" for pin in group.pins[:4]),
    }


def _not_measured(job: Job) -> dict[str, str]:
    result, keys = job.compilation, job.config
    missing: dict[str, str] = dict.fromkeys(
        ("l2_hit_pct", "dram_bytes", "ept_j_per_tok"), NO_COUNTER
    )
    if result is not None:
        missing |= result.counters.reasons
        if result.counters.ncu:
            only = f"counted for {', '.join(result.counters.ncu)} only"
            missing |= dict.fromkeys(("l2_hit_pct", "dram_bytes"), only)
        elif "ncu" in result.counters.reasons:
            why = f"{NO_COUNTER}: {result.counters.reasons['ncu']}"
            missing |= dict.fromkeys(("l2_hit_pct", "dram_bytes"), why)
        if result.counters.energy:
            missing["ept_j_per_tok"] = f"counted for {', '.join(result.counters.energy)} only"
    flags = {flag.stage: flag.reason for flag in job.flags}
    stopped = f"{job.failure.stage} failed: {job.failure.message}" if job.failure else ""
    if result is not None and _tokens(result) is None:
        missing["toks_per_s"] = "no integer input, so a call has no tokens"
    if result is None or result.quality is None:
        asked = flags.get("quality") or stopped
        missing["quality"] = (
            asked if keys.quality.metric and asked else "no evaluation was asked for"
        )
    if keys.measure.rpc is not None:
        missing["peers"] = "the arms are timed on another device; peers run on this machine only"
    if result is None or not result.verified:
        missing["equivalence"] = stopped or "the arms were not found equal"
    if result is None or result.measured is None:
        reason = flags.get("measure") or stopped
        missing["lat_ms"] = reason if keys.measure.enabled else "--no-measure"
    return missing
