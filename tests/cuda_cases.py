"""Kernels to try, and what they compute in float64."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from math import erf

import numpy as np
import pytest
from cuda_emulation import Emulated, numpy_dtype

from icd_tvm.tir_schedules.cuda import source_kernel
from icd_tvm.tir_schedules.cuda.archs import HOPPER
from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.decode_attention import decode_attention_rule
from icd_tvm.tir_schedules.cuda.gemm import (
    gemm_rule,
    live_blocks,
    pack_weight,
)
from icd_tvm.tir_schedules.cuda.gemm_tile import TILES, WGMMA_TILES
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule
from icd_tvm.tir_schedules.cuda.mamba_step import conv_step_rule, scan_step_rule
from icd_tvm.tir_schedules.cuda.source_kernel import FP8, PLAIN, Epilogue, Rule, SourceKernel
from icd_tvm.tir_schedules.cuda.strays import pack_strays, split_strays

# Those whose kernels are all compiled for one as for the other.
ARCHS = ("sm_80", "sm_90")
EVERY_TILE = (*TILES, *WGMMA_TILES)
ORDERS = (1, 2)  # of the threads: last to first, shuffled
FULL = Epilogue("gelu", bias=True, residual=True)
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the path")


@dataclass(frozen=True)
class Gemm:
    """A matmul to try: sizes, types, epilogue, tile and columns of a group of live blocks."""

    m: int
    n: int
    k: int
    dtype: str = "float16"
    out: str = "float16"
    epilogue: Epilogue = PLAIN
    tile: int = 3
    splits: int = 1
    sparse: bool = False
    strays: float = 0.0

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.m * self.n + self.k)
        if self.dtype == "int8":
            a = rng.integers(-127, 128, (self.m, self.k)).astype(np.int8)
            w = rng.integers(-127, 128, (self.k, self.n)).astype(np.int8)
        else:
            a = rng.standard_normal((self.m, self.k)).astype(numpy_dtype(self.dtype))
            w = rng.standard_normal((self.k, self.n)).astype(numpy_dtype(self.dtype))
        if self.sparse:
            columns = EVERY_TILE[self.tile].n
            alive = rng.random((-(-self.k // 16), -(-self.n // columns))) < 0.4
            mask = np.kron(alive, np.ones((16, columns)))[: self.k, : self.n]
            w = (w * mask + w * (rng.random(w.shape) < self.strays)).astype(w.dtype)
        return a, w

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight in blocks, and its strays."""
        w = self.arrays()[1]
        return split_strays(w, EVERY_TILE[self.tile].n, 200) if self.strays else (w, 0 * w)

    def rule(self) -> Rule:
        tile = replace(EVERY_TILE[self.tile], splits=self.splits)
        blocks, strays = self.parts()
        live = live_blocks(blocks, tile.n).shape[1] if self.sparse else None
        return gemm_rule(
            self.m,
            self.n,
            self.k,
            self.dtype,
            out=self.out,
            epilogue=self.epilogue,
            arch=HOPPER if tile.wgmma else "sm_90",
            live=live,
            strays=len(pack_strays(strays).list) if self.strays else None,
            tile=tile,
        )


GEMMS = {
    "fp16": Gemm(70, 72, 200),
    "fp16 one row": Gemm(1, 64, 64, epilogue=FULL, tile=5),
    "fp16 epilogue": Gemm(33, 136, 96, epilogue=FULL, out="float32", tile=2),
    "fp16 128x128": Gemm(130, 136, 168, epilogue=Epilogue("relu", bias=True), tile=0),
    "fp16 128x64": Gemm(65, 64, 136, tile=1),
    "fp16 parts": Gemm(20, 72, 520, epilogue=FULL, tile=4, splits=3),
    "fp16 more parts than tiles": Gemm(17, 64, 64, tile=5, splits=4),
    "bf16": Gemm(40, 64, 72, "bfloat16", "bfloat16", Epilogue("silu", residual=True)),
    "int8": Gemm(70, 72, 208, "int8", epilogue=FULL),
    "int8 parts": Gemm(16, 64, 1040, "int8", epilogue=Epilogue(bias=True), tile=5, splits=2),
    "fp8": Gemm(70, 72, 208, FP8, epilogue=FULL),
    "fp8 parts": Gemm(16, 64, 528, FP8, "float32", tile=5, splits=2),
    "fp8 blocks": Gemm(20, 128, 400, FP8, "bfloat16", tile=3, sparse=True),
    "fp16 blocks": Gemm(40, 136, 216, epilogue=FULL, tile=3, sparse=True),
    "fp16 blocks 128": Gemm(40, 256, 512, tile=2, sparse=True),
    "bf16 blocks": Gemm(20, 64, 256, "bfloat16", "bfloat16", tile=4, sparse=True),
    "int8 blocks": Gemm(20, 128, 400, "int8", tile=3, sparse=True),
    "fp16 strays": Gemm(70, 136, 216, epilogue=FULL, tile=3, sparse=True, strays=0.02),
    "bf16 strays parts": Gemm(
        33, 128, 512, "bfloat16", "float32", tile=2, splits=2, sparse=True, strays=0.01
    ),
    "fp16 blocks parts": Gemm(10, 64, 512, tile=5, splits=2, sparse=True),
}


@dataclass(frozen=True)
class Gemv:
    """A product with a vector to try."""

    n: int
    k: int
    dtype: str
    x: str = "float16"
    epilogue: Epilogue = PLAIN
    group: int = 0
    groups: int = 0

    def blocks(self) -> np.ndarray | None:
        if not self.groups:
            return None
        rng = np.random.default_rng(self.n)
        alive = rng.random((self.groups, -(-self.k // 16))) < 0.5
        alive[0] = False
        most = int(alive.sum(1).max())
        found = np.full((self.groups, most + most % 2), -1, np.int32)
        for row, mask in zip(found, alive, strict=True):
            row[: mask.sum()] = np.flatnonzero(mask)
        return found

    def rule(self) -> Rule:
        blocks = self.blocks()
        live = None if blocks is None else (blocks.shape[0], blocks.shape[1])
        return gemv_rule(
            self.n,
            self.k,
            self.dtype,
            x=self.x,
            epilogue=self.epilogue,
            group=self.group,
            live=live,
        )


GEMVS = {
    "fp16": Gemv(37, 520, "float16", epilogue=FULL),
    "fp16 short": Gemv(8, 8, "float16"),
    "bf16": Gemv(24, 1288, "bfloat16", "bfloat16", Epilogue("silu", bias=True)),
    "int8": Gemv(21, 1040, "int8", epilogue=FULL),
    "int8 groups": Gemv(16, 512, "int8", group=128),
    "int4": Gemv(19, 2048, "int4", "bfloat16", Epilogue(residual=True)),
    "int4 groups": Gemv(16, 1024, "int4", group=128),
    "fp16 blocks": Gemv(64, 816, "float16", epilogue=FULL, groups=4),
    "bf16 blocks": Gemv(32, 256, "bfloat16", "bfloat16", groups=2),
    "int8 blocks": Gemv(64, 800, "int8", groups=4),
    "int8 blocks, groups": Gemv(32, 512, "int8", group=32, groups=2),
    "fp8": Gemv(21, 1040, FP8, epilogue=FULL),
    "fp8 blocks": Gemv(64, 800, FP8, "bfloat16", groups=4),
    "int4 blocks": Gemv(64, 800, "int4", epilogue=FULL, groups=4),
    "int4 blocks, groups": Gemv(32, 1024, "int4", group=128, groups=2),
}
# batch, queries, keys, heads, size, dtype, mask
ATTENTIONS = {
    "fp16": (2, 66, 130, 1, 64, "float16", True),
    "fp16 no mask": (1, 64, 64, 1, 64, "float16", False),
    "bf16 32": (1, 20, 40, 3, 32, "bfloat16", True),
    "fp16 128": (1, 66, 90, 1, 128, "float16", True),
}
# batch, key-value heads, shared heads, capacity, size, dtype, cache
DECODES = {
    "fp16": (2, 2, 4, 200, 64, "float16", "float16"),
    "fp16 alone": (1, 3, 1, 70, 128, "float16", "float16"),
    "bf16": (1, 1, 3, 130, 128, "bfloat16", "bfloat16"),
    "int8": (1, 2, 8, 140, 64, "float16", "int8"),
    "fp8": (1, 2, 2, 70, 128, "bfloat16", FP8),
}
CONVS = {"conv fp16": (150, "float16"), "conv bf16": (8, "bfloat16")}
SCANS = {
    "scan fp16": (70, 16, "float16"),
    "scan bf16": (9, 4, "bfloat16"),
    "scan 128": (3, 128, "float16"),
}


def product_rules() -> list[Rule]:
    """Return the rules of all matrix products."""
    return [case.rule() for case in (*GEMMS.values(), *GEMVS.values())]


def other_rules() -> list[Rule]:
    """Return the rules of all attentions and Mamba steps."""
    found = [attention_rule(*sizes, mask=mask) for *sizes, mask in ATTENTIONS.values()]
    found += [decode_attention_rule(*sizes, cache=cache) for *sizes, cache in DECODES.values()]
    found += [conv_step_rule(*sizes) for sizes in CONVS.values()]
    return found + [scan_step_rule(*sizes) for sizes in SCANS.values()]


def plant(patch: pytest.MonkeyPatch, right: str, wrong: str, *families: str) -> None:
    """Put a mistake into the kernels' sources; one of these families holds what is right."""
    original = source_kernel.source_of
    assert any(right in original(family) for family in families)
    patch.setattr(source_kernel, "source_of", lambda family: original(family).replace(right, wrong))


def finish(sums: np.ndarray, epilogue: Epilogue, given: dict[str, np.ndarray]) -> np.ndarray:
    """Return the epilogue in float64."""
    y = sums + (given["bias"].astype(float) if epilogue.bias else 0.0)
    if epilogue.activation == "gelu":
        y = 0.5 * y * (1 + np.vectorize(erf)(y / np.sqrt(2)))
    elif epilogue.activation == "relu":
        y = np.maximum(y, 0)
    elif epilogue.activation == "silu":
        y = y / (1 + np.exp(-y))
    return y + (given["residual"].astype(float) if epilogue.residual else 0.0)


def close(found: np.ndarray, expected: np.ndarray, dtype: str, sums: int, scale: float) -> None:
    """Compare with an error of rounding once to ``dtype`` and of float32 sums of ``sums`` terms."""
    allowed = 1.01 * EPS[dtype] * np.abs(expected) + 2 * sums**0.5 * EPS["float32"] * scale + 1e-7
    error = np.abs(found.astype(float) - expected)
    assert (error <= allowed).all(), f"worst {np.max(error / allowed):.2f} of what is allowed"


def needs(kernel: SourceKernel, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [a.name for a in kernel.arguments[: -kernel.outputs]]
    return {name: given[name] for name in names}


def check_gemm(case: Gemm, emulated: Emulated) -> None:
    """Run a matmul in every order of threads; compare with float64."""
    rule = case.rule()
    a, w = case.arrays()
    rng = np.random.default_rng(1)
    columns = EVERY_TILE[case.tile].n
    kept, strays = case.parts()
    blocks = live_blocks(kept, columns) if case.sparse else None
    given = {"a": a, "w": pack_weight(kept, columns, blocks), "slabs": blocks}
    given["stray_starts"], given["stray_list"] = pack_strays(strays.astype(np.float16))
    if case.strays:
        assert 0 < (strays != 0).sum() < (kept != 0).sum()
        given["stray_starts"], given["stray_list"] = pack_strays(strays)
    given["bias"] = rng.standard_normal(case.n).astype(np.float32)
    given["residual"] = rng.standard_normal((case.m, case.n)).astype(numpy_dtype(case.out))
    given["row_scale"] = (rng.random(case.m) / 127).astype(np.float32)
    given["column_scale"] = (rng.random(case.n) / 127).astype(np.float32)
    sums = a.astype(float) @ w.astype(float)
    scale = np.abs(a.astype(float)).max() * np.abs(w.astype(float)).max()
    if case.dtype in ("int8", FP8):
        factor = given["row_scale"].astype(float)[:, None] * given["column_scale"].astype(float)
        sums, scale = sums * factor, scale / 127**2
    assert len(rule.kernels) == 1 + (case.splits > 1) + (case.strays > 0)
    for order in ORDERS:
        for kernel in rule.kernels:
            found = emulated.run(kernel, needs(kernel, given), order)
            given |= found
        close(found["c"], finish(sums, case.epilogue, given), case.out, case.k, 8 * scale)
