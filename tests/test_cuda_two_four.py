"""2:4 products on emulated sparse tensor cores, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cuda_cases import FULL, ORDERS, close, finish, needs, needs_compiler, plant
from cuda_emulation import Emulated, numpy_dtype
from hypothesis import given
from hypothesis import strategies as st

from icd_tvm.errors import TransformError
from icd_tvm.tir_schedules.cuda.gemm_24 import (
    TILES_24,
    gemm_24_rule,
    not_two_four,
    pack_two_four,
    unpack_two_four,
)
from icd_tvm.tir_schedules.cuda.source_kernel import PLAIN, Epilogue, Rule


class Case(NamedTuple):
    m: int
    n: int
    k: int
    dtype: str = "float16"
    out: str = "float16"
    epilogue: Epilogue = PLAIN
    tile: int = 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.m)
        a = rng.standard_normal((self.m, self.k)).astype(numpy_dtype(self.dtype))
        return a, two_four(rng, self.k, self.n).astype(numpy_dtype(self.dtype))

    def rule(self) -> Rule:
        return gemm_24_rule(
            self.m,
            self.n,
            self.k,
            self.dtype,
            out=self.out,
            epilogue=self.epilogue,
            tile=TILES_24[self.tile],
        )


CASES = {
    "fp16": Case(70, 72, 200, epilogue=FULL),
    "one row": Case(1, 64, 64, tile=2),
    "bf16": Case(20, 136, 328, "bfloat16", "bfloat16", Epilogue("silu", residual=True)),
    "128x128": Case(130, 136, 128, out="float32", epilogue=Epilogue("relu", bias=True), tile=0),
    "16 rows": Case(16, 64, 520, epilogue=Epilogue(bias=True), tile=2),
}
# What a kernel may get wrong, and what the emulator makes of it.
MISTAKES = {
    "places of other rows": ("lane / 4 * 2 + lane % 2]", "lane / 4 + lane % 2]", "worst"),
    "places of the other half": ("lane % 2]", "(lane + 1) % 2]", "worst"),
    "places of the next tile": ("meta + (long)tile *", "meta + (long)(tile / 2) *", "worst"),
    "kept elements of no tile": ("step * 2 + lane / 16", "lane / 16", "worst"),
    "a plain layout": ("(chunk ^ (row & 7))", "chunk", "bank conflicts"),
    "sums read too early": ("  sync_block();\n  for (int at", "  for (int at", "worst"),
}


def two_four(rng: np.random.Generator, k: int, n: int) -> np.ndarray:
    """Return float64 [k, n] with none, one or two of every four rows of a column."""
    fours = rng.standard_normal((-(-k // 4), n, 4))
    order = rng.permuted(np.tile(np.arange(4), (*fours.shape[:2], 1)), axis=-1)
    fours[order >= rng.integers(0, 3, fours.shape[:2])[..., None]] = 0
    return fours.transpose(0, 2, 1).reshape(-1, n)[:k]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [kernel for case in CASES.values() for kernel in case.rule().kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


def check(case: Case, emulated: Emulated) -> None:
    (kernel,) = case.rule().kernels
    a, w = case.arrays()
    rng, packed = np.random.default_rng(1), pack_two_four(w, TILES_24[case.tile].n)
    given = {"a": a, "w": packed.w, "meta": packed.meta}
    given["bias"] = rng.standard_normal(case.n).astype(np.float32)
    given["residual"] = rng.standard_normal((case.m, case.n)).astype(numpy_dtype(case.out))
    expected = finish(a.astype(float) @ w.astype(float), case.epilogue, given)
    scale = 8 * np.abs(a.astype(float)).max() * np.abs(w.astype(float)).max()
    for order in ORDERS:
        found = emulated.run(kernel, needs(kernel, given), order)
        close(found["c"], expected, case.out, case.k, scale)


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_product_equals_float64(name: str, emulated: Emulated) -> None:
    check(CASES[name], emulated)


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulator_notices_a_planted_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, noticed = MISTAKES[mistake]
    plant(monkeypatch, right, wrong, "gemm", "gemm_24")
    with pytest.raises(AssertionError, match=noticed):
        check(CASES["16 rows"], Emulated(CASES["16 rows"].rule().kernels, tmp_path))


@needs_compiler
def test_places_out_of_order_are_noticed(emulated: Emulated) -> None:
    (kernel,) = CASES["one row"].rule().kernels
    a, w = CASES["one row"].arrays()
    packed = pack_two_four(w, 64)
    spoilt = packed.meta.copy()
    spoilt.flat[5] = 0x44444441
    with pytest.raises(AssertionError, match="not in order"):
        emulated.run(kernel, {"a": a, "w": packed.w, "meta": spoilt})


@given(
    k=st.integers(1, 150),
    n=st.integers(1, 150),
    columns=st.sampled_from([64, 128]),
    seed=st.integers(0, 2**16),
)
def test_packing_is_undone(k: int, n: int, columns: int, seed: int) -> None:
    w = two_four(np.random.default_rng(seed), k, n).astype(np.float16)
    packed = pack_two_four(w, columns)
    np.testing.assert_array_equal(unpack_two_four(packed, k, n), w)
    places = (packed.meta[..., None] >> np.arange(0, 32, 2, dtype=np.uint32)) & 3
    assert (places[..., 0::2] < places[..., 1::2]).all()


def test_words_are_those_of_the_isa() -> None:
    w = np.zeros((64, 64), np.float16)
    # Column 3: places 1 and 3 of the first four; column 11, 8 rows on: 2 and 3 of the fifth four.
    w[[1, 3], 3] = 5, 6
    w[[18, 19], 11] = 7, 8
    packed = pack_two_four(w, 64)
    assert packed.meta[0, 0, 0, 0, 3, 0] == 0x4444444D
    assert packed.meta[0, 0, 0, 0, 3, 1] == 0x444E4444
    assert (packed.w[0, 0, 3, :2] == [5, 6]).all()
    assert (packed.w[0, 0, 11, 8:10] == [7, 8]).all()


def test_a_weight_that_is_not_two_four_is_refused() -> None:
    w = two_four(np.random.default_rng(0), 64, 64).astype(np.float16)
    assert not_two_four(w) == ""
    assert gemm_24_rule(8, 64, 64, "float16", weight=w).kernels
    w[[8, 9, 11], 5] = 1
    rule = gemm_24_rule(8, 64, 64, "float16", weight=w)
    assert rule.kernels == ()
    assert "rows 8 to 11 of column 5" in rule.reason
    with pytest.raises(TransformError, match="prune with n:m 2:4"):
        pack_two_four(w, 64)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (gemm_24_rule(8, 64, 60, "float16"), "16 bytes"),
        (gemm_24_rule(8, 60, 64, "float16"), "16 bytes"),
        (gemm_24_rule(8, 64, 64, "int8"), "no sparse product of int8"),
    ],
)
def test_what_does_not_fit_has_a_reason(rule: Rule, reason: str) -> None:
    assert rule.kernels == ()
    assert reason in rule.reason


def test_a_large_product_has_the_large_tile() -> None:
    (large,), (small,) = (gemm_24_rule(m, 3072, 768, "float16").kernels for m in (16384, 16))
    assert large.config.startswith("icd::Gemm24Config<icd::F16, icd::F16, 128, 128,")
    assert small.config.startswith("icd::Gemm24Config<icd::F16, icd::F16, 16, 64,")
