"""ApplyKVCompress: the K transform on a decoder step whose KV cache is an opaque state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass, tvm
from icd_tvm.adapters.kv_pages import break_even_steps
from icd_tvm.adapters.kv_quant import STATE_TYPES
from icd_tvm.adapters.kv_slots import SlotCache, SlotPlan, compact_slots, plan_slots
from icd_tvm.adapters.kv_spec import KVSpec, parse_kv
from icd_tvm.errors import IcdError, TransformError
from icd_tvm.relax_passes.attach_layout_tags import opaque_states
from icd_tvm.relax_passes.compact_groups import compact_groups
from icd_tvm.relax_passes.kv_states import KVStates, find_kv_states
from icd_tvm.relax_passes.quantize_kv_states import QuantizeKVStates
from icd_tvm.relax_passes.step_cache import StepCache
from icd_tvm.relax_passes.transform_meta import with_transform_meta

__all__ = ["ApplyKVCompress", "parse_kv"]

_NO_CACHE = "no cache was given, so no token was chosen"
_QUANT: dict[str, dict[str, Any]] = {
    "int8": {
        "dtype": "int8",
        "scales": "float32, one for every token of every KV head",
        "error_bound": "max |row| / 254: half a scale",
    },
    "fp16": {
        "dtype": "float16",
        "scales": None,
        "error_bound": "|number| / 2048, 2**-25 below 2**-14; numbers up to 65504",
    },
    "bf16": {"dtype": "bfloat16", "scales": None, "error_bound": "|number| / 256"},
}
_HELD = {"int8": "8-bit codes", "fp16": "float16", "bf16": "bfloat16"}
_SCALE_BYTES = 4
_COPIED = ("pages", "tokens", "copy", "loss", "density")


@tvm.transform.module_pass(opt_level=0, name="ApplyKVCompress")
class ApplyKVCompress:
    """Rewrite a decoder step for a cache of fewer slots, of fewer bits, or both.

    Slots after = kept tokens and the room for new ones, in whole pages. Every size is inferred
    again; slot numbers are cut. What the step computes from the slots that are left does not
    change, so it equals attention over the kept tokens alone. Rotary positions stay the original
    ones: keys are cached after the rotation, and a new token's position is an input apart.

    With a ``dtype`` the cache is stored as codes of 8 bits or floats of 16; see
    :class:`icd_tvm.relax_passes.quantize_kv_states.QuantizeKVStates`.

    What cannot be rewritten leaves the module as it is, with a warning; ``meta`` says why.

    Parameters
    ----------
    spec : KVSpec
    cache : mapping of str to array, optional
        The step's real cache inputs, compacted at once (see `compact`).
    length : int, optional
        Filled slots; all but the last if omitted.
    attention : array, optional
        For the scores; see :func:`icd_tvm.adapters.kv_slots.compact_slots`.
    opaque_states : sequence of (str, str)
        (input, output) names of the cache; those of the module's layout tag if omitted.

    Attributes
    ----------
    meta : dict
        JSON record, also merged into ``icd.transform_meta`` under ``kv``.
    plan : SlotPlan or None
        What the rewritten module expects; None if it was left as it is.
    compacted : SlotCache or None
        The cache for the rewritten module, if one was given.
    """

    def __init__(
        self,
        spec: KVSpec,
        cache: Mapping[str, np.ndarray] | None = None,
        *,
        length: int | None = None,
        attention: np.ndarray | None = None,
        opaque_states: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.spec = spec
        self.cache = cache
        self.length = length
        self.attention = attention
        self.opaque_states = tuple(opaque_states)
        self.meta: dict[str, Any] = {}
        self.plan: SlotPlan | None = None
        self.compacted: SlotCache | None = None

    def transform_module(self, mod: Any, ctx: Any) -> Any:
        """Return the module for the compacted cache, with the metadata attached."""
        self.plan = self.compacted = None
        try:
            new = self._compacted_module(mod)
        except IcdError as error:
            self.plan = self.compacted = None
            self.meta = {"spec": str(self.spec), "skipped": True, "why": error.line()}
            if self.spec.drop > 0 or self.spec.dtype is not None:
                text = f"kv {self.spec} skipped: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            new = mod.clone()
        return with_transform_meta(new, {"kv": self.meta})

    def compact(
        self,
        cache: Mapping[str, np.ndarray],
        length: int,
        attention: np.ndarray | None = None,
        positions: np.ndarray | None = None,
    ) -> SlotCache:
        """Compact another cache into the rewritten module's inputs.

        Parameters
        ----------
        cache, length, attention, positions
            As for :func:`icd_tvm.adapters.kv_slots.compact_slots`.

        Raises
        ------
        TransformError
            The pass has not rewritten a module.
        IcdError
            As :func:`icd_tvm.adapters.kv_slots.compact_slots`.
        """
        if self.plan is None:
            why = self.meta.get("why", "it was not run")
            raise TransformError(f"the step was not rewritten: {why}")
        return compact_slots(self.plan, cache, length, attention, positions)

    def _compacted_module(self, mod: Any) -> Any:
        if self.spec.drop == 0 and self.spec.dtype is None:
            raise TransformError("drop 0 removes nothing")
        pairs = self.opaque_states or opaque_states(mod)
        states = find_kv_states(mod["main"], pairs)
        capacity = states.shape[1]
        length = max(1, capacity - 1) if self.length is None else self.length
        self.plan = plan_slots(states.layers, states.shape, length, self.spec)
        if self.cache is not None:
            self.compacted = self.compact(self.cache, length, self.attention)
        new = mod
        if self.spec.drop > 0:
            keep = {group: np.arange(self.plan.slots) for group in states.slots}
            new = compact_groups(mod, states.groups, keep, resizable=("relax.nn.softmax",))
        if self.spec.dtype is not None:
            names = [name for pair in states.layers for name in pair]
            new = apply_pass(QuantizeKVStates(names, pairs, self.spec.dtype), new)
        self.meta = _meta(self.plan, states, mod, self.compacted)
        return StepCache(self.plan, states.length).attach(new)


def _meta(
    plan: SlotPlan, states: KVStates, mod: Any, compacted: SlotCache | None
) -> dict[str, Any]:
    sizes = {p.name: p.ty for p in mod["main"].params}
    names = [name for pair in plan.layers for name in pair]
    before = sum(_bytes(sizes[name]) for name in names)
    ratio = _stored_ratio([sizes[name] for name in names], plan.spec)
    after = round(before / plan.capacity * plan.slots * ratio)
    meta = {
        "kind": "kvcache",
        "spec": str(plan.spec),
        "rate": plan.spec.drop,
        "states": names,
        "slots": {"before": plan.capacity, "after": plan.slots, "room": plan.room},
        "bytes_before": before,
        "bytes_after": after,
        "freed": 1 - after / before,
        "copy": {
            "break_even_steps": break_even_steps(plan.slots / plan.capacity, ratio),
            "source": "model",
        },
        "loss": None,
        "loss_why": _NO_CACHE,
        "delta_layout": True,
        "skipped": False,
        "why": _why(plan),
    }
    if plan.spec.dtype is not None:
        meta["quant"] = _QUANT[plan.spec.dtype]
    if compacted is not None:
        del meta["loss_why"]
        meta.update({name: compacted.meta[name] for name in _COPIED})
        meta["length"] = compacted.length
    return meta


def _stored_ratio(types: Sequence[Any], spec: KVSpec) -> float:
    """Return bytes of a stored row, its scale included, over bytes of the row before."""
    if spec.dtype is None:
        return 1.0
    channels = [int(ty.shape.values[-1]) for ty in types]
    wide = sum(n * np.dtype(str(ty.dtype)).itemsize for n, ty in zip(channels, types, strict=True))
    size, scale = STATE_TYPES[spec.dtype].itemsize, _SCALE_BYTES * (spec.dtype == "int8")
    return sum(n * size + scale for n in channels) / wide


def _why(plan: SlotPlan) -> str:
    parts = ["kept tokens are contiguous, the pages behind them are gone"] * (plan.spec.drop > 0)
    if plan.spec.dtype is not None:
        parts.append(f"the cache holds {_HELD[plan.spec.dtype]}")
    return "; ".join(parts)


def _bytes(ty: Any) -> int:
    shape = [int(size) for size in ty.shape.values]
    return int(np.prod(shape)) * np.dtype(str(ty.dtype)).itemsize
