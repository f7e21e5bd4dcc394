"""``icd pair``: the same run in both modes, compared."""

from __future__ import annotations

import argparse
import json

from icd_tvm.arguments import Parser
from icd_tvm.commands.run import HELP, add_config, config_from
from icd_tvm.commands.threads import set_threads

EXAMPLES = """  icd pair -c configs/mock.json --out runs/pair
  icd pair -c configs/minilm-unit.yaml --override pipeline.repeats=200 --out runs/pair
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(prog="icd pair", description=__doc__, examples=EXAMPLES)
    add_config(result)
    result.add_argument("--resume", action="store_true", help=HELP["resume"])
    result.add_common("print the comparison as JSON")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Run both, write ``pair.json``, print the comparison."""
    config = config_from(arguments)
    set_threads(config.threads)
    from icd_tvm.runtime.pair import pair, table
    from icd_tvm.runtime.progress import Progress

    progress = Progress(arguments.quiet or arguments.json)
    found = pair(config, out=arguments.out, resume=arguments.resume, progress=progress)
    print(json.dumps(found) if arguments.json else table(found))
    return 2 if any(found["failures"].values()) else 0
