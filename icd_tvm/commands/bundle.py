"""``icd bundle``: a finished run as one archive for a host without a network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from icd_tvm.arguments import Parser
from icd_tvm.errors import ConfigError

DESCRIPTION = """Pack what an offline host needs to run a compiled model: the library with its
weights, names and shapes of inputs and outputs, the orders, the configuration, checksums, run.py,
exact versions of the packages. Equal runs make equal archives."""
HELP = {
    "run": "directory of a finished run",
    "output": "archive to write",
    "wheels": "include the wheel files of this folder (pip download -d DIR ...); "
    "apache-tvm's is about 100 MiB, of which 4.5 MiB are the runtime",
    "verify": "compare the checksums of a bundle, unpack nothing",
}
EXAMPLES = """  icd bundle runs/unit -o unit.tar.gz
  icd bundle runs/unit -o unit.tar.gz --wheels wheels/
  icd bundle --verify unit.tar.gz
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(prog="icd bundle", description=DESCRIPTION, examples=EXAMPLES)
    result.add_argument("run", type=Path, nargs="?", metavar="RUN", help=HELP["run"])
    result.add_argument("-o", "--output", type=Path, metavar="FILE", help=HELP["output"])
    result.add_argument("--wheels", type=Path, metavar="DIR", help=HELP["wheels"])
    result.add_argument("--verify", type=Path, metavar="FILE", help=HELP["verify"])
    result.add_common("print the members as JSON")
    return result


def run(arguments: argparse.Namespace) -> None:
    """Pack or verify, and say what is inside."""
    from icd_tvm.runtime.bundle import verify_bundle, write_bundle

    packing = arguments.run is not None and arguments.output is not None
    if packing == (arguments.verify is not None):
        raise ConfigError("nothing to do", "icd bundle RUN -o FILE, or icd bundle --verify FILE")
    archive = arguments.output if packing else arguments.verify
    if packing:
        write_bundle(arguments.run, archive, arguments.wheels)
    found = verify_bundle(archive)
    if arguments.json:
        print(json.dumps(found))
    elif not arguments.quiet:
        print(f"{archive}: {len(found)} files, {archive.stat().st_size / 2**20:.1f} MiB, sound")
