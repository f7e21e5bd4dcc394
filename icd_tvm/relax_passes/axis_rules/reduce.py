"""Reductions, scans and sorts."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule


def _tie_kept(site: Site, data: Tensor, result: Tensor, reduced: set[int], keepdims: bool) -> None:
    kept = [axis for i, axis in enumerate(data.axes) if i not in reduced]
    out = [axis for i, axis in enumerate(result.axes) if not (keepdims and i in reduced)]
    site.tie_axes(kept, out)


def _reduce(site: Site) -> list[Dim]:
    """Tie the kept axes and return the reduced ones."""
    data = site.tensor(0)
    reduced = set(site.axes(data.rank, "axis"))
    _tie_kept(site, data, site.result(), reduced, bool(site.call.attrs.keepdims))
    return [data.axes[axis] for axis in reduced]


@rule("sum", "prod")
def total(site: Site) -> None:
    """The order along a reduced axis does not matter."""
    reduced = _reduce(site)
    if site.call.op.name == "relax.prod":
        site.count("a product over the axis", *reduced)


@rule("max", "min")
def extreme(site: Site) -> None:
    """A removed zero changes the result, unless zero is put into the range afterwards."""
    reduced = _reduce(site)
    if not site.with_zero:
        site.count(f"{site.call.op.name[6:]} over the axis", *reduced)


@rule("mean", "variance", "std")
def statistic(site: Site) -> None:
    """As a sum, but a removed zero would change the result."""
    site.count(f"{site.call.op.name[6:]} over the axis", *_reduce(site))


@rule("argmax", "argmin")
def position(site: Site) -> None:
    """The result is an index into the axis, which therefore keeps its order."""
    data, axis = site.tensor(0), site.call.attrs.axis
    reduced = set(range(data.rank)) if axis is None else {int(axis) % data.rank}
    _tie_kept(site, data, site.result(), reduced, bool(site.call.attrs.keepdims))
    site.pin("the result holds positions on the axis", *(data.axes[i] for i in reduced))


@rule("cumsum", "cumprod", "sort", "argsort", "flip")
def along(site: Site) -> None:
    """Scans and sorts fix their axis in data and result; the others pass."""
    data, result = site.tensor(0), site.result()
    if site.call.attrs.axis is None:
        raise Unsupported("works on the flattened tensor")
    axis = site.axis(data.rank)
    site.tie_except(data, result, [axis])
    site.pin(f"{site.call.op.name[6:]} along the axis", data.axes[axis], result.axes[axis])


@rule("reverse_sequence")
def reverse_sequence(site: Site) -> None:
    """Fixes the sequence axis and the axis that has one length per index."""
    raise Unsupported("reverses by length")


@rule("topk")
def topk(site: Site) -> None:
    """Fixes the sorted axis; the others pass to values and indices."""
    data = site.tensor(0)
    axis = site.axis(data.rank)
    results = [site.out] if isinstance(site.out, Tensor) else site.results()
    for result in results:
        if not isinstance(result, Tensor):
            raise Unsupported("a result of unknown rank")
        site.tie_except(data, result, [axis])
        site.pin("sorted order", result.axes[axis])
    site.pin("topk along the axis", data.axes[axis])
