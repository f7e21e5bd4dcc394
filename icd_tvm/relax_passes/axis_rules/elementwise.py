"""Elementwise ops, with and without broadcasting."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.site import Site, Unsupported, rule

# fmt: off
UNARY = (
    "abs", "acos", "acosh", "asin", "asinh", "astype", "atan", "atanh", "bitwise_not", "ceil",
    "clip", "cos", "cosh", "erf", "exp", "floor", "isfinite", "isinf", "isnan", "log",
    "logical_not", "negative", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "nn.relu", "nn.selu",
    "nn.silu", "nn.softplus", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt",
    "square", "tan", "tanh", "trunc", "builtin.stop_lift_params", "hint_on_device",
    "memory.ensure_zero_offset", "to_vdevice", "wrap_param", "grad.no_grad",
    "grad.start_checkpoint", "grad.end_checkpoint",
)
# fmt: on
# fmt: off
BROADCAST = (
    "add", "atan2", "bitwise_and", "bitwise_or", "bitwise_xor", "divide", "equal",
    "floor_divide", "floor_mod", "greater", "greater_equal", "left_shift", "less", "less_equal",
    "log_add_exp", "logical_and", "logical_or", "logical_xor", "maximum", "minimum", "mod",
    "multiply", "not_equal", "power", "right_shift", "subtract", "where",
)
# fmt: on


@rule(*UNARY)
def unary(site: Site) -> None:
    """Every axis passes; scalar arguments such as clip's bounds play no part."""
    site.tie_axes(site.tensor(0).axes, site.result().axes)
    for extra in site.tensors(1):
        if extra.rank:
            raise Unsupported("a second operand that is no scalar")


@rule(*BROADCAST)
def broadcast(site: Site) -> None:
    """Axes align from the right; an axis of size 1 ties nothing."""
    result = site.result()
    for operand in site.tensors():
        site.broadcast(operand, result.axes)


@rule("nn.dropout")
def dropout(site: Site) -> None:
    """The mask has the axes of the data."""
    for result in site.results():
        site.tie_axes(site.tensor(0).axes, result.axes)


@rule("nn.prelu")
def prelu(site: Site) -> None:
    """One slope per index of one axis."""
    data, slope = site.tensor(0), site.tensor(1)
    site.tie_axes(data.axes, site.result().axes)
    site.tie_axes(slope.axes, (data.axes[site.axis(data.rank)],))


@rule("bucketize")
def bucketize(site: Site) -> None:
    """The boundaries are sorted, the data is free."""
    site.tie_axes(site.tensor(0).axes, site.result().axes)
    site.pin("boundaries are sorted", *site.tensor(1).axes)
