"""Cross-compile every arm of the suite's models, on a machine that has nvcc and TVM."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.arm_modules import Arms, Orders, narrowed
from benchmarks.gpu.cases import ARMS, CASES, INDEX, NOTES, POOL, Case
from benchmarks.gpu.lift import STORED_BYTES, Recogniser, lift
from benchmarks.gpu.model_times import ALLOWED
from benchmarks.gpu.recipes import Pool, as_json
from icd_tvm._tvm import const_name, tvm_ffi
from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.verify_layout import order_tolerance
from icd_tvm.runtime.cross_compile import cross_compile
from icd_tvm.tir_schedules.target import PRECISIONS, cuda_target

FORMAT = "icd/gpu-models/v1"
# Type of the values between products of codes.
BETWEEN = {"int8": "float16"}


@dataclass
class Device:
    """What lowers a module and writes its library; the tests have one for the CPU."""

    arch: str

    def lower(self, mod: Any, dtype: str) -> Any:
        """Return calls of scheduled kernels."""
        precision = dtype if dtype in PRECISIONS else BETWEEN.get(dtype)
        return lower_cuda(mod, cuda_target(self.arch), precision)

    def compile(self, mod: Any, path: Path) -> None:
        """Write a library of a lowered module, machine code inside."""
        cross_compile(mod, self.arch, path, lowered=True)


def build_models(
    folder: Path, device: Device, cases: Iterable[Case] = CASES, solver_s: float = 20.0
) -> dict[str, Any]:
    """Write libraries, what their parameters are, and what was refused and why.

    Parameters
    ----------
    folder : Path
        Holds ``models.json`` (what the GPU host reads), ``arrays.npz`` and libraries.
    device : Device
    cases : iterable of Case
    solver_s : float
        Budget of each order.

    Returns
    -------
    dict
        The content of ``models.json``, which is written after every case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pool, orders = Pool(), Orders(solver_s)
    index: dict[str, Any] = {"format": FORMAT, "arch": device.arch, "notes": NOTES, "cases": {}}
    for case in cases:
        began = time.perf_counter()
        try:
            index["cases"][case.name] = _case(folder, device, case, pool, orders)
        except (IcdError, MemoryError) as error:
            index["cases"][case.name] = {"refused": str(error)}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        pool.save(folder / POOL)
        print(f"{case.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return index


def _case(folder: Path, device: Device, case: Case, pool: Pool, orders: Orders) -> dict[str, Any]:
    if case.dtype == "int8" and case.tokens == 1:
        raise MeasurementError("a compiled model has no int8 products of vectors on CUDA here")
    arms = Arms(case, orders)
    weights = {
        name: [list(a.shape), *map(float, (a.mean(), a.std(), a.min(), a.max()))]
        for name, a in arms.drawn.items()
    }
    record: dict[str, Any] = {"case": vars(case), "tokens": case.tokens, "weights": weights}
    record |= {"inputs": arms.inputs(), "arms": {}, "orders": arms.counts}
    made: list[tuple[Path, Any]] = []
    for name in ARMS:
        mod, mod_coded, same_as = arms.make(name)
        if same_as:
            record["arms"][name] = record["arms"][same_as] | {"same_as": same_as}
            continue
        whole = narrowed(mod, case.dtype)
        record["allowed"] = max(ALLOWED, order_tolerance(whole).value)
        lowered, constants = lift(device.lower(whole, case.dtype), arms.drawn)
        # Weights are parameters: arms that differ in them alone are one library.
        file = next((f for f, known in made if tvm_ffi.structural_equal(known, lowered)), None)
        if file is None:
            file = folder / f"{case.stem}-{name}.so"
            device.compile(lowered, file)
            made.append((file, lowered))
        parameters = list(_parameters(constants, Recogniser(mod, mod_coded, arms.drawn), pool))
        record["arms"][name] = {
            "library": file.name,
            "inputs": _inputs(lowered, len(constants)),
            "parameters": parameters,
            "parameter_bytes": sum(c.value.numpy().nbytes for c in constants),
        }
    return record


def _inputs(lowered: Any, parameters: int) -> list[dict[str, Any]]:
    params = lowered["main"].params
    return [
        {"name": str(p.name), "shape": [int(n) for n in p.ty.shape], "dtype": str(p.ty.dtype)}
        for p in params[: len(params) - parameters]
    ]


def _parameters(constants: list[Any], known: Recogniser, pool: Pool) -> Iterator[dict[str, Any]]:
    """Yield a recipe for each parameter, or where its value is kept."""
    for const in constants:
        array = const.value.numpy()
        try:
            yield as_json(known.recipe(const), pool)
        except MeasurementError:
            # A drawn weight must be drawn in every arm.
            if array.nbytes > STORED_BYTES or known.drawn(const):
                raise
            yield {"name": const_name(const), "stored": pool.put(array)}


def small(case: Case) -> Case:
    """Return the case of a model of test size."""
    return replace(case, model=f"{case.model} test")
