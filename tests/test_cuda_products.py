"""CUDA matrix products executed on the CPU, thread by thread, against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_cases import (
    GEMMS,
    GEMVS,
    ORDERS,
    Gemm,
    Gemv,
    check_gemm,
    close,
    finish,
    needs,
    needs_compiler,
    plant,
    product_rules,
)
from cuda_emulation import Emulated, numpy_dtype
from hypothesis import given
from hypothesis import strategies as st

from icd_tvm.errors import ShapeError
from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.decode_attention import decode_attention_rule
from icd_tvm.tir_schedules.cuda.gemm import (
    gemm_rule,
    live_blocks,
    pack_weight,
    unpack_weight,
)
from icd_tvm.tir_schedules.cuda.gemm_tile import TILES, choose_tile
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule, pack_vectors, unpack_int4
from icd_tvm.tir_schedules.cuda.mamba_step import conv_step_rule, scan_step_rule
from icd_tvm.tir_schedules.cuda.source_kernel import FP8, Rule
from icd_tvm.tir_schedules.cuda.strays import pack_strays, split_strays, unpack_strays

# 254 codes are numbers.
EVERY_CODE = (
    gemv_rule(254, 16, FP8, out="float32"),
    gemm_rule(1, 256, 16, FP8, out="float32", tile=TILES[5]),
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [kernel for rule in (*product_rules(), *EVERY_CODE) for kernel in rule.kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("name", GEMMS)
def test_gemm_equals_float64(name: str, emulated: Emulated) -> None:
    check_gemm(GEMMS[name], emulated)


@needs_compiler
@pytest.mark.parametrize("name", GEMVS)
def test_gemv_equals_float64(name: str, emulated: Emulated) -> None:
    check_gemv(GEMVS[name], emulated)


def check_gemv(case: Gemv, emulated: Emulated) -> None:
    rng, blocks = np.random.default_rng(case.k), case.blocks()
    limit = {"int8": 127, "int4": 7}.get(case.dtype)
    if limit is None:
        w = rng.standard_normal((case.k, case.n)).astype(numpy_dtype(case.dtype))
    else:
        w = rng.integers(-limit - 1, limit + 1, (case.k, case.n)).astype(np.int8)
    x = rng.standard_normal((1, case.k)).astype(numpy_dtype(case.x))
    if blocks is not None:
        w = (w * _alive(case, blocks)).astype(w.dtype)
    scales = rng.random((case.n, case.k // case.group) if case.group else case.n)
    given = {"x": x, "w": pack_vectors(w, case.dtype, blocks), "scales": scales.astype(np.float32)}
    given["blocks"] = blocks
    given["bias"] = rng.standard_normal(case.n).astype(np.float32)
    given["residual"] = rng.standard_normal((1, case.n)).astype(numpy_dtype(case.x))
    real = w.astype(float)
    if limit is not None or case.dtype == FP8:
        factor = given["scales"].astype(float)
        real *= np.repeat(factor, case.group, 1).T if case.group else factor
    expected = finish(x.astype(float) @ real, case.epilogue, given)
    (kernel,) = case.rule().kernels
    for order in ORDERS:
        found = emulated.run(kernel, needs(kernel, given), order)["y"]
        close(found, expected, case.x, case.k, 8 * np.abs(real).max())


@needs_compiler
def test_every_code_of_fp8_is_its_value(emulated: Emulated) -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes & 0x7F != 0x7F].view(numpy_dtype(FP8))
    w = np.zeros((16, len(codes)), codes.dtype)
    w[3] = codes
    ones = np.ones(len(codes), np.float32)
    (vector,) = EVERY_CODE[0].kernels
    given = {"x": np.ones((1, 16), np.float16), "w": pack_vectors(w, FP8), "scales": ones}
    np.testing.assert_array_equal(emulated.run(vector, given)["y"][0], codes.astype(np.float32))
    w = np.pad(w, ((0, 0), (0, 2)))
    (matrix,) = EVERY_CODE[1].kernels
    given = {"a": np.ones((1, 16), codes.dtype), "w": pack_weight(w, TILES[5].n)}
    given |= {"row_scale": ones[:1], "column_scale": np.ones(256, np.float32)}
    found = emulated.run(matrix, given)["c"][0]
    np.testing.assert_array_equal(found, w[3].astype(np.float32))


def _alive(case: Gemv, blocks: np.ndarray) -> np.ndarray:
    mask = np.zeros((-(-case.k // 16), case.groups))
    for group, listed in enumerate(blocks):
        mask[listed[listed >= 0], group] = 1
    return np.kron(mask, np.ones((16, case.n // case.groups)))[: case.k]


# What a kernel may get wrong, what the emulator makes of it, and of which case.
MISTAKES = {
    "a missing wait": ("copy_wait<G::STAGES - 2>();", "", "never waited for", "fp16 one row"),
    "a missing barrier": ("  sync_block();\n  int mine", "  int mine", "worst", "bf16 vector"),
    "a plain layout": ("(chunk ^ ((row >> 1) & 3))", "chunk", "bank conflicts", "fp16 one row"),
    "a wrong fragment": ("lane % 8 + lane / 16 * 8", "lane % 16", "worst", "fp16 one row"),
    "strays of other rows": ("from + i * 16 + half * 8", "from + i * 16", "worst", "fp16 strays"),
    "strays of other inputs": ("some.w[s] & 0xffff", "some.w[s] & 0xff", "worst", "many inputs"),
    "a second half turned": (
        "tile[(row + 1) * G::ROW",
        "tile[row * G::ROW",
        "worst",
        "fp16 strays",
    ),
    "a block for two": ("live[at / PIECES]", "live[at / 4 * 2]", "worst", "int4 blocks"),
    "a scale for two": ("SLAB < PER ? SLAB", "SLAB < PER ? PER", "worst", "int4 blocks, groups"),
    "halves of fp8 swapped": (
        "return i % 2 ? two.y : two.x",
        "return two.x",
        "worst",
        "fp8 vector",
    ),
}
PLANTED: dict[str, Gemm | Gemv] = {
    **{name: GEMMS[name] for name in ("fp16 one row", "fp16 strays")},
    **{name: GEMVS[name] for name in ("int4 blocks", "int4 blocks, groups")},
    "bf16 vector": GEMVS["bf16"],
    "fp8 vector": Gemv(8, 64, FP8),
    "many inputs": Gemm(8, 64, 512, tile=5, sparse=True, strays=0.02),
}


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulator_notices_a_planted_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, noticed, name = MISTAKES[mistake]
    case = PLANTED[name]
    kernels = case.rule().kernels
    plant(monkeypatch, right, wrong, *(kernel.family for kernel in kernels))
    broken = Emulated(kernels, tmp_path)
    with pytest.raises(AssertionError, match=noticed):
        check_gemm(case, broken) if isinstance(case, Gemm) else check_gemv(case, broken)


@given(
    k=st.integers(1, 90),
    n=st.integers(1, 150),
    columns=st.sampled_from([64, 128]),
    dtype=st.sampled_from(["float16", "int8"]),
    seed=st.integers(0, 2**16),
)
def test_packing_is_undone(k: int, n: int, columns: int, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-4, 5, (k, n)).astype(dtype)
    np.testing.assert_array_equal(unpack_weight(pack_weight(weight, columns), k, n), weight)
    weight[rng.random(k) < 0.7] = 0
    blocks = live_blocks(weight, columns)
    packed = pack_weight(weight, columns, blocks)
    np.testing.assert_array_equal(unpack_weight(packed, k, n, blocks), weight)
    assert packed.shape[1] * packed.shape[3] == 16 * blocks.shape[1]


@given(
    k=st.integers(1, 90), n=st.integers(1, 150), least=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_strays_and_blocks_are_the_weight(k: int, n: int, least: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((k, n)).astype(np.float16)
    weight[rng.random((k, n)) < 0.97] = 0
    kept, strays = split_strays(weight, 64, least)
    np.testing.assert_array_equal(kept + strays, weight)
    assert not (kept * strays).any()
    by_block = np.add.reduceat(np.add.reduceat(kept != 0, range(0, k, 16), 0), range(0, n, 64), 1)
    assert ((by_block == 0) | (by_block >= least)).all()
    packed = pack_strays(strays)
    np.testing.assert_array_equal(unpack_strays(packed, k, strays.dtype), strays)
    assert packed.starts[-1] <= len(packed.list)


def test_what_a_stray_has_no_bits_for_is_refused() -> None:
    with pytest.raises(ShapeError, match="65537 inputs"):
        pack_strays(np.zeros((65537, 1), np.float16))
    with pytest.raises(ShapeError, match="expected float16 or bfloat16"):
        pack_strays(np.zeros((8, 1), np.float32))


@given(n=st.integers(1, 9), k=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_int4_packing_is_undone(n: int, k: int, seed: int) -> None:
    weight = np.random.default_rng(seed).integers(-8, 8, (32 * k, n)).astype(np.int8)
    np.testing.assert_array_equal(unpack_int4(pack_vectors(weight, "int4")), weight.T)


@given(m=st.integers(1, 5000), n=st.integers(1, 40), k=st.integers(1, 200))
def test_chosen_tile_is_whole(m: int, n: int, k: int) -> None:
    tile = choose_tile(m, 8 * n, k, "sm_90")
    assert 1 <= tile.splits <= max(1, k // 8)
    assert tile.threads in (128, 256)
    assert choose_tile(m, 8 * n, k, "sm_80", columns=64).n == 64


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (gemm_rule(8, 64, 60, "float16"), "16 bytes"),
        (gemm_rule(8, 60, 64, "float16"), "16 bytes"),
        (gemm_rule(8, 64, 64, "float32"), "no tensor core product of float32"),
        (gemm_rule(8, 64, 64, "float16", live=3), "no whole tiles"),
        (gemv_rule(8, 100, "float16"), "16 bytes"),
        (gemv_rule(8, 96, "int4", group=24), "16 bytes"),
        (gemv_rule(8, 64, "float16", x="bfloat16"), "cast one"),
        (gemm_rule(8, 64, 64, FP8, arch="sm_80"), "sm_89"),
        (gemm_rule(8, 64, 64, "int8", live=4, strays=1), "strays of 64 inputs of int8"),
        (gemv_rule(8, 64, "int4", live=(2, 3)), "16 bytes"),
        (gemv_rule(8, 64, "int4", group=8, live=(2, 2)), "groups of 8"),
        (gemv_rule(8, 64, "float16", group=8), "groups of 8"),
        (gemv_rule(8, 72, "float16", live=(2, 2)), "multiple of 16"),
        (gemv_rule(6, 64, "float16", live=(2, 2)), "multiple of 4"),
        (gemv_rule(8, 64, "float8"), "no kernel for float8"),
        (attention_rule(1, 8, 8, 1, 48, "float16"), "heads of 48"),
        (attention_rule(1, 8, 8, 1, 64, "float32"), "float32"),
        (decode_attention_rule(1, 1, 9, 64, 64, "float16"), "at most 8"),
        (decode_attention_rule(1, 1, 1, 64, 32, "float16"), "heads of 32"),
        (decode_attention_rule(1, 1, 1, 64, 64, "float16", cache="int4"), "cache of int4"),
        (conv_step_rule(8, "float16", taps=3), "3 taps"),
        (conv_step_rule(8, "float32"), "float32"),
        (scan_step_rule(8, 12, "float16"), "12 states"),
        (scan_step_rule(8, 16, "int8"), "int8"),
    ],
)
def test_what_does_not_fit_has_a_reason(rule: Rule, reason: str) -> None:
    assert rule.kernels == ()
    assert reason in rule.reason
