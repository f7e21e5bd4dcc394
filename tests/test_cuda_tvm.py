"""TVM compiles the TIR functions of the kernel families, with machine code inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In a process of its own: the driver's stub must be there before TVM is.
PROGRAM = """
from icd_tvm.measure.cuda_toolkit import load_driver

load_driver()
from icd_tvm._tvm import tvm
from icd_tvm.tir_schedules.cuda.append import append_rule
from icd_tvm.tir_schedules.cuda.decode_attention import paged_attention_rule
from icd_tvm.tir_schedules.cuda.gemm import gemm_rule
from icd_tvm.tir_schedules.cuda.gemm_24 import gemm_24_rule
from icd_tvm.tir_schedules.cuda.gemv import gemv_rule
from icd_tvm.tir_schedules.cuda.norm import norm_rule
from icd_tvm.tir_schedules.cuda.prefill_scan import prefill_scan_rule
from icd_tvm.tir_schedules.cuda.source_kernel import FP8
from icd_tvm.tir_schedules.target import cuda_target

rules = [
    gemm_rule(64, 64, 64, FP8),
    gemm_rule(64, 64, 64, "float16", live=4, strays=8),
    gemm_24_rule(64, 64, 64, "float16"),
    gemv_rule(64, 64, FP8),
    paged_attention_rule(1, 1, 1, 4, 64, "float16", cache=FP8),
    prefill_scan_rule(1, 64, 16, 16, "float16", conv=True, chunk=32),
    norm_rule(4, 64, "float32", "float16", 1e-5, centre=True, beta=True),
    append_rule(2, 1, 8, 64, "float16"),
]
functions = {}
for kernel in (kernel for rule in rules for kernel in rule.kernels):
    functions[kernel.name] = kernel.primfunc().with_attr("global_symbol", kernel.name)
target = cuda_target("sm_90")
with target:
    library = tvm.compile(tvm.IRModule(functions), target)
library.export_library("kernels.so")
print(*functions)
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_tvm_embeds_machine_code_of_kernels(tmp_path: Path) -> None:
    settings = {"TVM_CUDA_COMPILE_MODE": "nvcc", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = done.stdout.split()
    families = {"gemm", "turn", "gemv", "decode", "prefill", "norm", "append"}
    assert {name.split("_")[1] for name in names} == families
    content = (tmp_path / "kernels.so").read_bytes()
    # Names of machine code's sections; source text would not have them.
    missing = [name for name in names if f".text.{name}".encode() not in content]
    assert missing == []
