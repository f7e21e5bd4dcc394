"""A step's cache arrays, of a fixed number of slots, before and after compaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icd_tvm.adapters.arrays import Array, Index, require_finite, require_real
from icd_tvm.adapters.kv_quant import (
    SCALE_SUFFIX,
    StateDtype,
    dequantize_rows,
    narrow_rows,
    quantize_rows,
)
from icd_tvm.adapters.kv_spec import KVSpec
from icd_tvm.adapters.kvcache import KVCache, apply_kvcache
from icd_tvm.adapters.units import kept_count
from icd_tvm.errors import ShapeError, TransformError


@dataclass(frozen=True)
class SlotPlan:
    """How a decoder step's cache shrinks.

    Attributes
    ----------
    layers : tuple of (str, str)
        Names of the inputs that hold each layer's keys and values.
    shape : (int, int, int)
        KV heads, slots before, and channels of a head of the keys.
    slots : int
        Slots after: a whole number of pages, or the slots before if nothing is dropped.
    room : int
        Tokens that can be appended to the compacted cache without filling its last page.
    spec : KVSpec
    """

    layers: tuple[tuple[str, str], ...]
    shape: tuple[int, int, int]
    slots: int
    room: int
    spec: KVSpec

    @property
    def capacity(self) -> int:
        """Slots before."""
        return self.shape[1]


@dataclass(frozen=True)
class SlotCache:
    """Cache arrays in the layout of a step's inputs.

    Attributes
    ----------
    arrays : mapping of str to array
        Input name -> [1, heads, slots, channels]; slots behind ``length`` are zero. For int8
        codes also ``NAME_scale`` -> float32[1, heads, slots, 1].
    length : int
        Filled slots, the step's ``cache_length``. The same in every head: the step has one
        length for all of them, so every head keeps the same number of tokens.
    positions : int32 array, shape [layers, heads, length]
        The index map: place of every kept token before the drop.
    meta : dict
        Of :func:`icd_tvm.adapters.kvcache.apply_kvcache`, JSON-serialisable.
    """

    arrays: dict[str, Array]
    length: int
    positions: Index
    meta: dict[str, Any]


def plan_slots(
    layers: tuple[tuple[str, str], ...], shape: tuple[int, int, int], length: int, spec: KVSpec
) -> SlotPlan:
    """Choose the slots of the compacted cache: the kept tokens and the room, in whole pages.

    Parameters
    ----------
    layers, shape
        See `SlotPlan`.
    length : int
        Filled slots before.
    spec : KVSpec

    Returns
    -------
    SlotPlan

    Raises
    ------
    ShapeError
        More filled slots than there are, or none.
    TransformError
        A page is larger than the cache, or no whole page would be freed.
    """
    capacity = shape[1]
    if not 1 <= length <= capacity:
        raise ShapeError(
            f"length {length} is outside 1..{capacity}", "pass the number of filled slots"
        )
    if spec.drop == 0:
        return SlotPlan(layers, shape, capacity, max(1, capacity - length), spec)
    if spec.block > capacity:
        raise TransformError(
            f"a page of {spec.block} tokens is larger than the cache of {capacity} slots",
            "pass a smaller block",
        )
    room = max(1, capacity - length) if spec.room is None else spec.room
    kept = _kept(length, spec)
    slots = -(-(kept + room) // spec.block) * spec.block
    if slots >= capacity:
        raise TransformError(
            f"{kept} of {length} tokens and room for {room} need {slots} of {capacity} slots: "
            "no whole page is freed",
            "drop more, or pass a smaller block",
        )
    return SlotPlan(layers, shape, slots, room, spec)


def _kept(length: int, spec: KVSpec) -> int:
    least = min(length, spec.keep_sinks + spec.keep_recent)
    return max(kept_count(length, spec.drop), least)


def compact_slots(
    plan: SlotPlan,
    cache: Mapping[str, Array],
    length: int,
    attention: Array | None = None,
    positions: Index | None = None,
) -> SlotCache:
    """Drop tokens of a step's real cache and lay the rest out for the compacted step.

    Rotated keys keep their rotation: the step goes on with the token's original position.

    Parameters
    ----------
    plan : SlotPlan
    cache : mapping of str to float array
        The step's cache inputs, each [1, heads, slots, channels]; not modified, further entries
        are ignored.
    length : int
        Filled slots.
    attention : float array, optional
        Shape [layers, query heads, (queries,) length]; see
        :func:`icd_tvm.adapters.kvcache.apply_kvcache`. The query heads of a KV head are summed,
        so all of them see the same kept tokens.
    positions : int32 array, shape [layers, heads, length], optional
        The index map so far, of a cache that was compacted before and filled on; composed.

    Returns
    -------
    SlotCache

    Raises
    ------
    ShapeError
        An array is missing or has the wrong shape, the length is out of range, or the kept
        tokens and one more do not fit.
    NonFiniteError
        NaN or infinity in a filled slot, or a number outside the range of the spec's dtype.
    ConfigError
        ``attention_mass`` without attention.
    """
    if not 1 <= length <= plan.capacity:
        raise ShapeError(f"length {length} is outside 1..{plan.capacity}", "count filled slots")
    kept = _kept(length, plan.spec)
    if kept >= plan.slots:
        raise ShapeError(
            f"{kept} of {length} tokens and a new one do not fit into {plan.slots} slots",
            "plan for this length",
        )
    keys, values = (_stacked(plan, cache, length, part) for part in (0, 1))
    spec = plan.spec
    small, meta = apply_kvcache(
        KVCache(keys, values, positions), spec.block, spec.drop, spec.score, spec.scope,
        spec.keep_sinks, spec.keep_recent, attention=attention,
    )  # fmt: skip
    arrays = {}
    for layer, names in enumerate(plan.layers):
        for name, stored in zip(names, (small.keys, small.values), strict=True):
            arrays[name] = _padded(stored[layer], plan.slots)
    if spec.dtype is not None:
        arrays, meta["loss"]["quant"] = quantized_slots(arrays, spec.dtype)
    assert small.positions is not None
    return SlotCache(arrays, small.tokens, small.positions, meta)


def quantized_slots(
    arrays: Mapping[str, Array], dtype: StateDtype
) -> tuple[dict[str, Array], float]:
    """Return cache inputs as a step stores them, and the largest relative Frobenius error of one.

    Parameters
    ----------
    arrays : mapping of str to float array
        Input name -> [1, heads, slots, channels].
    dtype : {"int8", "fp16", "bf16"}
        int8 codes come with their scales, as input ``NAME_scale``.

    Raises
    ------
    NonFiniteError
        A number is outside the range of the type.
    """
    found: dict[str, Array] = {}
    worst = 0.0
    for name, array in arrays.items():
        if dtype == "int8":
            codes, scales = quantize_rows(array)
            found[name], found[name + SCALE_SUFFIX] = codes, scales
            back = dequantize_rows(codes, scales)
        else:
            found[name] = narrow_rows(array, dtype)
            back = found[name].astype(np.float32)
        norm = float(np.linalg.norm(array))
        lost = float(np.linalg.norm(back - array))
        worst = max(worst, lost / norm if norm else 0.0)
    return found, worst


def _stacked(plan: SlotPlan, cache: Mapping[str, Array], length: int, part: int) -> Array:
    """Return the filled slots of all layers' keys (part 0) or values, checked."""
    rows = []
    for names in plan.layers:
        name = names[part]
        if name not in cache:
            raise ShapeError(f"the cache has no array {name!r}", "pass every state of the step")
        array = np.asarray(cache[name])
        want = (1, *plan.shape[:2])
        if array.ndim != 4 or array.shape[:3] != want:
            raise ShapeError(f"{name} has shape {list(array.shape)}, not {[*want, 'channels']}")
        require_real(array, name)
        require_finite(array[0, :, :length], name)
        rows.append(array[0, :, :length])
    if any(row.shape != rows[0].shape for row in rows):
        raise ShapeError("layers have different numbers of channels", "compact them apart")
    return np.stack(rows)


def _padded(stored: Array, slots: int) -> Array:
    array = np.zeros((1, stored.shape[0], slots, stored.shape[2]), stored.dtype)
    array[0, :, : stored.shape[1]] = stored
    return array
