"""What the CUDA pipeline fuses, what it leaves alone and why, and what a graph would hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from cuda_modules import selected
from tvm import relax

from icd_tvm._tvm import apply_pass, named_const
from icd_tvm.relax_passes.attach_layout_tags import LAYOUT_TAG
from icd_tvm.relax_passes.attention_match import Refused
from icd_tvm.relax_passes.cuda_graph import graph_config
from icd_tvm.relax_passes.cuda_shared import SharedValues
from icd_tvm.relax_passes.cuda_views import view_of
from icd_tvm.relax_passes.elementwise_function import function_after
from icd_tvm.relax_passes.inputs_first import InputsFirst
from icd_tvm.relax_passes.merge_shared_input import MergeSharedInput
from icd_tvm.relax_passes.relax_graph import Dataflow
from icd_tvm.relax_passes.select_cuda_kernels import CUDA_KERNELS_ATTR, CudaChoice
from icd_tvm.relax_passes.static_states import StaticStates
from icd_tvm.tir_schedules.cpu.append_row import append_row
from icd_tvm.tir_schedules.cuda.gemm import gemm_rule, pack_weight
from icd_tvm.tir_schedules.cuda.placed import placed
from icd_tvm.tir_schedules.cuda.source_kernel import Epilogue

op = relax.op
ROWS, K, N = 4, 32, 64
Emit = Callable[..., Any]


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scalar(value: float) -> Any:
    return relax.const(np.float32(value))


def module(
    body: Callable[[Emit, Any, Any], Any],
    rows: int = ROWS,
    width: int = N,
    builder: relax.BlockBuilder | None = None,
) -> tvm.IRModule:
    """Return ``main(x, r)`` with what ``body`` makes of them."""
    x = relax.Var("x", relax.TensorType((1, rows, K), "float32"))
    r = relax.Var("r", relax.TensorType((1, rows, width), "float32"))
    builder = builder or relax.BlockBuilder()
    with builder.function("main", [x, r]):
        with builder.dataflow():
            out = builder.emit_output(body(builder.emit, x, r))
        builder.emit_func_output(out)
    return builder.get()


def product(emit: Emit, x: Any) -> Any:
    wide = emit(op.matmul(x, named_const(array(K, N), "w")), "product")
    return emit(op.add(wide, named_const(array(N), "b")), "biased")


def gelu(emit: Emit, v: Any) -> Any:
    inner = emit(op.multiply(v, scalar(0.5**0.5)))
    shifted = emit(op.add(emit(op.erf(inner)), scalar(1.0)))
    return emit(op.multiply(emit(op.multiply(scalar(0.5), v)), shifted))


def tanh_gelu(emit: Emit, v: Any) -> Any:
    return emit(op.nn.gelu_tanh(v))


def silu(emit: Emit, v: Any) -> Any:
    return emit(op.multiply(emit(op.sigmoid(v)), v))


def clipped_relu(emit: Emit, v: Any) -> Any:
    return emit(op.minimum(emit(op.nn.relu(v)), scalar(6.0)))


def relu(emit: Emit, v: Any) -> Any:
    return emit(op.maximum(v, scalar(0.0)))


def same(emit: Emit, v: Any) -> Any:
    return v


def bound(mod: tvm.IRModule) -> list[Any]:
    return [b for block in mod["main"].body.blocks for b in block.bindings]


def operators(mod: tvm.IRModule) -> list[str]:
    calls = [b.value for b in bound(mod) if isinstance(b.value, tvm.ir.Call)]
    return [str(call.op.name).removeprefix("relax.") for call in calls]


@pytest.mark.parametrize(
    ("activation", "fused"),
    [
        (gelu, ("bias", "gelu", "residual")),
        (silu, ("bias", "silu", "residual")),
        (relu, ("bias", "relu", "residual")),
        (same, ("bias", "residual")),
        # Not what the kernel computes: they stay behind it.
        (tanh_gelu, ("bias",)),
    ],
)
def test_epilogue_is_what_follows(activation: Callable[..., Any], fused: tuple[str, ...]) -> None:
    mod = module(lambda emit, x, r: op.add(activation(emit, product(emit, x)), r))
    after, chosen = selected(mod)
    (choice,) = chosen.choices.values()
    assert choice == CudaChoice("gemm", 0, "float16, dense", fused)
    left = [name for name in operators(after) if name not in ("astype", "call_tir")]
    assert left == ([] if "residual" in fused else ["nn.gelu_tanh", "add"])


def test_module_is_the_expected_one() -> None:
    before = module(lambda emit, x, r: op.add(gelu(emit, product(emit, x)), r))
    copy = tvm.ir.load_json(tvm.ir.save_json(before))
    after, _ = selected(before)
    tvm.ir.assert_structural_equal(before, copy)
    epilogue = Epilogue("gelu", bias=True, residual=True)
    (kernel,) = gemm_rule(ROWS, N, K, "float16", out="float32", epilogue=epilogue).kernels
    rows = {"a": (1, ROWS, K), "residual": (1, ROWS, N), "c": (1, ROWS, N)}
    packed = pack_weight(array(K, N).astype(np.float16), kernel.arguments[1].shape[2])

    def body(emit: Emit, x: Any, r: Any) -> Any:
        place = builder.add_func(placed(kernel, rows, {}).primfunc(), "gemm")
        narrow = emit(op.astype(x, "float16"))
        args = [narrow, named_const(packed, "w"), named_const(array(N), "b"), r]
        return relax.call_tir(place, relax.Tuple(args), relax.TensorType((1, ROWS, N), "float32"))

    builder = relax.BlockBuilder()
    expected = module(body, builder=builder).with_attr(
        CUDA_KERNELS_ATTR, str(after.attrs[CUDA_KERNELS_ATTR])
    )
    plain = relax.transform.CanonicalizeBindings()
    tvm.ir.assert_structural_equal(plain(after), plain(expected))


def test_bend_of_a_function_keeps_it_apart() -> None:
    after, chosen = selected(module(lambda emit, x, r: clipped_relu(emit, product(emit, x))))
    (choice,) = chosen.choices.values()
    assert choice.fused == ("bias", "relu")
    assert operators(after)[-1] == "minimum"


@pytest.mark.parametrize(
    ("body", "fused", "reason"),
    [
        (lambda emit, p, r: op.add(gelu(emit, p), p), ("bias",), "read 3 times"),
        (lambda emit, p, r: op.add(p, named_const(array(ROWS, N), "c")), ("bias",), "dense"),
        (lambda emit, p, r: op.add(p, op.sum(r, axis=[1], keepdims=True)), ("bias",), "shape"),
        (lambda emit, p, r: op.multiply(op.add(p, r), p), ("bias",), "read 2 times"),
    ],
)
def test_what_is_read_elsewhere_is_not_fused(
    body: Callable[..., Any], fused: tuple[str, ...], reason: str
) -> None:
    after, chosen = selected(module(lambda emit, x, r: body(emit, product(emit, x), r)))
    relax.analysis.well_formed(after)
    (choice,) = chosen.choices.values()
    assert choice.fused == fused
    assert reason in choice.reason


def test_values_between_kernels_are_narrow_and_the_rest_is_float32() -> None:
    def body(emit: Emit, x: Any, r: Any) -> Any:
        normed = emit(
            op.nn.layer_norm(
                product(emit, x), named_const(array(N), "g"), named_const(array(N), "h"), [-1]
            ),
            "normed",
        )
        second = emit(op.matmul(normed, named_const(array(N, N), "w2")), "second")
        return op.add(second, r)

    after, _ = selected(module(body))
    dtypes = [str(b.var.ty.dtype) for b in bound(after) if isinstance(b.value, tvm.ir.Call)]
    # The cast of x; product to norm in float32, norm to product in float16, the end in float32.
    assert dtypes == ["float16", "float32", "float16", "float32"]
    assert operators(after)[1:] == ["call_tir"] * 3


def merged(dead: bool) -> tvm.IRModule:
    """Return two products of one row, apart or as they are after the pass."""
    one, two = array(K, 16), array(K, 8, seed=1)

    def body(emit: Emit, x: Any, r: Any) -> Any:
        if not dead:
            first = emit(op.matmul(x, named_const(one, "w1")))
            second = emit(op.matmul(x, named_const(two, "w2")))
            second = emit(op.add(second, named_const(array(8), "b2")))
        else:
            weight = named_const(np.concatenate([one, two], 1), "w1+w2")
            wide = emit(op.matmul(x, weight))
            bias = np.concatenate([np.zeros(16, np.float32), array(8)])
            wide = emit(op.add(wide, named_const(bias, "b2")))
            first = emit(op.strided_slice(wide, [2], [0], [16]))
            second = emit(op.strided_slice(wide, [2], [16], [24]))
        return relax.Tuple([first, second])

    return module(body, rows=1)


def test_products_of_one_row_are_merged() -> None:
    before = merged(dead=False)
    copy = tvm.ir.load_json(tvm.ir.save_json(before))
    merge = MergeSharedInput()
    tvm.ir.assert_structural_equal(apply_pass(merge, before), merged(dead=True))
    tvm.ir.assert_structural_equal(before, copy)
    assert merge.merged == 1


def test_products_of_more_rows_stay_apart() -> None:
    def body(emit: Emit, x: Any, r: Any) -> Any:
        parts = [emit(op.matmul(x, named_const(array(K, 8, seed=i), f"w{i}"))) for i in range(2)]
        return relax.Tuple(parts)

    before = module(body)
    merge = MergeSharedInput()
    tvm.ir.assert_structural_equal(apply_pass(merge, before), before)
    assert merge.merged == 0


def attention(kind: str = "", size: int = 32) -> tvm.IRModule:
    """Return an encoder attention of two heads over rows of three products."""
    width = 2 * size

    def body(emit: Emit, x: Any, r: Any) -> Any:
        def heads(name: str, order: list[int]) -> Any:
            rows = emit(op.matmul(x, named_const(array(K, width), name)), name)
            return emit(op.permute_dims(emit(op.reshape(rows, (1, ROWS, 2, size))), order))

        q, k, v = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
        factor = 1.0 if kind == "scale" else size**-0.5
        scores = emit(op.multiply(emit(op.matmul(q, k)), scalar(factor)))
        shape = (1, 1, ROWS, ROWS) if kind == "mask" else (1, 1, 1, ROWS)
        scores = emit(op.add(scores, named_const(array(*shape), "mask")))
        weights = emit(op.nn.softmax(scores, -1), "weights")
        context = emit(op.permute_dims(emit(op.matmul(weights, v)), [0, 2, 1, 3]))
        return op.reshape(context, (1, ROWS, width))

    return module(body, width=width)


@pytest.mark.parametrize(
    ("kind", "size", "reason"),
    [
        ("", 48, "heads of 48"),
        ("scale", 32, "its scale is 1.0"),
        ("mask", 32, "the mask has shape"),
    ],
)
def test_attention_without_a_kernel_stays_with_a_reason(kind: str, size: int, reason: str) -> None:
    after, chosen = selected(attention(kind, size))
    assert reason in chosen.choices["weights"].reason
    assert chosen.choices["weights"].kind == "tvm"
    assert "nn.softmax" in operators(after)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_attention_reads_one_product(size: int) -> None:
    after, chosen = selected(attention("", size))
    assert sorted(choice.kind for choice in chosen.choices.values()) == ["attention", "gemm"]
    assert operators(after) == ["astype", "call_tir", "call_tir", "astype"]


def test_views_are_runs_of_memory() -> None:

    def body(emit: Emit, x: Any, r: Any) -> Any:
        base = emit(op.negative(r), "base")
        halves = emit(op.split(base, [N // 2], axis=2))
        second = emit(relax.TupleGetItem(halves, 1), "second")
        flat = emit(op.reshape(second, (N // 2,)), "flat")
        turned = emit(op.permute_dims(emit(op.reshape(base, (1, 2, N // 2))), [0, 2, 1]), "turned")
        odd = emit(op.strided_slice(base, [2], [4], [12]), "odd")
        return relax.Tuple([flat, turned, odd])

    flow = Dataflow(module(body, rows=1)["main"])
    found = {str(var.name): view_of(flow, var) for var in flow.values}
    assert (found["flat"].root.name, found["flat"].offset) == ("base", N // 2)
    assert found["turned"].root.name == "turned"
    # 16 bytes of float16 are eight elements.
    assert found["odd"].root.name == "odd"
    stop = [var for var in flow.values if var.name == "second"]
    flat = next(var for var in flow.values if var.name == "flat")
    assert view_of(flow, flat, stop).root.name == "second"


def test_spellings_of_functions_are_told_by_their_values() -> None:
    for body, name in ((gelu, "gelu"), (silu, "silu"), (relu, "relu")):
        mod = module(lambda emit, x, r, body=body: body(emit, emit(op.negative(r), "v")))
        flow = Dataflow(mod["main"])
        var = next(var for var in flow.values if var.name == "v")
        assert (function_after(flow, var, ("gelu", "relu", "silu")) or ("",))[0] == name
        assert function_after(flow, var, ("softplus",)) is None


def kernels_in_the_middle(first: bool) -> tvm.IRModule:
    """Return a chain from x with a reader of r in its middle, or at its beginning."""

    def body(emit: Emit, x: Any, r: Any) -> Any:
        if first:
            other = emit(op.exp(r), "other")
        chain = emit(op.exp(emit(op.negative(emit(op.tanh(x))))))
        if not first:
            other = emit(op.exp(r), "other")
        return relax.Tuple([chain, other])

    return module(body)


def test_readers_of_inputs_come_first() -> None:
    def names(mod: tvm.IRModule) -> list[str]:
        return operators(apply_pass(InputsFirst(), mod))[:4]

    assert names(kernels_in_the_middle(first=False)) == ["tanh", "exp", "negative", "exp"]
    assert names(kernels_in_the_middle(first=True)) == ["exp", "tanh", "negative", "exp"]


def test_shapes_that_are_not_known_leave_the_graph_out() -> None:
    x = relax.Var("x", relax.TensorType(dtype="float32", ndim=2))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        builder.emit_func_output(x)
    assert graph_config(builder.get(), wanted=True) == {"relax.backend.use_cuda_graph": False}
    known = module(lambda emit, x, r: op.exp(r))
    assert graph_config(known, wanted=True) == {"relax.backend.use_cuda_graph": True}
    assert graph_config(known, wanted=False) == {"relax.backend.use_cuda_graph": False}


def mask_of(kind: str) -> tuple[Dataflow, Any]:
    """Return the mask of empty slots of a cache of eight, or one that is none."""
    length = relax.Var("length", relax.TensorType((2 if kind == "lengths" else 1,), "int64"))
    numbers = np.arange(8)[::-1] if kind == "reversed" else np.arange(8)
    builder = relax.BlockBuilder()
    with builder.function("main", [length]):
        with builder.dataflow():
            emit = builder.emit
            one = emit(op.sum(length, keepdims=True)) if kind == "lengths" else length
            slots = named_const(numbers, "slots")
            after = emit((op.less if kind == "before" else op.greater)(slots, one))
            low = scalar(-1.0 if kind == "weak" else -1e9)
            mask = emit(op.where(after, low, scalar(0.0)), "mask")
            if kind == "other":
                mask = emit(op.negative(mask), "negated")
            out = builder.emit_output(mask)
        builder.emit_func_output(out)
    flow = Dataflow(builder.get()["main"])
    return flow, [var for var in flow.values if var.name in ("mask", "negated")][-1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("reversed", "not numbered"),
        ("before", "after a length"),
        ("weak", "other values"),
        ("other", "not made by a where"),
    ],
)
def test_mask_that_is_no_length_is_refused(kind: str, reason: str) -> None:
    flow, mask = mask_of(kind)
    with pytest.raises(Refused, match=reason):
        SharedValues(flow).live_slots(mask, (1, 2), 8)


def test_layers_share_what_is_made_of_the_length() -> None:
    flow, mask = mask_of("")
    shared = SharedValues(flow)
    first = shared.live_slots(mask, (1, 2), 8)
    assert first.same_as(shared.live_slots(mask, (1, 2), 8))
    assert not first.same_as(shared.live_slots(mask, (1, 3), 8))
    with pytest.raises(Refused, match="slots of its mask"):
        shared.live_slots(mask, (1, 2), 9)
    assert shared.live_slots(None, (1, 2), 8).value.numpy().tolist() == [[8, 8]]


def test_states_stay_where_they_are_only_if_written_in_place_at_the_end() -> None:
    def declared(names: list[str], states: list[tuple[str, str]]) -> list[str]:
        shapes = {"s": (1, 1, 4, 4), "x": (1, 1, 1, 4)}
        params = {n: relax.Var(n, relax.TensorType(shapes[n], "float32")) for n in names}
        state, row = params["s"], params["x"]
        builder = relax.BlockBuilder()
        with builder.function("main", list(params.values())):
            with builder.dataflow():
                func = append_row(shapes["s"], "float32", (1,), "int64", gpu=True)
                place = builder.add_func(func, "append_row")
                args = relax.Tuple([state, row, named_const(np.array([2]), "slot")])
                new = builder.emit(op.call_tir_inplace(place, args, 0, state.ty))
                out = builder.emit_output(relax.Tuple([new, builder.emit(op.exp(row))]))
            builder.emit_func_output(out)
        mod = builder.get().with_attr(LAYOUT_TAG, json.dumps({"opaque_states": states}))
        found = StaticStates()
        after = apply_pass(found, mod)
        if found.declared:
            assert int(after["main"].attrs["num_input"]) == len(names) - len(found.declared)
        return found.declared

    assert declared(["x", "s"], [("s", "new")]) == ["s"]
    assert declared(["s", "x"], [("s", "new")]) == []
    assert declared(["x", "s"], []) == []
    # Only read: it may lie elsewhere in the next call.
    assert declared(["s", "x"], [("s", "new"), ("x", "y")]) == []
