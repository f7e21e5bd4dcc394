"""Where an order comes from: a file, the cache, or the solver."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass
from icd_tvm.core.solver import fit_permutation
from icd_tvm.relax_passes.decide_permutation import DecidePermutation, Decision
from icd_tvm.runtime.access_graphs import AccessGraphs, access_graphs
from icd_tvm.runtime.job import Job

# What has a part in a decision.
PACKAGES = ("icd-tvm", "apache-tvm", "numpy", "scipy", "scikit-network")


def made_from(job: Job) -> dict[str, Any]:
    """Return everything that the orders of a run follow from."""
    config = job.config
    return {
        "model_hash": job.model_hash,
        "task": config.model.task,
        "transforms": {transform.name: transform.text for transform in job.transforms},
        "graph": config.graph.model_dump(exclude={"save"}),
        "solver": config.solver.model_dump(),
        "seed": config.seed,
        "target": str(job.target),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
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
    """
    name = f"order {when} the transform"
    if when in job.orders:
        with job.progress.stage(name) as stage:
            decisions = job.orders[when]
            stage.meta = {**counts(decisions), "from": "file"}
        return decisions, "file"
    return solved(job, when, mod), "solver"


def solved(job: Job, when: str, mod: Any) -> list[Decision]:
    """Build the access graphs, unless they are there, and solve for every axis."""
    graphs = access_graphs(job, when, mod)
    with job.progress.stage(f"order {when} the transform") as stage:
        try:
            decisions = _fit(job, graphs)
        except MemoryError:
            job.warn("order", f"the solver ran out of memory {when} the transform: initial order")
            decisions = []
        stage.meta = counts(decisions)
    for decision in decisions:
        decision.stats["W"] = graphs.source
    late = sum(decision.stats["stopped_by"] == "time" for decision in decisions)
    if late:
        job.warn("order", f"the time budget ended the search of {late} axes {when} the transform")
    return decisions


def permutations(decisions: list[Decision]) -> dict[str, np.ndarray]:
    """Return the orders that improve on those they replace."""
    return {decision.group: decision.perm for decision in decisions if decision.improved}


def counts(decisions: list[Decision]) -> dict[str, Any]:
    """Return how many axes were looked at and how many have a better order."""
    return {"axes": len(decisions), "improved": sum(d.improved for d in decisions)}


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
