"""Ops that read by index: a constant index can be rewritten, a computed one pins the axis."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule


@rule("take")
def take(site: Site) -> None:
    """The table's other axes pass; index axes take the place of the row axis."""
    table, result = site.tensor(0), site.result()
    if site.call.attrs.axis is None and table.rank != 1:
        raise Unsupported("works on the flattened table")
    axis = 0 if site.call.attrs.axis is None else site.axis(table.rank)
    index = site.args[1] if isinstance(site.args[1], Tensor) else Tensor(())
    site.tie_axes((*table.axes[:axis], *index.axes, *table.axes[axis + 1 :]), result.axes)
    _index_axis(site, index, table.axes[axis])


def _index_axis(site: Site, index: Tensor, row: Dim) -> None:
    if row.size == 1:
        return
    if index.const is None:
        site.pin("indexed by data", row)
        return
    values = index.const.value.numpy()
    if values.size and (values.min() < 0 or values.max() >= row.size):
        site.pin("indexed from the end or out of range", row)
        return
    site.indexed[1] = row


@rule("gather_elements")
def gather_elements(site: Site) -> None:
    """The gathered axis of the data is indexed by data; the index's own order is free."""
    data, index, result = site.tensor(0), site.tensor(1), site.result()
    axis = site.axis(data.rank)
    site.tie_axes(index.axes, result.axes)
    site.pin("indexed by data", data.axes[axis])
    for i in set(range(data.rank)) - {axis}:
        if data.axes[i].size == index.axes[i].size:
            site.tie(data.axes[i], index.axes[i])
        else:
            site.pin("indexed in part", data.axes[i], index.axes[i])


@rule("one_hot")
def one_hot(site: Site) -> None:
    """The new axis counts classes; the index's axes pass."""
    index, result = site.tensor(0), site.result()
    axis = site.axis(result.rank)
    site.tie_axes(index.axes, [dim for i, dim in enumerate(result.axes) if i != axis])
    site.pin("indexed by data", result.axes[axis])
