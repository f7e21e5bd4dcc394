"""SelectCudaKernels: products, attention, norms and Mamba steps become kernels of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from icd_tvm._tvm import GenericConst, PyExprMutator, mutator, relax, tvm
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.attach_layout_tags import opaque_states
from icd_tvm.relax_passes.cuda_match import find_kernels
from icd_tvm.relax_passes.cuda_plan import Operand, Planned, narrow_values
from icd_tvm.relax_passes.relax_graph import is_float32, rewrite_functions, static_shape
from icd_tvm.tir_schedules.cuda.placed import in_place, placed
from icd_tvm.tir_schedules.cuda.source_kernel import Argument, SourceKernel

CUDA_KERNELS_ATTR = "icd.cuda_kernels"


@dataclass(frozen=True)
class CudaChoice:
    """The kernel of one operator, or ``tvm``.

    Attributes
    ----------
    kind : str
        Family.
    live : int
        Live blocks in a list; 0 where all are.
    reason : str
        Why this one, and what was not fused.
    fused : tuple of str
        What else it computes.
    """

    kind: str
    live: int
    reason: str
    fused: tuple[str, ...] = ()


@tvm.transform.module_pass(opt_level=0, name="SelectCudaKernels")
class SelectCudaKernels:
    """Replace what a kernel of `tir_schedules.cuda` computes by calls of it.

    Products with a constant weight, of int8 where `MarkInt8Products` says so, with codes where
    `HoldWeightOnly` does, take a bias, GELU, ReLU or SiLU and a residual along; encoder and
    decoding attention, layer and RMS norms, and the parts of a Mamba layer are kernels of their
    own. int8 codes are written by what makes their values where that can be. Values between two
    kernels have the type ``dtype`` where one of them asks for it; all sums of floats are float32.
    Opaque states are written in place. Packed constants keep the name of the weight; scales, sums
    and lists of live blocks are named after it with ``.scale``, ``.sums`` and ``.blocks`` appended.
    Weights that are 2:4 are multiplied by sparse tensor cores, their places ``.places``; elements
    outside of live blocks, ``.starts`` and ``.strays``, are added where that is cheaper.
    What does not fit stays for TVM. The choices travel with the module as JSON
    (`read_cuda_kernels`); the reasons of passes before this one, which it had there, are kept.

    Parameters
    ----------
    arch : str
        ``sm_80``, ``sm_90`` or ``sm_90a``.
    dtype : str
        ``float16`` or ``bfloat16``.

    Attributes
    ----------
    choices : dict of str to CudaChoice
        Name of each operator that could be one -> its kernel, and why.
    kernels : dict of str to SourceKernel
        Name of each function that was added -> what it was made from.
    """

    def __init__(self, arch: str, dtype: str = "float16") -> None:
        self.arch = arch
        self.dtype = dtype
        self.choices: dict[str, CudaChoice] = {}
        self.kernels: dict[str, SourceKernel] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the kernels called."""
        self.choices, self.kernels, before = {}, {}, read_cuda_kernels(mod)
        states = opaque_states(mod)
        mod = rewrite_functions(mod, lambda new, func: self._rewriter(new, func, states))
        for node, refusal in before.items():
            own = self.choices.get(node)
            reason = refusal.reason if own is None else f"{own.reason}; {refusal.reason}"
            self.choices[node] = replace(own or refusal, reason=reason)
        mod = relax.transform.DeadCodeElimination()(mod)
        return mod.with_attr(CUDA_KERNELS_ATTR, _as_json(self.choices))

    def _rewriter(self, mod: Any, func: Any, states: Any) -> Any:
        found = find_kernels(mod, func, states, self.dtype, self.arch)
        for name, plan in found.plans.items():
            self.choices[name] = CudaChoice(plan.kind, plan.live, plan.reason, plan.fused)
        for name, reason in found.refusals.items():
            self.choices[name] = CudaChoice("tvm", 0, reason)
        return _Emitter(mod, list(found.plans.values()), found.owned, self)


def _as_json(choices: Mapping[str, CudaChoice]) -> str:
    return json.dumps({node: asdict(choice) for node, choice in choices.items()})


def with_refusals(mod: Any, refused: Mapping[str, str]) -> Any:
    """Return the module with reasons that `SelectCudaKernels` adds to its own.

    Parameters
    ----------
    mod : IRModule
    refused : mapping of str to str
        Binding of a product -> why a pass before that one left it.
    """
    left = read_cuda_kernels(mod)
    for node, why in refused.items():
        reason = f"{left[node].reason}; {why}" if node in left else why
        left[node] = CudaChoice("tvm", 0, reason)
    if not left:
        return mod
    return mod.with_attr(CUDA_KERNELS_ATTR, _as_json(left))


def read_cuda_kernels(mod: Any) -> dict[str, CudaChoice]:
    """Return the choices that `SelectCudaKernels` left in a module; none if it did not run."""
    text = (mod.attrs or {}).get(CUDA_KERNELS_ATTR, "{}")
    return {
        node: CudaChoice(**{**fields, "fused": tuple(fields["fused"])})
        for node, fields in json.loads(str(text)).items()
    }


@mutator
class _Emitter(PyExprMutator):
    """Emits kernels where the last of their results stood; what nothing reads any more goes later.

    Every value exists as float32, perhaps through a cast; ``_narrow`` has those that also exist in
    the narrow type.
    """

    def __init__(
        self, mod: Any, plans: list[Planned], owned: dict[Any, Any], owner: SelectCudaKernels
    ) -> None:
        super().__init__(mod)
        self._owner, self._owned = owner, owned
        waiting = [(plan, set(plan.results)) for plan in plans]
        self._waiting = {var: one for one in waiting for var in one[1]}
        self._narrow_results = narrow_values(plans)
        self._narrow: dict[Any, Any] = {}
        self._shared: dict[Any, Any] = {}

    def visit_var_binding_(self, binding: Any) -> None:
        """Keep the binding, or emit the kernels that it completes."""
        super().visit_var_binding_(binding)
        if binding.var in self._waiting:
            plan, missing = self._waiting[binding.var]
            missing.discard(binding.var)
            if not missing:
                self._emit(plan)

    def _emit(self, plan: Planned) -> None:
        dtype = self._owner.dtype
        out = dtype if plan.result in self._narrow_results else "float32"
        if not is_float32(plan.result):
            out = str(plan.result.ty.dtype)
        types = {name: self._type(one, out) for name, one in plan.operands.items()}
        known = {name: self._read(one, types[name]) for name, one in plan.operands.items()}
        offsets = {name: one.offset for name, one in plan.operands.items()}
        *before, last = plan.rule(types, out).kernels
        for kernel in before:
            parts = kernel.arguments[-kernel.outputs :]
            kinds = [relax.TensorType(part.shape, part.dtype) for part in parts]
            value = self.builder_.emit(self._call(kernel, known, offsets, kinds))
            made = [value] if len(parts) == 1 else self._items(value, len(parts))
            known |= {part.name: one for part, one in zip(parts, made, strict=True)}
        self._finish(plan, last, known, offsets, out)

    def _type(self, one: Operand, out: str) -> str:
        if one.reads == "kept":
            tensor = isinstance(one.value, relax.Var | GenericConst)
            return str(one.value.ty.dtype) if tensor else ""
        if one.reads in ("either", "asked"):
            return self._owner.dtype if one.value in self._narrow else "float32"
        return {"narrow": self._owner.dtype, "tied": out, "float32": "float32"}[one.reads]

    def _read(self, one: Operand, dtype: str) -> Any:
        """Return the tensor in the type that is read."""
        if not isinstance(one.value, relax.Var | GenericConst):
            return self._once((one.value, ""), lambda: self.visit_expr(one.value))
        value = self.visit_expr(one.value)
        if dtype != self._owner.dtype or one.reads == "kept":
            return value
        if one.value in self._narrow:
            return self._narrow[one.value]
        return self._once((one.value, dtype), lambda: relax.op.astype(value, dtype))

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._shared:
            self._shared[key] = self.builder_.emit(make())
        return self._shared[key]

    def _finish(
        self,
        plan: Planned,
        kernel: SourceKernel,
        known: Mapping[str, Any],
        offsets: Mapping[str, int],
        out: str,
    ) -> None:
        """Call the last kernel and let its results stand for the variables."""
        written = [one.name for one in kernel.arguments[-kernel.outputs :]]
        if written[:-1] != list(plan.states):
            wanted = ", ".join([*plan.states, "a result"])
            raise TransformError(f"{plan.kind} makes {wanted}, its kernel writes {written}")
        inside = dict(plan.in_place) if self._is_owned(plan) else {}
        states = {inside.get(name, name): var for name, var in plan.states.items()}
        kernel = in_place(kernel, inside)
        shape = relax.ShapeExpr(static_shape(plan.result) or ())
        kinds = [var.ty for var in states.values()] + [relax.TensorType(shape, out)]
        call = self._call(kernel, known, offsets, kinds, list(states) if inside else None)
        value = self.builder_.emit(call, name_hint=str(plan.result.name))
        made = self._items(value, len(kinds)) if states else [value]
        for var, new in zip(states.values(), made[:-1], strict=True):
            self._replace(var, new)
        self._result(plan.result, made[-1], out)

    def _items(self, value: Any, count: int) -> list[Any]:
        return [self.builder_.emit(relax.TupleGetItem(value, i)) for i in range(count)]

    def _is_owned(self, plan: Planned) -> bool:
        """Tell whether each state that is read is that which the new one replaces."""
        return all(
            out in plan.in_place
            and var in self._owned
            and self._owned[var].same_as(plan.operands[plan.in_place[out]].value)
            for out, var in plan.states.items()
        )

    def _result(self, var: Any, value: Any, out: str) -> None:
        if out != self._owner.dtype:
            return self._replace(var, value)
        self._narrow[var] = value
        return self._replace(var, self.builder_.emit(relax.op.astype(value, "float32")))

    def _replace(self, var: Any, value: Any) -> None:
        """Let ``value`` be what ``var`` was, outside the block too if ``var`` was seen there."""
        if not isinstance(var, relax.DataflowVar):
            value = self.builder_.emit_output(value, name_hint=str(var.name))
        self.set_var_remap(var, value)

    def _call(
        self,
        kernel: SourceKernel,
        known: Mapping[str, Any],
        offsets: Mapping[str, int],
        kinds: list[Any],
        states: list[str] | None = None,
    ) -> Any:
        fresh = kernel.arguments[len(kernel.arguments) - len(kinds) + len(states or []) :]
        read = [a for a in kernel.arguments if a not in fresh]
        shapes = {a.name: static_shape(known[a.name]) or a.shape for a in read}
        shapes |= _shapes(fresh, kinds[len(states or []) :])
        kernel = placed(kernel, shapes, offsets)
        place = self.builder_.add_func(kernel.primfunc(), kernel.family)
        self._owner.kernels[str(place.name_hint)] = kernel
        args = relax.Tuple([known[a.name] for a in read])
        if states is None:
            return relax.call_tir(place, args, kinds if len(kinds) > 1 else kinds[0])
        names = [a.name for a in read]
        indices = [names.index(name) for name in states] + [-1] * len(fresh)
        return relax.op.call_tir_inplace(place, args, indices, kinds)


def _shapes(arguments: tuple[Argument, ...], kinds: list[Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of outputs as the model has them."""
    pairs = zip(arguments, kinds, strict=True)
    return {a.name: tuple(int(size) for size in kind.shape) for a, kind in pairs}
