"""``python -m icd_tvm.compile model.onnx``: compile, re-permute, measure, accept or roll back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from icd_tvm.arguments import Parser, refused
from icd_tvm.errors import IcdError
from icd_tvm.runtime.options import CompileOptions, parse_shape, parse_state

HELP = {
    "model": "ONNX file, or the name of a built-in model (python -m icd_tvm.models --list)",
    "shape": "size of a symbolic input, name=1x128; repeat for more inputs",
    "sparsity": "none (exploit what the model already has), unit:RATE or vec16:RATE",
    "mode": "iterative re-decides the order after the transform; linear keeps the first one",
    "target": "host, x86-64-v3 or x86-64-v4",
    "threads": "worker threads (default: every core)",
    "repeats": "timed calls per arm, at least 30",
    "time_budget": "seconds the solver may spend",
    "peer": "measure this peer beside our arms: onnxruntime",
    "out": "folder for metrics.json",
    "library": "write the accepted arm's compiled library here",
    "no_measure": "do not time anything; no order is accepted on speed",
    "explain": "print every axis group and why the other axes are pinned",
    "quality": "evaluate quality: stsb or stsb:PAIRS (MiniLM only, needs the data)",
    "opaque_state": "input=output, a state that only this model reads; repeat for more states",
    "debug": "show the traceback of an error",
}

EXAMPLES = """examples:
  python -m icd_tvm.compile minilm --sparsity unit:0.5 --peer onnxruntime
  python -m icd_tvm.compile model.onnx --shape input_ids=1x128 --out runs/a -o model.so
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser; a bad argument raises :class:`ConfigError`."""
    parser = Parser(
        prog="python -m icd_tvm.compile",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help=HELP["model"])
    parser.add_argument("--shape", action="append", default=[], help=HELP["shape"])
    parser.add_argument("--sparsity", default="none", help=HELP["sparsity"])
    parser.add_argument(
        "--mode", choices=("iterative", "linear"), default="iterative", help=HELP["mode"]
    )
    parser.add_argument("--target", default="host", help=HELP["target"])
    parser.add_argument("--threads", type=int, help=HELP["threads"])
    parser.add_argument("--repeats", type=int, default=200, help=HELP["repeats"])
    parser.add_argument("--time-budget", type=float, default=30.0, help=HELP["time_budget"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", help=HELP["peer"])
    parser.add_argument("--out", type=Path, help=HELP["out"])
    parser.add_argument("-o", "--library", type=Path, help=HELP["library"])
    parser.add_argument("--no-measure", action="store_true", help=HELP["no_measure"])
    parser.add_argument("--explain", action="store_true", help=HELP["explain"])
    parser.add_argument("--quality", help=HELP["quality"])
    parser.add_argument(
        "--opaque-state", action="append", default=[], metavar="IN=OUT", help=HELP["opaque_state"]
    )
    parser.add_argument("--debug", action="store_true", help=HELP["debug"])
    return parser


def options_from(args: argparse.Namespace) -> CompileOptions:
    """Turn parsed arguments into checked options."""
    return CompileOptions(
        model=args.model,
        shapes=dict(parse_shape(text) for text in args.shape),
        sparsity=args.sparsity,
        mode=args.mode,
        target=args.target,
        threads=args.threads,
        repeats=args.repeats,
        time_budget_s=args.time_budget,
        seed=args.seed,
        peer=args.peer,
        out=args.out,
        library=args.library,
        measure=not args.no_measure,
        explain=args.explain,
        quality=args.quality,
        opaque_states=tuple(parse_state(text) for text in args.opaque_state),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a refused input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = options_from(build_parser().parse_args(arguments))
        _set_threads(options.threads)
        # TVM reads its thread settings when it is first imported.
        from icd_tvm.runtime.compile_model import compile_model

        compile_model(options)
    except IcdError as error:
        return refused(error, arguments)
    return 0


def _set_threads(threads: int | None) -> None:
    os.environ["TVM_NUM_THREADS"] = str(threads or os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
