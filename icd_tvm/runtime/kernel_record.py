"""What each kernel of an arm computes, moves and takes; see :mod:`icd_tvm.measure.kernel_times`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, relax, tvm, tvm_ffi
from icd_tvm.errors import IcdError
from icd_tvm.measure.kernel_times import SOURCE, kernel_times
from icd_tvm.relax_passes.axis_model import AxisGroups
from icd_tvm.relax_passes.kernel_calls import KernelCall, kernel_calls, origins, owners
from icd_tvm.runtime.build import Built
from icd_tvm.tir_schedules.flop_count import count_flop, touched_bytes

BYTES_SOURCE = "model: every weight, input and output moved once"


@dataclass
class WorkCounter:
    """Counts kernels once, however many arms and layers call them."""

    _known: dict[Any, tuple[int, list[int]]] = field(default_factory=dict)

    def count(self, call: KernelCall, func: Any) -> tuple[int, list[int]]:
        """Return the operations of a call, and the bytes of each parameter.

        Raises
        ------
        IcdError
            If the kernel cannot be counted; see :func:`count_flop`.
        """
        consts = call.integers(func)
        key = None if consts else (call.kernel, tvm_ffi.structural_hash(func))
        if key is None or key not in self._known:
            found = count_flop(func, consts), touched_bytes(func, consts)
            if key is None:
                return found
            self._known[key] = found
        return self._known[key]


def arm_work(lowered: Any, counter: WorkCounter) -> dict[str, Any]:
    """Return what one call of a lowered module computes and moves.

    Returns
    -------
    dict
        ``flop``, ``bytes`` (weights and inputs that are read, and outputs, each once), ``source``
        of the bytes, and ``kernels``: ``flop`` and ``bytes`` of each call of a kernel.

    Raises
    ------
    IcdError
        If a kernel cannot be counted.
    """
    kernels: list[dict[str, int]] = []
    outside: dict[Any, int] = {}
    body, parameters = lowered["main"].body.body, list(lowered["main"].params)
    calls = kernel_calls(lowered)
    views = origins(call for call in calls if not call.kernel)
    kept = [views.get(var, var) for var in relax.analysis.free_vars(body)]
    for call in calls:
        if not call.kernel:
            continue
        flop, moved = counter.count(call, lowered[call.kernel])
        kernels.append({"flop": flop, "bytes": sum(moved)})
        for argument, size in zip(call.arguments, moved, strict=False):
            key = _outside(views.get(argument, argument), parameters)
            if key is not None:
                outside[key] = max(size, outside.get(key, 0))
        if any(call.var.same_as(var) for var in kept):
            outside[call.var] = sum(moved[len(call.arguments) :])
    total = sum(kernel["flop"] for kernel in kernels)
    moved_once = sum(outside.values())
    return {"flop": total, "bytes": moved_once, "source": BYTES_SOURCE, "kernels": kernels}


def _outside(argument: Any, parameters: list[Any]) -> Any:
    """Return a key of what comes from outside the call, None for what a kernel made."""
    if isinstance(argument, GenericConst):
        return int(argument.value.data_ptr())
    return argument if any(argument.same_as(p) for p in parameters) else None


def kernel_record(
    built: Built,
    feeds: Mapping[str, NDArray[Any]],
    groups: AxisGroups | None,
    work: Mapping[str, Any],
) -> dict[str, Any]:
    """Time the kernels of an arm and say what each belongs to.

    Parameters
    ----------
    built : Built
    feeds : mapping of str to ndarray
        Inputs of the model.
    groups : AxisGroups or None
        Of the module as it came in.
    work : mapping
        From :func:`arm_work`; empty where the kernels cannot be counted.

    Returns
    -------
    dict
        ``source``, ``repeats``, ``total_us`` (median of the sum over kernels) and ``kernels``:
        ``kernel``, ``node``, ``weights``, ``groups``, ``us`` (median), ``us_min``, and ``flop``
        and ``bytes`` where they are known.

    Raises
    ------
    MeasurementError
        If the arm ran other kernels than those of its module.
    """
    about = owners(kernel_calls(built.lowered), groups)
    machine = relax.VirtualMachine(built.executable, tvm.cpu())
    call = built.caller(feeds, machine)
    seconds = kernel_times(machine, call, [item["kernel"] for item in about])
    counted = work.get("kernels") or [{}] * len(about)
    rows = zip(about, counted, np.median(seconds, axis=0), seconds.min(axis=0), strict=True)
    return {
        "source": SOURCE,
        "repeats": len(seconds),
        "total_us": 1e6 * float(np.median(seconds.sum(axis=1))),
        "kernels": [
            {**item, **known, "us": 1e6 * float(middle), "us_min": 1e6 * float(least)}
            for item, known, middle, least in rows
        ],
    }


def work_of_arms(built: Mapping[str, Built], reasons: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return :func:`arm_work` of every arm; what cannot be counted gets a reason under ``flop``."""
    counter, found = WorkCounter(), {}
    for name, arm in built.items():
        try:
            found[name] = arm_work(arm.lowered, counter)
        except IcdError as error:
            reasons["flop"] = f"{name}: {error}"
    return found
