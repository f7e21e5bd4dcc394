"""The converters of standard ONNX operators, assembled from one file a family."""

from __future__ import annotations

from icd_tvm.models.converters import (
    standard_activation,
    standard_cast,
    standard_cumulative,
    standard_elementwise,
    standard_index,
    standard_normalization,
    standard_partial,
    standard_recurrent,
    standard_reduce,
    standard_resize,
    standard_shape,
    standard_signal,
)
from icd_tvm.models.converters.node import Converter

_FAMILIES = (
    standard_activation,
    standard_cast,
    standard_cumulative,
    standard_elementwise,
    standard_index,
    standard_normalization,
    standard_partial,
    standard_recurrent,
    standard_reduce,
    standard_resize,
    standard_shape,
    standard_signal,
)

CONVERTERS: dict[tuple[str, str], Converter] = {
    key: converter for family in _FAMILIES for key, converter in family.CONVERTERS.items()
}
