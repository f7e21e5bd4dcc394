"""Converters from ONNX operators to Relax, one operator family a file.

A converter is looked up by domain and name, so that namesakes of other domains stay apart.
What is not listed here is left to the converters of TVM's own frontend.
"""

from __future__ import annotations

from icd_tvm.models.converters import matmul_nbits, norms, rotary
from icd_tvm.models.converters.node import Converter, OnnxNode

__all__ = ["CONVERTERS", "Converter", "OnnxNode", "find_converter"]

# (domain, operator) -> converter; the standard domain is the empty string.
CONVERTERS: dict[tuple[str, str], Converter] = {
    **matmul_nbits.CONVERTERS,
    **norms.CONVERTERS,
    **rotary.CONVERTERS,
}


def find_converter(domain: str, op: str) -> Converter | None:
    """Return the converter of an operator, or None if there is none here.

    Parameters
    ----------
    domain : str
        ``"ai.onnx"`` and the empty string both mean the standard operators.
    op : str
    """
    return CONVERTERS.get(("" if domain == "ai.onnx" else domain, op))
