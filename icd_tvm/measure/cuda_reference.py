"""Random inputs of a CUDA kernel, and what it must make of them, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm.measure.reference_codes import expected_codes, expected_row_codes
from icd_tvm.tir_schedules.cuda.gemm import SLAB, unpack_weight
from icd_tvm.tir_schedules.cuda.gemm_24 import TwoFour, unpack_two_four
from icd_tvm.tir_schedules.cuda.gemv import unpack_int4
from icd_tvm.tir_schedules.cuda.source_kernel import Argument, Rule, SourceKernel, numpy_dtype

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Random = np.random.Generator
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


class Expected(NamedTuple):
    """One output: which of its leading rows are checked, their values, and the error allowed.

    The error is infinite where a kernel writes nothing, so that anything may stand there.
    """

    rows: Array
    values: Array
    allowed: Array


class Trial(NamedTuple):
    """Inputs by name, and what must come out of some rows of each output."""

    inputs: Arrays
    expected: dict[str, Expected]

    def check(self, found: Mapping[str, Array]) -> float:
        """Return the largest error as a share of what is allowed; more than 1 is wrong."""
        shares = [
            np.where(
                np.isinf(expected.allowed),
                0.0,
                np.abs(found[name][expected.rows].astype(np.float64) - expected.values)
                / expected.allowed,
            )
            for name, expected in self.expected.items()
        ]
        # max() of Python would lose a NaN.
        worst = float(np.max([np.max(share) for share in shares]))
        return worst if np.isfinite(worst) else float("inf")


def make_trial(rule: Rule, seed: int = 0, rows: int = 64) -> Trial:
    """Return random inputs of a rule's kernels, and what its last one must write.

    Parameters
    ----------
    rule : Rule
    seed : int
    rows : int
        How many of the leading rows of a large output are checked, drawn at random.
    """
    rng, last = np.random.default_rng(seed), rule.kernels[-1]
    made = {a.name for k in rule.kernels[:-1] for a in k.arguments[-k.outputs :]}
    arguments = {a.name: a for k in rule.kernels for a in k.arguments[: -k.outputs]}
    inputs = {name: _random(a, rng) for name, a in arguments.items() if name not in made}
    family = last.family
    if family == "mamba_step":
        return _scan(inputs) if "state" in inputs else _conv(inputs)
    if family == "prefill_scan":
        return _prefill(inputs) if "state" in inputs else _prefill_conv(inputs)
    out = last.arguments[-1]
    if family == "append":
        return _append(inputs, last.arguments[-3])
    if family == "attention":
        return _attention(inputs, out)
    if family == "decode_attention":
        return _decode(inputs, out)
    chosen = np.sort(rng.permutation(out.shape[0])[:rows])
    if family == "norm":
        return _norm(inputs, last, chosen)
    if family == "quantize":
        y = inputs["x"][chosen].astype(np.float64)
        return Trial(inputs, _coded(y, np.zeros_like(y), chosen, last))
    if family == "gemv":
        return _gemv(inputs, out, chosen, last.activation)
    return _gemm(inputs, last, chosen)


def _random(argument: Argument, rng: Random) -> Array:
    """Return values of a kind that the argument's name calls for."""
    name, shape, dtype = argument.name, argument.shape, numpy_dtype(argument.dtype)
    if name in ("slabs", "blocks"):
        # As many live blocks as are listed, of twice as many.
        return np.stack(
            [np.sort(rng.permutation(2 * shape[1])[: shape[1]]) for _ in range(shape[0])]
        ).astype(np.int32)
    if name == "meta":
        # Two places of four, in order.
        nibbles = rng.choice(np.array([4, 8, 9, 12, 13, 14], np.uint32), (*shape, 8))
        return (nibbles << np.arange(8, dtype=np.uint32) * 4).sum(-1, dtype=np.uint32)
    if name == "pages":
        # No two heads share a page.
        return rng.permutation(int(np.prod(shape))).reshape(shape).astype(np.int32)
    if name == "length":
        return np.zeros(shape, dtype)  # set by _append
    if name == "live":
        return np.full(shape, -1, np.int32)  # set by _decode, which knows the capacity
    if name == "mask":
        return np.where(rng.random(shape) < 0.2, -np.inf, 0).astype(np.float32)
    if name in ("row_zero", "column_sums"):
        return rng.integers(-128, 128, shape).astype(np.float32)
    if name.endswith(("scale", "scales")):
        return (rng.random(shape) / 64).astype(np.float32)
    if name == "a" and dtype == np.float32:
        return -rng.random(shape, np.float32)
    if dtype.kind in "iu":
        low, high = (0, 256) if dtype == np.uint8 else (-127, 128)
        return rng.integers(low, high, shape).astype(dtype)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _finish(sums: Array, inputs: Arrays, rows: Array, activation: str) -> Array:
    y = sums + inputs["bias"].astype(np.float64) if "bias" in inputs else sums
    if activation == "gelu":
        y = 0.5 * y * (1 + np.vectorize(erf, otypes=[float])(y / np.sqrt(2)))
    elif activation == "relu":
        y = np.maximum(y, 0)
    elif activation == "silu":
        y = y / (1 + np.exp(-y))
    return y + inputs["residual"][rows].astype(np.float64) if "residual" in inputs else y


def _rounded(values: Array, dtype: str, terms: int, scale: float) -> Array:
    """Return the error of one rounding to ``dtype`` and of a float32 sum of ``terms``."""
    return np.asarray(
        1.01 * EPS[dtype] * np.abs(values) + 16 * terms**0.5 * EPS["float32"] * scale + 1e-7
    )


def _gemm(inputs: Arrays, kernel: SourceKernel, rows: Array) -> Trial:
    a, packed, out = inputs["a"], inputs["w"], kernel.arguments[-1]
    k, n = a.shape[1], out.shape[1]
    slabs = inputs.get("slabs")
    if slabs is not None:
        # A matrix of random blocks: those beyond K read nothing.
        inputs["slabs"] = slabs = np.where(slabs < -(-k // SLAB), slabs, -1).astype(np.int32)
    if "meta" in inputs:
        w = unpack_two_four(TwoFour(packed, inputs["meta"]), k, n).astype(np.float64)
    else:
        w = unpack_weight(packed, k, n, slabs).astype(np.float64)
    if "stray_list" in inputs:
        w = w + _strays(inputs, k, n, a.dtype)
    sums, scale = a[rows].astype(np.float64) @ w, 4.0 * float(np.abs(w).max())
    if "row_zero" in inputs:
        sums = sums - np.outer(inputs["row_zero"][rows].astype(np.float64), inputs["column_sums"])
    if "column_scale" in inputs:
        ones = np.ones(len(a), np.float32)
        by_row = inputs.get("row_scale", ones)[rows].astype(np.float64)
        sums = sums * by_row[:, None] * inputs["column_scale"]
        largest = by_row.max() * 127 * (255 if "row_zero" in inputs else 127) / 64
        scale = largest if a.dtype == np.int8 else scale / 64**2
    y = _finish(sums, inputs, rows, kernel.activation)
    if out.dtype == "int8":
        coded = expected_codes(y, _rounded(y, "float32", k, scale), *kernel.codes)
        return Trial(inputs, {"c": Expected(rows, *coded)})
    return Trial(inputs, {"c": Expected(rows, y, _rounded(y, out.dtype, k, scale))})


def _strays(inputs: Arrays, k: int, n: int, dtype: np.dtype[Any]) -> Array:
    """Spread random strays over the columns; return them as float64[k, n], doubled ones summed."""
    rng, shape = np.random.default_rng(n), inputs["stray_list"].shape
    starts = np.linspace(0, shape[0], n + 1).astype(np.int32)
    at, values = rng.integers(0, k, shape), rng.standard_normal(shape).astype(dtype)
    words = at.astype(np.uint32) | values.view(np.uint16).astype(np.uint32) << 16
    inputs["stray_starts"], inputs["stray_list"] = starts, words
    full = np.zeros((k, n))
    columns = np.repeat(np.arange(n), np.diff(starts))
    np.add.at(full, (at, columns[:, None]), values.astype(np.float64))
    return full


def _gemv(inputs: Arrays, out: Argument, rows: Array, activation: str) -> Trial:
    x, w = inputs["x"][0].astype(np.float64), inputs["w"]
    w = (unpack_int4(w) if w.dtype == np.uint8 else w).astype(np.float64)
    blocks = inputs.get("blocks")
    if blocks is not None:
        inputs["blocks"] = blocks = np.where(blocks * SLAB < len(x), blocks, -1).astype(np.int32)
        real = _spread(w, blocks, len(x))
    else:
        real = w[:, : len(x)]
    if "scales" in inputs:
        scales = inputs["scales"].astype(np.float64).reshape(len(real), -1)
        real = real * np.repeat(scales, real.shape[1] // scales.shape[1], 1)
    y = _finish((real @ x)[None], inputs, rows, activation)
    allowed = _rounded(y, out.dtype, len(x), float(np.abs(real).max()))
    return Trial(inputs, {"y": Expected(rows, y, allowed)})


def _spread(w: Array, blocks: Array, k: int) -> Array:
    """Return the rows with their live blocks where they belong."""
    full = np.zeros((len(w), -(-k // SLAB), SLAB))
    per_group = len(w) // len(blocks)
    for group, listed in enumerate(blocks):
        own = slice(group * per_group, (group + 1) * per_group)
        kept = w[own].reshape(per_group, -1, SLAB)[:, listed >= 0]
        full[own][:, listed[listed >= 0]] = kept
    return full.reshape(len(w), -1)[:, :k]


def _softmax(scores: Array) -> Array:
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return np.asarray(weights / np.where(total > 0, total, 1))


def _attention(inputs: Arrays, out: Argument) -> Trial:
    # The first and the last sequence.
    rows = np.unique([0, out.shape[0] - 1])
    q, k, v = (inputs[name][rows].astype(np.float64) for name in "qkv")
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if "mask" in inputs:
        scores = scores + inputs["mask"][rows][:, None, None]
    y = np.einsum("bhqk,bkhd->bqhd", _softmax(scores), v)
    # Weights are rounded to the operand type before the second product.
    allowed = np.full_like(y, 4 * EPS[out.dtype] * np.abs(v).max())
    return Trial(inputs, {"out": Expected(rows, y, allowed)})


def _cache(inputs: Arrays, name: str) -> Array:
    """Return keys or values as float64[batch, heads, capacity, size]."""
    codes, scale = inputs[name].astype(np.float64), inputs.get(f"{name}_scale")
    if scale is not None:
        # By slot; a page may have a scale for each channel instead.
        by_slot = scale.shape == codes.shape[:-1]
        codes *= scale[..., None] if by_slot else scale[:, None]
    if "pages" not in inputs:
        return codes
    own = codes[inputs["pages"]]
    return own.reshape(*own.shape[:2], -1, own.shape[-1])


def _decode(inputs: Arrays, out: Argument) -> Trial:
    k, v = (_cache(inputs, name) for name in "kv")
    capacity, heads = k.shape[2], inputs["live"].size
    inputs["live"] = np.linspace(1, capacity, heads).astype(np.int32).reshape(inputs["live"].shape)
    scores = np.einsum("bhgd,bhtd->bhgt", inputs["q"].astype(np.float64), k) / k.shape[-1] ** 0.5
    dead = np.arange(capacity) >= inputs["live"][..., None]
    weights = _softmax(np.where(dead[:, :, None], -np.inf, scores))
    y = np.einsum("bhgt,bhtd->bhgd", weights, v)
    allowed = np.full_like(y, 2 * EPS[out.dtype] * np.abs(v).max())
    return Trial(inputs, {"out": Expected(np.arange(len(y)), y, allowed)})


def _coded(y: Array, error: Array, rows: Array, kernel: SourceKernel) -> dict[str, Expected]:
    found = expected_row_codes(y, error, *kernel.codes)
    return {name: Expected(rows, *one) for name, one in found.items()}


def _norm(inputs: Arrays, kernel: SourceKernel, rows: Array) -> Trial:
    """Only a layer norm has a beta, and subtracts the mean."""
    h = inputs["x"][rows].astype(np.float64)
    if "residual" in inputs:
        h = h + inputs["residual"][rows].astype(np.float64)
    if "beta" in inputs:
        h = h - h.mean(-1, keepdims=True)
    y = h / np.sqrt((h**2).mean(-1, keepdims=True) + kernel.eps)
    y = y * inputs["gamma"].astype(np.float64) + inputs.get("beta", np.zeros(1)).astype(np.float64)
    written = {a.name: a.dtype for a in kernel.arguments[-kernel.outputs :]}
    expected = {}
    if "codes" in written:
        expected = _coded(y, _rounded(y, "float32", h.shape[-1], 1.0), rows, kernel)
    if "out" in written:
        allowed = _rounded(y, written["out"], h.shape[-1], 1.0)
        expected["out"] = Expected(rows, y, allowed)
    return Trial(inputs, expected)


def _append(inputs: Arrays, cache: Argument) -> Trial:
    """Write the last slot: what lies in the others is no input, and not known."""
    heads, slots, size = cache.shape
    inputs["length"] = np.full_like(inputs["length"], slots - 1)
    f = {name: inputs[name].astype(np.float64) for name in "qkv"}
    if "cos" in inputs:
        for name in "qk":
            first, second = np.split(f[name], 2, axis=1)
            turned = np.concatenate([-second, first], 1) * inputs["sin"]
            f[name] = f[name] * inputs["cos"] + turned
    expected: dict[str, Expected] = {}
    for name, row in (("keys", f["k"]), ("values", f["v"])):
        values, allowed = np.zeros(cache.shape), np.full(cache.shape, np.inf)
        values[:, -1], allowed[:, -1] = row, _rounded(row, cache.dtype, size, 1.0)
        expected[name] = Expected(np.arange(heads), values, allowed)
    error = _rounded(f["q"], str(inputs["q"].dtype), size, 1.0)
    return Trial(inputs, {**expected, "q_out": Expected(np.arange(len(f["q"])), f["q"], error)})


def _conv(inputs: Arrays) -> Trial:
    x, everything = inputs["x"], np.arange(len(inputs["x"]))
    moved = np.concatenate([inputs["window"][:, 1:], x.astype(np.float32)[:, None]], 1)
    sums = (moved.astype(np.float64) * inputs["weight"]).sum(1) + inputs["bias"]
    y = sums / (1 + np.exp(-sums))
    exact = np.full(moved.shape, 1e-30)
    return Trial(
        inputs,
        {
            "window_out": Expected(everything, moved.astype(np.float64), exact),
            "out": Expected(everything, y, _rounded(y, str(x.dtype), 4, 4.0)),
        },
    )


def _scan(inputs: Arrays) -> Trial:
    f = {name: array.astype(np.float64) for name, array in inputs.items()}
    everything = np.arange(len(f["x"]))
    step = np.logaddexp(0, f["dt"] + f["dt_bias"])
    state = f["state"] * np.exp(step[:, None] * f["a"]) + (step * f["x"])[:, None] * f["b"]
    y = (state @ f["c"] + f["d"] * f["x"]) * f["z"] / (1 + np.exp(-f["z"]))
    scale = 4 * float(np.abs(state).max())
    return Trial(
        inputs,
        {
            "state_out": Expected(everything, state, 2e-5 * (1 + np.abs(state))),
            "out": Expected(everything, y, _rounded(y, str(inputs["x"].dtype), 64, scale)),
        },
    )


def _convolved(inputs: Arrays) -> tuple[Array, Array]:
    """Return the convolution of a prompt with its SiLU, and the last four inputs."""
    x = inputs["x"].astype(np.float64)
    long = np.concatenate([inputs["window"].swapaxes(1, 2).astype(np.float64), x], 1)
    length = x.shape[1]
    sums = sum(long[:, i + 1 : i + 1 + length] * inputs["weight"][:, i] for i in range(4))
    sums = sums + inputs["bias"].astype(np.float64)
    return np.asarray(sums / (1 + np.exp(-sums))), long[:, -4:].swapaxes(1, 2)


def _window(values: Array) -> Expected:
    return Expected(np.arange(len(values)), values, np.full(values.shape, 1e-30))


def _prefill_conv(inputs: Arrays) -> Trial:
    y, window = _convolved(inputs)
    allowed = _rounded(y, str(inputs["x"].dtype), 4, 4.0)
    return Trial(
        inputs,
        {"window_out": _window(window), "out": Expected(np.arange(len(y)), y, allowed)},
    )


def _prefill(inputs: Arrays) -> Trial:
    f = {name: array.astype(np.float64) for name, array in inputs.items()}
    expected = {}
    if "window" in inputs:
        f["x"], window = _convolved(inputs)
        expected["window_out"] = _window(window)
    everything, state, y = np.arange(len(f["x"])), f["state"], np.zeros_like(f["x"])
    step = np.logaddexp(0, f["dt"] + f["dt_bias"])
    for t in range(y.shape[1]):
        state = state * np.exp(step[:, t, :, None] * f["a"])
        state = state + (step * f["x"])[:, t, :, None] * f["b"][:, t, None]
        y[:, t] = (state @ f["c"][:, t, :, None])[..., 0]
    y = (y + f["d"] * f["x"]) * f["z"] / (1 + np.exp(-f["z"]))
    scale = 4 * float(np.abs(state).max())
    allowed = _rounded(y, str(inputs["x"].dtype), 64, scale)
    close = 2e-5 * (1 + np.abs(state))
    expected["state_out"] = Expected(everything, state, close)
    return Trial(inputs, {**expected, "out": Expected(everything, y, allowed)})


def run_rule(
    rule: Rule, inputs: Mapping[str, Array], run: Callable[[Any, Arrays], Mapping[str, Array]]
) -> Arrays:
    """Run the kernels one after another; ``run(kernel, inputs)`` returns a kernel's outputs."""
    known = dict(inputs)
    for kernel in rule.kernels:
        names = [argument.name for argument in kernel.arguments[: -kernel.outputs]]
        known |= run(kernel, {name: known[name] for name in names})
    return known
