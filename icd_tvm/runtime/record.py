"""Turn a compilation into the record of ``metrics.json``; what was not measured is null."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import numpy as np

from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.gates import evaluate_gates
from icd_tvm.measure.metrics import SCHEMA, arm_record
from icd_tvm.relax_passes.axis_groups import AxisGroup
from icd_tvm.relax_passes.decide_permutation import Decision
from icd_tvm.relax_passes.verify_layout import difference
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.progress import Progress

if TYPE_CHECKING:
    from icd_tvm.runtime.compile_model import Compilation

NO_COUNTER = "no hardware counter was read on this target"


def make_record(
    result: Compilation, options: CompileOptions, target: Any, progress: Progress
) -> dict[str, Any]:
    """Return the metrics record (schema ``icd/metrics/v1``)."""
    measured = result.measured
    record = {
        "schema": SCHEMA,
        "model": _model(result, options),
        "target": str(target),
        "env": fingerprint(),
        "arms": _arms(result),
        "ratios": measured.ratios(options.seed) if measured else {},
        "equivalence": {
            "max_abs": result.equivalence.max_abs,
            "max_rel": result.equivalence.max_rel,
            "dense_vs_peer": _peer_differences(result),
        },
        "quality": result.quality,
        "groups": _groups(result),
        "decision": {
            "accepted": result.verdict.accepted,
            "arm": result.verdict.arm,
            "reason": result.verdict.reason,
        },
        "transform": result.transform,
        "peers": measured.peer_info if measured else {},
        "stages": [
            {"stage": s.stage, "seconds": s.seconds, "ok": s.ok, "meta": s.meta}
            for s in progress.stages
        ],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seed": options.seed,
        "not_measured": _not_measured(result),
    }
    return {**record, "gates": evaluate_gates(record, quality_reference="identity")}


def _model(result: Compilation, options: CompileOptions) -> dict[str, Any]:
    return {
        "name": result.imported.name,
        "source": options.model,
        "inputs": [
            {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}
            for spec in result.imported.inputs
        ],
        "weights": {p.key: p.value for p in result.imported.model.metadata_props}.get("weights"),
    }


def _arms(result: Compilation) -> dict[str, Any]:
    if result.measured is None:
        return {}
    tokens = _tokens(result)
    arms = {}
    for name, samples in result.measured.samples.items():
        arms[name] = {**arm_record(samples, tokens_per_call=tokens)}
        if name in result.arms:
            arm = result.arms[name]
            kernels = result.built[name].kernels
            more = {"same_module_as": arm.same_as, "removed_units": arm.removed, "kernels": kernels}
            arms[name] |= more
    return arms


def _tokens(result: Compilation) -> int | None:
    """Return the tokens of one call: the elements of the first integer input, if there is one."""
    ids = [s for s in result.imported.inputs if np.issubdtype(np.dtype(s.dtype), np.integer)]
    return int(np.prod(ids[0].shape)) if ids else None


def _peer_differences(result: Compilation) -> dict[str, float]:
    if result.measured is None or not result.measured.peer_outputs:
        return {}
    dense = result.built["dense"].run_all(result.measured.feeds)
    return {
        peer: difference([outputs[name] for name in result.imported.outputs], dense).max_rel
        for peer, outputs in result.measured.peer_outputs.items()
    }


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


def _not_measured(result: Compilation) -> dict[str, str]:
    missing: dict[str, str] = dict.fromkeys(
        ("l2_hit_pct", "dram_bytes", "ept_j_per_tok"), NO_COUNTER
    )
    if _tokens(result) is None:
        missing["toks_per_s"] = "no integer input, so a call has no tokens"
    if result.quality is None:
        missing["quality"] = "no evaluation was asked for"
    if result.measured is None:
        missing["lat_ms"] = "--no-measure"
    return missing
