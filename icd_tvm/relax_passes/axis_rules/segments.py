"""Concat, split, slice, pad and stack: segments of an axis stay where they are."""

from __future__ import annotations

from icd_tvm._tvm import GenericConst, relax
from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule, static_size


@rule("concat")
def concat(site: Site) -> None:
    """The result's axis is a row of the operands' axes."""
    operands, result = site.fields(), site.result()
    if site.call.attrs.axis is None:
        raise Unsupported("works on flattened tensors")
    axis = site.axis(result.rank)
    for operand in operands:
        site.tie_except(operand, result, [axis])
    site.tie(result.axes[axis], site.dims.segments(operand.axes[axis] for operand in operands))


@rule("split")
def split(site: Site) -> None:
    """The inverse of concat."""
    data, results = site.tensor(0), site.results()
    axis = site.axis(data.rank)
    for result in results:
        site.tie_except(data, result, [axis])
    parts = [result.axes[axis] for result in results]
    if sum(part.size for part in parts) != data.axes[axis].size:
        raise Unsupported("the parts overlap or leave a rest")
    site.tie(data.axes[axis], site.dims.segments(parts))


@rule("stack")
def stack(site: Site) -> None:
    """The new axis counts the operands."""
    operands, result = site.fields(), site.result()
    axis = 0 if site.call.attrs.axis is None else site.axis(result.rank)
    others = [dim for i, dim in enumerate(result.axes) if i != axis]
    for operand in operands:
        site.tie_axes(operand.axes, others)
    site.pin("stack counts its operands", result.axes[axis])


@rule("strided_slice")
def strided_slice(site: Site) -> None:
    """A slice with step 1 is a segment; with step k it takes one index of a factor k."""
    data, result = site.tensor(0), site.result()
    axes, begins, ends, strides = _slice_arguments(site, data)
    site.tie_except(data, result, axes)
    for axis, begin, end, stride in zip(axes, begins, ends, strides, strict=True):
        _slice_axis(site, data.axes[axis], result.axes[axis], begin, end, stride)


def _slice_arguments(site: Site, data: Tensor) -> tuple[list[int], list[int], list[int], list[int]]:
    lists = [_integers(argument) for argument in site.call.args[1:5]]
    axes, begins, ends = ([*lists[0]], [*lists[1]], [*lists[2]])
    strides = lists[3] if len(lists) > 3 else [1] * len(axes)
    return [axis % data.rank for axis in axes], begins, ends, strides


def _integers(argument: object) -> list[int]:
    """Read a tuple of immediates, a shape or a constant tensor."""
    if isinstance(argument, GenericConst):
        return [int(value) for value in argument.value.numpy().ravel()]
    if not isinstance(argument, relax.Tuple | relax.ShapeExpr):
        raise Unsupported("bounds are computed")
    values = argument.fields if isinstance(argument, relax.Tuple) else argument.values
    numbers = [getattr(value, "value", value) for value in values]
    if not all(isinstance(number, int) for number in numbers):
        raise Unsupported("bounds are symbolic")
    return [int(number) for number in numbers]


def _slice_axis(site: Site, source: Dim, target: Dim, begin: int, end: int, stride: int) -> None:
    size = source.size
    if size < 0 or stride < 1:
        site.pin("sliced with a dynamic size or backwards", source, target)
        return
    start, stop, _ = slice(begin, end, stride).indices(size)
    if len(range(start, stop, stride)) != target.size:
        site.pin("sliced beyond its bounds", source, target)
    elif stride == 1:
        before, after = site.dims.fresh(start), site.dims.fresh(size - stop)
        site.tie(source, site.dims.segments([before, target, after]))
    elif size % stride == 0 and start < stride and target.size == size // stride:
        phase = site.dims.fresh(stride)
        site.pin(f"every {stride}th index is sliced", phase)
        site.tie(source, site.dims.product([target, phase]))
    else:
        site.pin(f"sliced with step {stride}", source, target)


@rule("dynamic_strided_slice")
def dynamic_strided_slice(site: Site) -> None:
    """The bounds are known only at run time."""
    raise Unsupported("bounds are computed")


@rule("nn.pad")
def pad(site: Site) -> None:
    """Constant padding adds segments; other modes copy positions."""
    data, result, attrs = site.tensor(0), site.result(), site.call.attrs
    widths = [static_size(width) for width in attrs.pad_width]
    if len(widths) != 2 * data.rank:
        raise Unsupported(f"{len(widths)} widths for rank {data.rank}")
    for i, (source, target) in enumerate(zip(data.axes, result.axes, strict=True)):
        before, after = widths[2 * i : 2 * i + 2]
        if not before and not after:
            site.tie(source, target)
        elif str(attrs.pad_mode) != "constant" or min(before, after, source.size) < 0:
            site.pin(f"padded in mode {attrs.pad_mode}", source, target)
        else:
            row = [site.dims.fresh(before), source, site.dims.fresh(after)]
            site.tie(target, site.dims.segments(row))
