"""``icd``: re-decide the layout of compressed models, measure it, keep it only if it pays.

examples:
  icd compile minilm --sparsity unit:0.5 --peer onnxruntime
  icd run -c configs/mock.json --override pipeline.mode=iterative --out runs/iter
  icd run --resume --out runs/iter
  icd pair -c configs/minilm-unit.yaml --out runs/pair
  icd sweep -c configs/sweeps/rates.yaml --out runs/rates
  icd bundle runs/iter -o iter.tar.gz
  icd explain model.onnx --dot groups.dot

icd COMMAND --help says more; icd completion bash prints a completion script.
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from icd_tvm import __version__
from icd_tvm.arguments import refused
from icd_tvm.errors import ConfigError, IcdError

# Command -> module with parser() and run(arguments), and what it does. Loaded on use.
COMMANDS = {
    "run": ("icd_tvm.commands.run", "everything in a run directory that can be resumed"),
    "pair": ("icd_tvm.commands.pair", "linear and iterative, compared"),
    "sweep": ("icd_tvm.commands.sweep", "a grid of runs, resumable, with one summary"),
    "compile": ("icd_tvm.commands.compile", "one model, one result, no directory needed"),
    "explain": ("icd_tvm.commands.explain", "which axes may move, and what pins the others"),
    "roofline": ("icd_tvm.commands.roofline", "predicted time of each CUDA kernel, from counts"),
    "calibrate": ("icd_tvm.commands.calibrate", "rank the cost terms against measured time"),
    "solve": ("icd_tvm.commands.solve", "an order of one axis, from a file of W"),
    "cache": ("icd_tvm.commands.cache", "look after the orders that earlier runs decided"),
    "report": ("icd_tvm.commands.report", "one HTML page about a run, or several compared"),
    "doctor": ("icd_tvm.commands.doctor", "what can be measured here, and how to enable the rest"),
    "bundle": ("icd_tvm.commands.bundle", "a finished run as an archive for an offline host"),
    "schema": ("icd_tvm.commands.schema", "every configuration key"),
    "completion": ("icd_tvm.commands.completion", "completion script for bash or zsh"),
}
INTERRUPTED = 130
# What a shell reports of a process that SIGPIPE ended.
CLOSED_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a refused input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE


def _reader_is_gone() -> bool:
    """Say whether it is our output that nobody reads, not a pipe to another process."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _main(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        print(_help())
        return 0
    if arguments[:1] == ["--version"]:
        print(f"icd {__version__}")
        return 0
    try:
        command = load_command(" ".join(arguments[:1]))
        return int(command.run(_parsed(command, arguments[1:])) or 0)
    except IcdError as error:
        return refused(error, arguments)
    except KeyboardInterrupt:
        print("stopped; --resume continues a run or a sweep", file=sys.stderr)
        return INTERRUPTED


def load_command(name: str) -> Any:
    """Return the module of a command; ConfigError names the nearest one."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name!r}", hint)
    return import_module(COMMANDS[name][0])


def _parsed(command: Any, arguments: list[str]) -> argparse.Namespace:
    parsed: argparse.Namespace = command.parser().parse_args(arguments)
    return parsed


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: icd COMMAND ...", "", "commands:", *lines, "", str(__doc__).strip()])


if __name__ == "__main__":
    sys.exit(main())
