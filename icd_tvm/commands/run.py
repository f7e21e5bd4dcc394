"""``icd run``: the whole loop in a run directory that survives being killed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from icd_tvm.arguments import Parser, add_device
from icd_tvm.commands.threads import set_threads
from icd_tvm.config import Config
from icd_tvm.config_file import load_config
from icd_tvm.errors import ConfigError

HELP = {
    "config": "YAML or JSON file; --resume finds the one it needs in the run directory",
    "override": "replace values, key.of.it=value",
    "no_tune": "predict kernels instead of timing them (pipeline.tune=false)",
    "out": "the run directory (report.out_dir)",
    "resume": "continue after the last stage that was finished",
    "dry_run": "check the inputs, print the plan, write nothing",
    "quality_budget": "points the sparsity may cost (quality.budget)",
    "reuse_perm": "take the orders of this perm.json instead of solving",
    "fail_on_gate": "exit with 3 if a gate failed; with names, if one of those did not pass",
}
GATES = ("latency", "l2", "energy", "quality")
GATE_FAILED = 3
EXAMPLES = """  icd run -c configs/mock.json --override pipeline.mode=iterative --out runs/iter
  icd run -c configs/minilm-unit.yaml --out runs/unit --dry-run
  icd run --resume --out runs/unit
  icd run -c configs/minilm-unit.yaml --out runs/ci --fail-on-gate latency quality
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(prog="icd run", description=__doc__, examples=EXAMPLES)
    add_config(result)
    result.add_argument("--resume", action="store_true", help=HELP["resume"])
    result.add_argument("--dry-run", action="store_true", help=HELP["dry_run"])
    result.add_argument(
        "--quality-budget", type=float, metavar="POINTS", help=HELP["quality_budget"]
    )
    result.add_argument("--reuse-perm", type=Path, metavar="FILE", help=HELP["reuse_perm"])
    result.add_argument("--fail-on-gate", nargs="*", choices=GATES, help=HELP["fail_on_gate"])
    result.add_common("print the metrics record instead of a table")
    return result


def add_config(result: Parser) -> None:
    """Add the flags that make a configuration."""
    result.add_argument("-c", "--config", type=Path, metavar="FILE", help=HELP["config"])
    result.add_override(HELP["override"])
    result.add_argument("--no-tune", action="store_true", help=HELP["no_tune"])
    result.add_argument("--out", type=Path, metavar="DIR", help=HELP["out"])
    add_device(result)


def config_from(arguments: argparse.Namespace) -> Config:
    """Return the checked configuration that the arguments ask for."""
    path = arguments.config
    if path is None and getattr(arguments, "resume", False) and arguments.out is not None:
        path = arguments.out / "config.resolved.yaml"
    if path is None:
        raise ConfigError("no configuration is given", "icd run -c FILE --out DIR")
    tune = ["pipeline.tune=false"] if arguments.no_tune else []
    return load_config(path, [*arguments.override, *tune, *_budget(arguments), *_device(arguments)])


def _budget(arguments: argparse.Namespace) -> list[str]:
    """Return the override that the flag of a quality budget stands for."""
    budget = getattr(arguments, "quality_budget", None)
    return [] if budget is None else [f"quality.budget={budget}"]


def _device(arguments: argparse.Namespace) -> list[str]:
    """Return the overrides that the flags of a device stand for."""
    flags = {"rpc": arguments.rpc, "rpc_key": arguments.rpc_key}
    # As JSON: an address like [::1]:9190 would be read as a list.
    return [f"measure.{key}={json.dumps(value)}" for key, value in flags.items() if value]


def run(arguments: argparse.Namespace) -> int:
    """Run, resume or plan; the exit status is 2 where the run failed, 3 where a gate did."""
    config = config_from(arguments)
    set_threads(config.threads)
    from icd_tvm.runtime.compile_model import summary
    from icd_tvm.runtime.progress import Progress
    from icd_tvm.runtime.run import plan
    from icd_tvm.runtime.run import run as run_config

    if arguments.dry_run:
        print(plan(config, out=arguments.out, reuse_perm=arguments.reuse_perm))
        return 0
    artifacts = run_config(
        config,
        out=arguments.out,
        resume=arguments.resume,
        reuse_perm=arguments.reuse_perm,
        progress=Progress(arguments.quiet or arguments.json),
    )
    print(json.dumps(artifacts.metrics) if arguments.json else summary(artifacts.metrics))
    told = _told(artifacts.folder, artifacts.failure)
    return told or gated(artifacts.gates, arguments.fail_on_gate)


def gated(gates: list[dict[str, Any]], asked: list[str] | None) -> int:
    """Print the gates that must stop a caller; return the exit status."""
    from icd_tvm.measure.gates import failed_gates

    found = [] if asked is None else failed_gates(gates, asked)
    for line in found:
        print(f"gate {line}", file=sys.stderr)
    return GATE_FAILED if found else 0


def _told(folder: Path, failure: dict[str, str] | None) -> int:
    """Print what stopped a run; return the exit status."""
    if failure is None:
        return 0
    where = folder / failure["traceback"]
    print(
        f"error {failure['code']}: {failure['message']} ({failure['stage']}; {where})",
        file=sys.stderr,
    )
    return 2
