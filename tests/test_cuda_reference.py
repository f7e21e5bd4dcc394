"""The suite's reference on kernels executed on the CPU: right ones pass, spoilt ones do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_cases import FULL, needs_compiler
from cuda_emulation import Emulated

from icd_tvm.measure.cuda_reference import make_trial, run_rule
from icd_tvm.tir_schedules.cuda.append import append_rule
from icd_tvm.tir_schedules.cuda.decode_attention import decode_attention_rule, paged_attention_rule
from icd_tvm.tir_schedules.cuda.gemm import gemm_rule
from icd_tvm.tir_schedules.cuda.gemm_24 import TILES_24, gemm_24_rule
from icd_tvm.tir_schedules.cuda.gemm_tile import TILES
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule
from icd_tvm.tir_schedules.cuda.norm import norm_rule
from icd_tvm.tir_schedules.cuda.prefill_scan import prefill_conv_rule, prefill_scan_rule
from icd_tvm.tir_schedules.cuda.quantize import quantize_rule
from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import FP8, Epilogue

PARTS = replace(TILES[5], splits=2)
GELU = Epilogue("gelu", bias=True)
# Nothing but codes, which are right or wrong.
EXACT = ("codes", "int8 to int8")
RULES = {
    "fp8": gemm_rule(20, 64, 96, FP8, epilogue=FULL, tile=TILES[4]),
    "strays": gemm_rule(20, 64, 96, "float16", live=4, strays=70, tile=TILES[4]),
    "strays, bf16, parts": gemm_rule(
        9, 64, 512, "bfloat16", out="float32", live=16, strays=40, tile=PARTS
    ),
    "2:4": gemm_24_rule(20, 72, 200, "float16", epilogue=FULL, tile=TILES_24[2]),
    "fp8 vector": gemv_rule(16, 128, FP8, epilogue=FULL),
    "fp8 vector, blocks": gemv_rule(64, 256, FP8, live=(4, 8)),
    "int4 vector, blocks": gemv_rule(64, 256, "int4", group=64, live=(4, 8)),
    "fp8 cache": decode_attention_rule(1, 2, 2, 70, 64, "float16", cache=FP8),
    "pages": paged_attention_rule(1, 2, 2, 5, 64, "float16"),
    "int8 pages": paged_attention_rule(1, 2, 2, 5, 64, "float16", cache="int8"),
    "fp8 pages by channel": paged_attention_rule(
        1, 2, 2, 5, 64, "float16", page=32, cache=FP8, by_channel=True
    ),
    "layer norm": norm_rule(
        70, 72, "float16", "bfloat16", 0.1, centre=True, beta=True, residual=True
    ),
    "rms norm": norm_rule(1, 200, "float32", "float32", 0.1, centre=False),
    "norm and codes": norm_rule(
        9, 200, "float16", "float16", 0.1, centre=True, beta=True, codes=RowCodes(0.05, -3)
    ),
    "norm to codes by row": norm_rule(
        9, 72, "float32", "int8", 0.1, centre=False, residual=True, codes=RowCodes()
    ),
    "codes": quantize_rule(9, 72, "bfloat16", RowCodes(0.05, 60)),
    "codes by row": quantize_rule(70, 200, "float16", RowCodes()),
    "int8, zero points": gemm_rule(20, 64, 96, "int8", epilogue=FULL, tile=TILES[4], rows="zero"),
    "int8 to int8": gemm_rule(
        20, 64, 96, "int8", out="int8", epilogue=GELU, rows="none", codes=RowCodes(8.0, -120)
    ),
    "append": append_rule(4, 2, 5, 64, "float16", cache="float32"),
    "append, bf16": append_rule(2, 2, 5, 32, "bfloat16"),
    "prefill conv": prefill_conv_rule(2, 40, 24, "float16"),
    "prefill scan": prefill_scan_rule(2, 40, 24, 16, "float16", chunk=16),
    "prefill scan with conv": prefill_scan_rule(1, 40, 24, 16, "bfloat16", conv=True, chunk=64),
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    kernels = [kernel for rule in RULES.values() for kernel in rule.kernels]
    return Emulated(kernels, tmp_path_factory.mktemp("emulated"))


@needs_compiler
@pytest.mark.parametrize("name", RULES)
def test_reference_tells_right_from_wrong(name: str, emulated: Emulated) -> None:
    trial = make_trial(RULES[name])
    found = run_rule(RULES[name], trial.inputs, emulated.run)
    share = trial.check(found)
    assert share <= 1
    assert share > 0 or name in EXACT
    for output, expected in trial.expected.items():
        spoilt = found[output].copy()
        spoilt[(expected.rows[-1], *(-1,) * (spoilt.ndim - 1))] += np.asarray(1, spoilt.dtype)
        assert trial.check({**found, output: spoilt}) > 1
