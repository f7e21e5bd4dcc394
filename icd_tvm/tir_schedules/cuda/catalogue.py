"""The shapes that the kernels are inspected, predicted and, on a GPU host, measured at.

BERT-base (Devlin et al., 2019): hidden 768, 12 heads of 64, feed-forward 3072. Mamba-2.8B (Gu, Dao,
2023): model 2560, inner 5120, 16 states. The decoder has 8 key-value heads of 128, each for 4 query
heads (Llama 3 8B; Dubey et al., 2024).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from icd_tvm.tir_schedules.cuda.append import append_rule
from icd_tvm.tir_schedules.cuda.archs import HOPPER
from icd_tvm.tir_schedules.cuda.attention import attention_rule
from icd_tvm.tir_schedules.cuda.decode_attention import (
    decode_attention_rule,
    paged_attention_rule,
)
from icd_tvm.tir_schedules.cuda.gemm import gemm_rule
from icd_tvm.tir_schedules.cuda.gemm_24 import gemm_24_rule
from icd_tvm.tir_schedules.cuda.gemm_tile import WGMMA_TILES, GemmTile
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule
from icd_tvm.tir_schedules.cuda.mamba_step import conv_step_rule, scan_step_rule
from icd_tvm.tir_schedules.cuda.norm import norm_rule
from icd_tvm.tir_schedules.cuda.prefill_scan import prefill_conv_rule, prefill_scan_rule
from icd_tvm.tir_schedules.cuda.quantize import quantize_rule
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import FP8, Epilogue, Rule

ROWS = (128, 1024, 4096, 16384)
LAYERS = {"qkv": (2304, 768), "out": (768, 768), "ffn1": (3072, 768), "ffn2": (768, 3072)}
EPILOGUES = {
    "qkv": Epilogue(bias=True),
    "out": Epilogue(bias=True, residual=True),
    "ffn1": Epilogue("gelu", bias=True),
    "ffn2": Epilogue(bias=True, residual=True),
}
PROJECTIONS = {"in_proj": (10240, 2560), "out_proj": (2560, 5120)}
MODEL, INNER, STATES, PROMPT = 2560, 5120, 16, 1024
# One block to a multiprocessor, with more copies on their way.
_DEEP = GemmTile(128, 128, 16, 128, stages=6, wgmma=True)
# Kernels of these differ from others in sizes only.
_REPEATED = ("qkv", "ffn2 1024", "half of the units", "half of the outputs")


class Entry(NamedTuple):
    """A named rule, and the name of the one it should beat: the same product, dense."""

    name: str
    rule: Rule
    dense: str = ""


def catalogue(arch: str = "sm_90", *, quick: bool = False) -> list[Entry]:
    """Return the named kernels for an architecture; with ``quick`` one of each kind.

    Parameters
    ----------
    arch : str
        ``sm_80`` or ``sm_90``: it decides tiles and parts. ``sm_90a``: what it has beyond sm_90.
    quick : bool
        Leave out other sizes of the same kernels.
    """
    rows = (1024,) if quick else ROWS
    found = _warpgroups(rows) if arch == HOPPER else _portable(rows, arch, quick)
    return [e for e in found if not (quick and any(word in e.name for word in _REPEATED))]


def _portable(rows: tuple[int, ...], arch: str, quick: bool) -> list[Entry]:
    found = [entry for m in rows for entry in _bert(m, arch)]
    found += _small_rows(arch)
    found += [entry for name in list(PROJECTIONS)[: 1 if quick else 2] for entry in _mamba(name)]
    found += _attentions(arch, quick)
    found.append(Entry("mamba conv step fp16", conv_step_rule(INNER, "float16")))
    found.append(Entry("mamba scan step fp16", scan_step_rule(INNER, STATES, "float16")))
    found += _prefills(arch)
    found += _norms(rows)
    # The step of the decoder whose attention is above.
    return found + [
        Entry(f"decode append {cache}", append_rule(32, 8, 8192, 128, "float16", cache=cache))
        for cache in ("float16", "float32")
    ]


def _warpgroups(rows: tuple[int, ...]) -> list[Entry]:
    """Products that others above make with mma.sync; which tile is best is not known yet."""
    found = []
    for m in (m for m in rows if m >= 1024):
        for layer in LAYERS:
            found.append(Entry(f"bert {layer} {m} rows fp16, wgmma", _by_warpgroups(layer, m)))
    for layer, m in (("ffn1", 4096), ("ffn2", 1024)):
        for tile in (*WGMMA_TILES, _DEEP):
            word = f"wgmma {tile.m} x {tile.n}, {tile.stages} stages"
            rule = _by_warpgroups(layer, m, tile=tile)
            found.append(Entry(f"bert {layer} {m} rows fp16, {word}", rule))
    name, half = "bert ffn1 4096 rows", LAYERS["ffn1"][1] // 32
    rules = {
        "fp16, half of the blocks of 128": _by_warpgroups(
            "ffn1", 4096, live=half, tile=WGMMA_TILES[1]
        ),
        "bf16": _by_warpgroups("ffn1", 4096, "bfloat16", out="bfloat16"),
        "int8": _by_warpgroups("ffn1", 4096, "int8", rows="zero"),
    }
    return found + [Entry(f"{name} {word}, wgmma", rule) for word, rule in rules.items()]


def _by_warpgroups(layer: str, m: int, dtype: str = "float16", **options: Any) -> Rule:
    n, k = LAYERS[layer]
    return gemm_rule(m, n, k, dtype, epilogue=EPILOGUES[layer], arch=HOPPER, **options)


def _bert(m: int, arch: str) -> list[Entry]:
    found = []
    for layer, (n, k) in LAYERS.items():
        epilogue, name = EPILOGUES[layer], f"bert {layer} {m} rows"
        found.append(
            Entry(f"{name} fp16", gemm_rule(m, n, k, "float16", epilogue=epilogue, arch=arch))
        )
    n, k = LAYERS["ffn1"]
    gelu, dense = EPILOGUES["ffn1"], f"bert ffn1 {m} rows fp16"
    half = gemm_rule(m, n // 2, k, "float16", epilogue=gelu, arch=arch)
    vectors = gemm_rule(m, n, k, "float16", epilogue=gelu, arch=arch, live=k // 32)
    # One in 200 elements outside of the blocks, in fours by column.
    strayed = gemm_rule(
        m, n, k, "float16", epilogue=gelu, arch=arch, live=k // 32, strays=n * -(-k // 200 // 4)
    )
    bf16 = gemm_rule(m, n, k, "bfloat16", out="bfloat16", epilogue=gelu, arch=arch)
    found.append(Entry(f"bert ffn1 {m} rows fp16, half of the units", half, dense))
    found.append(Entry(f"bert ffn1 {m} rows fp16, half of the blocks", vectors, dense))
    found.append(Entry(f"bert ffn1 {m} rows fp16, half of the blocks, strays", strayed, dense))
    kept = gemm_24_rule(m, n, k, "float16", epilogue=gelu, arch=arch)
    found.append(Entry(f"bert ffn1 {m} rows fp16, 2:4", kept, dense))
    found.append(Entry(f"bert ffn1 {m} rows bf16", bf16))
    found += _int8(m, arch)
    if arch != "sm_80":
        rule = gemm_rule(m, n, k, FP8, epilogue=gelu, arch=arch)
        found.append(Entry(f"bert ffn1 {m} rows fp8", rule))
    return found


def _int8(m: int, arch: str) -> list[Entry]:
    """A product of codes in the forms that models have it, and what makes the codes."""
    n, k = LAYERS["ffn1"]
    gelu, name = EPILOGUES["ffn1"], f"bert ffn1 {m} rows int8"
    by_row, one = RowCodes(), RowCodes(16.0, -122)
    options: dict[str, Any] = {"epilogue": gelu, "arch": arch}
    dense = gemm_rule(m, n, k, "int8", rows="zero", **options)
    half = gemm_rule(m, n // 2, k, "int8", rows="zero", **options)
    return [
        Entry(name, dense),
        Entry(f"{name}, half of the units", half, name),
        Entry(
            f"{name} to int8",
            gemm_rule(m, n, k, "int8", out="int8", rows="none", codes=one, **options),
        ),
        Entry(f"bert codes {m} rows by row", quantize_rule(m, n, "float16", by_row)),
        Entry(f"bert codes {m} rows", quantize_rule(m, k, "float16", RowCodes(0.03, -12))),
        Entry(
            f"bert layer norm {m} rows fp16 and codes by row",
            norm_rule(m, k, "float16", "float16", 1e-12, centre=True, beta=True, codes=by_row),
        ),
    ]


def _small_rows(arch: str) -> list[Entry]:
    """Products of few rows, where parts of K fill the device."""
    n, k = LAYERS["ffn2"]
    rule = gemm_rule(16, n, k, "float16", epilogue=EPILOGUES["ffn2"], arch=arch)
    return [Entry("bert ffn2 16 rows fp16", rule)]


def _mamba(name: str) -> list[Entry]:
    n, k = PROJECTIONS[name]
    live = (n // 64, k // 32)
    label = f"mamba {name}"
    return [
        Entry(f"{label} fp16", gemv_rule(n, k, "float16")),
        Entry(f"{label} bf16", gemv_rule(n, k, "bfloat16", x="bfloat16")),
        Entry(f"{label} int8", gemv_rule(n, k, "int8")),
        Entry(f"{label} int4 g128", gemv_rule(n, k, "int4", group=128)),
        Entry(f"{label} fp8", gemv_rule(n, k, FP8)),
        *(
            Entry(
                f"{label} {word}, half of the blocks",
                gemv_rule(n, k, dtype, group=group, live=live),
                f"{label} {word}",
            )
            for word, dtype, group in (
                ("fp16", "float16", 0),
                ("fp8", FP8, 0),
                ("int4 g128", "int4", 128),
            )
        ),
        Entry(f"{label} fp16, half of the outputs", gemv_rule(n // 2, k, "float16")),
    ]


def _prefills(arch: str) -> list[Entry]:
    name, sizes = f"mamba prefill {PROMPT}", (1, PROMPT, INNER)
    scan, fused = (
        prefill_scan_rule(*sizes, STATES, "float16", conv=conv, arch=arch) for conv in (False, True)
    )
    return [
        Entry(f"{name} conv fp16", prefill_conv_rule(*sizes, "float16")),
        Entry(f"{name} scan fp16", scan),
        Entry(f"{name} conv and scan fp16", fused),
    ]


def _norms(rows: tuple[int, ...]) -> list[Entry]:
    """Layer norms behind a product, and the RMS norm of a residual stream."""
    found = []
    for m in rows:
        rule = norm_rule(m, 768, "float16", "float16", 1e-12, centre=True, beta=True)
        found.append(Entry(f"bert layer norm {m} rows fp16", rule))
    rule = norm_rule(1, MODEL, "float32", "float16", 1e-5, centre=False)
    return [*found, Entry("mamba rms norm fp16", rule)]


def _attentions(arch: str, quick: bool) -> list[Entry]:
    found = [
        Entry(
            f"bert attention 8 x {length} fp16",
            attention_rule(8, length, length, 12, 64, "float16"),
        )
        for length in ((128,) if quick else (128, 512))
    ]
    for slots in (8192,) if quick else (8192, 4096):
        for cache in ("float16", "int8"):
            rule = decode_attention_rule(1, 8, 4, slots, 128, "float16", cache=cache, arch=arch)
            found.append(Entry(f"decode attention {slots} slots {cache}", rule))
        for word, cache in {"fp16": "float16", "int8": "int8", "fp8": FP8}.items():
            # Quantised pages have a scale for each channel, as a whole cache has.
            rule = paged_attention_rule(
                1,
                8,
                4,
                slots // 64,
                128,
                "float16",
                page=64,
                cache=cache,
                by_channel=cache != "float16",
                arch=arch,
            )
            found.append(Entry(f"decode attention {slots} slots {word}, pages of 64", rule))
    return found
