"""Ops that only rename or regroup axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from icd_tvm._tvm import relax, tvm_ffi
from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule


@rule("reshape", "flatten", "nn.batch_flatten", "squeeze", "expand_dims")
def reshape(site: Site) -> None:
    """Row-major regrouping: minimal blocks of equal size are factored alike."""
    source = _sized(site.tensor(0), site.call.args[0].ty)
    target = _sized(site.result(), site.call.ty)
    _strip_equal(site, source, target, 0)
    _strip_equal(site, source, target, -1)
    left, right = [axis for axis, _ in source], [axis for axis, _ in target]
    if any(axis.size < 0 for axis in (*left, *right)):
        site.pin("reshape with a dynamic size", *left, *right)
        return
    for old, new in _blocks(left, right):
        site.match(old, new, f"reshape {_sizes(old)} to {_sizes(new)}")


def _sized(tensor: Tensor, ty: Any) -> list[tuple[Dim, Any]]:
    """Pair every axis of more than one index with its size expression."""
    sizes = ty.shape.values if isinstance(ty.shape, relax.ShapeExpr) else [None] * tensor.rank
    return [(a, size) for a, size in zip(tensor.axes, sizes, strict=True) if a.size != 1]


def _strip_equal(
    site: Site, source: list[tuple[Dim, Any]], target: list[tuple[Dim, Any]], end: int
) -> None:
    """Tie and drop equal axes at one end, so that a dynamic batch does not stop the rest."""
    while source and target and _equal(source[end], target[end]):
        site.tie(source.pop(end)[0], target.pop(end)[0])


def _equal(left: tuple[Dim, Any], right: tuple[Dim, Any]) -> bool:
    if left[0].size >= 0 or right[0].size >= 0:
        return left[0].size == right[0].size
    known = left[1] is not None and right[1] is not None
    return known and bool(tvm_ffi.structural_equal(left[1], right[1]))


def _blocks(source: Sequence[Dim], target: Sequence[Dim]) -> list[tuple[list[Dim], list[Dim]]]:
    """Cut two row-major sequences into the smallest blocks of equal volume."""
    blocks: list[tuple[list[Dim], list[Dim]]] = []
    left: list[Dim] = []
    right: list[Dim] = []
    volumes = [1, 1]
    rest = [list(reversed(source)), list(reversed(target))]
    while rest[0] or rest[1]:
        side = 0 if rest[0] and (volumes[0] <= volumes[1] or not rest[1]) else 1
        axis = rest[side].pop()
        (right if side else left).append(axis)
        volumes[side] *= axis.size
        if volumes[0] == volumes[1]:
            blocks.append((left, right))
            left, right, volumes = [], [], [1, 1]
    return blocks


def _sizes(axes: Sequence[Dim]) -> str:
    return "x".join(str(axis.size) for axis in axes)


@rule("permute_dims")
def permute_dims(site: Site) -> None:
    """Axes change places."""
    source, target = site.tensor(0), site.result()
    order = site.call.attrs.axes
    axes = range(source.rank)[::-1] if order is None else [int(i) % source.rank for i in order]
    site.tie_axes([source.axes[axis] for axis in axes], target.axes)


@rule("broadcast_to")
def broadcast_to(site: Site) -> None:
    """As in an elementwise op: new and widened axes are tied to nothing."""
    site.broadcast(site.tensor(0), site.result().axes)


@rule("repeat")
def repeat(site: Site) -> None:
    """Each index is repeated in place: the new axis is (old x repeats)."""
    source, target = site.tensor(0), site.result()
    axis = site.axis(source.rank)
    if source.axes[axis].size < 0:
        raise Unsupported("a dynamic axis")
    copies = site.dims.fresh(int(site.call.attrs.repeats))
    site.tie_except(source, target, [axis])
    site.tie(target.axes[axis], site.dims.product([source.axes[axis], copies]))


@rule("tile")
def tile(site: Site) -> None:
    """The whole axis is repeated: the new axis is (repeats x old)."""
    source, target = site.tensor(0), site.result()
    repeats = [int(count) for count in site.call.attrs.repeats]
    width = max(len(repeats), source.rank)
    if target.rank != width:
        raise Unsupported(f"rank {source.rank} tiled to rank {target.rank}")
    repeats = [1] * (width - len(repeats)) + repeats
    axes = [site.dims.fresh(1) for _ in range(width - source.rank)] + list(source.axes)
    for axis, count, out in zip(axes, repeats, target.axes, strict=True):
        if axis.size < 0 and count != 1:
            raise Unsupported("a dynamic axis")
        site.tie(out, site.dims.product([site.dims.fresh(count), axis]))
