"""FuseDepthwiseConv: a convolution between two transposes runs on the rows as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, const_name, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.index_ops import is_depthwise
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    constant_array,
    is_call,
    is_float32,
    operands,
    rewrite_functions,
    static_shape,
)
from icd_tvm.tir_schedules.cpu.depthwise import depthwise_rows

_VIEWS = ("relax.expand_dims", "relax.squeeze", "relax.reshape")
# The sum over the taps is written out.
_MAX_TAPS = 16
_NEIGHBOURS = "it does not lie between transposes that nothing else reads, with a bias a channel"


@dataclass(frozen=True)
class _Convolution:
    """A convolution over the rows of ``source``, and the constant that is added, if any."""

    source: Any
    call: Any
    added: Any

    def constants(self) -> list[Any]:
        """Return the filters [taps, channels] and the bias [channels]."""
        filters = _array(self.call.args[1])
        bias = np.zeros(len(filters), np.float32) if self.added is None else _array(self.added)
        name = "" if self.added is None else const_name(self.added)
        return [
            named_const(np.ascontiguousarray(filters[:, 0].T), const_name(self.call.args[1])),
            named_const(bias.reshape(-1), name),
        ]

    def stage(self, *tensors: Any) -> Any:
        """Return the TE stage on the rows and the constants."""
        before, after = (int(pad) for pad in self.call.attrs.padding)
        step = int(self.call.attrs.dilation[0])
        return depthwise_rows(*tensors, before=before, after=after, step=step)


@tvm.transform.module_pass(opt_level=0, name="FuseDepthwiseConv")
class FuseDepthwiseConv:
    """Replace ``transpose(conv1d(transpose(x)) + bias)`` by one stage on the rows of x.

    For the short filters over time of state space models, one for every channel: channels are
    neighbours in memory before and after, and only the operator wants them apart. Applies where
    filters and bias are constant, the stride is one, and nothing else reads what lies between
    the convolution and the second transpose. The constants keep their names.

    Attributes
    ----------
    fused : int
        Convolutions replaced.
    refusals : dict of str to str
        Name of each 1-D convolution that was left alone -> the reason.
    """

    def __init__(self) -> None:
        self.fused = 0
        self.refusals: dict[str, str] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the convolutions replaced."""
        self.fused, self.refusals = 0, {}
        mod = rewrite_functions(mod, lambda new, func: _Fuser(new, Dataflow(func), self))
        return relax.transform.DeadCodeElimination()(mod)


@mutator
class _Fuser(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: FuseDepthwiseConv) -> None:
        super().__init__(mod)
        self._owner = owner
        every = {call: _convolution(flow, call) for call in flow.values.values()}
        self._found = {call: found for call, found in every.items() if found is not None}
        fused = {found.call for found in self._found.values()}
        for var, call in flow.values.items():
            if is_call(call, "relax.nn.conv1d") and call not in fused:
                owner.refusals[str(var.name)] = _unsupported(call) or _NEIGHBOURS

    def visit_call_(self, call: Any) -> Any:
        found = self._found.get(call)
        if found is None:
            return super().visit_call_(call)
        self._owner.fused += 1
        source = self.visit_expr(found.source)
        return self.builder_.call_te(
            found.stage, source, *found.constants(), primfunc_name_hint="depthwise_conv"
        )


def _convolution(flow: Dataflow, call: Any) -> _Convolution | None:
    """Return the convolution that a transpose is the end of, or None."""
    result = _behind(flow, call, unshared=True) if _is_exchange(call) else None
    if result is None:
        return None
    added, constant = flow.call(result, "relax.add"), None
    if added is not None:
        result, constant = operands(added)
        if not flow.single_use(result):
            return None
    conv = flow.resolve(result)
    if not is_call(conv, "relax.nn.conv1d") or _unsupported(conv):
        return None
    if added is not None and not _is_bias(constant, conv):
        return None
    source = _behind(flow, conv.args[0])
    if source is None or len(source.ty.shape) != len(call.ty.shape):
        return None
    return _Convolution(source, conv, constant)


def _behind(flow: Dataflow, expr: Any, *, unshared: bool = False) -> Any:
    """Return the tensor of which an expression exchanges the last two axes, or None.

    A leading axis of one may come or go before or after. With ``unshared``, nothing else may
    read what lies between.
    """
    exchanged = False
    for _ in range(2):
        call = flow.resolve(expr)
        if _is_exchange(call) and not exchanged:
            exchanged = True
        elif not _is_view(call):
            break
        expr = call.args[0]
        if unshared and not flow.single_use(expr):
            return None
    return expr if exchanged else None


def _is_exchange(call: Any) -> bool:
    """Tell whether a call exchanges the last two of two or three axes."""
    if not is_call(call, "relax.permute_dims") or not is_float32(call):
        return False
    rank, axes = len(call.ty.shape), call.attrs.axes
    order = list(reversed(range(rank))) if axes is None else [int(axis) for axis in axes]
    return order in ([1, 0], [0, 2, 1])


def _is_view(call: Any) -> bool:
    """Tell whether a call adds or drops a leading axis of one."""
    if not any(is_call(call, op) for op in _VIEWS):
        return False
    new, old = static_shape(call), static_shape(call.args[0])
    return new is not None and old is not None and ((1, *new) == old or new == (1, *old))


def _unsupported(call: Any) -> str:
    """Return why `depthwise_rows` does not compute a convolution, or an empty string."""
    attrs, filters = call.attrs, constant_array(call.args[1], dims=3)
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout))
    if static_shape(call) is None or not is_float32(call):
        return f"it is {call.ty}, not float32 of a known shape"
    if not is_depthwise(call):
        return "it has not one filter for every channel"
    if filters is None or layouts != ("NCW", "OIW"):
        return "its filters are no constant, or its layouts are not NCW and OIW"
    if int(attrs.strides[0]) != 1:
        return f"its stride is {int(attrs.strides[0])}, not 1"
    taps = filters.shape[2]
    return f"it has {taps} taps, more than {_MAX_TAPS}" if taps > _MAX_TAPS else ""


def _is_bias(constant: Any, conv: Any) -> bool:
    """Tell whether a constant has one value for every channel of a convolution."""
    array = constant_array(constant)
    channels = conv.args[1].ty.shape.values[0]
    return array is not None and array.shape in ((1, int(channels), 1), (int(channels), 1))


def _array(constant: Any) -> npt.NDArray[Any]:
    return np.asarray(constant.value.numpy())
