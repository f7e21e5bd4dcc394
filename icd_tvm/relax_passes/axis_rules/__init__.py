"""One small rule per op family, registered by Relax op name in `site.RULES`."""

from icd_tvm.relax_passes.axis_rules import (
    conv,
    create,
    elementwise,
    index,
    matmul,
    norm,
    quant,
    reduce,
    scan,
    scatter,
    segments,
    shape,
)
from icd_tvm.relax_passes.axis_rules.site import RULES, Site, Tensor, Unsupported, rule

__all__ = [
    "RULES",
    "Site",
    "Tensor",
    "Unsupported",
    "conv",
    "create",
    "elementwise",
    "index",
    "matmul",
    "norm",
    "quant",
    "reduce",
    "rule",
    "scan",
    "scatter",
    "segments",
    "shape",
]
