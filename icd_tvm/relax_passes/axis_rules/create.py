"""Ops that make tensors, and ops that read shapes only."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.site import Site, rule


@rule("full", "full_like", "ones", "ones_like", "zeros", "zeros_like")
def uniform(site: Site) -> None:
    """All elements are equal, so every order is the same tensor."""
    site.result()


@rule("shape_of", "size", "print", "assert_op", "null_value")
def reads_no_order(site: Site) -> None:
    """Looks at shapes; the order of elements plays no part."""


@rule("arange", "eye", "eye_like", "hamming_window")
def positional(site: Site) -> None:
    """The values depend on their position."""
    site.pin("values depend on their position", *site.result().axes)


@rule("tril", "triu")
def triangle(site: Site) -> None:
    """The last two axes are compared by position."""
    data = site.tensor(0)
    site.tie_axes(data.axes, site.result().axes)
    site.pin("a triangle is cut out by position", *data.axes[-2:])
