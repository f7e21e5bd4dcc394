"""What the CUDA matchers agree on: kernels for parts of a function, and the types between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

from icd_tvm._tvm import relax
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import Rule

# ``narrow``: the precision of the pass. ``kept``: as the module has it. ``either``: both are read.
# ``asked``: as ``either``, and asked for in the narrow type. ``tied``: that of the output.
Reads = Literal["narrow", "float32", "kept", "either", "asked", "tied"]


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads: a variable or constant, from an element on, in some type."""

    value: Any
    reads: Reads = "narrow"
    offset: int = 0


@dataclass(frozen=True)
class ProductKernels:
    """The kernels of one product.

    Attributes
    ----------
    make : callable
        (epilogue, output type, codes) -> rule.
    constants : dict of str to array
        By the names of the kernels' arguments.
    reason : str
        Why there are none.
    kind : str
        Family.
    left : str
        Why a sparse form of the weight is not made use of.
    """

    make: Callable[..., Rule]
    constants: Mapping[str, npt.NDArray[Any]]
    reason: str = ""
    kind: str = "gemm"
    left: str = ""

    @property
    def form(self) -> str:
        """How the weight is stored, for people."""
        if "meta" in self.constants:
            return "2:4"
        lists = {"slabs", "blocks"} & self.constants.keys()
        strays = " and strays" if "stray_list" in self.constants else ""
        return f"live blocks{strays}" if lists else "dense"


@dataclass(frozen=True)
class Planned:
    """Kernels that make a variable of a function, and states beside it.

    Attributes
    ----------
    result : relax.Var
        The last output of the last kernel.
    operands : dict of str to Operand
        By the names of the kernels' arguments.
    rule : callable
        (types of the operands, type of the result) -> kernels, never a refusal.
    kind : str
        Family, for people.
    reason : str
        Why this kernel, and what was not fused.
    fused : tuple of str
        What else it computes.
    flexible : bool
        Whether the result may also be float32.
    states : dict of str to relax.Var
        Other outputs: new states, whose type is that of the function.
    in_place : dict of str to str
        Such an output -> the operand that it may replace.
    live : int
        Live blocks in each list; 0 where the weight is dense.
    codes : RowCodes or None
        Of a plan that only makes codes: what they stand for.
    asked : bool
        Whether the result is asked for in the narrow type by what is now part of the plan.
    """

    result: Any
    operands: Mapping[str, Operand]
    rule: Callable[[Mapping[str, str], str], Rule]
    kind: str
    reason: str
    fused: tuple[str, ...] = ()
    flexible: bool = False
    states: Mapping[str, Any] = field(default_factory=dict)
    in_place: Mapping[str, str] = field(default_factory=dict)
    live: int = 0
    codes: RowCodes | None = None
    asked: bool = False

    @property
    def results(self) -> tuple[Any, ...]:
        """All variables that the kernels make."""
        return (self.result, *self.states.values())

    def read(self) -> set[Any]:
        """Return the variables that the kernels read."""
        return {one.value for one in self.operands.values() if isinstance(one.value, relax.Var)}


def narrow_values(plans: Iterable[Planned]) -> set[Any]:
    """Return the variables that kernels write in the narrow type.

    A flexible one does where a kernel reads it so; the rows that are added to a product go with
    its result. Where nothing asks for the narrow type, as on the residual stream of a model that
    normalises before each block, values stay float32.
    """
    found = list(plans)
    parent: dict[Any, Any] = {}

    def top(var: Any) -> Any:
        while (above := parent.setdefault(var, var)) != var:
            var = above
        return var

    for plan in found:
        for operand in plan.operands.values():
            if operand.reads == "tied":
                parent[top(operand.value)] = top(plan.result)
    wanted = {
        top(operand.value)
        for plan in found
        for operand in plan.operands.values()
        if operand.reads in ("narrow", "asked")
    }
    wanted |= {top(plan.result) for plan in found if plan.asked}
    fixed = {plan.result for plan in found if not plan.flexible}
    return fixed | {plan.result for plan in found if plan.flexible and top(plan.result) in wanted}
