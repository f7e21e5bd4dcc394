"""Transcendental functions as fp32 polynomials that LLVM turns into vector code.

A call to ``expf`` or ``erff`` is scalar and keeps a whole loop scalar. The clamps take the
argument second, so that a NaN passes through.
"""

from __future__ import annotations

import math
from typing import Any

from icd_tvm._tvm import te, tirx
from icd_tvm.tir_schedules.cpu.emit import f32

LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# A sum with it is rounded to a whole number n, and its lowest bits are n + 126, the exponent of
# 2^(n - 1): one shift makes a factor of it. The polynomials are doubled in return.
_SHIFT = 1.5 * 2.0**23 + 126.0
# 2 exp(r) on |r| <= ln(2) / 2: minimax in relative error, 3.2e-9, and exact at 0.
_EXP = (
    2.763873432e-3,
    1.673734002e-2,
    8.333656192e-2,
    3.333304226e-1,
    9.999998808e-1,
    2.0,
    2.0,
)
# 2 * 2^f on |f| <= 1/2: minimax in relative error, 9.3e-8, and exact at 0.
_EXP2 = (
    2.653903095e-3,
    1.934258081e-2,
    1.110142171e-1,
    4.804449379e-1,
    1.386294007,
    2.0,
)
# log(1 + e) / e on 0 <= e <= 1: minimax in relative error, 3.3e-8, and exact at 0.
_LOG1P = (
    5.365407560e-3,
    -3.006824106e-2,
    7.920873910e-2,
    -1.375418156e-1,
    1.915384680e-1,
    -2.485721707e-1,
    3.332132995e-1,
    -4.999964833e-1,
    1.0,
)
# log(1 + f) = f - f^2 / 2 + f^3 p(f) on sqrt(1/2) <= 1 + f < sqrt(2) (Cephes, logf).
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF_BITS, _LEAST_NORMAL = 0x3F3504F3, 2.0**-126
# Beyond the most the factor 2^(n - 1) is infinite: n is 129.
_EXP_MIN, _EXP_MAX = -87.33654, 89.5
_ERF_LIMIT = 3.8
# erf(x) = x p(2 x^2 / 3.8^2 - 1) on |x| <= 3.8: minimax in |error|, 5e-8 before rounding; beyond,
# erf is 1 to within 8e-8. No division, and coefficients small enough for Horner in fp32.
_ERF = (
    1.022083103e-03,
    -2.695758129e-03,
    2.367288573e-03,
    -3.299472388e-03,
    9.949505329e-03,
    -1.833326928e-02,
    2.669303492e-02,
    -3.893965483e-02,
    5.505656078e-02,
    -7.251549512e-02,
    9.083271027e-02,
    -1.111855730e-01,
    1.377395093e-01,
    -1.856411994e-01,
    3.721076250e-01,
)
# The same on |x| <= 3 to 2.3e-5, and exact at the ends, so that what lies beyond is exactly 1.
_ERF_SHORT_LIMIT = 3.0
_ERF_SHORT = (
    6.957304110e-03,
    -1.786044529e-02,
    2.387828754e-02,
    -3.974237538e-02,
    7.225932735e-02,
    -1.111366914e-01,
    1.575779918e-01,
    -2.287293417e-01,
    4.701292763e-01,
)
# 2^f on |f| <= 1/2: minimax in relative error, 2.6e-6.
_EXP2_SHORT = (
    9.570113237e-03,
    5.591789425e-02,
    2.402474488e-01,
    6.931218106e-01,
    9.999992613e-01,
)
_TANH_SCALE = math.sqrt(2.0 / math.pi)
_EXP2_MIN, _EXP2_MAX = -126.0, 129.0


def exp(x: Any) -> Any:
    """Return ``e ** x`` to 2 ulp; zero below -87, infinite above 88.72."""
    clamped = tirx.min(f32(_EXP_MAX), tirx.max(f32(_EXP_MIN), x))
    n, half = _round(clamped * f32(LOG2_E))
    r = clamped - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW)
    return _horner(_EXP, r) * half


def exp2(x: Any, *, positive: bool = True) -> Any:
    """Return ``2 ** x`` to 3 ulp; zero below -125.5, infinite from 128 on.

    Without ``positive`` numbers the limit above is left out.
    """
    clamped = tirx.max(f32(_EXP2_MIN), x)
    clamped = tirx.min(f32(_EXP2_MAX), clamped) if positive else clamped
    n, half = _round(clamped)
    return _horner(_EXP2, clamped - n) * half


def exp2_short(x: Any) -> Any:
    """Return ``2 ** x`` of a number that is not positive, to 3e-6 relative.

    For results that are rounded to bytes. Below -126 it stays at the least normal float.
    """
    clamped = tirx.max(f32(_EXP2_MIN), x)
    n = te.round(clamped)
    power = n.astype("int32") << 23
    return tirx.reinterpret(
        "float32", tirx.reinterpret("int32", _horner(_EXP2_SHORT, clamped - n)) + power
    )


def log(x: Any) -> Any:
    """Return the natural logarithm to 2 ulp; -inf of zero, NaN below it."""
    small = x < f32(_LEAST_NORMAL)
    normal = tirx.Select(small, x * f32(2.0**23), x)
    bits = tirx.reinterpret("int32", normal)
    # Arithmetic shift: the power of two that leaves a factor from sqrt(1/2) to sqrt(2).
    power = (bits - _SQRT_HALF_BITS) >> 23
    f = tirx.reinterpret("float32", bits - (power << 23)) - f32(1.0)
    n = power.astype("float32") - tirx.Select(small, f32(23.0), f32(0.0))
    square = f * f
    value = f * square * _horner(_LOG, f) + n * f32(_LN2_LOW) - square * f32(0.5)
    value = value + f + n * f32(_LN2_HIGH)
    value = tirx.Select(x > f32(0.0), value, f32(math.nan))
    value = tirx.Select(tirx.EQ(x, f32(0.0)), f32(-math.inf), value)
    return tirx.Select(tirx.EQ(x, f32(math.inf)), x, value)


def softplus(x: Any) -> Any:
    """Return ``log(1 + e ** x)`` to 3 ulp, without an overflow; zero below -87."""
    power = exp(-te.abs(x))
    return tirx.max(f32(0.0), x) + power * _horner(_LOG1P, power)


def erf(x: Any) -> Any:
    """Return the error function to 3e-7 absolute."""
    return _odd(x, _ERF, _ERF_LIMIT)


def erf_short(x: Any) -> Any:
    """Return the error function to 2.3e-5 absolute, for results that are rounded to bytes."""
    return _odd(x, _ERF_SHORT, _ERF_SHORT_LIMIT)


def gelu(x: Any) -> Any:
    """Return ``x * (1 + erf(x / sqrt(2))) / 2`` to 5e-7, of results over 1 relative."""
    return _gelu(x, _ERF, _ERF_LIMIT)


def gelu_short(x: Any) -> Any:
    """Return `gelu` to 1.2e-5 of x, for results that are rounded to bytes."""
    return _gelu(x, _ERF_SHORT, _ERF_SHORT_LIMIT)


def gelu_tanh(x: Any) -> Any:
    """Return ``x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) / 2``."""
    inner = x * (f32(_TANH_SCALE) + f32(0.044715 * _TANH_SCALE) * x * x)
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    return x * sigmoid(inner * f32(2.0))


def sigmoid(x: Any) -> Any:
    """Return ``1 / (1 + e ** -x)``."""
    return f32(1.0) / (f32(1.0) + exp(-x))


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent to 3e-7 absolute."""
    return f32(2.0) * sigmoid(x * f32(2.0)) - f32(1.0)


def whole_power(x: Any, exponent: int) -> Any:
    """Return ``x ** exponent`` of a positive whole exponent, off by as many ulp at most."""
    if exponent == 1:
        return x
    half = whole_power(x, exponent // 2)
    return half * half * x if exponent % 2 else half * half


def to_code(x: Any, zero: Any, dtype: str) -> Any:
    """Return ``round(x) + zero`` saturated to int8 or uint8; halves go to even."""
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    return tirx.max(tirx.min(te.round(x) + zero, f32(high)), f32(low)).astype(dtype)


def _round(x: Any) -> tuple[Any, Any]:
    """Return n, which is x rounded, and ``2 ** (n - 1)``; zero for n = -126, infinite for 129."""
    bits = tirx.reinterpret("int32", x + f32(_SHIFT))
    # By way of the bits, because TVM simplifies (x + c) - c to x.
    n = tirx.reinterpret("float32", bits) - f32(_SHIFT)
    return n, tirx.reinterpret("float32", bits << 23)


def _odd(x: Any, coefficients: tuple[float, ...], limit: float) -> Any:
    """Return ``c p(2 c^2 / limit^2 - 1)`` of x clamped to +-limit."""
    clamped = tirx.min(f32(limit), tirx.max(f32(-limit), x))
    return clamped * _even(clamped, coefficients, limit)


def _even(x: Any, coefficients: tuple[float, ...], limit: float) -> Any:
    return _horner(coefficients, x * x * f32(2.0 / limit**2) - f32(1.0))


def _gelu(x: Any, coefficients: tuple[float, ...], limit: float) -> Any:
    """Return GELU by the polynomial of an error function, whose factors become its own."""
    limit = limit * 2.0**0.5
    # Both limits stay on the factor: far below, its error would be multiplied by x.
    above = tirx.max(f32(-limit), x)
    clamped = tirx.min(f32(limit), above)
    half = tuple(c * 0.5**1.5 for c in coefficients)
    return above * (clamped * _even(clamped, half, limit) + f32(0.5))


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    value = f32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + f32(coefficient)
    return value
