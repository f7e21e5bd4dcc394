"""Run the points of a sweep, here one after the other or on Dask; keep what each came to."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icd_tvm.config_file import to_yaml
from icd_tvm.errors import ConfigError, IcdError, MissingDependencyError, OutputError
from icd_tvm.files import make_folder
from icd_tvm.runtime.machine_lock import machine_lock
from icd_tvm.runtime.prepare import prepare
from icd_tvm.runtime.run import finished
from icd_tvm.runtime.run_folder import RunFolder
from icd_tvm.runtime.sweep_grid import Point
from icd_tvm.runtime.sweep_table import CSV, JSON, as_csv, row, summary
from icd_tvm.steps import counted

RUNS, CONFIGS = "runs", "configs"
CONNECT_S = 10


@dataclass(frozen=True)
class Task:
    """A point as a worker gets it: paths that it must see, and whether it times."""

    name: str
    config: str
    folder: str
    cwd: str
    timed: bool


def sweep(
    points: Sequence[Point],
    out: Path,
    *,
    resume: bool = False,
    scheduler: str | None = None,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Run every point in ``out/runs/NAME`` and write ``out/sweep.json`` and ``out/sweep.csv``.

    Each point is an ``icd run --resume`` in a process of its own: a crash ends that point alone.
    The summary is written anew after every point.

    Parameters
    ----------
    points : sequence of Point
    out : Path
    resume : bool
        Continue the sweep that is there; finished points are not run again, failed ones are.
    scheduler : str, optional
        Address of a Dask scheduler whose workers see ``out`` under the same path.
    tell : callable
        Hears of every point that ends.

    Returns
    -------
    dict
        What ``sweep.json`` holds (schema ``icd/sweep/v1``).

    Raises
    ------
    IcdError
        What any point would be refused for, before the first one runs.
    OutputError
        If the folder is in use, holds a sweep, or cannot be written.
    MissingDependencyError
        If a scheduler is given and ``distributed`` is not installed.
    """
    _check(points)
    with RunFolder(out) as folder:
        if not resume and folder.path(JSON).exists():
            raise OutputError(f"{out} holds a sweep", "--resume continues it")
        tasks = [_task(folder, point) for point in points]
        todo = [task for task in tasks if not finished(RunFolder(Path(task.folder)))]
        ended = {task.name: "" for task in tasks if task not in todo}
        for name in ended:
            tell(f"{name}: finished before")
        _write(folder, points, ended)
        results = _here(todo) if scheduler is None else _on_dask(scheduler, todo)
        with counted("points", len(todo)) as advance:
            for name, reason in results:
                ended[name] = reason
                tell(f"{name}: {reason or 'done'}")
                _write(folder, points, ended)
                advance()
        return _write(folder, points, ended)


def run_point(task: Task) -> str:
    """Run one point, alone on its machine if it times; return why it failed, or nothing."""
    if not Path(task.config).exists():
        return f"{platform.node()} does not see {task.config}: share the folder with the workers"
    command = [sys.executable, "-m", "icd_tvm", "run", "-c", task.config, "--out", task.folder]
    try:
        with machine_lock(task.timed) as lock:
            done = subprocess.run(
                [*command, "--resume", "--quiet"],
                cwd=task.cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                pass_fds=[lock],
                check=False,
            )
    except (OSError, IcdError) as error:
        return f"cannot start on {platform.node()}: {error}"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}: {signal.strsignal(-done.returncode)}"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1] if done.returncode else ""


def _check(points: Sequence[Point]) -> None:
    """Refuse what a configuration cannot say: unknown transforms, targets, quality metrics."""
    for point in points:
        try:
            prepare(point.config)
        except IcdError as error:
            raise type(error)(f"point {point.name}: {error.message}", error.hint) from error


def _task(folder: RunFolder, point: Point) -> Task:
    make_folder(folder.path(CONFIGS))
    config = folder.write_text(f"{CONFIGS}/{point.name}.yaml", to_yaml(point.config)).absolute()
    keys = point.config.measure
    # What another device times disturbs nothing here.
    timed = keys.enabled and keys.rpc is None
    runs = folder.path(RUNS).absolute()
    return Task(point.name, str(config), str(runs / point.name), str(Path.cwd()), timed)


def _write(folder: RunFolder, points: Sequence[Point], ended: dict[str, str]) -> dict[str, Any]:
    rows = [row(point, folder.path(RUNS) / point.name, ended.get(point.name)) for point in points]
    record = summary(rows)
    folder.write_json(JSON, record)
    folder.write_text(CSV, as_csv(rows))
    return record


def _here(tasks: Sequence[Task]) -> Iterator[tuple[str, str]]:
    for task in tasks:
        yield task.name, run_point(task)


def _on_dask(address: str, tasks: Sequence[Task]) -> Iterator[tuple[str, str]]:
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise MissingDependencyError(
            "--scheduler needs the package distributed", "pip install icd-tvm[sweep]"
        ) from error
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {address!r}: {error}", "start one: dask scheduler"
        ) from error
    with client:
        if not client.nthreads():
            raise ConfigError(f"the Dask scheduler at {address!r} has no worker", "dask worker ...")
        futures = {client.submit(run_point, task, pure=False): task.name for task in tasks}
        for future in as_completed(futures, loop=client.loop):
            lost = future.exception()
            yield futures[future], future.result() if lost is None else f"Dask: {lost}"
