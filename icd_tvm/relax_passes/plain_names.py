"""PlainNames: variables get names that C allows; ONNX's hold slashes, and kernels inherit them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from icd_tvm._tvm import PyExprMutator, mutator, relax, tvm


def plain_name(name: str) -> str:
    """Return ``name`` with every run of other characters replaced by an underscore."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII)
    return plain if plain[:1].isalpha() or plain[:1] == "_" else f"v{plain}"


def names_before(mod: Any) -> dict[str, str]:
    """Return plain name -> name before of the bindings of ``main``; shared plain names are out."""
    blocks = mod["main"].body.blocks
    names = [str(binding.var.name) for block in blocks for binding in block.bindings]
    plain = [plain_name(name) for name in names]
    clashes = {name for name, count in Counter(plain).items() if count > 1}
    return {new: old for new, old in zip(plain, names, strict=True) if new not in clashes}


@tvm.transform.module_pass(opt_level=0, name="PlainNames")
class PlainNames:
    """Rename the variables of every Relax function, but for the parameters that users name.

    LegalizeOps and FuseTIR name a kernel's buffers after the variables, and the code generator for
    CUDA writes those names as they are.
    """

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return a clone of ``mod`` with plain names."""
        mod = mod.clone()
        for name, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mod[name] = _Renamer(mod, _public(func)).visit_expr(func)
        return mod


def _public(func: Any) -> list[Any]:
    return list(func.params) if "global_symbol" in (func.attrs or {}) else []


@mutator
class _Renamer(PyExprMutator):
    def __init__(self, mod: Any, kept: list[Any]) -> None:
        super().__init__(mod)
        self._kept = kept

    def visit_var_def_(self, var: Any) -> Any:
        return self._plain(var, relax.Var)

    def visit_dataflow_var_def_(self, var: Any) -> Any:
        return self._plain(var, relax.DataflowVar)

    def _plain(self, var: Any, kind: Any) -> Any:
        name = plain_name(str(var.name))
        if name == str(var.name) or any(var.same_as(kept) for kept in self._kept):
            return var
        new = kind(name, var.ty)
        self.set_var_remap(var, new)
        return new
