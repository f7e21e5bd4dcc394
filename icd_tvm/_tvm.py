"""Every TVM name that has moved between releases, imported in one place.

TVM 0.27 renamed ``tvm.tir`` to ``tvm.tirx``, moved schedules to ``tvm.s_tir`` and
``relax.Constant`` to ``tvm.ir.GenericConst``. The rest of the package imports these names
from here, so a change of the pinned version is a change of this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, s_tir, sym, te, tirx
from tvm.ir import Call, GenericConst, Op, SourceName, Span, TensorLoad, Var
from tvm.relax import PyExprMutator
from tvm.relax.expr_functor import mutator
from tvm.relax.frontend.onnx import onnx_frontend
from tvm.s_tir import dlight
from tvm.s_tir.dlight.base import ScheduleRule
from tvm_ffi.error import register_error

from icd_tvm import errors

__all__ = [
    "Call",
    "GenericConst",
    "Op",
    "PyExprMutator",
    "ScheduleRule",
    "TensorLoad",
    "Var",
    "apply_pass",
    "const_name",
    "dlight",
    "i64",
    "mutator",
    "named_const",
    "onnx_frontend",
    "relax",
    "s_tir",
    "sym",
    "te",
    "tirx",
    "tvm",
    "tvm_ffi",
]

# A Python exception raised inside a pass crosses C++; without this it returns as RuntimeError.
for _cls in vars(errors).values():
    if isinstance(_cls, type) and issubclass(_cls, errors.IcdError):
        register_error(f"icd.{_cls.__name__}", _cls)


def named_const(array: Any, name: str) -> GenericConst:
    """Return a Relax constant that remembers its ONNX name.

    The name travels in the expression's span: spans survive mutation, fusion and
    ``tvm.ir.save_json``, and TVM ignores them for structural equality.

    Parameters
    ----------
    array : numpy.ndarray or tvm.runtime.Tensor
        The value; its dtype is kept (``relax.const`` would narrow 64-bit numpy arrays).
    name : str
        Name of the ONNX initializer.
    """
    if isinstance(array, np.ndarray | np.generic):
        array = tvm.runtime.tensor(np.asarray(array, order="C"))
    const = relax.const(array)
    return GenericConst(const.value, const.ty, Span(SourceName(name), 0, 0, 0, 0))


def apply_pass(module_pass: Any, mod: Any) -> Any:
    """Return ``module_pass(mod)``; TVM's decorator makes passes callable, unseen by mypy."""
    return module_pass(mod)


def const_name(const: GenericConst) -> str:
    """Return the ONNX name of a constant, or an empty string if it has none."""
    return str(const.span.source_name.name) if const.span is not None else ""


def i64(value: int) -> Any:
    """Return an int64 immediate; TE shapes must be int64 to match Relax's when fused."""
    return tirx.IntImm("int64", value)
