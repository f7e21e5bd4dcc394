"""Run a configuration in its directory: new, resumed, or only planned."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icd_tvm.config import Config
from icd_tvm.config_file import differences, load_config, make_config, to_yaml
from icd_tvm.errors import ConfigError, OutputError
from icd_tvm.measure.environment import fingerprint
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.pipeline import STAGES, execute
from icd_tvm.runtime.prepare import prepare
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.run_folder import CONFIG, ENVIRONMENT, METRICS, MODULE, RunFolder
from icd_tvm.runtime.stages.load import load
from icd_tvm.runtime.states import State


@dataclass(frozen=True)
class RunArtifacts:
    """What a run left behind.

    Attributes
    ----------
    folder : Path
        The run directory.
    paths : dict of str to Path
        Its files by name: ``perm.json``, ``metrics.json``, ``module.so``, ...
    metrics : dict
        The record of ``metrics.json`` (schema ``icd/metrics/v1``).
    gates : list of dict
        The goals: pass, fail or not measured, with the reason.
    """

    folder: Path
    paths: dict[str, Path]
    metrics: dict[str, Any]
    gates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failure(self) -> dict[str, str] | None:
        """What stopped the run: stage, code, message, traceback file; None if nothing did."""
        return self.metrics.get("failure")


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    reuse_perm: str | Path | None = None,
    progress: Progress | None = None,
) -> RunArtifacts:
    """Run the loop of a configuration and keep everything in a run directory.

    Parameters
    ----------
    config : Config, mapping or path
        See ``docs/Configuration.md``.
    out : str or Path, optional
        The run directory; ``report.out_dir`` if omitted.
    resume : bool
        Continue the run in the directory. Orders that are decided there are not decided again.
    reuse_perm : str or Path, optional
        ``perm.json`` of another run of the same model.
    progress : Progress, optional
        Where stages are shown; a new one on stderr if omitted.

    Returns
    -------
    RunArtifacts
        Also of a run that failed: ``failure`` says at which stage and why.

    Raises
    ------
    ConfigError
        If the configuration is refused, or a resumed run was of another one.
    OutputError
        If the directory is in use, holds another run, or cannot be written.

    Examples
    --------
    >>> config = {
    ...     "model": {"path": str(model_file)},
    ...     "transform": {"sparsity": "unit:0.5; min-size=0"},
    ...     "measure": {"enabled": False},
    ...     "cache": {"enabled": False},
    ... }
    >>> artifacts = run(config, out=folder / "run", progress=Progress(quiet=True))
    >>> artifacts.failure is None, artifacts.metrics["decision"]["accepted"]
    (True, None)
    >>> "module.so" in artifacts.paths
    True
    """
    checked = _checked(config)
    target, transforms = prepare(checked)
    with RunFolder(_out_dir(checked, out)) as folder:
        begun = _begun(folder, checked, resume)
        if begun and finished(folder):
            return _artifacts(folder)
        if not begun:
            folder.write_json(ENVIRONMENT, fingerprint())
            folder.write_text(CONFIG, to_yaml(checked))
        job = Job(checked, target, transforms, progress or Progress(), folder.log(), folder)
        job.metrics, job.library = folder.path(METRICS), folder.path(MODULE)
        job.resumed = begun
        job.reuse = None if reuse_perm is None else Path(reuse_perm)
        execute(job)
        return _artifacts(folder)


def plan(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    reuse_perm: str | Path | None = None,
) -> str:
    """Check everything that can be checked without writing; return what a run would do.

    Raises
    ------
    IcdError
        What the run would be refused for.
    """
    checked = _checked(config)
    target, transforms = prepare(checked)
    folder = _out_dir(checked, out)
    _check_writable(folder)
    reuse = None if reuse_perm is None else Path(reuse_perm)
    job = Job(checked, target, transforms, Progress(quiet=True), reuse=reuse)
    with job.log.state(State.READY) as event:
        load(job, event)
    return "\n".join(f"{name:11s} {text}" for name, text in _planned(job, folder).items())


def _planned(job: Job, folder: Path) -> dict[str, str]:
    config, groups = job.config, job.result.groups
    applied = ", ".join(f"{item.name} {item.text}" for item in job.transforms) or "none"
    timed = f"{config.pipeline.repeats} calls of each arm"
    free, pinned = len(groups.free), len(groups.pinned)
    return {
        "model": f"{config.source}: {free} free axis groups, {pinned} pinned",
        "target": job.target_text,
        "W": config.graph.source,
        "transforms": applied,
        "mode": config.pipeline.mode,
        "solver": f"{config.solver.time_budget_s:g} s at most",
        "orders": f"{', '.join(job.orders)} from {job.reuse}" if job.reuse else "solved",
        "measure": timed if config.measure.enabled else "nothing",
        "directory": str(folder),
        "stages": " > ".join([*(state.value for state in STAGES), State.REPORTED.value]),
    }


def _checked(config: Config | Mapping[str, Any] | str | Path) -> Config:
    if isinstance(config, Config):
        return config
    return make_config(config) if isinstance(config, Mapping) else load_config(config)


def _out_dir(config: Config, out: str | Path | None) -> Path:
    folder = out or config.report.out_dir
    if not folder:
        raise ConfigError("no run directory is given", "give --out DIR or report.out_dir")
    return Path(folder)


def _begun(folder: RunFolder, config: Config, resume: bool) -> bool:
    """Return whether the folder holds this run; refuse a folder that holds another one."""
    if not folder.begun():
        return False
    if not resume:
        raise OutputError(
            f"{folder.root} holds a run", "--resume continues it; or give another --out"
        )
    changed = differences(load_config(folder.path(CONFIG)), config)
    if changed:
        raise ConfigError(
            f"{folder.root} holds a run of another configuration: {'; '.join(changed)}",
            "give another --out",
        )
    return True


def finished(folder: RunFolder) -> bool:
    """Return whether a run went through to its report there, without a failure."""
    last = (folder.events() or [{}])[-1]
    meta = last.get("meta") or {}
    done = last.get("stage") == State.REPORTED and last.get("ok") and meta.get("failure") is None
    return bool(done) and folder.path(METRICS).exists()


def _artifacts(folder: RunFolder) -> RunArtifacts:
    metrics = json.loads(folder.path(METRICS).read_text("utf-8"))
    return RunArtifacts(folder.root, folder.files(), metrics, metrics["gates"])


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"cannot write to {folder}: {existing} is no folder or read-only")
