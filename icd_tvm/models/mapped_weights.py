"""Weights in a file as constants of a module, without reading them."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from icd_tvm._tvm import PyExprMutator, mutator, named_const, relax, tvm
from icd_tvm.models.importer import ImportedModel


def bind_weights(imported: ImportedModel) -> ImportedModel:
    """Turn the weights of ``import_onnx(..., parameters=True)`` into constants.

    A constant shares the memory of its array: one that is mapped stays in its file until a pass
    reads it, and `release` lets it go again.

    Parameters
    ----------
    imported : ImportedModel
        With ``parameters``; their arrays must stay as they are.

    Returns
    -------
    ImportedModel
        As `import_onnx` returns it without ``parameters``, except that these remain listed.
    """
    main = imported.mod["main"]
    count = len(imported.inputs)
    weights = zip(main.params[count:], imported.parameters.items(), strict=True)
    consts = {
        param: named_const(tvm.runtime.from_dlpack(array), name) for param, (name, array) in weights
    }
    binder = _Binder(imported.mod, consts)
    body = binder.visit_expr(main).body
    mod = binder.builder_.get()
    attrs = main.without_attr("num_input").attrs
    mod["main"] = relax.Function(main.params[:count], body, main.ret_ty, main.is_pure, attrs)
    return replace(imported, mod=relax.transform.Normalize()(mod))


def release(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Give the memory of mapped arrays back; their next reader takes it from the file again."""
    for array in arrays.values():
        mapping = getattr(array, "_mmap", None)
        if isinstance(mapping, mmap.mmap):
            mapping.madvise(mmap.MADV_DONTNEED)


@mutator
class _Binder(PyExprMutator):
    def __init__(self, mod: Any, consts: dict[Any, Any]) -> None:
        super().__init__(mod)
        self._consts = consts

    def visit_var_(self, var: Any) -> Any:
        return self._consts.get(var, var)
