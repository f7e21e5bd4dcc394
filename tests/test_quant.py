"""Quantisation: error bounds, exact cases, compensation, order and salient rows, bad requests."""

import json
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icd_tvm.adapters import quant_tensor
from icd_tvm.adapters.quant import (
    Histogram,
    QuantizedTensor,
    QuantSpec,
    activation_scale,
    apply_quant,
    fold_scales,
    migrate_scales,
    observe,
    pack_int4,
    parse_quant,
    quantize,
    unpack_int4,
)
from icd_tvm.adapters.quant_compensate import DAMPING
from icd_tvm.adapters.quant_scales import FORMATS, kl_factor
from icd_tvm.errors import ConfigError, NonFiniteError, PermutationError, ShapeError

GRANULARITIES = st.sampled_from(["tensor", "channel", "group:1", "group:5", "group:16"])
METHODS = ["ptq-minmax", "ptq-mse", "ptq-kld"]


def weight(k: int = 32, n: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size=(k, n)).astype(np.float32)


def correlated(tokens: int, k: int, seed: int) -> np.ndarray:
    """Inputs in which some directions carry most of the energy, the same for every seed."""
    mix = np.random.default_rng(99).normal(size=(k, k)) * np.geomspace(1, 0.02, k)[:, None]
    return np.random.default_rng(seed).normal(size=(tokens, k)) @ mix


def wide(q: QuantizedTensor) -> np.ndarray:
    return q.dequantize(np.float64)


# Requests as text.


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", QuantSpec("none")),
        (" INT8 ", QuantSpec("int8")),
        ("int4", QuantSpec("int4", granularity="group", group=128)),
        ("int4:channel", QuantSpec("int4")),
        ("int8:group:64", QuantSpec("int8", granularity="group", group=64)),
        ("fp8_e5m2:tensor:ptq-mse", QuantSpec("fp8_e5m2", "ptq-mse", "tensor")),
        ("int8:ptq-kld:asym", QuantSpec("int8", "ptq-kld", symmetric=False)),
        (
            "int4:compensate:salient:0.01:act-order:group32",
            QuantSpec("int4", "ptq-minmax", "group", 32, True, True, 0.01, True),
        ),
        ("int4:g64", QuantSpec("int4", granularity="group", group=64)),
        ("int8:w8a8", QuantSpec("int8", activations="minmax")),
        ("int8:w8a8-mse:asym", QuantSpec("int8", symmetric=False, activations="mse")),
        ("int8:smooth:0.5:w8a8-dynamic", QuantSpec("int8", activations="dynamic", smooth=0.5)),
    ],
)
def test_parse(text: str, spec: QuantSpec) -> None:
    assert parse_quant(text) == spec
    assert parse_quant(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "did you mean 'int"),
        ("itn4:group128", "did you mean 'int4'"),
        ("fp8", "did you mean 'fp8_"),
        ("", "known: none"),
        ("int8:chanel", "did you mean 'channel'"),
        ("int8:ptq-mean", "did you mean 'ptq-m"),
        ("int8:act_order", "did you mean 'act-order'"),
        ("int8:", "known: tensor"),
        ("int8:channel:tensor", "granularity twice"),
        ("int8:asym:asym", "symmetry twice"),
        ("int4:group0", "group below 1"),
        ("int4:salient0", "in \\(0, 1\\)"),
        ("int4:salient1.0", "in \\(0, 1\\)"),
        ("int4:salientx", "in \\(0, 1\\)"),
        ("none:channel", "after 'none'"),
        ("fp8_e4m3:asym", "drop asym"),
        ("fp8_e4m3:ptq-kld", "even steps"),
        ("int8:channel:act-order", "changes nothing"),
        ("int8:w8a9", "did you mean 'w8a8'"),
        ("int8:w8a8:w8a8-mse", "activations twice"),
        ("int4:w8a8", "w8a8 takes int8"),
        ("fp8_e4m3:w8a8-dynamic", "w8a8 takes int8"),
        ("int8:group32:w8a8", "w8a8 takes int8"),
        ("int8:w8a8:salient0.1", "drop w8a8"),
        ("int8:smooth0.5", "add w8a8"),
        ("int8:w8a8:smooth1.5", "no smooth share"),
        ("int8:w8a8-kld:smooth0.5", "smooth goes with w8a8"),
    ],
)
def test_bad_requests_point_at_a_valid_one(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_quant(text)
    assert re.search(message, str(caught.value))


def test_parameters_and_text_say_the_same() -> None:
    x = correlated(64, 32, 0)
    by_text, meta = apply_quant(weight(), "int4:group16:ptq-mse:asym:compensate", calibration=x)
    by_name, same = apply_quant(
        weight(),
        "int4",
        "ptq-mse",
        granularity="group:16",
        symmetric=False,
        calibration=x,
        compensate=True,
    )
    assert meta == same
    np.testing.assert_array_equal(by_text.codes, by_name.codes)
    with pytest.raises(ConfigError, match="granularity twice"):
        apply_quant(weight(), "int4:group16", granularity="channel")


# Error bounds and exact cases.


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["int8", "int4"]),
    GRANULARITIES,
    st.booleans(),
    st.integers(1, 33),
    st.integers(1, 9),
    st.floats(-30, 30),
    st.integers(0, 99),
)
def test_integer_error_is_at_most_half_a_step(
    dtype: str, granularity: str, symmetric: bool, k: int, n: int, power: float, seed: int
) -> None:
    w = (weight(k, n, seed) * 10.0**power).astype(np.float32)
    q, meta = apply_quant(w, dtype, granularity=granularity, symmetric=symmetric)
    step = np.broadcast_to(q.scales[q.g_idx], w.shape).astype(np.float64)
    assert (np.abs(wide(q) - w) <= 0.5 * step * (1 + 1e-5)).all()
    assert q.codes.min() >= FORMATS[dtype].low
    assert q.codes.max() <= FORMATS[dtype].high
    assert symmetric <= (not q.zero_points.any())
    assert meta["loss"]["frobenius"] < (0.02 if dtype == "int8" else 0.5)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["fp8_e4m3", "fp8_e5m2"]), GRANULARITIES, st.integers(1, 20), st.integers(0, 99)
)
def test_float8_error_is_at_most_half_a_unit(
    dtype: str, granularity: str, k: int, seed: int
) -> None:
    w = weight(k, 5, seed)
    q, _ = apply_quant(w, dtype, granularity=granularity)
    bits, smallest = (3, 2.0**-9) if dtype == "fp8_e4m3" else (2, 2.0**-16)
    scale = np.broadcast_to(q.scales[q.g_idx], w.shape).astype(np.float64)
    bound = np.maximum(np.abs(w) * 2.0 ** -(bits + 1), 0.5 * smallest * scale)
    assert (np.abs(wide(q) - w) <= bound * (1 + 1e-5)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["int8", "int4"]), GRANULARITIES, st.sampled_from(["ptq-minmax", "ptq-mse"]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_representable_integers_come_back_exactly(
    dtype: str, granularity: str, method: str, symmetric: bool, seed: int
) -> None:
    form, rng = FORMATS[dtype], np.random.default_rng(seed)
    low = -form.high if symmetric else form.low
    codes = rng.integers(int(low), int(form.high) + 1, size=(32, 6))
    if granularity == "group:1":
        codes = np.where(codes < 0, low, form.high)
    # Every group of every column reaches both ends of the range.
    codes[::5], codes[1::5], codes[::16], codes[1::16] = low, form.high, low, form.high
    w = (codes * 0.125).astype(np.float32)
    q, meta = apply_quant(w, dtype, method, granularity=granularity, symmetric=symmetric)
    np.testing.assert_array_equal(q.dequantize(), w)
    assert meta["loss"]["frobenius"] < 1e-6


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_representable_floats_come_back_exactly(dtype: str) -> None:
    form = FORMATS[dtype]
    every = np.arange(256, dtype=np.uint8).view(form.storage).astype(np.float32)
    w = every[np.isfinite(every)].reshape(-1, 1)
    q, _ = apply_quant(w, dtype)
    np.testing.assert_array_equal(q.dequantize(), w)


def test_zero_weights_and_zero_columns() -> None:
    for dtype in FORMATS:
        w = weight()
        w[:, 3] = 0
        q, _ = apply_quant(w, dtype, "ptq-minmax" if dtype == "bf16" else "ptq-mse")
        assert (q.dequantize()[:, 3] == 0).all()
        zero, meta = apply_quant(np.zeros((4, 2)), dtype)
        assert not zero.dequantize().any()
        assert meta["loss"]["frobenius"] == 0.0


def test_least_squares_beat_the_full_range() -> None:
    for dtype in ("int4:channel", "int4:group16", "int8:tensor"):
        plain, best = (apply_quant(weight(256), dtype, m)[1] for m in ("ptq-minmax", "ptq-mse"))
        assert best["loss"]["frobenius"] < plain["loss"]["frobenius"]


def test_least_squares_follow_the_input_energy() -> None:
    w, energy = weight(64), np.ones(64)
    energy[np.abs(w).max(axis=1) < 2] = 1e6
    errors = [
        apply_quant(w, "int4:channel", "ptq-mse", calibration=c)[0].dequantize() - w
        for c in (None, np.sqrt(energy))
    ]
    blind, aware = (float(energy @ (e.astype(np.float64) ** 2).sum(axis=1)) for e in errors)
    assert aware < 0.9 * blind


def test_divergence_clips_a_long_tail() -> None:
    assert kl_factor(np.full(2048, 1000.0), 8) == 1.0
    assert kl_factor(1e6 * np.exp(-np.arange(2048) / 100), 8) < 0.8
    w = np.random.default_rng(0).normal(size=(512, 64))
    w[0, 0] = 12.0
    q, _ = apply_quant(w, "int4:tensor:ptq-kld")
    assert q.scales[0, 0] < 0.9 * 12 / 7


# Compensation, order, salient rows.


@pytest.mark.parametrize(
    "request_text",
    [
        "int4:channel",
        "int4:tensor:ptq-mse",
        "int4:group16",
        "int4:group24:asym",
        "int4:group16:act-order",
        "int4:group48:act-order:salient0.05",
        "int8:channel",
        "fp8_e4m3:channel",
    ],
)
def test_compensation_lowers_the_error_on_held_out_inputs(request_text: str) -> None:
    w, train, test = weight(192, 16), correlated(2048, 192, 1), correlated(512, 192, 2)
    errors = []
    for text in (request_text, f"{request_text}:compensate"):
        q, meta = apply_quant(w, text, calibration=train)
        errors.append(np.linalg.norm(test @ (wide(q) - w)) / np.linalg.norm(test @ w))
        assert meta["loss"]["output"] == pytest.approx(errors[-1], rel=0.25)
        assert meta["params"]["compensated"] is text.endswith("compensate")
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("size", [5, 48, 100, 128, 192, 300])
def test_blocked_compensation_equals_row_by_row(size: int) -> None:
    w, x = weight(300, 4), correlated(2048, 300, 1)
    q, _ = apply_quant(w, f"int4:group{size}:compensate", calibration=x)
    work, gram = w.astype(np.float64), x.T @ x
    damped = gram + DAMPING * np.trace(gram) / 300 * np.eye(300)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    for i in range(300):
        if i % size == 0:
            scale = np.abs(work[i : i + size]).max(axis=0) / 7
        codes = np.clip(np.rint(work[i] / scale), -8, 7)
        error = (work[i] - codes * scale) / factor[i, i]
        work[i + 1 :] -= np.outer(factor[i, i + 1 :], error)
        np.testing.assert_allclose(wide(q)[i], codes * scale, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("text", ["int8", "int8:asym", "int4:group16:act-order", "fp8_e4m3"])
def test_pruned_weights_stay_zero_and_the_rest_makes_up_for_them(text: str) -> None:
    w, x = weight(96, 16), correlated(2048, 96, 1)
    w[np.random.default_rng(7).random(w.shape) < 0.5] = 0
    w[:, 3] = 0
    errors = []
    for request in (f"{text}:compensate", text):
        q, _ = apply_quant(w, request, calibration=x)
        assert not wide(q)[w == 0].any()
        errors.append(np.linalg.norm(x @ (wide(q) - w)))
    assert errors[0] < 0.9 * errors[1]


def test_a_weight_alone_has_no_activations_to_quantise() -> None:
    with pytest.raises(ConfigError, match="ApplyQuant"):
        apply_quant(weight(), "int8:w8a8")
    assert parse_quant("int8:w8a8:smooth0.5:asym").weights_only == parse_quant("int8:asym")


def test_independent_inputs_of_equal_energy_need_no_compensation() -> None:
    plain, _ = apply_quant(weight(), "int4:channel")
    q, _ = apply_quant(weight(), "int4:channel:compensate", calibration=np.eye(32))
    np.testing.assert_array_equal(plain.codes, q.codes)


def test_compensation_without_input_energy_is_plain_rounding() -> None:
    plain, _ = apply_quant(weight(), "int4:group16")
    q, _ = apply_quant(weight(), "int4:group16:compensate", calibration=np.zeros((5, 32)))
    np.testing.assert_array_equal(plain.codes, q.codes)


def test_a_gram_matrix_that_is_none_falls_back_with_a_reason() -> None:
    gram = np.ones((32, 32)) - 0.5 * np.eye(32)
    plain, _ = apply_quant(weight(), "int4:group16")
    with pytest.warns(RuntimeWarning, match="without compensation"):
        q, meta = apply_quant(weight(), "int4:group16:compensate", calibration=gram)
    np.testing.assert_array_equal(plain.codes, q.codes)
    np.testing.assert_array_equal(plain.scales, q.scales)
    assert not meta["params"]["compensated"]
    assert "not positive definite" in meta["params"]["compensation"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_act_order_round_trip(k: int, size: int, mixed: bool, seed: int) -> None:
    w, rng = weight(k, 5, seed), np.random.default_rng(seed)
    q, meta = apply_quant(
        w,
        "int4",
        granularity=f"group:{size}",
        act_order=True,
        mixed="salient:0.1" if mixed else None,
        calibration=rng.random(k),
    )
    assert q.order is not None
    assert meta["groups"]["order"] == q.order.tolist()
    assert sorted(q.order.tolist()) == list(range(k))
    np.testing.assert_array_equal(q.g_idx[q.order], np.arange(k) // size)
    moved = q.permute_rows(q.order)
    np.testing.assert_array_equal(moved.dequantize(), q.dequantize()[q.order])
    np.testing.assert_array_equal(moved.order, np.arange(k))
    back = moved.permute_rows(np.argsort(q.order))
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    np.testing.assert_array_equal(back.order, q.order)
    assert meta["delta_layout"]


def test_act_order_is_by_falling_energy() -> None:
    norms = np.array([1.0, 3.0, 2.0, 4.0])
    q, _ = apply_quant(weight(4), "int4:group2:act-order", calibration=norms)
    np.testing.assert_array_equal(q.order, [3, 1, 2, 0])
    np.testing.assert_array_equal(q.g_idx, [1, 0, 1, 0])


def test_rows_move_only_by_a_permutation() -> None:
    q, _ = apply_quant(weight(), "int8")
    with pytest.raises(PermutationError, match="no permutation of 32 rows"):
        q.permute_rows(np.zeros(32, int))


@pytest.mark.parametrize("compensate", [False, True])
def test_salient_rows_stay_in_floating_point(compensate: bool) -> None:
    w = weight(40)
    w[[5, 17]] *= 50
    x = correlated(256, 40, 0)
    options = {"granularity": "channel", "calibration": x, "compensate": compensate}
    plain, _ = apply_quant(w, "int4", **options)
    q, meta = apply_quant(w, "int4", mixed="salient:0.05", **options)
    assert meta["groups"]["salient_rows"] == np.flatnonzero(q.salient).tolist() == [5, 17]
    assert q.salient_values.dtype == np.float16
    assert not q.codes[[5, 17]].any()
    np.testing.assert_array_equal(q.dequantize()[[5, 17]], q.salient_values.astype(np.float32))
    lost = [np.linalg.norm(x @ (wide(t) - w)) for t in (plain, q)]
    assert lost[1] < 0.5 * lost[0]
    assert meta["delta_layout"]


def test_salient_values_beyond_float16_stay_float32() -> None:
    w = weight()
    w[3] = 1e6
    q, _ = apply_quant(w, "int8", mixed="salient:0.01")
    assert q.salient_values.dtype == np.float32
    np.testing.assert_array_equal(q.dequantize()[3], w[3])


# Contracts.

EVERY = [
    "none",
    "int8",
    "int8:tensor:ptq-kld",
    "int4:group8:asym",
    "int4:group8:act-order:salient0.1:compensate",
    "fp8_e4m3:ptq-mse",
    "fp8_e5m2:tensor",
]


FIELDS = {
    **dict.fromkeys(("kind", "dtype", "method", "granularity", "spec", "format", "why"), str),
    **dict.fromkeys(("symmetric", "delta_layout", "delta_packing", "skipped"), bool),
    **dict.fromkeys(("bytes_before", "bytes_after"), int),
    **dict.fromkeys(("params", "loss", "groups"), dict),
    "shape": list,
}


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_copies_dtype_and_metadata(text: str, dtype: type) -> None:
    w, x = weight().astype(dtype), correlated(128, 32, 0)
    before, x_before = w.copy(), x.copy()
    q, meta = apply_quant(w, text, calibration=x)
    again, same = apply_quant(w, text, calibration=x)
    np.testing.assert_array_equal(w, before)
    np.testing.assert_array_equal(x, x_before)
    np.testing.assert_array_equal(q.codes, again.codes)
    assert meta == same
    assert {key: type(value) for key, value in meta.items()} == FIELDS
    assert (meta["kind"], meta["bytes_before"]) == ("quant", w.nbytes)
    assert meta["skipped"] == (text == "none")
    assert json.loads(json.dumps(meta, allow_nan=False)) == meta
    assert q.dequantize().dtype == w.dtype
    assert q.dequantize().shape == q.shape == w.shape
    assert not np.shares_memory(q.codes, w)
    assert meta["bytes_after"] == q.nbytes
    assert str(parse_quant(meta["spec"])) == meta["spec"]
    expected = np.linalg.norm(wide(q) - w.astype(np.float64)) / np.linalg.norm(w.astype(np.float64))
    assert meta["loss"]["frobenius"] == pytest.approx(expected)
    if text != "none":
        lost = np.linalg.norm(x @ (wide(q) - w.astype(np.float64)))
        whole = np.linalg.norm(x @ w.astype(np.float64))
        assert meta["loss"]["output"] == pytest.approx(lost / whole, rel=1e-4)


def test_packed_bytes() -> None:
    w = weight()
    sizes = {
        t: apply_quant(w, t)[1]["bytes_after"] for t in ("none", "int8", "int4", "int8:tensor")
    }
    assert sizes["none"] == 32 * 24 * 4
    assert sizes["int8"] == 32 * 24 + 24 * 4
    assert sizes["int8:tensor"] == 32 * 24 + 4
    assert sizes["int4"] == 32 * 24 // 2 + 24 * 4
    asym = apply_quant(w, "int8:asym")[1]["bytes_after"]
    assert asym == sizes["int8"] + 24


def test_layout_changes_only_where_an_order_can_help() -> None:
    for text in ("int8", "int4:group8", "fp8_e4m3"):
        meta = apply_quant(weight(), text)[1]
        assert not meta["delta_layout"]
        assert meta["delta_packing"]
        assert "packing" in meta["why"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_int4_packing_round_trip(k: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, size=(k, n)).astype(np.int8)
    packed = pack_int4(codes)
    assert packed.shape == ((k + 1) // 2, n)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_int4(packed, k), codes)


@pytest.mark.parametrize(
    "codes", [np.full((2, 2), 8, np.int8), np.zeros(3, np.int8), np.zeros((2, 2), np.int32)]
)
def test_codes_that_cannot_be_packed(codes: np.ndarray) -> None:
    with pytest.raises(ShapeError):
        pack_int4(codes)


@pytest.mark.parametrize(
    ("w", "why"),
    [
        (np.ones((4, 3), np.int8), "int8: integer codes already"),
        (np.full((4, 3), 1e300), "range of float32"),
    ],
)
def test_what_cannot_be_quantised_is_left_with_a_reason(w: np.ndarray, why: str) -> None:
    with pytest.warns(RuntimeWarning, match=why):
        q, meta = apply_quant(w, "int8")
    np.testing.assert_array_equal(q.dequantize(), w)
    assert q.dequantize().dtype == w.dtype
    assert meta["skipped"]
    assert why in meta["why"]
    assert meta["dtype"] == "none"
    assert not meta["delta_packing"]


def test_none_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, meta = apply_quant(weight(), "none")
    np.testing.assert_array_equal(q.dequantize(), weight())
    assert meta["skipped"]


@pytest.mark.parametrize(
    ("tensor", "options", "error", "message"),
    [
        (np.ones(3), {}, ShapeError, r"shape \[3\]"),
        (np.ones((0, 3)), {}, ShapeError, r"shape \[0, 3\]"),
        (np.ones((2, 2), complex), {}, ShapeError, "complex"),
        (np.array([[1, np.nan]]), {}, NonFiniteError, "1 NaN"),
        (np.array([[-np.inf]]), {}, NonFiniteError, "infinite"),
        (weight(), {"dtype": "int7"}, ConfigError, "did you mean"),
        (weight(), {"method": "ptq-max"}, ConfigError, "unknown part 'ptq-max'"),
        (weight(), {"granularity": "row"}, ConfigError, "unknown part 'row'"),
        (weight(), {"granularity": "group"}, ConfigError, "did you mean 'group128'"),
        (weight(), {"mixed": "salient:2"}, ConfigError, r"\(0, 1\)"),
        (weight(), {"mixed": "outliers"}, ConfigError, "unknown part 'outliers'"),
        (weight(), {"compensate": True}, ConfigError, "Gram"),
        (weight(), {"compensate": True, "calibration": np.ones(32)}, ConfigError, "Gram"),
        (weight(), {"granularity": "group:8", "act_order": True}, ConfigError, "needs calib"),
        (weight(), {"calibration": np.ones(31)}, ShapeError, "32 rows"),
        (weight(), {"calibration": np.full(32, np.inf)}, NonFiniteError, "calibration holds 32"),
    ],
)
def test_bad_input(tensor: np.ndarray, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        apply_quant(tensor, **options)


# Activations.


def one(values: np.ndarray) -> Histogram:
    return observe(values)


@settings(max_examples=30, deadline=None)
@given(st.floats(-20, 20), st.integers(1, 30), st.integers(0, 99))
@example(-20.0, 3, 0)
def test_histograms_do_not_depend_on_the_order_of_batches(
    power: float, size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=size), rng.normal(size=size) * 2.0**power]
    x = np.concatenate(parts)
    whole, forward, backward = observe(x), None, None
    for part in parts:
        forward = observe(part, forward)
    for part in reversed(parts):
        backward = observe(part, backward)
    for found in (forward, backward):
        assert found is not None
        assert (found.low, found.high, found.limit) == (whole.low, whole.high, whole.limit)
        np.testing.assert_array_equal(found.counts, whole.counts)
    assert whole.counts.sum() == x.size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_scales_cover_the_bulk(method: str, symmetric: bool) -> None:
    x = np.random.default_rng(0).normal(size=20000) + (0.0 if symmetric else 2.0)
    scale, zero = activation_scale(one(x), "int8", method, symmetric=symmetric)
    back = (np.clip(np.rint(x / scale) + zero, -128, 127) - zero) * scale
    assert np.mean((back - x) ** 2) < 1e-3 * np.var(x)
    assert symmetric <= (zero == 0)


def test_activation_minmax_is_exact_about_the_range() -> None:
    x = np.array([-1.0, 0.5, 3.0])
    assert activation_scale(one(x))[0] == pytest.approx(3 / 127)
    scale, zero = activation_scale(one(x), symmetric=False)
    assert scale == pytest.approx(4 / 255)
    assert zero == round(-128 + 1 / scale)
    assert activation_scale(one(x), "fp8_e4m3")[0] == pytest.approx(3 / 448)


def test_least_squares_clip_a_rare_outlier() -> None:
    x = np.random.default_rng(0).normal(size=50000)
    x[0] = 40.0
    scales = [activation_scale(one(x), "int4", m)[0] for m in ("ptq-minmax", "ptq-mse")]
    assert scales[1] < 0.7 * scales[0]


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_all_zero(method: str) -> None:
    scale, zero = activation_scale(one(np.zeros(4)), "int8", method, symmetric=False)
    assert scale > 0
    assert zero == -128 or zero == 0


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(1, 20), st.integers(0, 99))
def test_migration_leaves_the_product(alpha: float, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(k, n)) for n in (3, 5)]
    gamma, beta, x = rng.normal(size=k), rng.normal(size=k), rng.normal(size=(7, k))
    top = rng.random(k) * 100
    top[0] = 0
    scales = migrate_scales(top, weights, alpha)
    assert (scales > 0).all()
    assert scales[0] == 1
    g, b, ws = fold_scales(scales, gamma, beta, weights)
    for old, new in zip(weights, ws, strict=True):
        np.testing.assert_allclose(
            (x * g + b) @ new, (x * gamma + beta) @ old, rtol=1e-9, atol=1e-9
        )


def test_migration_balances_the_ranges() -> None:
    top, w = np.array([1.0, 100.0, 4.0]), np.array([[1.0], [0.25], [-4.0]])
    np.testing.assert_allclose(migrate_scales(top, w), np.sqrt(top / np.abs(w[:, 0])), rtol=1e-6)
    np.testing.assert_allclose(migrate_scales(top, w, 1.0), top)
    np.testing.assert_allclose(migrate_scales(top, w, 0.0), 1 / np.abs(w[:, 0]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: observe(np.array([])), ShapeError, r"shape \[0\]"),
        (lambda: observe(np.array([np.nan])), NonFiniteError, "activations"),
        (lambda: observe(np.array(["a"])), ShapeError, "dtype"),
        (lambda: activation_scale(one(np.ones(2)), "int7"), ConfigError, "did you mean"),
        (lambda: activation_scale(one(np.ones(2)), "none"), ConfigError, "none"),
        (lambda: activation_scale(one(np.ones(2)), method="max"), ConfigError, "unknown part"),
        (
            lambda: activation_scale(one(np.ones(2)), "fp8_e4m3", symmetric=False),
            ConfigError,
            "asym",
        ),
        (lambda: migrate_scales(np.ones(3), np.ones((3, 2)), 1.5), ConfigError, "alpha"),
        (lambda: migrate_scales(np.ones(3), np.ones((4, 2))), ShapeError, "first dimension 3"),
        (lambda: migrate_scales(-np.ones(3), np.ones((3, 2))), ShapeError, "negative"),
        (lambda: migrate_scales(np.ones((3, 1)), np.ones((3, 2))), ShapeError, r"\[3, 1\]"),
        (lambda: migrate_scales(np.ones(3), []), ShapeError, "no weight"),
        (lambda: migrate_scales(np.full(3, np.nan), np.ones((3, 2))), NonFiniteError, "absmax"),
        (
            lambda: fold_scales(np.ones(3), np.ones(2), np.ones(3), []),
            ShapeError,
            "norm_scale",
        ),
        (
            lambda: fold_scales(np.ones(3), np.ones(3), np.ones(3), [np.ones((2, 2))]),
            ShapeError,
            r"weights\[0\]",
        ),
    ],
)
def test_bad_activation_calls(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "text",
    ["int8", "int8:asym", "int8:tensor", "int8:ptq-mse", "int8:ptq-kld", "int4:group32",
     "int8:salient0.1", "fp8_e4m3"],
)  # fmt: skip
def test_blocks_of_columns_change_nothing(text, monkeypatch):
    weight = np.random.default_rng(3).standard_normal((64, 50)).astype(np.float32)
    whole, meta = quantize(weight, parse_quant(text))
    monkeypatch.setattr(quant_tensor, "BLOCK_ELEMENTS", 7 * 64)
    cut, cut_meta = quantize(weight, parse_quant(text))
    np.testing.assert_array_equal(cut.codes, whole.codes)
    np.testing.assert_array_equal(cut.scales, whole.scales)
    np.testing.assert_array_equal(cut.zero_points, whole.zero_points)
    assert cut_meta["loss"]["frobenius"] == pytest.approx(meta["loss"]["frobenius"], rel=1e-9)
    columns = slice(5, 13)
    np.testing.assert_array_equal(cut.dequantize(columns=columns), whole.dequantize()[:, columns])
