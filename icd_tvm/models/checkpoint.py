"""Read a checkpoint in safetensors form, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.errors import MissingDependencyError, ModelFileError
from icd_tvm.models.onnx_file import first_line
from icd_tvm.models.weights import Float32, Shape, ShapedWeights

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
CONVERT = "only safetensors are read; safetensors.torch.save_file makes one of a PyTorch checkpoint"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class Checkpoint(ShapedWeights):
    """The tensors of a checkpoint by their own names; nothing is read before it is asked for.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` file, or a Hugging Face folder with ``model.safetensors`` or the files
        that ``model.safetensors.index.json`` names.
    rename : callable, optional
        Name in the file -> name here.

    Raises
    ------
    ModelFileError
        No such file or folder, another format, or a damaged file.
    MissingDependencyError
        The safetensors library is absent.
    """

    def __init__(self, path: str | Path, rename: Callable[[str], str] = str) -> None:
        self._places: dict[str, tuple[Any, str]] = {}
        shapes: dict[str, Shape] = {}
        for file in checkpoint_files(Path(path)):
            opened = _open(file)
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                if part.get_dtype() in FLOATS:
                    shapes[rename(key)] = tuple(part.get_shape())
                    self._places[rename(key)] = (opened, key)
        super().__init__(shapes)

    def __getitem__(self, name: str) -> Float32:
        """Read one tensor as float32, whatever float type it is stored in."""
        opened, key = self._places[name]
        return np.asarray(opened.get_tensor(key), dtype=np.float32)


def checkpoint_files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint; errors as `Checkpoint`."""
    if path.is_file():
        return [path]
    index = path / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"cannot read {index}: {first_line(error)}") from error
        if any(Path(str(name)).name != name for name in named):
            raise ModelFileError(f"{index} names files outside its folder")
        return [path / name for name in sorted(named)]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    what = f"holds no {SINGLE}" if path.is_dir() else "does not exist"
    raise ModelFileError(f"checkpoint {path} {what}", CONVERT)


def _open(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingDependencyError(
            "reading a checkpoint needs safetensors", "pip install safetensors"
        ) from error
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:
        raise ModelFileError(f"cannot read {path}: {first_line(error)}", CONVERT) from error
