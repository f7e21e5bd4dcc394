"""What a compiled model would do to a machine's caches, kernel by kernel: a model, not a counter.

Every call of the lowered module is turned into the addresses it touches (`address_trace`) and run
through `CacheSimulator`, one thread, in the order of execution. Checked against cachegrind by
``benchmarks/cache_model.py``. Prefetchers and other threads are not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm._tvm import GenericConst, Var, relax, tvm_ffi
from icd_tvm.errors import ConfigError, IcdError, UnsupportedOpError
from icd_tvm.measure.cache_sim import CacheLevel, CacheSimulator, LevelCount
from icd_tvm.measure.environment import data_cache_levels
from icd_tvm.relax_passes.kernel_calls import KernelCall, kernel_calls, origins
from icd_tvm.tir_schedules.address_trace import address_trace, lower_loops

_PAGE = 4096
_SCRATCH = 1 << 44
# Between the buffers of a trace that is kept: no tensor is that large.
_APART = 1 << 36
# Six bytes each.
_KEPT_SECTORS = 1 << 26
# Bytes in units of the last level after which nothing older is in it, about.
_REFILLS = 8

# Numbers of buffers, and sectors from the start of each.
_Places = tuple[NDArray[np.uint16], NDArray[np.int32]]

# One thread block after the other; only the shared L2 is modelled. 60 MiB as the device reports
# it; lines of four 32-byte sectors (NVIDIA H100 whitepaper). The 16 ways are assumed.
H200_LEVELS = (CacheLevel("L2", 60 << 20, 16, 128, 32),)


def host_levels(root: Path = Path("/")) -> tuple[CacheLevel, ...]:
    """Return the data caches of the first core, nearest first, as the system reports them.

    Raises
    ------
    UnsupportedOpError
        If the system does not report them.
    """
    found = [
        CacheLevel(f"L{c['level']}", c["bytes"], c["ways"], c["line_bytes"], c["line_bytes"])
        for c in data_cache_levels(root)
    ]
    if not found:
        raise UnsupportedOpError("the system reports no caches", "give the levels explicitly")
    return tuple(found)


@dataclass
class KernelModel:
    """Modelled cache events of one call.

    Attributes
    ----------
    kernel : str
        Name of the PrimFunc.
    node : str
        The operator, see :attr:`KernelCall.node`.
    levels : list of LevelCount
        Nearest first.
    reason : str
        Why the call was not modelled; empty if it was.
    """

    kernel: str
    node: str
    levels: list[LevelCount] = field(default_factory=list)
    reason: str = ""


@dataclass
class CacheModel:
    """Modelled cache events of one run, in steady state if it was warmed up."""

    levels: tuple[CacheLevel, ...]
    kernels: list[KernelModel]

    def totals(self) -> list[LevelCount]:
        """Return the sums over all modelled calls, by level."""
        sums = [LevelCount() for _ in self.levels]
        for kernel in self.kernels:
            for total, count in zip(sums, kernel.levels, strict=False):
                total.requests += count.requests
                total.misses += count.misses
        return sums

    @property
    def dram_bytes(self) -> int:
        """Bytes fetched from memory: misses of the last level times its sector."""
        return self.totals()[-1].misses * self.levels[-1].sector_bytes

    def record(self) -> dict[str, Any]:
        """Return a JSON record; ``source`` says that this is a model."""
        totals = self.totals()
        return {
            "source": "model",
            "levels": [
                {**asdict(level), **asdict(count), "hit_pct": count.hit_pct}
                for level, count in zip(self.levels, totals, strict=True)
            ],
            "dram_bytes": self.dram_bytes,
            "kernels": [asdict(kernel) for kernel in self.kernels],
        }


def model_caches(
    lowered: Any,
    target: Any,
    inputs: Mapping[str, NDArray[Any]],
    levels: Sequence[CacheLevel],
    *,
    warm: bool = True,
) -> CacheModel:
    """Model the caches over one run of ``main`` in steady state.

    Parameters
    ----------
    lowered : tvm.IRModule
        As ``cpu_pipeline`` leaves it: calls of scheduled PrimFuncs.
    target : tvm.target.Target
        What it was lowered for.
    inputs : mapping of str to ndarray
        Values of the inputs by name; integer inputs decide which rows a gather touches.
    levels : sequence of CacheLevel
        Nearest first.
    warm : bool
        Run the last calls before, those that fill the last level many times over, all if there
        are too few; otherwise the caches start empty.
    """
    calls = kernel_calls(lowered)
    memory = _Memory(lowered["main"], calls, inputs)
    simulator = CacheSimulator(levels)
    traces = _Traces(lowered, target, simulator.sector_bytes)
    if warm:
        # All that earlier calls left behind is gone by the end of these.
        for call in calls[_last_calls(calls, memory, _REFILLS * levels[-1].size_bytes) :]:
            _run(call, memory, traces, simulator)
    return CacheModel(tuple(levels), [_run(call, memory, traces, simulator) for call in calls])


def _last_calls(calls: Sequence[KernelCall], memory: _Memory, least: int) -> int:
    """Return the first of the last calls that read and write ``least`` bytes."""
    for place in reversed(range(len(calls))):
        least -= memory.size(calls[place]) if calls[place].kernel else 0
        if least <= 0:
            return place
    return 0


def _run(
    call: KernelCall, memory: _Memory, traces: _Traces, simulator: CacheSimulator
) -> KernelModel:
    result = KernelModel(call.kernel, call.node)
    if not call.kernel:
        result.reason = "no call of a TIR function"
        return result
    try:
        func = traces.loops(call.kernel)
        addresses, consts = memory.arguments(call, func)
        sums = [LevelCount() for _ in simulator.levels]
        for sectors in traces.sectors(call.kernel, addresses, consts):
            for total, count in zip(sums, simulator.access(sectors), strict=True):
                total.requests += count.requests
                total.misses += count.misses
        result.levels = sums
    except IcdError as error:
        result.reason = str(error)
    return result


class _Traces:
    """The sectors that kernels touch. Layers share kernels, so their traces are kept.

    A trace is kept as places in buffers, for the row lists and ids it was made with, and moved to
    the addresses of a call.
    """

    def __init__(self, lowered: Any, target: Any, sector_bytes: int) -> None:
        if _PAGE % sector_bytes:
            raise ConfigError(f"sectors of {sector_bytes} bytes do not divide a page of {_PAGE}")
        self.lowered, self.target, self.sector_bytes = lowered, target, sector_bytes
        self._room = _KEPT_SECTORS
        self._loops: dict[str, Any] = {}
        self._kept: dict[Any, list[_Places]] = {}

    def loops(self, kernel: str) -> Any:
        """Return a kernel as :func:`address_trace` wants it."""
        if kernel not in self._loops:
            self._loops[kernel] = lower_loops(self.lowered[kernel], self.target)
        return self._loops[kernel]

    def sectors(
        self, kernel: str, addresses: Sequence[int], consts: Mapping[str, NDArray[Any]]
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the sectors of one call in program order, in chunks."""
        parameters = len(self.loops(kernel).params)
        if len(addresses) != parameters:
            raise ConfigError(f"{parameters} parameters but {len(addresses)} addresses")
        start = np.array([*addresses, _SCRATCH], np.int64) // self.sector_bytes
        values = sorted((name, array.tobytes()) for name, array in consts.items())
        for buffer, place in self._places((kernel, *values), consts):
            yield start[buffer] + place

    def _places(self, key: Any, consts: Mapping[str, NDArray[Any]]) -> Iterator[_Places]:
        if key in self._kept:
            yield from self._kept[key]
            return
        func, size, kept = self.loops(key[0]), 0, []
        bases = range(0, (len(func.params) + 1) * _APART, _APART)
        for chunk in address_trace(func, bases[:-1], bases[-1], consts=consts):
            sectors = chunk.units(self.sector_bytes)
            buffer, place = np.divmod(sectors, _APART // self.sector_bytes)
            found = buffer.astype(np.uint16), place.astype(np.int32)
            yield found
            size += sectors.size
            if size <= self._room:
                kept.append(found)
        if size <= self._room:
            self._kept[key] = kept
            self._room -= size


class _Memory:
    """Where every tensor of ``main`` lies: constants apart, intermediates reused when dead."""

    def __init__(self, func: Any, calls: Sequence[KernelCall], inputs: Mapping[str, Any]) -> None:
        self.top = _PAGE
        self.places: dict[Any, list[int]] = {}
        self.values: dict[Any, NDArray[Any]] = {}
        for parameter in func.params:
            self.places[parameter] = self._fresh(parameter.ty)
            if str(parameter.name) in inputs:
                self.values[parameter] = np.asarray(inputs[str(parameter.name)])
        self._constants(calls)
        self._intermediates(func, calls)

    def arguments(self, call: KernelCall, func: Any) -> tuple[list[int], dict[str, NDArray[Any]]]:
        """Return the address of each parameter, and the values of the integer ones."""
        addresses = [a for argument in call.arguments for a in self._of(argument)]
        if not call.in_place:
            addresses += self.places[call.var]
        consts = {
            str(parameter.name): self.values[_key(argument)]
            for parameter, argument in zip(func.params, call.arguments, strict=False)
            if _key(argument) in self.values and self.values[_key(argument)].dtype.kind in "iu"
        }
        return addresses, consts

    def size(self, call: KernelCall) -> int:
        """Return the bytes of a call's arguments and results."""
        return sum(sum(_sizes(value.ty)) for value in (*call.arguments, call.var))

    def _of(self, argument: Any) -> list[int]:
        found = self.places.get(_key(argument))
        if found is None:
            raise UnsupportedOpError(f"the address of {argument} is unknown")
        return found

    def _constants(self, calls: Sequence[KernelCall]) -> None:
        for call in calls:
            for argument in call.arguments:
                if isinstance(argument, GenericConst) and _key(argument) not in self.places:
                    self.places[_key(argument)] = self._fresh(argument.ty)
                    if "int" in str(argument.ty.dtype):
                        self.values[_key(argument)] = argument.value.numpy()

    def _intermediates(self, func: Any, calls: Sequence[KernelCall]) -> None:
        lies_in = origins(calls)
        read = [{lies_in.get(a, a) for a in c.arguments if isinstance(a, Var)} for c in calls]
        last = {argument: step for step, found in enumerate(read) for argument in found}
        kept = {lies_in.get(var, var) for var in relax.analysis.free_vars(func.body.body)}
        free: list[tuple[int, int]] = []
        for step, call in enumerate(calls):
            if call.in_place:
                self.places[call.var] = self._of(call.arguments[0])
            else:
                self.places[call.var] = [self._reused(size, free) for size in _sizes(call.var.ty)]
            for argument in (a for a in read[step] if isinstance(a, Var)):
                if last[argument] == step and argument not in kept and argument not in func.params:
                    sizes = _sizes(argument.ty)
                    free += list(zip(sizes, self.places[argument], strict=True))

    def _reused(self, size: int, free: list[tuple[int, int]]) -> int:
        """Take the smallest free block that is large enough, as TVM's static plan does."""
        fits = sorted(block for block in free if block[0] >= size)
        if not fits:
            return self._take(size)
        free.remove(fits[0])
        return fits[0][1]

    def _fresh(self, ty: Any) -> list[int]:
        return [self._take(size) for size in _sizes(ty)]

    def _take(self, size: int) -> int:
        place, self.top = self.top, self.top + -(-max(size, 1) // _PAGE) * _PAGE
        return place


def _key(expr: Any) -> Any:
    """Return what identifies a tensor: a constant is its data, whoever refers to it."""
    return int(expr.value.data_ptr()) if isinstance(expr, GenericConst) else expr


def _sizes(ty: Any) -> list[int]:
    if isinstance(ty, relax.TupleType):
        return [size for part in ty.fields for size in _sizes(part)]
    shape = [int(extent) for extent in ty.shape.values]
    return [int(np.prod(shape)) * int(tvm_ffi.dtype(str(ty.dtype)).itemsize)]
