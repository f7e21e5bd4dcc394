"""Products: matmul, einsum, outer and the fused attention op."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Tensor, Unsupported, rule


@rule("matmul")
def matmul(site: Site) -> None:
    """K ties to K, M to M, N to N; batch axes broadcast."""
    left, right, out = site.tensor(0), site.tensor(1), list(site.result().axes)
    if not left.rank or not right.rank:
        raise Unsupported("a scalar operand")
    site.tie(left.axes[-1], right.axes[max(right.rank - 2, 0)])
    if right.rank > 1:
        site.tie(right.axes[-1], out.pop())
    if left.rank > 1:
        site.tie(left.axes[-2], out.pop())
    site.broadcast(Tensor(left.axes[:-2]), out)
    site.broadcast(Tensor(right.axes[:-2]), out)
    if left.const is None and right.const is None and right.rank > 2:
        _name_heads(site, left, right)


def _name_heads(site: Site, left: Tensor, right: Tensor) -> None:
    """Describe the axes of scores (q k^T) and of their product with the values."""
    heads = [axis for axis in left.axes[:-2] if axis.size > 1]
    if not heads:
        return
    site.role("heads", *heads[-1:])
    if any("softmax" in leaf.roles for leaf in left.axes[-1].leaves()):
        site.role("inside a head: v", right.axes[-1])
    else:
        site.role("inside a head: q k", left.axes[-1])


@rule("outer")
def outer(site: Site) -> None:
    """Both vectors pass."""
    site.tie_axes((*site.tensor(0).axes, *site.tensor(1).axes), site.result().axes)


@rule("einsum")
def einsum(site: Site) -> None:
    """Equal letters are one axis."""
    operands, result = site.fields(), site.result()
    text = str(site.call.attrs.subscripts).replace(" ", "")
    if "." in text or "->" not in text:
        raise Unsupported(f"subscripts {text!r}")
    inputs, output = text.split("->")
    letters: dict[str, list[Dim]] = {}
    for term, tensor in zip([*inputs.split(","), output], [*operands, result], strict=True):
        if len(term) != tensor.rank:
            raise Unsupported(f"subscripts {text!r}")
        for letter, axis in zip(term, tensor.axes, strict=True):
            letters.setdefault(letter, []).append(axis)
    for axes in letters.values():
        widest = max(axes, key=lambda axis: axis.size)
        for axis in axes:
            site.tie(widest, axis)


@rule("nn.attention", "nn.attention_bias")
def attention(site: Site) -> None:
    """softmax(q k^T) v on [batch, sequence, head, channel] operands."""
    query, key, value, out = (*(site.tensor(i) for i in range(3)), site.result())
    if any(tensor.rank != 4 for tensor in (query, key, value, out)):
        raise Unsupported("operands of rank other than 4")
    if query.axes[2].size != key.axes[2].size:
        raise Unsupported("grouped-query attention inside one op")
    for i in (0, 2):
        for tensor in (query, key, value):
            site.tie(tensor.axes[i], out.axes[i])
    site.tie(query.axes[1], out.axes[1])
    site.tie(key.axes[1], value.axes[1])
    site.tie(query.axes[3], key.axes[3])
    site.tie(value.axes[3], out.axes[3])
    site.role("heads", query.axes[2])
    site.role("inside a head: q k", query.axes[3])
    site.role("inside a head: v", value.axes[3])
    site.count("softmax over the axis", key.axes[1])
    site.count("the score scale follows the width", query.axes[3])
    for bias in site.tensors(3):
        site.broadcast(bias, (out.axes[0], out.axes[2], query.axes[1], key.axes[1]))
    if site.call.attrs.causal_mask is not None or site.call.attrs.window_size is not None:
        site.pin("causal or windowed mask", query.axes[1], key.axes[1])


@rule("nn.attention_var_len")
def attention_var_len(site: Site) -> None:
    """Sequences are packed by offsets: too irregular for a rule."""
    raise Unsupported("sequences packed by offsets")
