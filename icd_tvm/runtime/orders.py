"""Where an order comes from: a file, the cache, or the solver."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass
from icd_tvm.core.solver import fit_permutation
from icd_tvm.relax_passes.decide_permutation import DecidePermutation, Decision
from icd_tvm.relax_passes.permutation_file import model_hash
from icd_tvm.runtime.access_graphs import AccessGraphs, access_graphs
from icd_tvm.runtime.cache_entry import CacheEntry
from icd_tvm.runtime.cache_key import cache_key, tool_versions
from icd_tvm.runtime.child import ChildError, in_child
from icd_tvm.runtime.job import Flag, Job
from icd_tvm.runtime.order_file import AFTER, Record, as_decisions, as_records
from icd_tvm.runtime.perm_cache import PermutationCache

# Where an order comes from that could not be decided.
NOTHING = "nothing"
# Seconds that a solver may take beyond its budget, which it does not look at in every loop.
GRACE_S = 120.0
# What the solver imports when it needs it.
_LIBRARIES = ("scipy.sparse.linalg", "sknetwork.clustering")


def made_from(job: Job) -> dict[str, Any]:
    """Return everything that the orders of a run follow from."""
    config = job.config
    return {
        "model_hash": job.model_hash,
        "task": config.model.task,
        "transforms": {transform.name: transform.text for transform in job.transforms},
        "solver": {
            **config.solver.model_dump(exclude={"memory_mb"}),
            "graph": _graph(job),
            "opaque_states": config.model.opaque_states,
        },
        "seed": config.seed,
        "target": str(job.order_target),
        "versions": tool_versions(),
    }


def decided(job: Job, when: str, mod: Any) -> tuple[list[Decision], str]:
    """Return the decisions for ``mod`` and where they come from.

    Parameters
    ----------
    job : Job
    when : str
        ``before`` or ``after`` the transform.
    mod : tvm.IRModule
        The module whose axes are ordered.

    Returns
    -------
    decisions : list of Decision
    how : str
        ``file``, ``cache``, ``solver``, or :data:`NOTHING` where the solver's process ended
        without an order; then the run is flagged and there are no decisions.
    """
    name = f"order {when} the transform"
    if when in job.orders:
        with job.progress.stage(name) as stage:
            stage.meta = {**counts(job.orders[when]), "from": "file"}
        return job.orders[when], "file"
    try:
        return _cached(job, when, mod) if job.config.cache.enabled else _fresh(job, when, mod)
    except (ChildError, MemoryError) as error:
        reason = str(error) or "it ran out of memory"
        job.warn("order", f"the solver failed {when} the transform: {reason}; the order stays")
        return [], NOTHING


def _fresh(job: Job, when: str, mod: Any) -> tuple[list[Decision], str]:
    return _solved(job, when, mod), "solver"


def _cached(job: Job, when: str, mod: Any) -> tuple[list[Decision], str]:
    began = job.progress.now()
    entry, how = _looked_up(job, when, mod)
    decisions = as_decisions(_records(entry), job.result.groups, job.result.widths)
    if how == "hit":
        with job.progress.stage(f"order {when} the transform", began) as stage:
            stage.meta = {**counts(decisions), "from": "cache"}
        return decisions, "cache"
    if how != "computed":
        job.flags.append(Flag("cache", how))
    return decisions, "solver"


def _solved(job: Job, when: str, mod: Any) -> list[Decision]:
    """Build the access graphs, unless they are there, and solve for every axis."""
    graphs = access_graphs(job, when, mod)
    keys = job.config.solver
    if keys.memory_mb is not None:
        # Loaded below the limit, a library that does not fit would look like a missing one.
        for library in _LIBRARIES:
            import_module(library)
    with job.progress.stage(f"order {when} the transform") as stage:
        records = in_child(
            lambda: as_records(_fit(job, graphs)),
            memory_mb=keys.memory_mb,
            limit_s=keys.time_budget_s / 2 + GRACE_S,
        )
        decisions = [_decision(record) for record in records]
        stage.meta = counts(decisions)
    for decision in decisions:
        decision.stats["W"] = graphs.source
    return decisions


def _decision(record: Record) -> Decision:
    perm = np.asarray(record["perm"], np.int32)
    return Decision(record["group"], perm, record["stats"], record["w_nnz"])


def permutations(decisions: Sequence[Decision]) -> dict[str, np.ndarray]:
    """Return the orders that improve on those they replace."""
    return {decision.group: decision.perm for decision in decisions if decision.improved}


def counts(decisions: Sequence[Decision]) -> dict[str, Any]:
    """Return how many axes were looked at and how many have a better order."""
    return {"axes": len(decisions), "improved": sum(d.improved for d in decisions)}


def _graph(job: Job) -> dict[str, Any]:
    """Return what W follows from, beside the model."""
    keys = job.config.graph
    if keys.source == "mock":
        return keys.model_dump(include={"source", "mock"})
    if keys.source == "tir":
        return {"source": "tir"}
    try:
        digest = hashlib.sha256(Path(str(keys.trace)).read_bytes()).hexdigest()
    except OSError:
        digest = ""
    return {**keys.model_dump(exclude={"save", "trace"}), "sha256": digest}


def _looked_up(job: Job, when: str, mod: Any) -> tuple[CacheEntry, str]:
    """Look the order up, or solve and keep it; another process's solution is waited for."""
    keys, facts = job.config.cache, made_from(job)
    # What the transforms made, not only what they were asked for: one may have been left out, or
    # have seen other data.
    incoming = mod.same_as(job.result.imported.mod)
    module = job.model_hash if incoming else model_hash(mod["main"])
    transforms = {**facts["transforms"], "module": module}
    key = cache_key(
        model_hash=job.model_hash,
        task=f"{facts['task']}/{when}",
        transforms=transforms if when == AFTER else {},
        seed=job.config.seed,
        target=facts["target"],
        solver=facts["solver"],
    )
    cache = PermutationCache(keys.dir, max_bytes=keys.max_mb << 20)
    groups, widths = job.result.groups, job.result.widths
    sizes = {**{group.id: group.size for group in groups.free}, **widths}

    def validate(entry: CacheEntry) -> None:
        entry.check_model(job.model_hash, sizes)
        as_decisions(_records(entry), groups, widths)

    def compute() -> CacheEntry:
        decisions = _solved(job, when, mod)
        perms = {decision.group: decision.perm for decision in decisions}
        meta = {r["group"]: {k: r[k] for k in ("stats", "w_nnz")} for r in as_records(decisions)}
        return CacheEntry(perms, job.model_hash, meta={"axes": meta}, versions=tool_versions())

    return cache.get_or_compute(key, validate, compute)


def _records(entry: CacheEntry) -> list[Record]:
    axes = entry.meta["axes"]
    return [{"group": group, "perm": perm, **axes[group]} for group, perm in entry.perms.items()]


def _fit(job: Job, graphs: AccessGraphs) -> list[Decision]:
    keys = job.config.solver
    budget_s = keys.time_budget_s / 2
    if graphs.planted is None:
        solver = DecidePermutation(
            time_budget_s=budget_s,
            seed=job.config.solver_seed,
            refine_steps=keys.refine_steps,
            k_blocks=keys.k_blocks,
        )
        apply_pass(solver, graphs.mod)
        return solver.decisions
    decisions = []
    for axis, graph in graphs.planted.items():
        perm, stats = fit_permutation(
            graph,
            time_budget_s=budget_s / len(graphs.planted),
            refine_steps=keys.refine_steps,
            k_blocks=keys.k_blocks,
            rng_seed=job.config.solver_seed,
        )
        decisions.append(Decision(axis, perm, stats.to_dict(), int(graph.nnz)))
    return decisions
