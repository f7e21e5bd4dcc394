"""``icd``: compile models, see which axes may be permuted, solve, and look after the cache.

Examples
--------
  icd compile minilm --sparsity unit:0.5 --peer onnxruntime
  icd explain model.onnx --shape input_ids=1x128
  icd explain model.onnx --dot groups.dot
  icd calibrate --quick
  icd solve W.npz -o perm.json --time-budget 10
  icd cache ls
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from icd_tvm import compile as compile_command
from icd_tvm.arguments import Parser, refused
from icd_tvm.commands import cache, calibrate, solve
from icd_tvm.errors import ConfigError, IcdError
from icd_tvm.files import write_atomically
from icd_tvm.runtime.options import parse_shape, parse_state

_MODULES = {"calibrate": calibrate, "solve": solve, "cache": cache}
COMMANDS = ("compile", "explain", *_MODULES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a refused input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compile"]:
        return compile_command.main(arguments[1:])
    try:
        if arguments[:1] == ["explain"]:
            _explain(_explain_parser().parse_args(arguments[1:]))
        elif arguments and arguments[0] in _MODULES:
            command = _MODULES[arguments[0]]
            command.run(command.parser().parse_args(arguments[1:]))
        elif arguments[:1] in (["-h"], ["--help"]):
            print(f"usage: icd {{{','.join(COMMANDS)}}} ...\n\n{__doc__}")
        else:
            raise ConfigError(
                f"unknown command {' '.join(arguments[:1])!r}", f"commands: {', '.join(COMMANDS)}"
            )
    except IcdError as error:
        return refused(error, arguments)
    return 0


def _explain_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="icd explain", description="Print every axis group of a model.")
    parser.add_argument("model", help="ONNX file, or the name of a built-in model")
    parser.add_argument("--shape", action="append", default=[], help="name=1x128; may repeat")
    parser.add_argument(
        "--opaque-state",
        action="append",
        default=[],
        metavar="INPUT=OUTPUT",
        help="a state that the same module feeds back to itself; may repeat",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--dot", type=Path, metavar="FILE", help="write a Graphviz picture")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _explain(arguments: argparse.Namespace) -> None:
    from icd_tvm.models.importer import import_onnx
    from icd_tvm.relax_passes.axis_groups import find_axis_groups
    from icd_tvm.relax_passes.explain import explain_dot, explain_json, explain_text
    from icd_tvm.runtime.compile_model import load_model

    shapes = dict(parse_shape(text) for text in arguments.shape)
    states = [parse_state(text) for text in arguments.opaque_state]
    imported = import_onnx(load_model(arguments.model), shapes or None)
    groups = find_axis_groups(imported.mod["main"], opaque_states=states)
    print(explain_json(groups) if arguments.json else explain_text(groups))
    if arguments.dot:
        write_atomically(arguments.dot, lambda path: _write(path, explain_dot(groups)))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
