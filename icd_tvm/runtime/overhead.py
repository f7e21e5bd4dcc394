"""What the bookkeeping of a run cost, as shares of the run."""

from __future__ import annotations

from typing import Any

from icd_tvm.runtime.job import Job

NOTHING_TIMED = "nothing was timed"


def overhead(job: Job, statistics_s: float, report_s: float) -> dict[str, Any]:
    """Return what events and profiling cost.

    Parameters
    ----------
    job : Job
    statistics_s : float
        Seconds spent on turning samples into the record.
    report_s : float
        Seconds of the stage that is still going on.

    Returns
    -------
    dict
        ``events_s``, ``profiling_s`` (the time around the timed calls, clock records, statistics;
        without the calls, emptied caches and waits for a peer), ``run_s`` (all states, earlier
        processes of a resumed run included), ``events_pct`` and ``profiling_pct`` of ``run_s``,
        and ``reason`` where profiling is null.
    """
    events = job.log.events if job.folder is None else job.folder.events()
    run_s = report_s + sum(event["t_end"] - event["t_start"] for event in events)
    measured = job.compilation.measured if job.compilation else None
    around = measured.conditions.get("overhead_s") if measured else None
    profiling_s = None if around is None else around + statistics_s
    return {
        "events_s": job.log.overhead_s,
        "profiling_s": profiling_s,
        "run_s": run_s,
        "events_pct": 100 * job.log.overhead_s / run_s,
        "profiling_pct": None if profiling_s is None else 100 * profiling_s / run_s,
        "reason": NOTHING_TIMED if profiling_s is None else None,
    }
