"""The selective scan kernel: time stays, channels and states move together."""

from __future__ import annotations

from icd_tvm._tvm import tvm
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule

_KERNEL = "selective_scan"


@rule("call_tir")
def call_tir(site: Site) -> None:
    """Every tensor is [time, *state] with size 1 where it does not run along an axis."""
    callee = site.call.args[0]
    name = callee.name_hint if isinstance(callee, tvm.ir.GlobalVar) else "an expression"
    if name.rstrip("0123456789_") != _KERNEL:
        raise Unsupported(f"no rule for the kernel {name}")
    results = [site.out] if isinstance(site.out, Tensor) else site.results()
    tensors = [*site.fields(1), *(item for item in results if isinstance(item, Tensor))]
    start = tensors[0]
    for tensor in tensors:
        site.pin("time of a scan", tensor.axes[0])
        site.tie_axes(tensor.axes[1:], start.axes[1:])
    site.role("channels of a scan", *start.axes[1:-1])
    site.role("states of a scan", start.axes[-1])
