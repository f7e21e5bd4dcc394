"""Convolutions and what goes with them: pooling and resizing."""

from __future__ import annotations

from typing import Any

from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule


def _lettered(tensor: Tensor, layout: Any) -> dict[str, Dim]:
    text = str(layout)
    if len(text) != tensor.rank or not text.isalpha() or not text.isupper():
        raise Unsupported(f"layout {text}")
    return dict(zip(text, tensor.axes, strict=True))


@rule("nn.conv1d", "nn.conv2d", "nn.conv3d")
def conv(site: Site) -> None:
    """Input channels are (groups x I), output channels O = (groups x rest)."""
    attrs = site.call.attrs
    data = _lettered(site.tensor(0), attrs.data_layout)
    kernel = _lettered(site.tensor(1), attrs.kernel_layout)
    out = _lettered(site.result(), str(attrs.out_layout) or attrs.data_layout)
    _tie_channels(site, data["C"], kernel["I"], kernel["O"], int(attrs.groups))
    site.tie(out["C"], kernel["O"])
    site.tie(out["N"], data["N"])
    for i, letter in enumerate(key for key in data if key not in "NC"):
        if _is_pointwise(attrs, kernel[letter], i):
            site.tie(data[letter], out[letter])
        else:
            site.pin("convolved over", data[letter], kernel[letter], out[letter])


def _is_pointwise(attrs: Any, width: Dim, i: int) -> bool:
    rank = len(attrs.strides)
    padding = [int(p) for p in attrs.padding]
    return width.size == 1 and int(attrs.strides[i]) == 1 and not any(padding[i::rank])


def _tie_channels(site: Site, data: Dim, inner: Dim, outer: Dim, groups: int) -> None:
    """Tie data = (groups x inner); outer = (groups x rest)."""
    if groups == 1:
        site.tie(data, inner)
        return
    if outer.size < 0 or outer.size % groups:
        raise Unsupported(f"{groups} groups do not divide {outer.size} channels")
    group = site.dims.fresh(groups)
    rest = site.dims.fresh(outer.size // groups)
    site.tie(data, site.dims.product([group, inner]))
    site.tie(outer, site.dims.product([group, rest]))


@rule("nn.conv1d_transpose", "nn.conv2d_transpose", "nn.conv3d_transpose")
def conv_transpose(site: Site) -> None:
    """As a convolution with the roles of I and O exchanged."""
    site.count("the op's groups attribute", *site.tensor(1).axes)
    attrs = site.call.attrs
    data = _lettered(site.tensor(0), attrs.data_layout)
    kernel = _lettered(site.tensor(1), attrs.kernel_layout)
    out = _lettered(site.result(), str(attrs.out_layout) or attrs.data_layout)
    _tie_channels(site, out["C"], kernel["O"], kernel["I"], int(attrs.groups))
    site.tie(data["C"], kernel["I"])
    site.tie(out["N"], data["N"])
    for letter in (key for key in data if key not in "NC"):
        site.pin("convolved over", data[letter], kernel[letter], out[letter])


_POOLS = [f"nn.{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg") for n in (1, 2, 3)]


@rule(*_POOLS)
def pool(site: Site) -> None:
    """Batch and channels pass; a pool over all positions does not see their order."""
    attrs = site.call.attrs
    source, target = site.tensor(0), site.result()
    data = _lettered(source, attrs.layout)
    out = _lettered(target, str(attrs.out_layout) or attrs.layout)
    site.tie(data["N"], out["N"])
    site.tie(data["C"], out["C"])
    space = [letter for letter in data if letter not in "NC"]
    for letter in space:
        if "adaptive" in site.call.op.name and out[letter].size == 1:
            site.count("averaged over the axis", data[letter])
        else:
            site.pin("pooled over", data[letter], out[letter])


@rule("image.resize2d", "image.resize3d")
def resize(site: Site) -> None:
    """Batch and channels pass."""
    source, target = site.tensor(0), site.result()
    data = _lettered(source, site.call.attrs.layout)
    out = _lettered(target, site.call.attrs.layout)
    for letter, axis in data.items():
        if letter in "NC":
            site.tie(axis, out[letter])
        else:
            site.pin("resized", axis, out[letter])
