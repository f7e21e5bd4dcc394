"""Cross-compile every arm of the suite's models, on a machine that has nvcc and TVM."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.arm_modules import Arms, Orders
from benchmarks.gpu.cases import ARMS, CASES, INDEX, NOTES, POOL, Case
from benchmarks.gpu.lift import STORED_BYTES, Recogniser, lift
from benchmarks.gpu.model_times import ALLOWED
from benchmarks.gpu.recipes import Pool, as_json
from benchmarks.gpu.repeat_layers import Repeated, repeat_layers
from icd_tvm._tvm import const_name, tvm_ffi
from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.select_cuda_kernels import read_cuda_kernels
from icd_tvm.relax_passes.verify_layout import order_tolerance
from icd_tvm.runtime.arms import DENSE
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
        """Return calls of scheduled kernels.

        Raises
        ------
        MeasurementError
            If a kernel wants a weight in a form that no recipe makes.
        """
        precision = dtype if dtype in PRECISIONS else BETWEEN.get(dtype)
        lowered = lower_cuda(mod, cuda_target(self.arch), precision)
        for name, one in read_cuda_kernels(lowered).items():
            if one.kind == "gemm_24" or (one.kind == "gemm" and "strays" in one.reason):
                raise MeasurementError(f"hosts draw no weight in the form of {name}: {one.reason}")
        return lowered

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
    pool, orders = Pool(), Orders(solver_s, device.arch)
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
    arms = Arms(case, orders)
    weights = {
        name: [list(a.shape), *map(float, (a.mean(), a.std(), a.min(), a.max()))]
        for name, a in arms.drawn.items()
    }
    record: dict[str, Any] = {"case": vars(case), "tokens": case.tokens, "weights": weights}
    record |= {"inputs": arms.inputs(), "arms": {}, "orders": arms.counts}
    record |= {"stands_for": case.stands_for, "allowed": ALLOWED}
    made: list[tuple[Path, Any]] = []
    for name in ARMS:
        about = _arm(device, arms, name, folder / f"{case.stem}-{name}.so", made, pool)
        known = record["arms"].get(about.get("same_as", ""), {})
        record["allowed"] = max(record["allowed"], about.pop("allowed", 0.0))
        record["arms"][name] = known | about
        if name == DENSE:
            arms.forget_dense()
    return record


def _arm(
    device: Device, arms: Arms, name: str, file: Path, made: list[tuple[Path, Any]], pool: Pool
) -> dict[str, Any]:
    """Return what the host must know of an arm; its weights are free again when this returns."""
    mod, same_as = arms.make(name)
    if same_as:
        return {"same_as": same_as}
    whole = arms.narrowed(mod)
    wide, constants = _lowered(device, arms, whole)
    # Weights are parameters: arms that differ in them alone are one library.
    library = next((f for f, known in made if tvm_ffi.structural_equal(known, wide.mod)), None)
    if library is None:
        library = file
        device.compile(wide.mod, file)
        made.append((file, wide.mod))
    known = Recogniser(mod, lambda: arms.codes(name), arms.drawn.shapes, arms.coded)
    tolerance = order_tolerance(whole).value
    del mod, whole
    known.look(constants)
    return {
        "allowed": tolerance,
        "library": library.name,
        "inputs": _inputs(wide),
        "parameters": list(_parameters(constants, wide, known, pool)),
        "parameter_bytes": sum(
            const.value.numpy().nbytes * len(places)
            for const, places in zip(constants, wide.places, strict=True)
        ),
    }


def _lowered(device: Device, arms: Arms, mod: Any) -> tuple[Repeated, list[Any]]:
    """Return a lowered arm of all its layers, its constants lifted, and those constants."""
    lowered, constants = lift(device.lower(mod, arms.dtype), arms.drawn)
    if arms.depth:
        return repeat_layers(lowered, constants, arms.depth), constants
    return Repeated(lowered, tuple((place,) for place in range(len(constants)))), constants


def _inputs(wide: Repeated) -> list[dict[str, Any]]:
    main = wide.mod["main"]
    return [
        {"name": str(p.name), "shape": [int(n) for n in p.ty.shape], "dtype": str(p.ty.dtype)}
        for p in main.params[: int(main.attrs["num_input"])]
    ]


def _parameters(
    constants: list[Any], wide: Repeated, known: Recogniser, pool: Pool
) -> Iterator[dict[str, Any]]:
    """Yield a recipe for each constant, or where its value is kept, and which parameters it is."""
    for const, places in zip(constants, wide.places, strict=True):
        try:
            made = as_json(known.recipe(const), pool)
        except MeasurementError:
            array = const.value.numpy()
            # A drawn weight must be drawn in every arm.
            if array.nbytes > STORED_BYTES or known.drawn(const):
                raise
            made = {"name": const_name(const), "stored": pool.put(array)}
        yield made | {"places": list(places)}


def small(case: Case) -> Case:
    """Return the case of a model of test size."""
    return replace(case, model=f"{case.model} test")
