"""QuantizeKVStates: a decoder step keeps its KV cache in 8 or 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icd_tvm._tvm import Var, apply_pass, relax, tvm
from icd_tvm.adapters.kv_quant import INT8_MAX, SCALE_SUFFIX, STATE_TYPES, TINY, StateDtype
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags, opaque_states
from icd_tvm.relax_passes.cache_append import CacheAppend, find_appends
from icd_tvm.relax_passes.relax_graph import is_float32, static_shape


@tvm.transform.module_pass(opt_level=0, name="QuantizeKVStates")
class QuantizeKVStates:
    """Store states in 8 or 16 bits; the new token's row is rounded once, when it is appended.

    In 8 bits a state [1, heads, slots, channels] of float32 becomes two: codes of the same name
    and shape, and scales [1, heads, slots, 1] under ``NAME_scale``, which are appended to inputs
    and outputs. The block of a scale is one token of one head, so nothing that is stored ever
    changes. What reads the state gets ``codes * scale``, which `FuseDecodeAttention` takes into
    its kernel. The error of a number is at most half a scale, ``max |row| / 254``.

    In 16 bits a state only changes its dtype, and what reads it gets it widened. The relative
    error of a number is at most 2**-11 (float16) or 2**-8 (bfloat16); float16 holds numbers up to
    65504, a larger one becomes infinite.

    Parameters
    ----------
    names : sequence of str
        Inputs to be quantised.
    opaque_states : sequence of (str, str), optional
        (input, output) names of all states; those of the module's layout tag if omitted. The tag
        of the result has the scales too.
    dtype : {"int8", "fp16", "bf16"}

    Raises
    ------
    TransformError
        A state is no float32, or the step does anything but append to it.
    """

    def __init__(
        self,
        names: Sequence[str],
        opaque_states: Sequence[tuple[str, str]] | None = None,
        dtype: StateDtype = "int8",
    ) -> None:
        self.names = tuple(names)
        self.dtype = dtype
        self.opaque_states = None if opaque_states is None else tuple(opaque_states)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a module with quantised states."""
        states = list(opaque_states(mod) if self.opaque_states is None else self.opaque_states)
        func = mod["main"]
        found, refusals = find_appends(func, states)
        for name in self.names:
            _check(name, found, refusals)
        mod, first = mod.clone(), len(func.ret_ty.fields)
        mod["main"] = _Quantizer([found[name] for name in self.names], self.dtype).function(func)
        mod = relax.transform.DeadCodeElimination()(relax.transform.Normalize()(mod))
        if self.dtype == "int8":
            for place, name in enumerate(self.names, first):
                states.append((name + SCALE_SUFFIX, str(place)))
        own = {name: str(found[name].output) for name in self.names}
        states = [(name, own.get(name, output)) for name, output in states]
        return apply_pass(AttachLayoutTags(states), mod)


def _check(name: str, found: dict[str, CacheAppend], refusals: dict[str, str]) -> None:
    if name not in found:
        why = refusals.get(name, "it is no opaque state")
        raise TransformError(f"state {name!r} cannot be quantised: {why}")
    if not is_float32(found[name].past):
        raise TransformError(f"state {name!r} is {found[name].past.ty.dtype}, not float32")


class _Quantizer:
    """Rebuilds a function: every variable that is not a state stays the one it was."""

    def __init__(self, appends: Sequence[CacheAppend], dtype: StateDtype) -> None:
        self._appends = {append.result: append for append in appends}
        self._dtype = str(STATE_TYPES[dtype])
        self._builder = relax.BlockBuilder()
        self._bindings: list[Any] = []
        self._outputs: dict[int, tuple[Any, ...]] = {}
        self._params: dict[Any, Any] = {}
        self._scales: list[Any] = []
        self._body: Any = None

    def function(self, func: Any) -> Any:
        """Return the function with quantised states."""
        for append in self._appends.values():
            self._make_params(append.past)
        self._body = func.body.body
        blocks = [self._block(block) for block in func.body.blocks]
        if isinstance(self._body, relax.Tuple):
            self._body = self._tuple(self._body)
        attrs = dict(func.attrs.items()) if func.attrs else {}
        inputs = int(attrs.get("num_input", len(func.params)))
        params = [self._params.get(param, param) for param in func.params]
        params[inputs:inputs] = self._scales
        if "num_input" in attrs:
            attrs["num_input"] = inputs + len(self._scales)
        body = self._builder.normalize(relax.SeqExpr(blocks, self._body))
        return relax.Function(
            params, body, body.ty, func.is_pure, tvm.ir.make_node("ir.DictAttrs", **attrs)
        )

    def _make_params(self, past: Any) -> None:
        shape = static_shape(past)
        assert shape is not None
        self._params[past] = Var(past.name, relax.TensorType(shape, self._dtype))
        if self._dtype == "int8":
            scale = relax.TensorType((*shape[:-1], 1), "float32")
            self._scales.append(Var(past.name + SCALE_SUFFIX, scale))

    def _block(self, block: Any) -> Any:
        self._bindings = []
        for binding in block.bindings:
            append = self._appends.get(binding.var)
            if append is not None:
                self._append(append)
            elif isinstance(binding.value, relax.Tuple) and binding.var.same_as(self._body):
                self._body = self._bind(self._tuple(binding.value), binding.var, self._joined())
            else:
                self._bindings.append(binding)
        return type(block)(self._bindings, block.span)

    def _joined(self) -> str:
        """Return the name of the outputs, which joins theirs with ``/`` where it did."""
        name = str(self._body.name)
        more = [str(scale.name) for scale in self._scales]
        return "/".join([name, *more]) if "/" in name else name

    def _bind(self, value: Any, like: Any, name: str) -> Any:
        value = self._builder.normalize(value)
        var = type(like)(name, value.ty)
        self._bindings.append(relax.VarBinding(var, value))
        return var

    def _append(self, append: CacheAppend) -> None:
        """Emit the row as it is stored, its append, and the state as numbers."""
        name = str(append.result.name)

        def emit(value: Any, what: str) -> Any:
            return self._bind(value, relax.DataflowVar("", None), f"{name}_{what}")

        store = self._coded if self._dtype == "int8" else self._narrowed
        value, self._outputs[append.output] = store(append, emit)
        self._bindings.append(relax.VarBinding(append.result, self._builder.normalize(value)))

    def _narrowed(
        self, append: CacheAppend, emit: Callable[[Any, str], Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Return the new state as numbers, and as it is stored."""
        row = emit(relax.op.astype(append.row, self._dtype), "row_stored")
        state = emit(relax.op.where(append.mark, row, self._params[append.past]), "stored")
        return relax.op.astype(state, "float32"), (state,)

    def _coded(
        self, append: CacheAppend, emit: Callable[[Any, str], Any]
    ) -> tuple[Any, tuple[Any, ...]]:
        """Return the new state as numbers, and as codes and scales."""
        op = relax.op
        peak = emit(op.abs(append.row), "abs")
        peak = emit(op.max(peak, [-1], keepdims=True), "peak")
        scale = emit(op.divide(peak, relax.const(np.float32(INT8_MAX))), "step")
        scale = emit(op.maximum(scale, relax.const(TINY)), "row_scale")
        codes = emit(op.round(emit(op.divide(append.row, scale), "ratio")), "round")
        codes = emit(op.astype(codes, "int8"), "row_codes")
        past = self._params[append.past]
        past_scale = self._scales[list(self._params).index(append.past)]
        codes = emit(op.where(append.mark, codes, past), "codes")
        scale = emit(op.where(append.mark, scale, past_scale), "scale")
        wide = emit(op.astype(codes, "float32"), "wide")
        return op.multiply(wide, scale), (codes, scale)

    def _tuple(self, value: Any) -> Any:
        fields = [self._outputs.get(i, (field,))[0] for i, field in enumerate(value.fields)]
        places = {append.result: append.output for append in self._appends.values()}
        scales = [scale for place in places.values() for scale in self._outputs[place][1:]]
        return relax.Tuple([*fields, *scales])
