"""What the K adapter promises: the metadata of all adapters, untouched inputs, clear errors."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest

from icd_tvm.adapters.kvcache import KVCache, apply_kvcache

LAYERS, HEADS, TOKENS, DEPTH = 2, 2, 64, 8
FIELDS = {
    "kind": str,
    "type": str,
    "rate": float,
    "shape": list,
    "density": float,
    "params": dict,
    "tokens": dict,
    "pages": dict,
    "copy": dict,
    "loss": dict,
    "bytes_before": int,
    "bytes_after": int,
    "format": str,
    "groups": dict,
    "delta_layout": bool,
    "skipped": bool,
    "why": str,
}
REQUESTS: dict[str, dict[str, Any]] = {
    "drop": {"drop": 0.5},
    "mass": {"drop": 0.5, "score": "attention_mass", "scope": "shared"},
    "int8": {"drop": 0.0, "dtype": "int8"},
    "drop and fp8": {"drop": 0.25, "dtype": "fp8_e4m3"},
    "nothing": {"drop": 0.0},
    "impossible": {"drop": 0.5, "keep_recent": TOKENS},
}


def frozen(*shape: int, seed: int = 0) -> np.ndarray:
    """Return random values that cannot be written to."""
    array = np.random.default_rng(seed).random(shape).astype(np.float32)
    array.setflags(write=False)
    return array


def frozen_cache() -> KVCache:
    shape = (LAYERS, HEADS, TOKENS)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), shape)  # read-only
    return KVCache(frozen(*shape, DEPTH, seed=1), frozen(*shape, DEPTH, seed=2), positions)


def applied(name: str) -> tuple[KVCache, dict[str, Any]]:
    attention = frozen(LAYERS, 2 * HEADS, 3, TOKENS)
    options = {"block": 8, "attention": attention, **REQUESTS[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return apply_kvcache(frozen_cache(), **options)


@pytest.mark.parametrize("name", REQUESTS)
def test_metadata_of_every_request(name: str) -> None:
    out, meta = applied(name)
    assert {key: type(value) for key, value in meta.items()} == FIELDS
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    assert meta["kind"] == "kvcache"
    asked = REQUESTS[name]
    given = {"block": 8, "keep_sinks": 4, "keep_recent": 16, "scope": "per_head", "dtype": None}
    assert meta["params"] == {**given, "score": "attention_mass"} | {
        key: value for key, value in asked.items() if key != "drop"
    }
    assert meta["rate"] == asked["drop"]
    assert set(meta["loss"]) == {"frobenius", "quant", "output"}
    assert meta["skipped"] == (name in ("nothing", "impossible"))
    assert meta["delta_layout"] is not meta["skipped"]
    assert meta["why"]
    assert meta["bytes_before"] == 2 * LAYERS * HEADS * TOKENS * DEPTH * 4
    assert (meta["bytes_after"] < meta["bytes_before"]) is not meta["skipped"]
    kept = {"heads": HEADS, "layers": LAYERS, "kept": out.tokens}
    assert meta["groups"] == ({} if meta["skipped"] else kept)


@pytest.mark.parametrize("name", REQUESTS)
def test_repeats_exactly_and_writes_to_no_input(name: str) -> None:
    # Frozen inputs raise on any write.
    (first, meta), (second, again) = applied(name), applied(name)
    assert meta == again
    for one, other in ((first, second), (first.dequantized(), second.dequantized())):
        np.testing.assert_array_equal(one.keys, other.keys)
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.positions, other.positions)
    assert first.keys.flags.writeable
    assert first.positions is not None
    assert first.positions.flags.writeable


@pytest.mark.parametrize("name", REQUESTS)
def test_the_loss_is_that_of_the_whole_cache(name: str) -> None:
    """Dropped rows count as zeros, kept ones by what storage gives back."""
    out, meta = applied(name)
    back, whole = out.dequantized(), frozen_cache()
    assert back.positions is not None
    worst = 0.0
    for before, after in ((whole.keys, back.keys), (whole.values, back.values)):
        filled = np.zeros_like(before)
        np.put_along_axis(filled, back.positions[..., None], after, axis=2)
        worst = max(worst, float(np.linalg.norm(filled - before) / np.linalg.norm(before)))
    assert meta["loss"]["frobenius"] == pytest.approx(worst, rel=1e-5)
    assert (worst > 0) is not meta["skipped"]


def test_an_impossible_request_warns_and_the_caller_goes_on() -> None:
    whole = frozen_cache()
    with pytest.warns(RuntimeWarning, match="sinks or recent"):
        out, meta = apply_kvcache(whole, block=8, **REQUESTS["impossible"])
    np.testing.assert_array_equal(out.keys, whole.keys)
    np.testing.assert_array_equal(out.values, whole.values)
    again, _ = apply_kvcache(out, block=8, drop=0.5)
    assert again.tokens == TOKENS // 2
    assert meta["skipped"]
