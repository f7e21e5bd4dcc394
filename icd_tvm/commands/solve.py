"""``icd solve``: find an order of one axis from a file of its access graph W."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from icd_tvm.arguments import Parser

_SCORES = ("U", "C", "Q", "J")
EXAMPLES = """  icd solve W.npz -o perm.json
  icd solve W.npz -o better.json --start perm.json --time-budget 10 --objective J
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd solve",
        description="Find an order of one axis that lowers the cost of its access graph W.",
        examples=EXAMPLES,
    )
    result.add_argument("graph", type=Path, metavar="W.npz", help="file of save_w")
    result.add_argument("-o", "--out", type=Path, required=True, metavar="perm.json")
    result.add_argument(
        "--time-budget", type=float, default=300.0, metavar="S", help="seconds (default: 300)"
    )
    result.add_argument("--seed", type=int, default=0)
    result.add_argument(
        "--objective",
        choices=("C", "Q", "J"),
        default="J",
        help="distance, modularity, or both (default)",
    )
    result.add_argument(
        "--start", type=Path, metavar="perm.json", help="order to improve (default: identity)"
    )
    result.add_common("print the statistics as JSON")
    return result


def run(arguments: argparse.Namespace) -> None:
    """Solve, write the permutation with its statistics, and print them."""
    from icd_tvm.core.access_graph import load_w
    from icd_tvm.core.permutation import load_permutation, save_permutation
    from icd_tvm.core.solver import fit_permutation
    from icd_tvm.runtime.output import check_writable_file

    check_writable_file(arguments.out)
    graph, about = load_w(arguments.graph)
    start = None if arguments.start is None else load_permutation(arguments.start)[0]
    order, stats = fit_permutation(
        graph,
        time_budget_s=arguments.time_budget,
        rng_seed=arguments.seed,
        objective=arguments.objective,
        start=start,
    )
    record = json.loads(json.dumps(stats.to_dict(), default=float))
    save_permutation(arguments.out, order, {"graph": about, "stats": record})
    if arguments.json or not arguments.quiet:
        print(json.dumps(record, indent=1) if arguments.json else _text(record))


def _text(record: dict[str, Any]) -> str:
    lines = [f"objective {record['objective']}: {_verdict(record)}"]
    for name in _SCORES:
        if record[name] is not None:
            lines.append(f"{name}: {record[f'{name}_before']:.6g} -> {record[name]:.6g}")
    lines.append(
        f"{record['winner']}, {record['iterations']} steps, {record['elapsed_s']:.2f} s, "
        f"stopped by {record['stopped_by']}"
        + ("" if record["deterministic"] else ", not reproducible: the clock decided")
    )
    return "\n".join(lines)


def _verdict(record: dict[str, Any]) -> str:
    if record["improved"]:
        return "improved"
    return f"not improved: {record['reason'] or 'no better order was found'}"
