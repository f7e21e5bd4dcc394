"""Replace constants of ``main`` by arrays of the same shape, keeping their ONNX names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm._tvm import GenericConst, PyExprMutator, const_name, mutator, named_const


@mutator
class _ConstantReplacer(PyExprMutator):
    def __init__(self, mod: Any, arrays: Mapping[Any, np.ndarray]) -> None:
        super().__init__(mod)
        self._new = {const: named_const(a, const_name(const)) for const, a in arrays.items()}

    def visit_generic_const_(self, const: GenericConst) -> Any:
        return self._new.get(const, const)


def replace_constants(mod: Any, arrays: Mapping[Any, np.ndarray]) -> Any:
    """Return a clone of ``mod`` whose ``main`` uses new values for some constants.

    Parameters
    ----------
    mod : tvm.IRModule
        Left untouched.
    arrays : Mapping[GenericConst, numpy.ndarray]
        Constant object -> its new value, of the same shape and dtype.
    """
    mod = mod.clone()
    mod["main"] = _ConstantReplacer(mod, arrays).visit_expr(mod["main"])
    return mod
