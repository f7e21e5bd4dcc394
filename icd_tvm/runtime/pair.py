"""Linear and iterative runs of one configuration, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icd_tvm.config import Config
from icd_tvm.config_file import make_config
from icd_tvm.errors import ConfigError
from icd_tvm.files import write_atomically
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.run import RunArtifacts, run
from icd_tvm.runtime.run_folder import PERM

MODES = ("linear", "iterative")


def pair(
    config: Config,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run ``out/linear`` and ``out/iterative`` and write ``out/pair.json``.

    The ratio is that of the iterative run, where both arms were timed interleaved. The linear run
    says how much two processes differ; its first order is used again by the iterative one.

    Parameters
    ----------
    config : Config
        ``pipeline.mode`` is replaced.
    out : str or Path, optional
        Folder of both runs; ``report.out_dir`` if omitted.
    resume : bool
        Continue the runs that are there.
    progress : Progress, optional

    Returns
    -------
    dict
        ``ratio``, ``decision``, ``lat_ms`` of each run's kept arm, ``failures``.
    """
    folder = Path(out or config.report.out_dir or "")
    if not folder.name:
        raise ConfigError("no run directory is given", "give --out DIR or report.out_dir")
    runs: dict[str, RunArtifacts] = {}
    for mode in MODES:
        again = runs["linear"].paths.get(PERM) if "linear" in runs else None
        values = config.model_dump()
        values["pipeline"]["mode"] = mode
        runs[mode] = run(
            make_config(values),
            out=folder / mode,
            resume=resume,
            reuse_perm=again,
            progress=progress,
        )
    found = _compared(runs)
    text = json.dumps(found, indent=1) + "\n"
    write_atomically(folder / "pair.json", lambda path: path.write_text(text, "utf-8"))
    return found


def _compared(runs: dict[str, RunArtifacts]) -> dict[str, Any]:
    last = runs["iterative"].metrics
    return {
        "ratio": last["ratios"].get("iterative/linear"),
        "decision": last["decision"],
        "graph_source": last["graph_source"],
        "lat_ms": {mode: _latencies(item.metrics) for mode, item in runs.items()},
        "gates": last["gates"],
        "failures": {mode: item.failure for mode, item in runs.items()},
    }


def _latencies(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: arm["lat_ms"]["median"] for name, arm in metrics["arms"].items()}


def table(found: dict[str, Any]) -> str:
    """Return the comparison as plain text; medians in milliseconds."""
    names = dict.fromkeys(name for arms in found["lat_ms"].values() for name in arms)
    lines = [f"{'arm':12s}" + "".join(f"{mode + ' run':>16s}" for mode in MODES)]
    for name in names:
        cells = [found["lat_ms"][mode].get(name) for mode in MODES]
        lines.append(
            f"{name:12s}" + "".join(f"{'-' if c is None else f'{c:.3f}':>16s}" for c in cells)
        )
    ratio = found["ratio"]
    if ratio is not None:
        lines.append(
            f"\niterative/linear {ratio['median']:.3f} [{ratio['lo']:.3f}, {ratio['hi']:.3f}], "
            "both timed in the iterative run"
        )
    lines.append(f"W: {found['graph_source']}")
    lines += [f"{mode} run failed: {f['message']}" for mode, f in found["failures"].items() if f]
    return "\n".join([*lines, found["decision"]["reason"]])
