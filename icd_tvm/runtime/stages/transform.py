"""TRANSFORMED: S, Q and K in turn; one that fails is left out, with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, apply_pass, relax
from icd_tvm.models.calibration import calibration_batches
from icd_tvm.runtime.arms import DENSE, IDENTITY, Arm
from icd_tvm.runtime.budget_search import within_budget
from icd_tvm.runtime.calibrate import calibrate
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.order_file import AFTER
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.run_folder import COUNTERS, MEASURED
from icd_tvm.runtime.states import State
from icd_tvm.runtime.transforms import NONE, Transform

CALIBRATION_BATCHES = 24


def transform(job: Job, event: Stage) -> None:
    """Apply every transform to the model, order untouched."""
    dense = job.result.imported.mod
    mod, source = dense, NONE
    meta: dict[str, Any] = {}
    with job.progress.stage("transform") as stage:
        for item in job.transforms:
            mod, done, data = _applied(job, item, mod)
            meta |= done
            source = data if source == NONE else source
        kind = " + ".join(item.text for item in job.transforms) or NONE
        stage.meta = {"kind": kind, "calibration": source}
        if job.budget is not None:
            stage.meta["budget"] = job.budget["reason"]
    job.result.transform = {**meta, "calibration": source, "delta_layout": _says_layout(meta)}
    job.result.arms = {DENSE: Arm(DENSE, dense), IDENTITY: Arm(IDENTITY, mod)}
    left_out = [name for name, item in meta.items() if "why" in item]
    event.meta |= {**stage.meta, "left_out": left_out}
    event.meta["delta_layout"] = job.result.transform["delta_layout"]
    _forget_another(job, event)


def _forget_another(job: Job, event: Stage) -> None:
    """Keep nothing that the continued run decided and measured on other weights than these.

    A transform may fail, or find its data gone, in only one of the processes of a run.
    """
    if job.folder is None:
        return
    earlier = job.folder.events()
    made = [e["meta"] for e in earlier if e["stage"] == State.TRANSFORMED and e.get("ok")]
    if not made or all(made[-1].get(k) == event.meta[k] for k in ("calibration", "left_out")):
        return
    job.warn("transform", "it made other weights than before: ordered and measured again")
    job.orders.pop(AFTER, None)
    for name in (MEASURED, COUNTERS):
        job.folder.path(name).unlink(missing_ok=True)


def _applied(job: Job, item: Transform, mod: Any) -> tuple[Any, dict[str, Any], str]:
    """Return the module, the metadata and where the calibration data came from."""
    try:
        requests, statistics, source = item.requests(mod), {}, NONE
        if requests:
            batches, source = calibration_batches(
                job.result.imported, CALIBRATION_BATCHES, job.config.seed
            )
            statistics = calibrate(mod, requests, batches, job.target)
        if item.rules is not None:
            item = within_budget(job, item, statistics)
        made = item.make(statistics, job.config.seed)
        changed = apply_pass(made, mod)
    except Exception as error:
        # Whatever is wrong with one adapter, the others and the order can still be had.
        job.warn("transform", f"{item.name} {item.text} is left out: {error}")
        skipped = {"spec": item.text, "entries": [], "skipped": [], "why": str(error)}
        return mod, {item.name: skipped}, NONE
    meta = made.meta.get(item.name, made.meta)
    if meta.get("skipped") is True:
        job.warn("transform", f"{item.name} {item.text} is left out: {meta['why']}")
    elif why := unchanged_because(meta):
        job.warn("transform", f"{item.name} {item.text} changed nothing: {why}")
    return changed, {item.name: meta}, source


def unchanged_because(record: Mapping[str, Any]) -> str:
    """Return why a transform left every weight as it is; empty if it changed one."""
    entries = record.get("entries")
    if entries is None or any(not entry.get("skipped") for entry in entries):
        return ""
    left = [*entries, *record.get("skipped", [])]
    reasons = Counter(str(item["why"]) for item in left)
    return "; ".join(reasons) or "no constant weight of a matmul is of the sort it changes"


def _says_layout(meta: Any) -> bool:
    """Say whether any transform reports that it changed what an order can exploit."""
    if isinstance(meta, dict):
        return meta.get("delta_layout") is True or any(map(_says_layout, meta.values()))
    return isinstance(meta, list) and any(map(_says_layout, meta))


def changed_accesses(before: Any, after: Any) -> bool:
    """Say whether a constant has another shape, type or set of zeros than it had."""
    first, second = _constants(before), _constants(after)
    if len(first) != len(second):
        return True
    return any(_differs(a, b) for a, b in zip(first, second, strict=True) if not a.same_as(b))


def _constants(mod: Any) -> list[Any]:
    found: list[Any] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst):
            found.append(expr)

    relax.analysis.post_order_visit(mod["main"], visit)
    return found


def _differs(first: Any, second: Any) -> bool:
    a, b = first.value.numpy(), second.value.numpy()
    return a.shape != b.shape or a.dtype != b.dtype or bool(np.any((a == 0) != (b == 0)))
