"""Decode attention over pages, executed on the CPU, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cuda_cases import EPS, ORDERS, needs, needs_compiler, plant
from cuda_emulation import Emulated, numpy_dtype

from icd_tvm.adapters.kv_quant import (
    KVDtype,
    dequantize_pages,
    quantize_pages,
    quantize_rows,
)
from icd_tvm.tir_schedules.cuda.decode_attention import paged_attention_rule
from icd_tvm.tir_schedules.cuda.source_kernel import FP8, Rule


class Case(NamedTuple):
    batch: int
    kv_heads: int
    shared_heads: int
    pages: int
    size: int
    dtype: str
    page: int
    cache: str
    by_channel: bool = False

    @property
    def pool(self) -> int:
        return self.batch * self.kv_heads * self.pages + 3

    def rule(self) -> Rule:
        return paged_attention_rule(
            *self[:6],
            page=self.page,
            pool=self.pool,
            cache=self.cache,
            by_channel=self.by_channel,
        )


CASES = {
    "fp16": Case(2, 2, 4, 9, 64, "float16", 16, "float16"),
    "bf16 single slots": Case(1, 1, 3, 40, 128, "bfloat16", 1, "bfloat16"),
    "int8": Case(1, 2, 8, 5, 64, "float16", 16, "int8"),
    "int8 by channel": Case(1, 2, 2, 3, 64, "float16", 32, "int8", True),
    "fp8 by channel": Case(1, 1, 4, 9, 128, "float16", 8, FP8, True),
}
# What a kernel may get wrong.
MISTAKES = {
    "the first page of all": ("head * capacity + at / size", "head * capacity"),
    "the list of another head": ("pages[head * capacity + at", "pages[at"),
    "slots counted on": ("page * size + at % size", "page * size"),
    "scales of another page": ("k_scale, page, at_lane", "k_scale, 0, at_lane"),
    "scales of the keys": ("value, v_scale", "value, k_scale"),
}


def make(case: Case, live: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the arguments, and keys and values in float32 [batch, heads, slots, size]."""
    rng, heads = np.random.default_rng(case.pages), (case.batch, case.kv_heads)
    shape = (*heads, case.pages * case.page, case.size)
    q = rng.standard_normal((*heads, case.shared_heads, case.size))
    # Pages of all heads in any order; those that nobody lists hold what nobody may read.
    pages = rng.permutation(case.pool)[: case.pool - 3].reshape(*heads, case.pages)
    given = {
        "q": q.astype(numpy_dtype(case.dtype)),
        "live": live.astype(np.int32),
        "pages": pages.astype(np.int32),
    }
    plain = {}
    for name in "kv":
        exact = (rng.standard_normal(shape) * (1 + np.arange(case.size) % 7)).astype(np.float32)
        codes, scales, plain[name] = stored(case, exact)
        pool = np.full((case.pool, case.page, case.size), 127).astype(codes.dtype)
        pool[pages] = codes.reshape(*heads, case.pages, case.page, case.size)
        given[name] = pool
        if scales is not None:
            table = np.full((case.pool, *scales.shape[3:]), np.nan, np.float32)
            table[pages] = scales
            given[f"{name}_scale"] = table
    return given, plain


def stored(case: Case, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Return the codes, their scales by page, and what they stand for, as float64."""
    if not case.by_channel and case.cache == "int8":
        codes, scales = quantize_rows(exact)
        by_page = scales.reshape(case.batch, case.kv_heads, case.pages, case.page)
        return codes, by_page, codes * scales.astype(float)
    if not case.by_channel:
        codes = exact.astype(numpy_dtype(case.cache))
        return codes, None, codes.astype(float)
    kind: KVDtype = "int8" if case.cache == "int8" else "fp8_e4m3"
    codes, scales = quantize_pages(exact, case.page, kind)
    real = dequantize_pages(codes, scales, case.page, kind).astype(float)
    return codes.view(numpy_dtype(case.cache)), scales, real


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, live: np.ndarray) -> np.ndarray:
    scores = np.einsum("bhgd,bhtd->bhgt", q.astype(float), k) / np.sqrt(q.shape[-1])
    dead = np.arange(k.shape[2]) >= live[..., None]
    scores = np.where(dead[:, :, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhgt,bhtd->bhgd", weights / weights.sum(-1, keepdims=True), v)


def run(rule: Rule, given: dict[str, np.ndarray], emulated: Emulated, order: int) -> np.ndarray:
    known = dict(given)
    for kernel in rule.kernels:
        known |= emulated.run(kernel, needs(kernel, known), order)
    return known["out"].astype(float)


def check(case: Case, emulated: Emulated) -> None:
    rng = np.random.default_rng(case.size)
    live = rng.integers(1, case.pages * case.page + 1, (case.batch, case.kv_heads))
    live.flat[-1] = case.pages * case.page
    given, plain = make(case, live)
    expected = attend(given["q"], plain["k"], plain["v"], live)
    allowed = 2 * EPS[case.dtype] * np.abs(plain["v"]).max()
    for order in ORDERS:
        error = np.abs(run(case.rule(), given, emulated, order) - expected).max()
        assert error <= allowed, f"worst {error / allowed:.2f} of what is allowed"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [kernel for case in CASES.values() for kernel in case.rule().kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_paged_attention_equals_float64(name: str, emulated: Emulated) -> None:
    check(CASES[name], emulated)


@needs_compiler
@pytest.mark.parametrize("mistake", MISTAKES)
def test_emulator_notices_a_planted_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = MISTAKES[mistake]
    case = CASES["int8 by channel"]
    plant(monkeypatch, right, wrong, "decode_attention")
    with pytest.raises(AssertionError, match="worst"):
        check(case, Emulated(case.rule().kernels, tmp_path))


@needs_compiler
def test_dropped_pages_are_not_seen(emulated: Emulated) -> None:
    """Compaction takes pages off the lists, each head its own; no key or value moves."""
    case = CASES["fp16"]
    live = np.full((case.batch, case.kv_heads), case.pages * case.page - 5)
    given, plain = make(case, live)
    rng, rest = np.random.default_rng(0), 5
    kept = np.sort(rng.permuted(np.tile(np.arange(case.pages - 1), (2, 2, 1)), axis=-1)[..., :rest])
    # The last page holds the newest slots, some of them still empty.
    kept = np.concatenate([kept, np.full((2, 2, 1), case.pages - 1)], -1)
    given["pages"] = np.take_along_axis(given["pages"], kept, -1)
    given["pages"] = np.pad(given["pages"], ((0, 0), (0, 0), (0, case.pages - rest - 1)))
    given["live"] = np.full_like(given["live"], (rest + 1) * case.page - 5)
    slots = (kept[..., None] * case.page + np.arange(case.page)).reshape(2, 2, -1, 1)
    k, v = (np.take_along_axis(plain[name], slots, 2) for name in "kv")
    expected = attend(given["q"], k, v, given["live"])
    found = run(case.rule(), given, emulated, 0)
    assert np.abs(found - expected).max() <= 2 * EPS["float16"] * np.abs(v).max()
    assert np.abs(attend(given["q"], plain["k"], plain["v"], live) - expected).max() > 0.05


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (paged_attention_rule(1, 1, 1, 4, 64, "float16", page=24), "pages of 24 slots"),
        (paged_attention_rule(1, 1, 1, 0, 64, "float16"), "0 pages hold no slot"),
        (paged_attention_rule(1, 1, 1, 4, 32, "float16"), "heads of 32"),
        (paged_attention_rule(1, 1, 1, 4, 64, "float16", cache="int4"), "cache of int4"),
        (paged_attention_rule(1, 1, 1, 4, 64, "float16", by_channel=True), "no scales of channels"),
    ],
)
def test_what_does_not_fit_has_a_reason(rule: Rule, reason: str) -> None:
    assert rule.kernels == ()
    assert reason in rule.reason
