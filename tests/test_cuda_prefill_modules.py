"""Prompts through compiled Mamba layers: every kernel executed, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from cuda_cases import needs_compiler
from cuda_modules import EmulatedModule, launches, selected

from icd_tvm._tvm import apply_pass
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.mamba import MambaConfig, mamba_states, random_mamba_weights
from icd_tvm.models.mamba_prefill import build_mamba_prefill
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.cuda_prefill import mamba_roles
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.tir_schedules.cpu.scan_program import Operand, ScanProgram, Term
from icd_tvm.tir_schedules.target import cuda_target

CONFIG = MambaConfig(1, hidden=64, vocab=96, state=8, dt_rank=8)


def prefill(steps: int, config: MambaConfig = CONFIG) -> onnx.ModelProto:
    return build_mamba_prefill(config, random_mamba_weights(config), steps)


@needs_compiler
@pytest.mark.parametrize(
    ("steps", "dtype", "kernels"),
    [(24, "float16", 1), (100, "float16", 3), (24, "bfloat16", 1)],
)
def test_a_prompt_of_our_kernels_equals_onnx_runtime(
    steps: int, dtype: str, kernels: int, tmp_path: Path
) -> None:
    model = prefill(steps)
    mod, chosen = selected(import_onnx(model).mod, dtype, mamba_states(CONFIG))
    assert not [one.reason for one in chosen.choices.values() if one.kind == "tvm"]
    (scan,) = [one for one in chosen.choices.values() if one.kind == "prefill_scan"]
    assert scan.fused == ("softplus", "skip", "gate")
    assert f"{kernels} kernels" in scan.reason
    families = [kernel.family for kernel in chosen.kernels.values()]
    assert families.count("prefill_scan") == kernels + 1  # the convolution is of that family
    rng, feeds = np.random.default_rng(0), {}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for one in session.get_inputs():
        integer = one.type == "tensor(int64)"
        made = rng.integers(0, 90, one.shape) if integer else rng.standard_normal(one.shape)
        feeds[one.name] = made if integer else made.astype(np.float32)
    expected, emulated = session.run(None, feeds), EmulatedModule(mod, chosen, tmp_path)
    for found, right in zip(emulated(feeds), expected, strict=True):
        allowed = {"float16": 0.01, "bfloat16": 0.06}[dtype] * np.abs(right).max()
        assert np.abs(found - right).max() <= allowed


def test_launches_of_a_prompt() -> None:
    names = []
    for layers in (1, 2):
        config = MambaConfig(layers, hidden=64, vocab=96, state=8, dt_rank=8)
        mod = import_onnx(prefill(24, config)).mod
        mod = apply_pass(AttachLayoutTags(opaque_states=mamba_states(config)), mod)
        names.append(launches(lower_cuda(mod, cuda_target("sm_90"), "float16")))
    layer = len(names[1]) - len(names[0])
    assert sum("prefill" in name for name in names[1]) == 4
    assert layer == 12, names[1]


def program(*, decay: bool = True, swapped: bool = False) -> ScanProgram:
    """Return Mamba's recurrence, or another."""
    dt, a, x, b, c = (Term("operand", place=i) for i in range(5))
    rate = Term("Mul", (a, dt) if swapped else (dt, a))
    kept = Term("Mul", (Term("Exp", (rate,)) if decay else rate, Term("old")))
    drive = Term("Mul", (Term("Mul", (b, dt)), x) if swapped else (Term("Mul", (dt, x)), b))
    axes = [(True, False), (True, True), (True, False), (False, True), (False, True)]
    operands = [Operand(None if i == 1 else i, one) for i, one in enumerate(axes)]
    late, update = [Term("Mul", (Term("new"), c))], Term("Add", (kept, drive))
    return ScanProgram((16, 8), operands, update, [], late, [(Term("late"), (16,), False)])


def test_the_recurrence_is_known_by_its_values() -> None:
    expected = {"dt": 0, "x": 2, "a": 1, "b": 3, "c": 4}
    assert mamba_roles(program()) == expected
    assert mamba_roles(program(swapped=True)) == expected
    assert mamba_roles(program(decay=False)) is None
    other = program()
    other.late[0] = Term("Tanh", (other.late[0],))
    assert mamba_roles(other) is None
    assert mamba_roles(ScanProgram((16, 8))) is None


def test_another_recurrence_stays_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icd_tvm.relax_passes.cuda_prefill.mamba_roles", lambda program: None)
    _, chosen = selected(import_onnx(prefill(24)).mod)
    reasons = [one.reason for one in chosen.choices.values() if one.kind == "tvm"]
    assert reasons == ["its recurrence is not that of Mamba"]


def test_a_convolution_of_three_taps_stays() -> None:
    config = MambaConfig(1, hidden=64, vocab=96, state=8, dt_rank=8, conv=3)
    _, chosen = selected(import_onnx(prefill(24, config)).mod)
    reasons = [one.reason for one in chosen.choices.values() if one.kind == "tvm"]
    assert reasons == ["3 taps are not made; 4 are"]
