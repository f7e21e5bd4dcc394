"""Operations and bytes of kernels against the numbers that the sizes give by hand."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from tvm.script import tirx as T

from icd_tvm.adapters.quant import parse_quant
from icd_tvm.errors import ConfigError, UnsupportedOpError
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.apply_quant import ApplyQuant
from icd_tvm.relax_passes.layer_rules import parse_request
from icd_tvm.relax_passes.relax_graph import is_call
from icd_tvm.runtime.build import build
from icd_tvm.runtime.kernel_record import WorkCounter, arm_work
from icd_tvm.tir_schedules.cpu.bf16_matmul import bf16_matmul, bf16_tile
from icd_tvm.tir_schedules.cpu.block_sparse import vrow_matmul
from icd_tvm.tir_schedules.cpu.dense import dense_matmul
from icd_tvm.tir_schedules.cpu.dot_product import dot_product
from icd_tvm.tir_schedules.cpu.tile import Tile
from icd_tvm.tir_schedules.flop_count import count_flop, touched_bytes
from icd_tvm.tir_schedules.target import parse_target

V3 = parse_target("x86-64-v3", 1)


def test_a_dense_matmul_is_two_operations_a_product() -> None:
    assert count_flop(dense_matmul(8, 24, 48, Tile(4, 2, 8))) == 2 * 8 * 24 * 48
    # A kernel computes whole tiles, and that is what it is counted by.
    padded = dense_matmul(6, 24, 40, Tile(4, 2, 8))
    assert count_flop(padded) == 2 * 8 * 24 * 48
    assert touched_bytes(padded) == [4 * 6 * 24, 4 * 24 * 48, 4 * 6 * 40]


def test_a_sparse_matmul_counts_the_rows_it_keeps() -> None:
    func = vrow_matmul(8, 64, 32, 20, target=V3)
    index = np.zeros((2, 20), np.int32)
    assert count_flop(func, {"idx": index}) == 2 * 8 * 20 * 32


@T.prim_func(s_tir=True)
def ragged(x_: T.handle, counts_: T.handle, y_: T.handle) -> None:
    x = T.match_buffer(x_, (4, 8), "float32")
    counts = T.match_buffer(counts_, (4,), "int32")
    y = T.match_buffer(y_, (4,), "float32")
    for row in range(4):
        for step in range(counts[row]):
            if step > 0:
                y[row] = y[row] + x[row, step] * x[row, step]


def test_loops_and_guards_that_data_decides_are_counted_exactly() -> None:
    counts = np.array([3, 0, 8, 1], np.int32)
    assert count_flop(ragged, {"counts": counts}) == 2 * (2 + 0 + 7 + 0)
    with pytest.raises(ConfigError, match="counts"):
        count_flop(ragged)


@T.prim_func(s_tir=True)
def repeated(x_: T.handle, index_: T.handle, y_: T.handle) -> None:
    x = T.match_buffer(x_, (100, 4), "float32")
    index = T.match_buffer(index_, (5,), "int32")
    y = T.match_buffer(y_, (5, 4), "float32")
    for row in range(5):
        for lane in T.vectorized(4):
            y[row, lane] = T.exp(x[index[row], lane] * T.float32(2)) / (
                x[index[row], lane] * T.float32(2) + T.Cast("float32", row * 3)
            )


def test_equal_parts_count_once_and_indices_not_at_all() -> None:
    # A product that stands twice, exp, a sum and a division.
    index = np.arange(5, dtype=np.int32)
    assert count_flop(repeated, {"index": index}) == 5 * 4 * 4
    # Of the 100 rows a call can touch as many as it takes.
    assert touched_bytes(repeated, {"index": index}) == [5 * 4 * 4, 20, 80]


@pytest.mark.parametrize("level", ["x86-64-v3", "x86-64-v4"])
def test_a_product_of_four_bytes_is_eight_operations_a_lane(level: str) -> None:
    dot = dot_product(parse_target(level, 1))
    lanes = dot.lanes

    def body(total_: Any, four_: Any, weight_: Any) -> Any:
        @T.prim_func(s_tir=True)
        def main(a: T.handle, b: T.handle, c: T.handle) -> None:
            total = T.match_buffer(a, (3,), total_)
            four = T.match_buffer(b, (3,), four_)
            weight = T.match_buffer(c, (3,), weight_)
            for step in range(3):
                total[step] = dot.add(total[step], four[step], weight[step])

        return main

    func = body(f"int32x{lanes}", "int32", f"int8x{4 * lanes}")
    assert count_flop(func) == 3 * 8 * lanes


@pytest.mark.parametrize("level", ["cooperlake", "x86-64-v3"])
def test_a_product_of_two_bfloat16_is_four_operations_a_lane(level: str) -> None:
    target = parse_target(level, 1)
    tile = bf16_tile(8, 16, 32, target)
    func = bf16_matmul(8, 16, 32, target, tile=tile)
    rows, columns = tile.padded(8, 32)
    assert count_flop(func) == 2 * rows * columns * 16


@T.prim_func(s_tir=True)
def endless(x_: T.handle) -> None:
    x = T.match_buffer(x_, (1,), "float32")
    while x[0] < T.float32(4):
        x[0] = x[0] + T.float32(1)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="while"):
        count_flop(endless)


def products(mod: Any) -> int:
    """Return the operations of the matmuls and attentions of a Relax module."""
    total = 0
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            if is_call(binding.value, "relax.matmul"):
                left, out = binding.value.args[0].ty.shape, binding.value.ty.shape
                total += 2 * int(left[-1]) * prod(int(size) for size in out)
    return total


@pytest.mark.parametrize("quant", ["", "int8:w8a8-dynamic; min-size=0"])
@pytest.mark.parametrize("name", ["mamba-mini-random", "decoder-mini-step-random"])
def test_every_kind_of_model_is_counted(name: str, quant: str) -> None:
    mod = import_onnx(build_model(name)).mod
    least = products(mod)
    if quant:
        mod = ApplyQuant(parse_request(quant, parse_quant))(mod)
    work = arm_work(build(mod, V3).lowered, WorkCounter())
    # Nothing but products has as many operations; rows, columns and norms add less again.
    assert 0 < least <= work["flop"] <= 4 * least
    assert work["flop"] == sum(kernel["flop"] for kernel in work["kernels"])
    assert work["bytes"] > 0
