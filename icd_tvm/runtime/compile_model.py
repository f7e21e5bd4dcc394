"""Compile a model: tags, W, order, transform, W', order, rewrite, verify, measure, decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icd_tvm.measure.metrics import arms_table
from icd_tvm.runtime.compilation import Compilation
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.output import check_writable_file, output_folder
from icd_tvm.runtime.pipeline import execute
from icd_tvm.runtime.prepare import prepare
from icd_tvm.runtime.progress import Progress

__all__ = ["Compilation", "compile_model", "summary"]


def compile_model(options: CompileOptions, progress: Progress | None = None) -> Compilation:
    """Compile a model and keep the re-permuted build only if it is equal and measured faster.

    Parameters
    ----------
    options : CompileOptions
        What to do.
    progress : Progress, optional
        Where stages are shown; a new one on stderr if omitted.

    Returns
    -------
    Compilation
        The arms, the measurements, the verdict and the record that ``--out`` receives.

    Raises
    ------
    IcdError
        For every refused input; nothing half-written is left behind.

    Examples
    --------
    >>> options = CompileOptions(model=str(model_file), measure=False)
    >>> result = compile_model(options, Progress(quiet=True))
    >>> result.verdict.arm, [group.id for group in result.groups.free]
    ('linear', ['up:1'])
    """
    config = options.to_config()
    target, transforms = prepare(config)
    check_writable_file(options.library)
    with output_folder(options.out) as out:
        job = Job(
            config=config,
            target=target,
            transforms=transforms,
            progress=progress or Progress(),
            metrics=None if out is None else out / "metrics.json",
            library=options.library,
            explain=options.explain,
        )
        execute(job)
    return job.result


def summary(record: Mapping[str, Any]) -> str:
    """Return the table of arms, the gates and the decision of a metrics record."""
    decision, lines = record["decision"], []
    if record["arms"]:
        lines += [arms_table(record), *_transform_gain(record["ratios"]), ""]
    if device := record.get("device"):
        lines.append(f"timed on {device['key']} at {device['address']} ({device['cpu']})")
    lines += [f"{g['name']:8s} {g['status']}: {g['reason']}" for g in record["gates"]]
    if "mock" in record["graph_source"]:
        lines.append(
            "W is a mock: the orders follow planted communities, not this model's accesses"
        )
    verdict = {True: "accepted", False: "not accepted", None: "undecided"}[decision["accepted"]]
    kept = f"{verdict}, {decision['arm']} is kept: " if decision["arm"] else ""
    return "\n".join([*lines, kept + decision["reason"]])


def _transform_gain(ratios: Mapping[str, Any]) -> list[str]:
    """Say what the transform alone changed, apart from any order."""
    found = ratios.get("identity/dense")
    if found is None:
        return []
    interval = f"{found['median']:.3f} [{found['lo']:.3f}, {found['hi']:.3f}]"
    return [f"the transform alone: identity/dense {interval}"]
