"""The trained Mamba of the package typeseg: a class for every byte of a file.

The package (Apache-2.0) holds an ONNX file: six bidirectional Mamba blocks of width 256, 1.36 M
parameters. Only its file is read.
"""

from __future__ import annotations

import onnx

from icd_tvm.errors import ShapeError
from icd_tvm.models.onnx_file import load_proto
from icd_tvm.models.package_files import package_file

PACKAGE = "typeseg"
FILE = "data/mamba_al.onnx"
INSTALL_HINT = "pip install --no-deps typeseg==0.2.7"


def build_typeseg(seq: int = 512) -> onnx.ModelProto:
    """Read the model for a window of ``seq`` bytes.

    Parameters
    ----------
    seq : int

    Returns
    -------
    onnx.ModelProto
        Opset 17. Input ``ids``, int64 ``[seq]``, bytes and two marks (130 rows); output
        ``logits``, float32 ``[seq, 35]``. The metadata says ``text: bytes``.

    Raises
    ------
    MissingDependencyError
        The package or its file is absent.
    ModelFileError
        The file is damaged.
    ShapeError
        seq is below 1.
    """
    if seq < 1:
        raise ShapeError(f"seq {seq} is below 1")
    model = load_proto(package_file(PACKAGE, FILE, INSTALL_HINT))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = seq
    del model.graph.value_info[:]
    model.graph.name = "typeseg"
    onnx.helper.set_model_props(model, {"weights": "trained", "text": "bytes"})
    return model
