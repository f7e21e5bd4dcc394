"""How the inputs of a whole KV cache become those of a step that was rewritten for fewer slots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.adapters.kv_quant import STATE_TYPES
from icd_tvm.adapters.kv_slots import SlotPlan, compact_slots, quantized_slots
from icd_tvm.adapters.kv_spec import KVSpec
from icd_tvm.errors import TransformError

STEP_CACHE = "icd.step_cache"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class StepCache:
    """The cache of a rewritten step, as module attribute ``icd.step_cache`` (JSON).

    Attributes
    ----------
    plan : SlotPlan
    length : str
        Input that holds the number of filled slots; empty if there is none.
    """

    plan: SlotPlan
    length: str

    @classmethod
    def read(cls, mod: Any) -> StepCache | None:
        """Return what the attribute of a module says; None where its cache is whole."""
        if mod.attrs is None or STEP_CACHE not in mod.attrs:
            return None
        found = json.loads(str(mod.attrs[STEP_CACHE]))
        plan = found["plan"]
        layers = tuple((keys, values) for keys, values in plan["layers"])
        heads, slots, channels = plan["shape"]
        spec = KVSpec(**plan["spec"])
        shape = (heads, slots, channels)
        return cls(SlotPlan(layers, shape, plan["slots"], plan["room"], spec), found["length"])

    def attach(self, mod: Any) -> Any:
        """Return a module with the attribute."""
        return mod.with_attr(STEP_CACHE, json.dumps(asdict(self)))

    def filled(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Return inputs of the whole step whose cache has one slot left for the new token."""
        if not self.length:
            return dict(inputs)
        length = np.full_like(inputs[self.length], self.plan.capacity - 1)
        return {**inputs, self.length: length}

    def inputs_to_own(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Drop tokens of a whole cache, round it, and return the inputs of the rewritten step.

        A cache that is as the step keeps it, such as a state that the step returned, passes.

        Raises
        ------
        TransformError
            The step has no input for the number of filled slots.
        IcdError
            As :func:`icd_tvm.adapters.kv_slots.compact_slots`.
        """
        names = [name for pair in self.plan.layers for name in pair]
        if self._is_own([inputs[name] for name in names]):
            return dict(inputs)
        dtype = self.plan.spec.dtype
        if self.plan.spec.drop == 0 and dtype is not None:
            return {**inputs, **quantized_slots({name: inputs[name] for name in names}, dtype)[0]}
        if not self.length:
            raise TransformError(
                "the step has no input that says how many slots are filled",
                "pass a compacted cache",
            )
        small = compact_slots(self.plan, inputs, int(np.max(inputs[self.length])))
        length = np.full_like(inputs[self.length], small.length)
        return {**inputs, **small.arrays, self.length: length}

    def _is_own(self, arrays: Sequence[NDArray[Any]]) -> bool:
        dtype = self.plan.spec.dtype
        return all(
            array.shape[2:3] == (self.plan.slots,)
            and (dtype is None or array.dtype == STATE_TYPES[dtype])
            for array in arrays
        )
