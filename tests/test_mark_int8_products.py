"""Products of quantised operands on CUDA: what is marked, fused and refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_modules import selected
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_modules import PLAIN, ROWS, Emit, K, N, array, module, op, static, with_codes
from relax_models import constants
from tvm import relax

from icd_tvm._tvm import apply_pass, named_const, tvm_ffi
from icd_tvm.relax_passes.int8_product import CodesCall, Int8Product, codes_call, int8_product
from icd_tvm.relax_passes.mark_int8_products import MarkInt8Products
from icd_tvm.relax_passes.select_cuda_kernels import CUDA_KERNELS_ATTR, read_cuda_kernels

# -- what is marked


def test_marked_product_is_the_expected_one() -> None:
    # Powers of two: what is multiplied at once here is exact, in whatever order.
    scales = (2.0 ** -np.arange(1, N + 1)).clip(2.0**-12).astype(np.float32)
    before = module(lambda emit, x: static(emit, x, 0.25, scales=scales))
    copy = tvm.ir.load_json(tvm.ir.save_json(before))
    mark = MarkInt8Products("sm_90")
    after = apply_pass(mark, before)
    tvm.ir.assert_structural_equal(before, copy)
    assert (mark.marked, mark.refused) == (["product"], {})
    weight = constants(before)["w"]

    def body(emit: Emit, x: Any) -> Any:
        step, point = named_const(np.float32(0.25), ""), named_const(np.asarray(-8, np.int8), "")
        codes = emit(CodesCall(x, step, point).call())
        offset = scales * np.float32(0.25) * 8 * weight.sum(0)
        parts = (weight, scales * np.float32(0.25), offset.astype(np.float32))
        return emit(Int8Product(codes, *(named_const(part, "") for part in parts)).call())

    tvm.ir.assert_structural_equal(after, module(body))
    assert set(constants(after)) == {"w", "w.scale", "w.zero_sums"}


class OnNumpy:
    """Packed functions that compute what marked calls stand for."""

    def __enter__(self) -> None:
        tvm_ffi.register_global_func("icd.int8_codes", self._codes, override=True)
        tvm_ffi.register_global_func("icd.int8_product", self._product, override=True)

    def __exit__(self, *_: Any) -> None:
        for name in ("icd.int8_codes", "icd.int8_product"):
            tvm_ffi.registry.remove_global_func(name)

    @staticmethod
    def _codes(*tensors: Any) -> None:
        x = tensors[0].numpy()
        if tensors[1].numpy().ndim == 0:
            step, point = tensors[1].numpy(), tensors[2].numpy().astype(int)
            tensors[3].copyfrom(np.clip(np.rint(x / step) + point, -128, 127).astype(np.int8))
            return
        rows = x.reshape(-1, x.shape[-1])
        low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
        step = (high - low) / np.float32(255)
        step = np.where(step == 0, np.float32(1), step)
        zero = np.rint(-low / step) - 128
        codes = np.clip(np.rint(rows / step[:, None]) + zero[:, None], -128, 127)
        for tensor, made in zip(tensors[1:], (step, zero, codes), strict=True):
            tensor.copyfrom(made.reshape(tensor.numpy().shape).astype(tensor.numpy().dtype))

    @staticmethod
    def _product(*tensors: Any) -> None:
        codes, weight, scale, offset, *rows, out = (tensor.numpy() for tensor in tensors)
        sums = codes.astype(np.int64) @ weight.astype(np.int64)
        if rows:
            step, zero = (row.astype(float).reshape(*codes.shape[:-1], 1) for row in rows)
            found = (sums - zero * offset) * step * scale.astype(float)
        else:
            found = sums * scale.astype(float) + offset
        tensors[-1].copyfrom(found.astype(np.float32).reshape(out.shape))


def run(mod: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    machine = relax.VirtualMachine(tvm.compile(mod, PLAIN), tvm.cpu())
    names = [str(param.name) for param in mod["main"].params]
    return machine["main"](*(tvm.runtime.tensor(feeds[name]) for name in names)).numpy()


@settings(max_examples=20)
@given(
    step=st.floats(1e-3, 0.5),
    point=st.integers(0, 255),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_of_one_step_stay_what_they_are(
    step: float, point: int, signed: bool, seed: int
) -> None:
    dtype = "int8" if signed else "uint8"
    before = module(lambda emit, x: static(emit, x, step, point - 128 * signed, dtype, seed))
    feeds = {"x": 3 * array(1, ROWS, K, seed=seed)}
    with OnNumpy():
        found = run(apply_pass(MarkInt8Products("sm_90"), before), feeds)
    wanted = run(before, feeds)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max() + 1e-6)


def test_codes_of_rows_are_finer_than_those_of_the_tensor() -> None:
    def body(emit: Emit, x: Any) -> Any:
        return emit(op.matmul(x, named_const(array(K, N), "w")), "product")

    floats = module(body)
    before = with_codes("int8:w8a8-dynamic", floats)
    mark = MarkInt8Products("sm_90")
    after = apply_pass(mark, before)
    assert mark.refused == {}
    # A row that is far larger than the others takes their codes only where all rows share one step.
    x = array(1, ROWS, K, seed=1) * np.array([[[100], [1], [1], [0.1]]], np.float32)
    with OnNumpy():
        found = run(after, {"x": x})[0]
    exact, rough = run(floats, {"x": x})[0], run(before, {"x": x})[0]
    errors = [np.linalg.norm(y - exact, axis=1) for y in (found, rough)]
    assert (errors[0] <= 1.1 * errors[1]).all()
    assert (errors[0][1:] < 0.1 * errors[1][1:]).all()
    assert (errors[0] <= 0.02 * np.linalg.norm(exact, axis=1)).all()


# -- what is left, and why


def rescaled(emit: Emit, x: Any) -> Any:
    """Return a product whose input is dequantised by another scale than it was quantised by."""
    zero = relax.const(0, "int8")
    codes = emit(op.quantize(x, relax.const(np.float32(0.1)), zero, out_dtype="int8"))
    data = emit(op.dequantize(codes, relax.const(np.float32(0.2)), zero))
    weight = op.dequantize(
        relax.const(np.ones((K, N), np.int8)), relax.const(np.float32(1)), zero, axis=1
    )
    return emit(op.matmul(data, emit(weight)), "product")


def columns(count: int) -> Callable[[Emit, Any], Any]:
    def body(emit: Emit, x: Any) -> Any:
        return emit(op.matmul(x, named_const(array(K, count), "w")), "product")

    return body


def symmetric(emit: Emit, x: Any) -> Any:
    """Return a product of codes by the largest magnitude, not by the range."""
    most = emit(op.max(emit(op.abs(x))))
    scale = emit(op.divide(most, relax.const(np.float32(127))))
    point = relax.const(np.uint8(128))
    steps = emit(op.add(emit(op.round(emit(op.divide(x, scale)))), relax.const(np.float32(128))))
    bounded = op.maximum(op.minimum(steps, relax.const(np.float32(255))), relax.const(0.0))
    codes = emit(op.astype(emit(bounded), "uint8"))
    left = op.subtract(op.astype(codes, "int32"), op.astype(point, "int32"))
    right = op.astype(named_const(np.ones((K, N), np.int8), "w"), "int32")
    total = emit(op.matmul(emit(left), emit(right), out_dtype="int32"), "product")
    return emit(op.multiply(emit(op.astype(total, "float32")), scale))


REFUSED = {
    "other codes": (None, symmetric, ROWS, "not made as DynamicQuantizeLinear"),
    "columns": ("int8:w8a8-dynamic", columns(60), ROWS, "60 columns are not whole pieces"),
    "row": ("int8:w8a8-dynamic", columns(64), 1, "one row"),
    "zero points": ("int8:w8a8-dynamic:asym", columns(64), ROWS, "zero points that int8 cannot"),
    "scales": (None, rescaled, ROWS, "by another scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_float16_with_a_reason(name: str) -> None:
    text, body, rows, reason = REFUSED[name]
    mod = module(body, rows)
    mod = mod if text is None else with_codes(text, mod)
    after, chosen = selected(mod)
    assert read_cuda_kernels(after) == chosen.choices
    [(node, choice)] = chosen.choices.items()
    assert node == "product"
    assert reason in choice.reason
    assert "no product of int8" in choice.reason


def test_weights_alone_are_left_to_others() -> None:
    mod = with_codes("int8", module(columns(64)))
    mark = MarkInt8Products("sm_90")
    assert CUDA_KERNELS_ATTR not in (apply_pass(mark, mod).attrs or {})
    assert (mark.marked, mark.refused) == ([], {})


# -- what is fused


def biased(emit: Emit, y: Any, seed: int = 0) -> Any:
    return emit(op.add(y, named_const(array(N, seed=seed), "b")), "biased")


def test_bias_takes_up_zero_points() -> None:
    after, chosen = selected(module(lambda emit, x: biased(emit, static(emit, x))))
    assert {name: one.kind for name, one in chosen.choices.items()} == {
        "x_codes": "codes", "product": "gemm"}  # fmt: skip
    assert chosen.choices["product"].fused == ("bias",)
    assert chosen.choices["product"].reason == "int8, dense"
    found, known = constants(after), constants(module(static))
    sums = known["w"].sum(0, dtype=np.int64)
    expected = array(N) + np.float32(0.02) * 8 * known["w.scale"] * sums
    np.testing.assert_allclose(found["b"], expected, rtol=1e-5, atol=1e-6)


def hidden(emit: Emit, x: Any, *, twice: bool = False) -> Any:
    """Return two products with a ReLU between them; it is read once more if ``twice``."""
    inner = emit(op.nn.relu(biased(emit, static(emit, x))), "inner")
    outer = static(emit, inner, 0.05, 0, seed=1)
    return relax.Tuple([outer, inner]) if twice else outer


@pytest.mark.parametrize("twice", [False, True])
def test_product_writes_codes_that_alone_are_read(twice: bool) -> None:
    _, chosen = selected(module(lambda emit, x: hidden(emit, x, twice=twice)))
    first = chosen.choices["product"]
    assert first.fused == ("bias", "relu", *(() if twice else ("codes",)))
    assert ("inner_codes" in chosen.choices) == twice


def normed(emit: Emit, x: Any, *, early: bool = False, alone: bool = False) -> Any:
    """Return a norm, its product, and the norm added to that; ``early``: it is also read before."""
    y = emit(
        op.nn.layer_norm(x, named_const(array(K), "g"), named_const(array(K), "h"), [-1]), "normed"
    )
    more = emit(op.exp(y)) if early else y
    product = static(emit, y)
    return product if alone else relax.Tuple([product, more])


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {"normed": "layer_norm", "product": "gemm"}),
        ({"alone": True}, {"normed": "layer_norm", "product": "gemm"}),
        ({"early": True}, {"normed": "layer_norm", "normed_codes": "codes", "product": "gemm"}),
    ],
)
def test_norm_writes_codes_beside_its_result(
    options: dict[str, bool], kinds: dict[str, str]
) -> None:
    after, chosen = selected(module(lambda emit, x: normed(emit, x, **options)))
    relax.analysis.well_formed(after)
    assert {name: one.kind for name, one in chosen.choices.items()} == kinds
    [kernel] = [k for k in chosen.kernels.values() if k.family == "norm"]
    outputs = [argument.name for argument in kernel.arguments[-kernel.outputs :]]
    assert outputs == {1: ["codes"], 2: ["codes", "out"]}.get(
        len(outputs) if not options.get("early") else 0, ["out"]
    )
    assert ("codes" in outputs) == (not options.get("early"))


def test_norm_writes_codes_of_one_step_and_leaves_others() -> None:
    def body(emit: Emit, x: Any) -> Any:
        parts = [named_const(array(K), name) for name in "gh"]
        y = emit(op.nn.layer_norm(x, *parts, [-1]), "normed")
        return relax.Tuple([static(emit, y), static(emit, y, 0.5, seed=1)])

    _, chosen = selected(module(body))
    kinds = [one.kind for one in chosen.choices.values()]
    assert sorted(kinds) == ["codes", "gemm", "gemm", "layer_norm"]


def test_codes_are_made_of_rows_that_were_only_reshaped() -> None:
    def body(emit: Emit, x: Any) -> Any:
        parts = [named_const(array(K), name) for name in "gh"]
        y = emit(op.nn.layer_norm(x, *parts, [-1]), "normed")
        return static(emit, emit(op.reshape(y, (ROWS // 2, 2, K)), "flat"))

    after, chosen = selected(module(body))
    assert {name: one.kind for name, one in chosen.choices.items()} == {
        "normed": "layer_norm",
        "flat_codes": "codes",
        "product": "gemm",
    }
    assert "reshape" not in str(after["main"])


def test_live_blocks_of_codes_are_listed() -> None:
    weight = array(K * 6, N * 2)
    for group in range(2):
        for block in range(group, 12, 2):
            weight[block * 16 : block * 16 + 16, group * 64 : group * 64 + 64] = 0

    def body(emit: Emit, x: Any) -> Any:
        wide = emit(op.concat([x] * 6, axis=2))
        return emit(op.matmul(wide, named_const(weight, "w")), "product")

    after, chosen = selected(with_codes("int8:w8a8-dynamic", module(body)))
    choice = chosen.choices["product_float"]
    assert (choice.kind, choice.live, choice.reason) == ("gemm", 8, "int8, live blocks")
    assert constants(after)["w"].size == 2 * N * 8 * 16


def test_parts_of_calls_are_read_again() -> None:
    after = apply_pass(MarkInt8Products("sm_90"), module(static))
    values = [b.value for block in after["main"].body.blocks for b in block.bindings]
    [codes] = filter(None, map(codes_call, values))
    [product] = filter(None, map(int8_product, values))
    assert codes.values == (pytest.approx(0.02), -8)
    assert (product.rows, product.array.shape) == ((), (K, N))
    assert codes_call(product.call()) is None
    assert int8_product(relax.const(0.0)) is None
