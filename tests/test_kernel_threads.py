"""Every parallel kernel on one worker of TVM's pool and on two: the same bits, all written.

The threads that other tests draw are those a schedule is made for; the pool that runs it has one
worker on two virtual CPUs. So the kernels run in a process of their own here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from test_cpu_kernels import SCALES, grouped_weight, random, schedule
from test_state_space_lowering import mamba, random_operands
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from icd_tvm._tvm import i64, te, tvm, tvm_ffi
from icd_tvm.relax_passes.narrow_weight import narrow_product
from icd_tvm.relax_passes.quantized_operands import Weight
from icd_tvm.tir_schedules.cpu import vector_math
from icd_tvm.tir_schedules.cpu.attention import attention
from icd_tvm.tir_schedules.cpu.attention_head import AttentionShape
from icd_tvm.tir_schedules.cpu.bf16_attention import bf16_attention
from icd_tvm.tir_schedules.cpu.bf16_dot import has_bf16
from icd_tvm.tir_schedules.cpu.bf16_matmul import bf16_matmul, bf16_tile, pack_bf16
from icd_tvm.tir_schedules.cpu.block_bf16 import block_bf16_matmul, pack_block_bf16
from icd_tvm.tir_schedules.cpu.block_int8 import block_int8_matmul, pack_block_int8
from icd_tvm.tir_schedules.cpu.byte_attention import ByteForm, byte_attention
from icd_tvm.tir_schedules.cpu.decode_attention import DecodeShape, decode_attention
from icd_tvm.tir_schedules.cpu.dense import pack_dense
from icd_tvm.tir_schedules.cpu.depthwise import depthwise_rows
from icd_tvm.tir_schedules.cpu.gemv import NarrowWeight, narrow_matmul, narrow_tile, pack_narrow
from icd_tvm.tir_schedules.cpu.int8_matmul import int8_matmul, int8_tile, pack_int8
from icd_tvm.tir_schedules.cpu.layer_norm import layer_norm
from icd_tvm.tir_schedules.cpu.matmul_kinds import KINDS, build_matmul, pack_matmul
from icd_tvm.tir_schedules.cpu.row_max import row_max
from icd_tvm.tir_schedules.cpu.scan_pair import scan_pair
from icd_tvm.tir_schedules.cpu.selective_scan import output_shape, selective_scan
from icd_tvm.tir_schedules.cpu.softmax import softmax
from icd_tvm.tir_schedules.cpu.stack import compile_kernel
from icd_tvm.tir_schedules.cpu.tile import choose_tile
from icd_tvm.tir_schedules.cpu.transpose import transpose
from icd_tvm.tir_schedules.cpu.transposed_int8 import pack_transposed_int8, transposed_int8_matmul
from icd_tvm.tir_schedules.target import host_target, vector_bits

Array = np.ndarray
WORKERS = 2
TARGET = host_target(WORKERS)
# Two workers that overlap need not show it in every run.
RUNS = 4
POISONS = (0xFF, 0x55)
M, K, N = 40, 48, 100


class Case(NamedTuple):
    """A scheduled function, its inputs, and the shape and type of each output."""

    func: Any
    inputs: list[Array]
    outputs: list[tuple[tuple[int, ...], str]]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return random(rng(), *shape)


def small(low: int, *shape: int) -> Array:
    """Bytes from ``low`` on, signed if that is below zero."""
    return rng().integers(low, low + 256, shape).astype(np.int8 if low else np.uint8)


def bits(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def product(kind: str) -> Case:
    shape, w = (2, M, K, N), grouped_weight(rng(), K, N, 16, 0.5)
    if kind == "dense":
        packed, nk = [pack_dense(w, choose_tile(M, K, N, TARGET).columns)], K
    else:
        constants = pack_matmul(kind, w, shape, TARGET)
        packed, nk = list(constants.values()), constants["rows"].shape[-1]
    func = schedule(build_matmul(kind, shape, nk, TARGET), TARGET)
    return Case(func, [floats(2, M, K), *packed], [((2, M, N), "float32")])


def few_rows(form: NarrowWeight, n: int = 500) -> Case:
    least, most = (-128, 127) if form.bits == 8 else (form.low, form.low + 15)
    values = floats(K, n) if form.floats else rng().integers(least, most + 1, (K, n))
    tables = [np.ones((K // form.block, n), np.float32)] * (not form.floats)
    packed = pack_narrow(values, tables, form, narrow_tile(2, TARGET).columns)
    func = schedule(narrow_matmul(2, K, n, form, TARGET), TARGET)
    return Case(func, [floats(2, K), *packed], [((2, n), "float32")])


def of_bytes(rows: int, keep: float = 1.0, n: int = 500) -> Case:
    """The product that models get: by digits from three rows on, and without runs of zeros."""
    values = small(-128, K, n) * np.repeat(rng().random(K // 8) < keep, 8)[:, None]
    weight = Weight(
        values.astype(np.int8), np.zeros((1, 1), np.int8), np.ones((1, n), np.float32), "w"
    )
    made = narrow_product(weight, (rows,), TARGET)
    inputs = [floats(rows, K), *made.constants.values()]
    return Case(schedule(made.func, TARGET), inputs, [((rows, n), "float32")])


def int8(kind: str) -> Case:
    w = grouped_weight(rng(), K // 4, N, 16, 0.5).repeat(4, axis=0)
    w = np.clip(w * 50, -127, 127).astype(np.int8)
    if kind == "dense":
        tile = int8_tile(M, K, N, TARGET)
        packed, func = [pack_int8(w, tile.columns)], int8_matmul(M, K, N, TARGET, tile=tile)
    elif kind == "blocks":
        tile = int8_tile(M, K, N, TARGET, 1)
        packed = pack_block_int8(w, tile.columns)
        func = block_int8_matmul(M, K, N, packed[1].shape[1], tile, TARGET)
    else:
        packed = pack_transposed_int8(w, TARGET)
        func = transposed_int8_matmul(M, K, N, packed[1].shape[1], TARGET)
    return Case(schedule(func, TARGET), [small(0, M, K), *packed], [((M, N), "int32")])


def bf16(vectors: int | None) -> Case:
    """The dense product, or blocks of as many vectors."""
    w, tile = grouped_weight(rng(), K, N, 16, 0.5), bf16_tile(M, K, N, TARGET, vectors)
    if vectors is None:
        packed, func = [pack_bf16(w, tile.columns)], bf16_matmul(M, K, N, TARGET, tile=tile)
    else:
        packed = pack_block_bf16(w, tile.columns)
        func = block_bf16_matmul(M, K, N, packed[1].shape[1], tile, TARGET)
    return Case(schedule(func, TARGET), [bits(floats(M, K)), *packed], [((M, N), "float32")])


def attended(kind: str, heads: int = 2, dim: int = 32) -> Case:
    """Fewer heads than workers, so that the rows of a head are shared out."""
    rows, keys, width = 50, 37, heads * dim
    shape = AttentionShape(1, rows, keys, heads, dim, 0.3, 1, (width,) * 3)
    mask, out = np.zeros((1, 1, 1, keys), np.float32), ((1, rows, width), "float32")
    if kind == "bytes":
        inputs = [small(0, 1, rows, width), *(small(-128, 1, keys, width) for _ in "kv"), mask]
        inputs += [*SCALES.arrays(), np.ones(width, np.float32), np.ones(1, np.float32)]
        func = byte_attention(shape, TARGET, ByteForm(codes=True))
        return Case(func, inputs, [((1, rows, width), "uint8")])
    inputs = [floats(1, rows, width), *(floats(1, keys, width) for _ in "kv"), mask]
    return Case((bf16_attention if kind == "bf16" else attention)(shape, TARGET), inputs, [out])


def decoded(dtype: str) -> Case:
    """One KV head, so that its slots are shared out and joined."""
    shape = DecodeShape(1, 1, 3, 130, 32, 0.3, dtype)
    cache = (1, 1, 130, 32)
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    inputs = [floats(1, 3, 1, 32), *((floats(*cache) * 9).astype(narrow) for _ in "kv")]
    inputs += [np.ones((*cache[:3], 1), np.float32)] * 2 * (dtype == "int8")
    inputs.append(np.zeros(130, np.float32))
    return Case(decode_attention(shape, TARGET), inputs, [((1, 3, 1, 32), "float32")])


def scanned(pair: bool) -> Case:
    program, length = mamba(64, 4), 9
    operands, start = random_operands(program, length, rng()), floats(1, 64, 4)
    out = (output_shape(program, 0, length), "float32")
    if pair:
        return Case(scan_pair(program, length, (False,) * 6), [start, start, *operands], [out])
    func = selective_scan(program, length, (False,) * 6, (False,))
    return Case(func, [start, *operands], [out, ((1, 64, 4), "float32")])


def stage(function: Callable[..., Any], *inputs: Array) -> Case:
    """A TE stage, as it is scheduled without a kernel of its own."""
    kinds = [te.placeholder([i64(e) for e in array.shape], str(array.dtype)) for array in inputs]
    made = function(*kinds)
    func = schedule(te.create_prim_func([*kinds, made]), TARGET)
    return Case(func, list(inputs), [(tuple(int(e) for e in made.shape), "float32")])


def rows_of(
    func: Any, *more: tuple[tuple[int, ...], str], inputs: list[Array] | None = None
) -> Case:
    return Case(func, [floats(2, 7, K), *(inputs or [])], list(more))


LANES = vector_bits(TARGET) // 32
NORM = [floats(K), floats(K), np.full(K, 20, np.float32), np.full(1, 100, np.float32)]
TABLE = rng().integers(0, 30, 400)
CASES: dict[str, Callable[[], Case]] = {
    **{kind: lambda kind=kind: product(kind) for kind in KINDS},  # type: ignore[misc]
    "few rows of floats": lambda: few_rows(NarrowWeight(32, K)),
    "few rows, 8 bits by block": lambda: few_rows(NarrowWeight(8, 16)),
    "few rows, 4 bits": lambda: few_rows(NarrowWeight(4, 16, -8)),
    "one row, 8 bits": lambda: of_bytes(1),
    "four rows, 8 bits": lambda: of_bytes(4),
    "eight rows, 8 bits": lambda: of_bytes(8),
    "one row, zeros skipped": lambda: of_bytes(1, 0.5),
    "eight rows, zeros skipped": lambda: of_bytes(8, 0.5),
    **{f"int8 {kind}": lambda kind=kind: int8(kind) for kind in ("dense", "blocks", "transposed")},  # type: ignore[misc]
    "bf16 dense": lambda: bf16(None),
    "bf16 blocks": lambda: bf16(1),
    "attention": lambda: attended("float32"),
    "attention in bytes": lambda: attended("bytes"),
    **({"attention in bf16": lambda: attended("bf16")} if has_bf16(TARGET) else {}),
    **{
        f"decode, {dtype}": lambda dtype=dtype: decoded(dtype)  # type: ignore[misc]
        for dtype in ("float32", "float16", "bfloat16", "int8")
    },
    "scan": lambda: scanned(False),
    "scan pair": lambda: scanned(True),
    "depthwise": lambda: stage(
        lambda *t: depthwise_rows(*t, before=3, after=0, step=1),
        floats(150, 160), floats(4, 160), floats(160),
    ),
    "softmax": lambda: rows_of(softmax((2, 7, K), TARGET), ((2, 7, K), "float32")),
    "row maximum": lambda: rows_of(row_max((2, 7, K), TARGET), ((2, 7, 1), "float32")),
    "norm": lambda: rows_of(
        layer_norm((2, 7, K), 1e-5, TARGET, codes=True),
        ((2, 7, K), "float32"), ((2, 7, K), "uint8"), inputs=NORM,
    ),
    "transpose": lambda: Case(
        transpose((LANES, 4 * LANES), TARGET),
        [floats(LANES, 4 * LANES)], [((4 * LANES, LANES), "float32")],
    ),
    "elementwise": lambda: stage(
        lambda x: te.compute(x.shape, lambda *at: vector_math.gelu(x[at])), floats(300, 70)
    ),
    "embedding": lambda: stage(
        lambda x, i: te.compute((i64(400), i64(70)), lambda r, c: x[i[r], c]), floats(30, 70), TABLE
    ),
}  # fmt: skip


def half_written() -> Case:
    """A kernel that is wrong."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name("half")
        x, y = (T.arg(name, T.Buffer((8,), "float32")) for name in "XY")
        with T.parallel(4) as i, T.sblock("half"):
            T.buffer_store(y, x[i], [i])
    return Case(builder.get(), [floats(8)], [((8,), "float32")])


def fault(case: Case) -> str:
    """Return what is wrong with a kernel, or an empty text."""
    if "T.parallel" not in case.func.script():
        return "it is not parallel"
    main = compile_kernel(case.func, TARGET)["main"]
    given = [tvm.runtime.tensor(array) for array in case.inputs]
    size = tvm_ffi.get_global_func("runtime.config_threadpool")

    def made(workers: int, poison: int) -> bytes:
        size(1, workers)
        blank = [np.zeros(shape, dtype) for shape, dtype in case.outputs]
        out = [
            tvm.runtime.tensor((a.view(np.uint8) + np.uint8(poison)).view(a.dtype)) for a in blank
        ]
        main(*given, *out)
        return b"".join(tensor.numpy().tobytes() for tensor in out)

    alone = made(1, POISONS[0])
    if made(1, POISONS[1]) != alone:
        return "an element of its output is not written"
    if any(made(WORKERS, POISONS[run % 2]) != alone for run in range(RUNS)):
        return f"{WORKERS} workers compute something else than one"
    return ""


@pytest.fixture(scope="module")
def faults() -> dict[str, str]:
    own = {"TVM_NUM_THREADS": str(WORKERS), "TVM_THREAD_POOL_SPIN_COUNT": "0"}
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if found is None:
        pytest.skip("TVM's pool has one worker on one CPU")
    return dict(found)


@pytest.mark.parametrize("name", CASES)
def test_workers_compute_what_one_does(faults: dict[str, str], name: str) -> None:
    assert faults[name] == ""


def test_what_is_not_written_is_found(faults: dict[str, str]) -> None:
    assert "not written" in faults["half"]


def main() -> None:
    kernels = {**CASES, "half": half_written}
    enough = int(tvm_ffi.get_global_func("runtime.NumThreads")()) >= WORKERS
    print(json.dumps({name: fault(make()) for name, make in kernels.items()} if enough else None))


if __name__ == "__main__":
    main()
