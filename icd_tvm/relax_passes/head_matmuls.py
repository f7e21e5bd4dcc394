"""The last products of a model: classifiers and language-model heads."""

from __future__ import annotations

from typing import Any

from icd_tvm._tvm import Call, GenericConst, Op, relax

# What may stand between a head and the output.
_PASSES_ON = frozenset(
    f"relax.{name}"
    for name in ("add", "astype", "multiply", "reshape", "sigmoid", "squeeze", "tanh")
) | {"relax.nn.softmax", "relax.nn.log_softmax"}


def head_matmuls(func: Any) -> set[str]:
    """Return the matmuls whose result is an output but for elementwise ends or another shape.

    Parameters
    ----------
    func : relax.Function

    Returns
    -------
    set of str
        Names of bindings.
    """
    values = {
        binding.var: binding.value
        for block in func.body.blocks
        for binding in block.bindings
        if isinstance(binding, relax.VarBinding)
    }
    heads: set[str] = set()
    todo = [func.body.body]
    while todo:
        expr = todo.pop()
        value = values.get(expr, expr)
        if isinstance(value, relax.Tuple):
            todo += list(value.fields)
        elif isinstance(value, relax.Var) and value in values:
            todo.append(value)
        elif isinstance(value, Call) and isinstance(value.op, Op):
            if value.op.name == "relax.matmul":
                heads.add(expr.name)
            todo += _passed_on(value)
    return heads


def _passed_on(call: Any) -> list[Any]:
    """Return the one variable that a harmless op works on, if all else is constant."""
    inputs = [arg for arg in call.args if isinstance(arg, relax.Var)]
    others = [arg for arg in call.args if not isinstance(arg, relax.Var)]
    constant = all(isinstance(arg, GenericConst | relax.ShapeExpr) for arg in others)
    return inputs if call.op.name in _PASSES_ON and len(inputs) == 1 and constant else []
