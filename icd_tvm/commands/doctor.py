"""``icd doctor``: what can be measured here, what can't, and how to enable it."""

from __future__ import annotations

import argparse
import json

from icd_tvm.arguments import Parser


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd doctor",
        description="Print what can be measured on this machine, what can't, and how to enable it.",
        examples="  icd doctor\n  icd doctor --json\n",
    )
    result.add_common()
    return result


def run(arguments: argparse.Namespace) -> None:
    """Print the capabilities."""
    from icd_tvm.measure.capabilities import capabilities

    found = capabilities()
    if arguments.json:
        print(json.dumps([vars(capability) for capability in found], indent=1))
        return
    width = max(len(capability.name) for capability in found)
    for capability in found:
        mark = "yes" if capability.available else "no "
        print(f"{capability.name:{width}s}  {mark}  {capability.detail}")
