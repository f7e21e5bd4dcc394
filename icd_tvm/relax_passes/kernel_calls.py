"""The calls of a lowered module, and the operators and axis groups that each kernel belongs to.

Fusion renames what it makes; constants keep the ONNX names of the weights they were packed from.
So a kernel is known by its binding where that has an ONNX name, and by its weights otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, const_name, relax
from icd_tvm.relax_passes.axis_model import AxisGroups
from icd_tvm.relax_passes.relax_graph import is_call

# What TVM's block builder calls a binding that nobody named.
_ANONYMOUS = re.compile(r"(lv|gv)\d*(_\d+)?")
# What kernels keep beside a weight is named after it.
_PART = re.compile(
    r"\.(rows|counts|quads|scale|zero_point|zero_sums|sums|g_idx|salient|salient_rows|"
    r"blocks|places|starts|strays)$"
)


@dataclass(frozen=True, eq=False)
class KernelCall:
    """One binding of ``main``.

    Attributes
    ----------
    var : relax.Var
        What the call is bound to.
    kernel : str
        Name of the PrimFunc; empty where the binding calls none.
    arguments : list of relax.Expr
    in_place : bool
        Whether the result is the first argument, or a view of it.
    label : str
        ONNX name of the binding where the pipeline gave it another; empty if it did not.
    """

    var: Any
    kernel: str
    arguments: list[Any]
    in_place: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the binding."""
        return self.label or str(self.var.name)

    @property
    def weights(self) -> tuple[str, ...]:
        """ONNX names of the constants that the call reads."""
        named = [const_name(a) for a in self.arguments if isinstance(a, GenericConst)]
        parts = [part for name in named for part in name.split("+") if part]
        return tuple(dict.fromkeys(_PART.sub("", part) for part in parts))

    @property
    def node(self) -> str:
        """ONNX name of the operator, of its weight where fusion left none, else the binding's."""
        name = self.name
        return name if not _ANONYMOUS.fullmatch(name) else " + ".join(self._matrices) or name

    @property
    def _matrices(self) -> list[str]:
        """Names of the weights with two axes or more; a bias names no operator."""
        wide = [a for a in self.arguments if isinstance(a, GenericConst) and len(a.ty.shape) > 1]
        return list(KernelCall(self.var, self.kernel, wide).weights)

    def integers(self, func: Any) -> dict[str, NDArray[Any]]:
        """Return the values of the integer constants by the kernel's parameter names."""
        return {
            str(parameter.name): argument.value.numpy()
            for parameter, argument in zip(func.params, self.arguments, strict=False)
            if isinstance(argument, GenericConst) and "int" in str(argument.ty.dtype)
        }


def kernel_calls(lowered: Any, names: Mapping[str, str] | None = None) -> list[KernelCall]:
    """Return the bindings of ``main`` in the order of execution.

    Parameters
    ----------
    lowered : tvm.IRModule
        As ``cpu_pipeline`` or ``cuda_pipeline`` leaves it: calls of scheduled PrimFuncs.
    names : mapping of str to str, optional
        Name of a binding there -> the ONNX name it had.
    """
    found, labels = [], names or {}
    for block in lowered["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            in_place = is_call(value, "relax.call_tir_inplace")
            if in_place or is_call(value, "relax.call_tir"):
                packed = value.args[1]
                fields = list(packed.fields) if isinstance(packed, relax.Tuple) else [packed]
                name = str(value.args[0].name_hint)
                label = labels.get(str(binding.var.name), "")
                found.append(KernelCall(binding.var, name, fields, in_place, label))
            elif is_call(value, "relax.reshape"):
                found.append(KernelCall(binding.var, "", [value.args[0]], in_place=True))
            else:
                found.append(KernelCall(binding.var, "", []))
    return found


def origins(calls: Iterable[KernelCall]) -> dict[Any, Any]:
    """Return the tensor in which the result of each view, and of each call in place, lies."""
    found: dict[Any, Any] = {}
    for call in calls:
        if call.in_place:
            found[call.var] = found.get(call.arguments[0], call.arguments[0])
    return found


def owners(calls: Iterable[KernelCall], groups: AxisGroups | None) -> list[dict[str, Any]]:
    """Return what each kernel call computes and which axis groups it reads or makes.

    Parameters
    ----------
    calls : iterable of KernelCall
        Those without a kernel are left out.
    groups : AxisGroups or None
        Of the module before it was lowered.

    Returns
    -------
    list of dict
        ``kernel``, ``node``, ``weights`` and ``groups`` (ids of free groups), in the order of
        execution.
    """
    free = groups.free if groups is not None else ()
    members = {group.id: {m.name for m in group.members if m.name} for group in free}
    found = []
    for call in calls:
        if call.kernel:
            names = {*call.weights, call.name}
            touched = [key for key, known in members.items() if names & known]
            about = {"kernel": call.kernel, "node": call.node, "weights": list(call.weights)}
            found.append({**about, "groups": touched})
    return found
