"""W_BUILT and PERMUTED: what is touched together, and the order decided before the transform."""

from __future__ import annotations

from typing import Any

from icd_tvm.relax_passes.decide_permutation import Decision
from icd_tvm.runtime.access_graphs import access_graphs
from icd_tvm.runtime.graph_file import save_graphs
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.order_file import AFTER, BEFORE, orders_text
from icd_tvm.runtime.orders import NOTHING, counts, decided, made_from, permutations
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.run_folder import GRAPH, GRAPH_AFTER, PERM


def build_graph(job: Job, event: Stage) -> None:
    """Build and keep W of the incoming model; without a folder it is built when it is needed."""
    keep_graph(job, BEFORE, job.result.imported.mod, event)


def first_order(job: Job, event: Stage) -> None:
    """Decide the order of the incoming model.

    Structure that arrives with the model was put there after its order had been decided: then
    the incoming order is the one that was decided before the transform.
    """
    if not job.transforms and job.config.graph.source == "tir":
        job.perms[BEFORE] = {}
        event.meta["skipped"] = "no transform follows: the incoming order is the first one"
        return
    mod = job.result.imported.mod
    job.result.before, how = decided(job, BEFORE, mod)
    job.perms[BEFORE] = permutations(job.result.before)
    keep_order(job, BEFORE, job.result.before, event, how)


def keep_graph(job: Job, when: str, mod: Any, event: Stage) -> None:
    """Store W in the run directory, once."""
    name = GRAPH if when == BEFORE else GRAPH_AFTER
    if job.folder is None or not job.config.graph.save:
        return
    if when in job.orders and job.folder.path(name).exists():
        event.meta["from"] = "file"
        return
    graphs = access_graphs(job, when, mod)
    if not job.transforms and when == BEFORE:
        # The same module: what was touched before the transform is touched after it.
        job.graphs[AFTER] = graphs
    seed = job.config.graph.mock.seed if graphs.source == "mock" else None
    matrices = graphs.matrices()
    rows = save_graphs(job.folder.path(name), matrices, graphs.source, seed)
    event.meta |= {"source": graphs.source, "nnz": sum(m.nnz for m in matrices.values())}
    event.meta["rows"] = rows


def keep_order(job: Job, when: str, decisions: list[Decision], event: Stage, how: str) -> None:
    """Store the orders decided so far in the run directory."""
    event.meta |= {**counts(decisions), "from": how}
    if how == NOTHING:
        # Not stored: a run that is continued may have what the solver lacked.
        return
    late = sum(decision.stats.get("stopped_by") == "time" for decision in decisions)
    if late:
        job.warn("order", f"the time budget ended the search of {late} axes {when} the transform")
    job.decided[when] = decisions
    if job.folder is not None:
        known = job.orders if job.continued else {}
        text = orders_text({**known, **job.decided}, made_from(job))
        job.folder.write_text(PERM, text)
