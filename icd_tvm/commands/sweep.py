"""``icd sweep``: a run for every point of a grid, one summary."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from icd_tvm.arguments import Parser

DESCRIPTION = """Run a base configuration for every combination of some values. The file has two
keys: "base", a configuration or the name of its file, and "grid", a list of values for each key,
e.g. {seed: [0, 1], transform.sparsity: ["unit:0.25", "unit:0.5"]}. Every point is checked before
the first one runs, and is an ordinary run in DIR/runs; DIR/sweep.csv and DIR/sweep.json have a row
for each. By default the points run one after the other: two that share a machine would time each
other. On Dask, points that time still run alone on their machine (a file lock), so what a cluster
adds is machines."""
HELP = {
    "config": "YAML or JSON file with base and grid",
    "out": "folder of the sweep; with --scheduler the workers must see it under the same path",
    "override": "replace values of every point, key.of.it=value",
    "resume": "run what is not finished; failed points are tried again",
    "scheduler": "a Dask scheduler, tcp://HOST:PORT (pip install icd-tvm[sweep])",
    "dry_run": "check every point, print their names, run nothing",
}
EXAMPLES = """  icd sweep -c configs/sweeps/rates.yaml --out runs/sweep --dry-run
  icd sweep -c configs/sweeps/rates.yaml --out runs/sweep
  icd sweep -c configs/sweeps/rates.yaml --out runs/sweep --resume --scheduler tcp://10.0.0.1:8786
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(prog="icd sweep", description=DESCRIPTION, examples=EXAMPLES)
    add = result.add_argument
    add("-c", "--config", type=Path, required=True, metavar="FILE", help=HELP["config"])
    add("--out", type=Path, required=True, metavar="DIR", help=HELP["out"])
    result.add_override(HELP["override"])
    add("--resume", action="store_true", help=HELP["resume"])
    add("--scheduler", metavar="ADDRESS", help=HELP["scheduler"])
    add("--dry-run", action="store_true", help=HELP["dry_run"])
    result.add_common("print the summary as JSON")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Run the sweep; the exit status is 2 where a point failed."""
    from icd_tvm.runtime.sweep_grid import read_sweep

    points = read_sweep(arguments.config, arguments.override)
    if arguments.dry_run:
        print("\n".join(point.name for point in points))
        return 0
    from icd_tvm.runtime.progress import Progress
    from icd_tvm.runtime.sweep import sweep
    from icd_tvm.runtime.sweep_table import table

    quiet = arguments.quiet or arguments.json

    def tell(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    with Progress(quiet).stage("sweep"):
        record = sweep(
            points,
            arguments.out,
            resume=arguments.resume,
            scheduler=arguments.scheduler,
            tell=tell,
        )
    print(json.dumps(record) if arguments.json else table(record))
    return 2 if record["counts"]["failed"] else 0
