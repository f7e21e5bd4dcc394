"""Every rule against the op itself: permuted operands must give a permuted result."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from axis_models import EXAMPLES, compiled
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm._tvm import Op, relax, tirx
from icd_tvm.relax_passes.axis_groups import AxisGroups, find_axis_groups
from icd_tvm.relax_passes.axis_rules import RULES
from icd_tvm.relax_passes.axis_structure import axis_index

op, nn = relax.op, relax.op.nn
Make = Callable[..., Any]
F = "float32"


def case(make: Make, free: list[int], *shapes: tuple[int, ...], dtype: str = F) -> Any:
    """One op: how to call it, the sizes of its free groups, and its operands' shapes."""
    return make, sorted(free), shapes, dtype


def item(call: Any, index: int = 0) -> Any:
    return lambda *args: relax.TupleGetItem(call(*args), index)


def whole(index: Any, size: int) -> Any:
    """Indices in [0, size) made of random floats."""
    return op.astype(op.clip(index, 0, size - 1), "int64")


CASES: dict[str, Any] = {
    "relu": case(nn.relu, [2, 3], (2, 3)),
    "astype": case(lambda x: op.astype(x, "int32"), [2, 3], (2, 3)),
    "clip": case(lambda x: op.clip(x, -1, 1), [2, 3], (2, 3)),
    "add_broadcast": case(op.add, [2, 3, 4], (2, 3, 4), (3, 1)),
    "add_same_vector": case(op.add, [3], (3,), (3,)),
    "add_outer": case(op.add, [3, 4], (3, 1), (4,)),
    "where": case(lambda a, b: op.where(op.greater(a, b), a, b), [3, 4], (3, 4), (4,)),
    "prelu": case(lambda x, a: nn.prelu(x, a, 1), [2, 3, 4], (2, 3, 4), (3,)),
    "dropout": case(item(nn.dropout), [2, 3], (2, 3)),
    "matmul": case(op.matmul, [2, 3, 4], (2, 3), (3, 4)),
    "matmul_batched": case(op.matmul, [5, 2, 3, 4], (5, 2, 3), (5, 3, 4)),
    "matmul_broadcast": case(op.matmul, [6, 5, 2, 3, 4], (6, 1, 2, 3), (5, 3, 4)),
    "matmul_vector_left": case(op.matmul, [3, 4], (3,), (3, 4)),
    "matmul_vector_right": case(op.matmul, [2, 3], (2, 3), (3,)),
    "matmul_vectors": case(op.matmul, [3], (3,), (3,)),
    "linear": case(lambda x, w, b: op.linear(x, w, b), [2, 3, 4], (2, 3), (4, 3), (4,)),
    "outer": case(op.outer, [2, 3], (2,), (3,)),
    "einsum": case(lambda a, b: op.einsum([a, b], "bij,jk->kbi"), [2, 3, 4, 5], (2, 3, 4), (4, 5)),
    "einsum_diagonal": case(lambda a: op.einsum([a], "ii->i"), [3], (3, 3)),
    "attention": case(nn.attention, [2, 3, 4, 4, 5, 6], (2, 6, 3, 4), (2, 5, 3, 4), (2, 5, 3, 4)),
    "attention_causal": case(
        lambda q, k, v: nn.attention(q, k, v, causal_mask="TopLeft"),
        [2, 3, 4, 7],
        (2, 5, 3, 4),
        (2, 5, 3, 4),
        (2, 5, 3, 7),
    ),
    "attention_bias": case(
        lambda q, k, v, b: nn.attention(q, k, v, b),
        [3, 4, 4, 5, 6],
        (1, 6, 3, 4),
        (1, 5, 3, 4),
        (1, 5, 3, 4),
        (1, 3, 6, 5),
    ),
    "softmax": case(lambda x: nn.softmax(x, 0), [2, 3], (2, 3)),
    "log_softmax": case(nn.log_softmax, [2, 3], (2, 3)),
    "layer_norm": case(
        lambda x, g, b: nn.layer_norm(x, g, b, axes=[-2, -1]), [2, 3, 4], (2, 3, 4), (3, 4), (3, 4)
    ),
    "rms_norm": case(lambda x, g: nn.rms_norm(x, g, axes=[-1]), [2, 3], (2, 3), (3,)),
    "instance_norm": case(
        lambda x, g, b: nn.instance_norm(x, g, b, 1, [2]), [2, 3, 4], (2, 3, 4), (3,), (3,)
    ),
    "group_norm": case(
        lambda x, g, b: nn.group_norm(x, g, b, 2, 1, [2]), [5, 2, 3, 4], (5, 6, 4), (6,), (6,)
    ),
    "batch_norm": case(
        item(lambda x, g, b, m: nn.batch_norm(x, g, b, m, op.abs(m), axis=1, training=False)),
        [2, 3, 4],
        (2, 3, 4),
        (3,),
        (3,),
        (3,),
    ),
    "batch_norm_mean": case(
        item(lambda x, g: nn.batch_norm(x, g, g, g, g, axis=1, training=True), 1),
        [2, 3, 4],
        (2, 3, 4),
        (3,),
    ),
    "sum": case(lambda x: op.sum(x, [1]), [2, 3, 4], (2, 3, 4)),
    "sum_all": case(op.sum, [2, 3], (2, 3)),
    "mean_keep": case(lambda x: op.mean(x, [-1, 0], keepdims=True), [2, 3, 4], (2, 3, 4)),
    "variance": case(lambda x: op.variance(x, [0]), [2, 3], (2, 3)),
    "prod": case(lambda x: op.prod(x, [0]), [2, 3], (2, 3)),
    "argmax": case(lambda x: op.argmax(x, 1), [2, 4], (2, 3, 4)),
    "argmax_all": case(lambda x: op.argmax(x), [], (2, 3)),
    "cumsum": case(lambda x: op.cumsum(x, 1), [2, 4], (2, 3, 4)),
    "cumsum_flat": case(lambda x: op.cumsum(x), [], (2, 3)),
    "sort": case(lambda x: op.sort(x, 0), [3], (2, 3)),
    "flip": case(lambda x: op.flip(x, 0), [3], (2, 3)),
    "topk": case(item(lambda x: op.topk(x, 2, axis=1, ret_type="both")), [2], (2, 3)),
    "reshape_split": case(lambda x: op.reshape(x, (2, 3, 4)), [2, 3, 4], (2, 12)),
    "reshape_merge": case(lambda x: op.reshape(x, (12, 5)), [3, 4, 5], (3, 4, 5)),
    "reshape_refine": case(lambda x: op.reshape(x, (2, 6)), [2, 2, 3], (4, 3)),
    "reshape_mixed": case(lambda x: op.reshape(x, (4, 6)), [], (6, 4)),
    "slice_of_product": case(
        lambda x: op.strided_slice(op.reshape(x, (12,)), [0], [3], [12]), [3, 3], (4, 3)
    ),
    "slice_of_a_row_of_products": case(
        lambda x, z: op.strided_slice(op.concat([op.reshape(x, (12,)), z], 0), [0], [0], [3]),
        [2, 3, 3],
        (4, 3),
        (2,),
    ),
    "segments_inside_a_product": case(
        lambda x, a, b: op.add(op.reshape(x, (12,)), op.concat([a, b], 0)),
        [3],
        (2, 2, 3),
        (3,),
        (9,),
    ),
    "reshape_ones": case(lambda x: op.reshape(x, (1, 3, 1, 2)), [3, 2], (3, 1, 2)),
    "flatten": case(op.flatten, [2, 3], (2, 3)),
    "expand_dims": case(lambda x: op.expand_dims(x, [0, 2]), [2, 3], (2, 3)),
    "squeeze": case(lambda x: op.squeeze(x, [1]), [2, 3], (2, 1, 3)),
    "permute_dims": case(lambda x: op.permute_dims(x, [2, 0, 1]), [2, 3, 4], (2, 3, 4)),
    "permute_dims_default": case(op.permute_dims, [2, 3], (2, 3)),
    "broadcast_to": case(lambda x: op.broadcast_to(x, (4, 2, 3)), [2, 3, 4], (2, 1)),
    "repeat": case(lambda x: op.repeat(x, 2, 1), [2, 3, 2], (2, 3)),
    "repeat_flat": case(lambda x: op.repeat(x, 2), [], (2, 3)),
    "tile": case(lambda x: op.tile(x, [2, 1, 3]), [2, 4, 3, 5], (4, 5)),
    "concat": case(lambda a, b: op.concat([a, b], 1), [2, 3, 4], (2, 3), (2, 4)),
    "concat_twice": case(lambda a: op.concat([a, a], 1), [2, 3], (2, 3)),
    "split_sections": case(item(lambda x: op.split(x, 2, 1), 1), [2, 3, 3], (2, 6)),
    "split_at": case(item(lambda x: op.split(x, [2, 5], 1), 1), [2, 2, 3, 4], (2, 9)),
    "stack": case(lambda a, b: op.stack([a, b], 1), [2, 3], (2, 3), (2, 3)),
    "slice": case(lambda x: op.strided_slice(x, [1], [2], [5]), [2, 2, 3, 4], (2, 9)),
    "slice_open": case(lambda x: op.strided_slice(x, [1], [-4], [2**31]), [2, 5, 4], (2, 9)),
    "slice_step": case(lambda x: op.strided_slice(x, [1], [1], [9], [3]), [2, 3], (2, 9)),
    "slice_odd_step": case(lambda x: op.strided_slice(x, [1], [1], [8], [3]), [2], (2, 10)),
    "slice_backwards": case(lambda x: op.strided_slice(x, [1], [8], [-10], [-1]), [2], (2, 9)),
    "pad": case(lambda x: nn.pad(x, [0, 0, 2, 3]), [2, 4, 2, 3], (2, 4)),
    "pad_reflect": case(lambda x: nn.pad(x, [0, 0, 2, 1], "reflect"), [2], (2, 4)),
    "take_data": case(
        lambda x, i: op.take(x, op.astype(op.abs(op.clip(i, 0, 1)), "int32"), 1),
        [2, 4, 5],
        (2, 3, 4),
        (5,),
    ),
    "gather_elements": case(
        lambda x, i: op.gather_elements(x, op.astype(op.clip(i, 0, 1), "int64"), 1),
        [2, 5, 4],
        (2, 3, 4),
        (2, 5, 4),
    ),
    "one_hot": case(
        lambda i: op.one_hot(
            op.astype(op.clip(i, 0, 3), "int32"),
            relax.prim_value(tirx.FloatImm("float32", 1)),
            relax.prim_value(tirx.FloatImm("float32", 0)),
            4,
            -1,
        ),
        [2, 3],
        (2, 3),
    ),
    "gather_nd": case(lambda x, i: op.gather_nd(x, whole(i, 2)), [4, 5, 7], (2, 3, 4, 5), (7, 2)),
    "gather_nd_batched": case(
        lambda x, i: op.gather_nd(x, whole(i, 2), 1), [2, 5, 7], (2, 3, 4, 5), (2, 7, 2)
    ),
    "scatter_nd_add": case(
        lambda x, i, u: op.scatter_nd(x, whole(i, 2), u, "add"),
        [5, 7],
        (3, 4, 5),
        (7, 2),
        (7, 5),
    ),
    "scatter_nd_update": case(
        lambda x, i, u: op.scatter_nd(x, whole(i, 2), u), [4, 5], (3, 4, 5), (7, 1), (7, 4, 5)
    ),
    "scatter_elements_add": case(
        lambda x, i, u: op.scatter_elements(x, whole(i, 2), u, 1, "add"),
        [2, 5],
        (2, 3, 4),
        (2, 5, 3),
        (2, 5, 3),
    ),
    "scatter_elements_update": case(
        lambda x, i, u: op.scatter_elements(x, whole(i, 2), u, 1),
        [2, 4],
        (2, 3, 4),
        (2, 5, 4),
        (2, 5, 4),
    ),
    "slice_scatter": case(
        lambda x, u: op.slice_scatter(x, u, 2, 6, 1, axis=1), [2, 2, 4, 3], (2, 9), (2, 4)
    ),
    "slice_scatter_step": case(
        lambda x, u: op.slice_scatter(x, u, 0, 8, 2, axis=1), [], (2, 9), (2, 4)
    ),
    "index_tensor": case(
        lambda x, i, j: op.index_tensor(x, [whole(i, 2), whole(j, 2)]),
        [2, 5, 7],
        (3, 4, 5),
        (7,),
        (2, 1),
    ),
    "index_put": case(
        lambda x, i, v: op.index_put(x, (whole(i, 2),), v, True), [], (4,), (3,), (3,)
    ),
    "meshgrid": case(item(lambda a, b: op.meshgrid(relax.Tuple([a, b]), "ij")), [2, 3], (2,), (3,)),
    "zeros_like": case(op.zeros_like, [2, 3, 2, 3], (2, 3)),
    "tril": case(op.tril, [2], (2, 3, 4)),
    "conv1d": case(lambda x, w: nn.conv1d(x, w, padding=1), [2, 3, 4], (2, 3, 7), (4, 3, 3)),
    "conv1d_pointwise": case(nn.conv1d, [2, 3, 4, 7], (2, 3, 7), (4, 3, 1)),
    "conv1d_strided": case(
        lambda x, w: nn.conv1d(x, w, strides=2), [2, 3, 4], (2, 3, 7), (4, 3, 1)
    ),
    "conv1d_pointwise_padded": case(
        lambda x, w: nn.conv1d(x, w, strides=2, padding=1), [2, 3, 4], (2, 3, 3), (4, 3, 1)
    ),
    "conv2d_grouped": case(
        lambda x, w: nn.conv2d(x, w, groups=2), [3, 2, 4, 5], (3, 8, 5, 5), (10, 4, 3, 3)
    ),
    "conv2d_depthwise": case(
        lambda x, w: nn.conv2d(x, w, groups=4), [3, 4, 2], (3, 4, 5, 5), (8, 1, 3, 3)
    ),
    "conv2d_channels_last": case(
        lambda x, w: nn.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO"),
        [2, 3, 4],
        (2, 5, 5, 3),
        (3, 3, 3, 4),
    ),
    "conv1d_transpose": case(nn.conv1d_transpose, [2, 3, 4], (2, 3, 7), (3, 4, 3)),
    "conv1d_transpose_grouped": case(
        lambda x, w: nn.conv1d_transpose(x, w, groups=2), [3, 2, 2, 4], (3, 4, 7), (4, 4, 3)
    ),
    "max_pool2d": case(lambda x: nn.max_pool2d(x, (2, 2)), [2, 3], (2, 3, 4, 4)),
    "avg_pool1d": case(lambda x: nn.avg_pool1d(x, 2), [2, 3], (2, 3, 4)),
    "global_pool": case(lambda x: nn.adaptive_avg_pool2d(x, 1), [2, 3, 4, 5], (2, 3, 4, 5)),
    "resize": case(
        lambda x: op.image.resize2d(x, (8, 8), roi=[0.0] * 4, layout="NCHW", method="linear"),
        [2, 3],
        (2, 3, 4, 4),
    ),
    "quantize": case(
        lambda x, s: op.quantize(x, op.abs(s), relax.const(np.zeros(3, "int8")), 1),
        [2, 3],
        (2, 3),
        (3,),
    ),
    "dequantize": case(
        lambda x, s: op.dequantize(op.astype(x, "int8"), s, relax.const(0, "int8"), axis=1),
        [2, 3],
        (2, 3),
        (3,),
    ),
    "collapse_sum_to": case(lambda x: op.collapse_sum_to(x, (1, 3)), [], (2, 3)),
}


def build(make: Make, shapes: tuple[tuple[int, ...], ...], dtype: str) -> Any:
    params = [relax.Var(f"x{i}", relax.TensorType(s, dtype)) for i, s in enumerate(shapes)]
    builder = relax.BlockBuilder()
    with builder.function("main", params, attrs={"num_input": 0}):
        with builder.dataflow():
            out = builder.emit_output(make(*params), "out")
        builder.emit_func_output(out)
    return builder.get()


def permuted(array: np.ndarray, axes: Any, perms: dict[str, Any]) -> np.ndarray:
    for i, structure in enumerate(axes):
        array = np.take(array, axis_index(structure, perms), axis=i)
    return array


def shuffled(groups: AxisGroups, rng: np.random.Generator) -> dict[str, Any]:
    return {group.id: rng.permutation(group.size) for group in (*groups.free, *groups.idle)}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    make, free, shapes, dtype = CASES[name]
    mod = build(make, shapes, dtype)
    groups = find_axis_groups(mod["main"], keep_outputs=False)
    assert sorted(g.size for g in (*groups.free, *groups.idle)) == free
    rng = np.random.default_rng(0)
    arrays = [(rng.standard_normal(shape) * 2).astype(dtype) for shape in shapes]
    execute = compiled(mod)
    before = execute(arrays)[0]
    params = mod["main"].params
    for _ in range(4):
        perms = shuffled(groups, rng)
        moved = [
            permuted(a, groups.value_axes[p], perms) for a, p in zip(arrays, params, strict=True)
        ]
        expected = permuted(before, groups.value_axes[mod["main"].body.body], perms)
        np.testing.assert_allclose(execute(moved)[0], expected, rtol=1e-4, atol=1e-4)


def test_rules_name_existing_ops() -> None:
    assert RULES.keys() <= set(Op.list_op_names())


def test_unknown_op_pins_everything_with_its_name() -> None:
    mod = build(lambda x: op.collapse_sum_to(x, (1, 3)), ((2, 3),), F)
    groups = find_axis_groups(mod["main"], keep_outputs=False)
    assert not groups.free
    pins = [pin for group in groups.pinned for pin in group.pins]
    assert {(pin.op, pin.reason) for pin in pins} == {
        ("relax.collapse_sum_to", "no rule for this op")
    }


def test_incompatible_reshape_says_why() -> None:
    mod = build(lambda x: op.reshape(x, (4, 6)), ((6, 4),), F)
    groups = find_axis_groups(mod["main"], keep_outputs=False)
    reasons = {pin.reason for group in groups.pinned for pin in group.pins}
    assert reasons == {"reshape 6x4 to 4x6: factors 6 and 4 have no common split"}


def test_dynamic_batch_passes_through_a_reshape() -> None:
    batch = tirx.Var("batch", "int64")
    x = relax.Var("x", relax.TensorType((batch, 5, 12), F))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 0}):
        y = builder.emit(op.reshape(x, (batch, 5, 3, 4)))
        builder.emit_func_output(y)
    groups = find_axis_groups(builder.get()["main"], keep_outputs=False)
    assert sorted(group.size for group in groups.free) == [3, 4, 5]
    assert {pin.reason for group in groups.pinned for pin in group.pins} == {"dynamic size"}


def test_two_dynamic_axes_that_change_places_are_pinned() -> None:
    rows, columns = tirx.Var("rows", "int64"), tirx.Var("columns", "int64")
    x = relax.Var("x", relax.TensorType((rows, 4, columns), F))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 0}):
        y = builder.emit(op.reshape(x, (columns, 4, rows)))
        builder.emit_func_output(y)
    groups = find_axis_groups(builder.get()["main"], keep_outputs=False)
    assert not groups.free


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of equal volume, made of the same primes."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=6))

    def shape(factors: list[int]) -> list[int]:
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=3)))
        edges = [0, *cuts, len(factors)]
        return [int(np.prod(factors[a:b])) for a, b in pairwise(edges)]

    return shape(primes), shape(draw(st.permutations(primes)))


@settings(max_examples=EXAMPLES, deadline=None)
@given(reshapes(), st.integers(0, 99))
def test_reshape_keeps_every_permutation(shapes: tuple[list[int], list[int]], seed: int) -> None:
    source, target = shapes
    mod = build(lambda x: op.reshape(x, target), (tuple(source),), F)
    func = mod["main"]
    groups = find_axis_groups(func, keep_outputs=False)
    perms = shuffled(groups, np.random.default_rng(seed))
    x = np.arange(np.prod(source)).reshape(source)
    moved = permuted(x, groups.value_axes[func.params[0]], perms)
    expected = permuted(x.reshape(target), groups.value_axes[func.body.body], perms)
    np.testing.assert_array_equal(moved.reshape(target), expected)
    if source == target:
        assert sorted(g.size for g in groups.free) == sorted(n for n in source if n > 1)


def _apply(kind: str, x: Any, number: int, library: Any) -> Any:
    """One step on a Relax expression or on an array, by the same name."""
    n = int(x.shape[0]) if isinstance(x, np.ndarray) else int(x.ty.shape.values[0])
    cut = 1 + number % max(n - 1, 1)
    if kind == "halves" and n % 2 == 0:
        return library["split"](x, 2)
    if kind == "cut" and n > 1:
        return library["slice"](x, 0, cut)
    if kind == "swap" and n > 1:
        return library["concat"]([library["slice"](x, cut, n), library["slice"](x, 0, cut)])
    if kind == "double" and n < 40:
        return library["concat"]([x, x])
    if kind == "add_swapped" and n > 1:
        turned = library["concat"]([library["slice"](x, cut, n), library["slice"](x, 0, cut)])
        return library["add"](x, turned)
    factors = [d for d in range(2, n) if n % d == 0]
    if kind in ("transpose", "row") and factors:
        d = factors[number % len(factors)]
        grid = library["reshape"](x, (d, n // d))
        turned = library["transpose"](grid)
        return library["reshape"](turned, (n,)) if kind == "transpose" else library["sum"](grid)
    return x


NUMPY: dict[str, Any] = {
    "split": lambda x, n: np.add(*np.split(x, n)),
    "slice": lambda x, a, b: x[a:b],
    "concat": np.concatenate,
    "add": np.add,
    "reshape": np.reshape,
    "transpose": np.transpose,
    "sum": lambda x: x.sum(axis=0),
}


def relax_library(builder: Any) -> dict[str, Any]:
    def split(x: Any, n: int) -> Any:
        parts = builder.emit(op.split(x, n, 0))
        return builder.emit(op.add(*(builder.emit(relax.TupleGetItem(parts, i)) for i in (0, 1))))

    return {
        "split": split,
        "slice": lambda x, a, b: builder.emit(op.strided_slice(x, [0], [a], [b])),
        "concat": lambda parts: builder.emit(op.concat(parts, 0)),
        "add": lambda a, b: builder.emit(op.add(a, b)),
        "reshape": lambda x, shape: builder.emit(op.reshape(x, shape)),
        "transpose": lambda x: builder.emit(op.permute_dims(x)),
        "sum": lambda x: builder.emit(op.sum(x, [0])),
    }


KINDS = ["halves", "cut", "swap", "double", "add_swapped", "transpose", "row"]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.sampled_from([6, 8, 12, 16, 24, 30]),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 20)), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_chains_of_segments_and_factors(size: int, chain: list[tuple[str, int]], seed: int) -> None:
    """Splits, swaps and transposes of one axis, checked on arrays of distinct numbers."""
    x = relax.Var("x", relax.TensorType((size,), F))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 0}):
        with builder.dataflow():
            library, value = relax_library(builder), x
            for kind, number in chain:
                value = _apply(kind, value, number, library)
            out = builder.emit_output(value, "out")
        builder.emit_func_output(out)
    func = builder.get()["main"]
    groups = find_axis_groups(func, keep_outputs=False)
    perms = shuffled(groups, np.random.default_rng(seed))
    rng = np.random.default_rng(seed + 1)
    before = rng.integers(0, 1 << 40, size)
    after = permuted(before, groups.value_axes[func.params[0]], perms)
    for kind, number in chain:
        before, after = (_apply(kind, array, number, NUMPY) for array in (before, after))
    expected = permuted(before, groups.value_axes[func.body.body], perms)
    np.testing.assert_array_equal(after, expected)
