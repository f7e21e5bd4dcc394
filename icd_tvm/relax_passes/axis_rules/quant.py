"""Quantise and dequantise: scales and zero points follow their axis."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.site import Site, Unsupported, rule


@rule("quantize", "dequantize")
def quantize(site: Site) -> None:
    """Elementwise in the data; per-axis parameters are tied to the axis."""
    data = site.tensor(0)
    site.tie_axes(data.axes, site.result().axes)
    for parameter in site.tensors(1):
        if parameter.rank > 1:
            raise Unsupported("block-wise parameters")
        if parameter.rank == 1:
            site.tie(parameter.axes[0], data.axes[site.axis(data.rank)])
