"""``python -m icd_tvm.models minilm --seq 128 -o minilm.onnx``: write an example model."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

from icd_tvm.errors import ConfigError, IcdError, OutputError
from icd_tvm.files import write_atomically
from icd_tvm.models.registry import MODELS, build

USAGE_ERROR = 2
OPTIONS = ("seq", "batch", "seed", "layers", "checkpoint")


def save_model(model: onnx.ModelProto, path: str | Path) -> Path:
    """Write a model so that the file is either whole or not there.

    Parameters
    ----------
    model : onnx.ModelProto
    path : str or Path
        Its folder must exist.

    Returns
    -------
    Path

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    return write_atomically(path, lambda temporary: _save(model, temporary))


def _save(model: onnx.ModelProto, path: Path) -> None:
    try:
        path.write_bytes(model.SerializeToString())
    except ValueError as error:
        raise OutputError(f"cannot write {path.name}: {error}") from error


def _beside(name: str, output: Path) -> dict[str, Path]:
    """Return where a model that may exceed a proto puts its weights."""
    entry = MODELS.get(name)
    large = entry is not None and "data" in inspect.signature(entry[0]).parameters
    return {"data": output.with_name(f"{output.name}.data")} if large else {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m icd_tvm.models", description="Write an example model as ONNX."
    )
    parser.add_argument("model", nargs="?", help=f"one of: {', '.join(MODELS)}")
    parser.add_argument("--seq", type=int, help="sequence length")
    parser.add_argument("--batch", type=int, help="batch size")
    parser.add_argument("--seed", type=int, help="seed of random weights")
    parser.add_argument("--layers", type=int, help="fewer layers of a Mamba")
    parser.add_argument("--checkpoint", help="safetensors file or folder with trained weights")
    parser.add_argument("-o", "--output", help="file to write; default MODEL.onnx")
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (2 after an error)."""
    options = _parser().parse_args(arguments)
    if options.list:
        for name, (_, text) in MODELS.items():
            print(f"{name:26} {text}")
        return 0
    try:
        if not options.model:
            raise ConfigError("no model named", f"models: {', '.join(MODELS)}")
        given = {key: getattr(options, key) for key in OPTIONS}
        chosen = {key: value for key, value in given.items() if value is not None}
        output = Path(options.output or f"{options.model}.onnx")
        path = save_model(build(options.model, **chosen, **_beside(options.model, output)), output)
    except IcdError as error:
        print(error.line(), file=sys.stderr)
        return USAGE_ERROR
    print(f"wrote {path} ({path.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
