"""Converters from ONNX operators to Relax, one operator family a file.

A converter is looked up by domain and name, so that namesakes of other domains stay apart.
What is not listed here is left to the converters of TVM's own frontend.
"""

from __future__ import annotations

from icd_tvm.models.converters.attention import CONVERTERS as ATTENTION
from icd_tvm.models.converters.attention_contrib import CONVERTERS as ATTENTION_CONTRIB
from icd_tvm.models.converters.attention_gqa import CONVERTERS as ATTENTION_GQA
from icd_tvm.models.converters.causal_conv import CONVERTERS as CAUSAL_CONV
from icd_tvm.models.converters.gated import CONVERTERS as GATED
from icd_tvm.models.converters.integer import CONVERTERS as INTEGER
from icd_tvm.models.converters.integer_conv import CONVERTERS as INTEGER_CONV
from icd_tvm.models.converters.linear_attention import CONVERTERS as LINEAR_ATTENTION
from icd_tvm.models.converters.matmul_nbits import CONVERTERS as MATMUL_NBITS
from icd_tvm.models.converters.node import Converter, OnnxNode
from icd_tvm.models.converters.norms import CONVERTERS as NORMS
from icd_tvm.models.converters.quantize_linear import CONVERTERS as QUANTIZE_LINEAR
from icd_tvm.models.converters.rotary import CONVERTERS as ROTARY
from icd_tvm.models.converters.scan import CONVERTERS as SCAN
from icd_tvm.models.converters.standard import CONVERTERS as STANDARD

__all__ = ["CONVERTERS", "Converter", "OnnxNode", "find_converter"]

# (domain, operator) -> converter; the standard domain is the empty string.
CONVERTERS: dict[tuple[str, str], Converter] = {
    **STANDARD,
    **ATTENTION,
    **ATTENTION_CONTRIB,
    **ATTENTION_GQA,
    **CAUSAL_CONV,
    **GATED,
    **INTEGER,
    **INTEGER_CONV,
    **LINEAR_ATTENTION,
    **MATMUL_NBITS,
    **NORMS,
    **QUANTIZE_LINEAR,
    **ROTARY,
    **SCAN,
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
