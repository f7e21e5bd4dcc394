"""SelectCudaKernels: matmuls with constant weights become kernels for tensor cores."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import PyExprMutator, const_name, mutator, named_const, relax, tvm
from icd_tvm.relax_passes.relax_graph import (
    Dataflow,
    call_func,
    constant_array,
    constant_weight,
    is_call,
    operands,
    rewrite_functions,
    static_shape,
)
from icd_tvm.tir_schedules.cuda.gemm import (
    SLAB,
    gemm_rule,
    live_blocks,
    pack_weight,
)
from icd_tvm.tir_schedules.cuda.gemm_tile import ROW, choose_tile
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule, pack_vectors
from icd_tvm.tir_schedules.cuda.source_kernel import (
    Epilogue,
    Rule,
    SourceKernel,
    numpy_dtype,
    refused,
)

Array = npt.NDArray[Any]
CUDA_KERNELS_ATTR = "icd.cuda_kernels"
# Columns of a group with one list of live blocks; blocks pay from this share on.
COLUMNS, PAYS = 64, 0.8


@dataclass(frozen=True)
class CudaChoice:
    """The kernel of one matmul: its family or ``tvm``, live blocks in a list or 0, and why."""

    kind: str
    live: int
    reason: str


@tvm.transform.module_pass(opt_level=0, name="SelectCudaKernels")
class SelectCudaKernels:
    """Replace ``relax.matmul(x, W)``, and a bias after it, by a kernel of `tir_schedules.cuda`.

    Operands are rounded to ``dtype``, sums and results stay float32. Packed constants keep the
    name of the weight, lists of live blocks are named after it with ``.blocks`` appended. What does
    not fit stays for TVM. The choices travel with the module as JSON (`read_cuda_kernels`).

    Parameters
    ----------
    arch : str
        ``sm_80`` or ``sm_90``.
    dtype : str
        ``float16`` or ``bfloat16``.

    Attributes
    ----------
    choices : dict of str to CudaChoice
        Name of each matmul with a constant weight -> kernel, live blocks in a list, and why.
    """

    def __init__(self, arch: str, dtype: str = "float16") -> None:
        self.arch = arch
        self.dtype = dtype
        self.choices: dict[str, CudaChoice] = {}

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with the matmuls replaced."""
        self.choices = {}
        mod = rewrite_functions(mod, lambda new, func: _Selector(new, Dataflow(func), self))
        choices = {node: asdict(choice) for node, choice in self.choices.items()}
        return mod.with_attr(CUDA_KERNELS_ATTR, json.dumps(choices))

    def choose(self, m: int, weight: Array, bias: bool) -> tuple[Rule, dict[str, Array]]:
        """Return kernels for ``X[m, K] @ weight`` and the constants that they read."""
        with np.errstate(over="ignore"):
            rounded = weight.astype(numpy_dtype(self.dtype))
        if not np.isfinite(rounded.astype(np.float32)).all():
            return refused(f"weights beyond the range of {self.dtype}"), {}
        blocks = live_blocks(rounded, COLUMNS)
        pays = blocks.shape[1] * SLAB <= PAYS * len(weight) and not weight.shape[1] % COLUMNS
        kept = blocks if pays else None
        make = self._vector if m == 1 else self._matrix
        return make(m, rounded, Epilogue(bias=bias), kept)

    def _matrix(
        self, m: int, weight: Array, epilogue: Epilogue, blocks: Array | None
    ) -> tuple[Rule, dict[str, Array]]:
        k, n = weight.shape
        live = tile = None
        if blocks is not None:
            live = blocks.shape[1]
            tile = choose_tile(m, n, live * SLAB * 2 // ROW, self.arch, columns=COLUMNS)
        rule = gemm_rule(
            m,
            n,
            k,
            self.dtype,
            out="float32",
            epilogue=epilogue,
            arch=self.arch,
            live=live,
            tile=tile,
        )
        if not rule.kernels:
            return rule, {}
        columns = rule.kernels[0].arguments[1].shape[2]
        constants = {"w": pack_weight(weight, columns, blocks)}
        return rule, constants if blocks is None else {**constants, "slabs": blocks}

    def _vector(
        self, m: int, weight: Array, epilogue: Epilogue, blocks: Array | None
    ) -> tuple[Rule, dict[str, Array]]:
        k, n = weight.shape
        live = None if blocks is None else (blocks.shape[0], blocks.shape[1])
        rule = gemv_rule(
            n, k, self.dtype, x=self.dtype, out="float32", epilogue=epilogue, live=live
        )
        if not rule.kernels:
            return rule, {}
        constants = {"w": pack_vectors(weight, self.dtype, blocks)}
        return rule, constants if blocks is None else {**constants, "blocks": blocks}


def read_cuda_kernels(mod: Any) -> dict[str, CudaChoice]:
    """Return the choices that `SelectCudaKernels` left in a module; none if it did not run."""
    text = (mod.attrs or {}).get(CUDA_KERNELS_ATTR, "{}")
    return {node: CudaChoice(**fields) for node, fields in json.loads(str(text)).items()}


@mutator
class _Selector(PyExprMutator):
    def __init__(self, mod: Any, flow: Dataflow, owner: SelectCudaKernels) -> None:
        super().__init__(mod)
        self._flow, self._owner = flow, owner
        self._names = {value: str(var.name) for var, value in flow.values.items()}

    def visit_call_(self, call: Any) -> Any:
        matmul, bias = self._biased(call)
        weight = constant_weight(matmul)
        if weight is None:
            return super().visit_call_(call)
        shape = static_shape(matmul.args[0]) or ()
        rule, constants = self._owner.choose(int(np.prod(shape[:-1])), weight, bias is not None)
        self._note(matmul, rule, constants)
        if not rule.kernels:
            return super().visit_call_(call)
        known = self._named(matmul, constants, bias)
        cast = relax.op.astype(self.visit_expr(matmul.args[0]), self._owner.dtype)
        known["a"] = known["x"] = self.builder_.emit(cast)
        return self._kernels(rule, known, shape, call.ty)

    def _biased(self, call: Any) -> tuple[Any, Any]:
        """Return the matmul that a call is or adds to, and the constant bias or None."""
        if not is_call(call, "relax.add"):
            return call, None
        value, bias = operands(call)
        matmul = self._flow.call(value, "relax.matmul")
        array = constant_array(bias, dims=1)
        if matmul is None or array is None or not self._flow.single_use(value):
            return call, None
        columns = (static_shape(matmul) or (0,))[-1]
        fits = array.dtype == np.float32 and array.shape == (columns,)
        return (
            (matmul, bias) if fits and static_shape(call) == static_shape(matmul) else (call, None)
        )

    def _note(self, matmul: Any, rule: Rule, constants: dict[str, Array]) -> None:
        lists = constants.get("slabs", constants.get("blocks"))
        kind = rule.kernels[0].family if rule.kernels else "tvm"
        count = 0 if lists is None else lists.shape[1]
        reason = (
            rule.reason or f"{self._owner.dtype}, {'dense' if lists is None else 'live blocks'}"
        )
        name = self._names.get(matmul, "matmul")
        self._owner.choices[name] = CudaChoice(kind, count, reason)

    def _named(self, matmul: Any, constants: dict[str, Array], bias: Any) -> dict[str, Any]:
        label = const_name(matmul.args[1])
        found = {
            name: named_const(array, label if name == "w" else f"{label}.blocks")
            for name, array in constants.items()
        }
        return found if bias is None else {**found, "bias": bias}

    def _kernels(self, rule: Rule, known: dict[str, Any], shape: tuple[int, ...], like: Any) -> Any:
        # Kernels see memory only: the leading axes are those of the model.
        shapes = {"a": shape, "x": shape}
        *before, last = rule.kernels
        for kernel in before:
            out = kernel.arguments[-1]
            kind = relax.TensorType(out.shape, out.dtype)
            known[out.name] = self.builder_.emit(self._call(kernel, known, shapes, kind))
        shapes[last.arguments[-1].name] = tuple(int(size) for size in like.shape)
        return self._call(last, known, shapes, like)

    def _call(
        self,
        kernel: SourceKernel,
        known: dict[str, Any],
        shapes: dict[str, tuple[int, ...]],
        kind: Any,
    ) -> Any:
        arguments = tuple(replace(a, shape=shapes.get(a.name, a.shape)) for a in kernel.arguments)
        func = replace(kernel, arguments=arguments).primfunc()
        args = [known[a.name] for a in arguments[:-1]]
        return call_func(self.builder_, func, kernel.family, args, kind)
