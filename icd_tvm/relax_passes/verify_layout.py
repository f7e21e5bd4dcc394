"""VerifyLayout: prove by running that a rewritten module computes what the original computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm._tvm import Call, Var, relax, tvm
from icd_tvm.errors import VerificationError
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.relax_passes.state_order import StateOrder
from icd_tvm.tir_schedules.target import host_target

# fp32 sums in another order: MiniLM's outputs move by about 1e-6 of their largest value.
FP32_TOLERANCE = 1e-4
# One step of a tensor of 8-bit codes, relative to the range that its codes span; bfloat16 has
# eight significant bits, float16 eleven.
CODE_STEP = 1 / 255
_STEPS = dict.fromkeys(("int8", "uint8", "float8", "bfloat16"), CODE_STEP) | {"float16": 2.0**-10}


@dataclass(frozen=True)
class Tolerance:
    """Largest difference, relative to the largest output, that an order may make, and why."""

    value: float
    reason: str


FP32_SUMS = Tolerance(FP32_TOLERANCE, "fp32 sums in another order")


def order_tolerance(mod: Any) -> Tolerance:
    """Return how far two orders of a module may differ.

    Sums in another order differ in their last bits. An activation that is rounded to 8 bits (or
    to bfloat16, which has eight) behind such a sum may lie at a tie and take the next code. That
    moves it by one step, 1/255 of its range (float16: 1/1024), and the output by as much where the
    layers behind do not amplify. The roundings of n tensors are independent, so their steps add up
    in squares: ``1e-4 + sqrt(n) / 255``.
    A wrong order mixes unrelated values and differs by the order of the output itself.

    Parameters
    ----------
    mod : tvm.IRModule
        The module in its original order.
    """
    steps = _rounded_activations(mod["main"])
    if not steps:
        return FP32_SUMS
    what = f"{len(steps)} tensors of 8-bit codes or 16-bit floats"
    reason = f"a tie may round the other way in {what}: sqrt(n) steps"
    return Tolerance(FP32_TOLERANCE + math.hypot(*steps), reason)


def _rounded_activations(func: Any) -> list[float]:
    """Return the steps of the tensors that are computed in float32 and rounded."""
    computed: set[Any] = set(func.params)
    steps = []
    for block in func.body.blocks:
        for binding in block.bindings:
            read = [v for v in relax.analysis.free_vars(binding.value) if v in computed]
            if read:
                computed.add(binding.var)
                steps += _steps(binding)
    return steps


def _steps(binding: Any) -> list[float]:
    """Return the step of a tensor that a binding rounds, or nothing."""
    value = getattr(binding, "value", None)
    if not isinstance(value, Call) or not value.args or not isinstance(value.args[0], Var):
        return []
    dtype, source = _dtype(binding.var), _dtype(value.args[0])
    found = [step for name, step in _STEPS.items() if dtype.startswith(name)]
    if "float" not in source or source == dtype == "float16":
        return []
    # A scalar of codes is a zero point, which products subtract again.
    return found if found and int(binding.var.ty.ndim) > 0 else []


def _dtype(var: Any) -> str:
    kind = var.ty
    return str(kind.dtype.dtype) if isinstance(kind, relax.TensorType) else ""


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference, and the same relative to the reference's largest value."""

    max_abs: float
    max_rel: float

    def within(self, tolerance: float) -> bool:
        """Return whether the relative difference is finite and at most ``tolerance``."""
        return bool(self.max_rel <= tolerance)


def worse(first: Difference, second: Difference) -> Difference:
    """Return the larger of both figures; a NaN counts as the largest."""
    return Difference(
        float(np.maximum(first.max_abs, second.max_abs)),
        float(np.maximum(first.max_rel, second.max_rel)),
    )


def difference(reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray]) -> Difference:
    """Compare two lists of outputs.

    A shape that differs, or a value that is not finite on one side only, counts as infinite.
    """
    worst = Difference(0.0, 0.0)
    for expected, actual in zip(reference, candidate, strict=True):
        worst = worse(worst, _difference(np.asarray(expected), np.asarray(actual)))
    return worst


def _difference(expected: np.ndarray, actual: np.ndarray) -> Difference:
    if expected.shape != actual.shape:
        return Difference(float("inf"), float("inf"))
    if expected.size == 0:
        return Difference(0.0, 0.0)
    wide = expected.astype(np.float64)
    gap = np.abs(wide - actual.astype(np.float64))
    gap[(wide == actual) | (np.isnan(wide) & np.isnan(actual.astype(np.float64)))] = 0.0
    largest = float(np.nan_to_num(gap, nan=np.inf).max())
    scale = float(np.max(np.abs(wide[np.isfinite(wide)]), initial=0.0))
    return Difference(largest, largest / scale if scale else largest)


@tvm.transform.module_pass(opt_level=0, name="VerifyLayout")
class VerifyLayout:
    """Run the module and a reference on random inputs; raise if they disagree.

    Parameters
    ----------
    reference : tvm.IRModule
        The module before the rewrite.
    tolerance : float, optional
        Largest allowed difference relative to the reference's largest output; that of
        :func:`order_tolerance` if omitted.
    runs : int
        Number of random inputs.
    seed : int
        Seed of the inputs.

    Raises
    ------
    VerificationError
        If the outputs differ by more than ``tolerance``.
    """

    def __init__(
        self,
        reference: Any,
        *,
        tolerance: float | None = None,
        runs: int = 2,
        seed: int = 0,
    ) -> None:
        self.reference = reference
        self.tolerance = order_tolerance(reference).value if tolerance is None else tolerance
        self.runs = runs
        self.seed = seed
        self.result = Difference(0.0, 0.0)

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return the module unchanged."""
        before, after = _Runner(self.reference), _Runner(mod)
        for run in range(self.runs):
            inputs = before.examples(self.seed + run)
            expected = after.states.outputs_to_own(before(inputs))
            found = difference(expected, after.states.outputs_to_own(after(inputs)))
            if not found.within(self.tolerance):
                raise VerificationError(
                    f"outputs differ by {found.max_rel:.2e} relative, more than "
                    f"{self.tolerance:.0e}",
                    "the original layout is kept",
                )
            self.result = worse(self.result, found)
        return mod


def example_inputs(func: Any, seed: int) -> list[np.ndarray]:
    """Return inputs for the parameters of ``func``: normal floats, integers from {0, 1}.

    Zero and one are valid rows of every table that has two, and valid mask values.
    """
    rng = np.random.default_rng(seed)
    inputs = []
    for parameter in func.params:
        shape = [int(size) for size in parameter.ty.shape.values]
        dtype = np.dtype(str(parameter.ty.dtype.dtype))
        if dtype.kind == "f":
            inputs.append(rng.standard_normal(shape).astype(dtype))
        else:
            inputs.append(rng.integers(0, 2, shape).astype(dtype))
    return inputs


class _Runner:
    """Runs a module on inputs by name; states enter and leave in the original order."""

    def __init__(self, mod: Any) -> None:
        self.func, self.states = mod["main"], StateOrder.read(mod)
        self.main = relax.VirtualMachine(build_cpu(mod, host_target()), tvm.cpu())["main"]

    def examples(self, seed: int) -> dict[str, np.ndarray]:
        names = [param.name for param in self.func.params]
        inputs = zip(names, example_inputs(self.func, seed), strict=True)
        return self.states.inputs_to_original(dict(inputs))

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        own = self.states.inputs_to_own(inputs)
        result = self.main(*(tvm.runtime.tensor(own[p.name]) for p in self.func.params))
        outputs = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return self.states.outputs_to_original([output.numpy() for output in outputs])
