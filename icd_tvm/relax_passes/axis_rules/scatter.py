"""Ops that read and write by coordinates: the addressed axes are pinned, the others pass."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule


@rule("gather_nd")
def gather_nd(site: Site) -> None:
    """Coordinates [batch, ..., M] address M axes after the batch."""
    data, index, result = site.tensor(0), site.tensor(1), site.result()
    batch = int(site.call.attrs.batch_dims)
    addressed = batch + _coordinates(index)
    site.tie_axes(data.axes[:batch], index.axes[:batch])
    site.tie_axes((*index.axes[:-1], *data.axes[addressed:]), result.axes)
    site.pin("indexed by data", *data.axes[batch:addressed])
    site.pin("holds coordinates", index.axes[-1])


def _coordinates(index: Tensor) -> int:
    if not index.rank or index.axes[-1].size < 0:
        raise Unsupported("an unknown number of coordinates")
    return index.axes[-1].size


@rule("scatter_nd")
def scatter_nd(site: Site) -> None:
    """Coordinates [..., M] address the first M axes; updates are [..., *rest of the data]."""
    data, index, updates = (site.tensor(i) for i in range(3))
    addressed = _coordinates(index)
    site.tie_axes(data.axes, site.result().axes)
    site.tie_axes((*index.axes[:-1], *data.axes[addressed:]), updates.axes)
    site.pin("written by index", *data.axes[:addressed])
    site.pin("holds coordinates", index.axes[-1])
    _pin_writes(site, *index.axes[:-1])


def _pin_writes(site: Site, *axes: Dim) -> None:
    """Where two writes meet the last one stays, so that their order counts."""
    if str(site.call.attrs.reduction) == "update":
        site.pin("of two writes the later one stays", *axes)


@rule("scatter_elements")
def scatter_elements(site: Site) -> None:
    """The axis is addressed; along the others index and updates lie beside the data."""
    data, index, updates = (site.tensor(i) for i in range(3))
    axis = site.axis(data.rank)
    site.tie_axes(data.axes, site.result().axes)
    site.tie_axes(index.axes, updates.axes)
    site.pin("written by index", data.axes[axis])
    _pin_writes(site, index.axes[axis])
    for i in set(range(data.rank)) - {axis}:
        if data.axes[i].size == index.axes[i].size:
            site.tie(data.axes[i], index.axes[i])
        else:
            site.pin("written in part", data.axes[i], index.axes[i])


@rule("slice_scatter")
def slice_scatter(site: Site) -> None:
    """A row of indices is replaced: it is a segment of the axis."""
    data, source, result = site.tensor(0), site.tensor(1), site.result()
    axis = site.axis(data.rank)
    start, end, step = (getattr(bound, "value", None) for bound in site.call.args[2:5])
    if start is None or end is None or step != 1 or data.axes[axis].size < 0:
        raise Unsupported("bounds are computed or have a step")
    site.tie_axes(data.axes, result.axes)
    site.tie_except(source, result, [axis])
    size = data.axes[axis].size
    first, last, _ = slice(int(start), int(end)).indices(size)
    if last - first != source.axes[axis].size:
        raise Unsupported("the slice reaches beyond the axis")
    before, after = site.dims.fresh(first), site.dims.fresh(size - last)
    site.tie(result.axes[axis], site.dims.segments([before, source.axes[axis], after]))


@rule("index_tensor")
def index_tensor(site: Site) -> None:
    """The first axes are addressed, one by each index; the indices' own axes come first."""
    data, result = site.tensor(0), site.result()
    indices = site.fields(1)
    width = max(index.rank for index in indices)
    for index in indices:
        site.broadcast(index, result.axes[:width])
    site.tie_axes(data.axes[len(indices) :], result.axes[width:])
    site.pin("indexed by data", *data.axes[: len(indices)])


@rule("index_put")
def index_put(site: Site) -> None:
    """Every axis of the data is addressed."""
    raise Unsupported("written by index")


@rule("meshgrid")
def meshgrid(site: Site) -> None:
    """Operand i runs along axis i of every result."""
    operands = site.fields()
    if str(site.call.attrs.indexing) != "ij":
        raise Unsupported(f"indexing {site.call.attrs.indexing}")
    for result in site.results():
        site.tie_axes([operand.axes[0] for operand in operands], result.axes)
