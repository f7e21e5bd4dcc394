"""Quantised encoders with int8 products on CUDA, every kernel executed, against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from converter_check import run_ort
from cuda_cases import needs_compiler, plant
from cuda_modules import EmulatedModule, launches, selected
from int8_modules import PLAIN, everything
from quant_models import quantised_twin
from relax_models import constants
from tvm import relax

from icd_tvm._tvm import apply_pass, const_name
from icd_tvm.models.bert import BertConfig, build_bert, random_bert_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.apply_quant import ApplyQuant, quant_requests
from icd_tvm.relax_passes.cuda_graph import captured, for_graph
from icd_tvm.relax_passes.lower_cuda import lower_cuda
from icd_tvm.relax_passes.mark_int8_products import MarkInt8Products
from icd_tvm.runtime.calibrate import calibrate
from icd_tvm.tir_schedules.target import cuda_target

BATCH, SEQ = 2, 8
TARGET = cuda_target("sm_90")
TEXTS = ("int8:w8a8", "int8:w8a8:attention", "int8:w8a8-dynamic")


def bert(layers: int = 1) -> onnx.ModelProto:
    config = BertConfig(layers, hidden=64, heads=2, ffn=128, vocab=40, max_position=16)
    # Larger than a model begins with: what a layer adds to its input counts.
    weights = {
        name: 6 * array if "layer." in name and array.ndim == 2 else array
        for name, array in random_bert_weights(config).items()
    }
    return build_bert(config, weights, SEQ, BATCH)


def kind_of(text: str) -> str:
    """Return the kind of the twin; where attentions are quantised too, theirs are floats."""
    return "dynamic" if text.endswith("dynamic") else "static"


def feeds_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (BATCH, SEQ)
    mask = (np.arange(SEQ) < np.array([[SEQ], [5]])).astype(np.int64)
    found = {"input_ids": rng.integers(0, 30, shape), "token_type_ids": rng.integers(0, 2, shape)}
    return {**found, "attention_mask": mask}


def quantised(text: str, layers: int = 1) -> tuple[onnx.ModelProto, Any]:
    """Return a model and its module with every product quantised."""
    model = bert(layers)
    mod = import_onnx(model).mod
    rules = everything(text)
    statistics = calibrate(
        mod, quant_requests(mod, rules), [feeds_of(seed) for seed in (1, 2)], PLAIN
    )
    return model, apply_pass(ApplyQuant(rules, statistics), mod)


def on_onnx_runtime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    names = {one.name for one in model.graph.input}
    [found] = run_ort(model, {name: array for name, array in feeds.items() if name in names})
    return found


@pytest.fixture(scope="module", params=TEXTS)
def encoder(request: pytest.FixtureRequest) -> tuple[str, onnx.ModelProto, Any]:
    return request.param, *quantised(request.param)


def test_model_that_arrives_quantised_is_marked(
    encoder: tuple[str, onnx.ModelProto, Any],
) -> None:
    text, model, mod = encoder
    twin = import_onnx(quantised_twin(model, constants(mod), kind_of(text))).mod
    marks = [MarkInt8Products("sm_90") for _ in range(2)]
    for mark, one in zip(marks, (mod, twin), strict=True):
        apply_pass(mark, one)
        assert (len(mark.marked), mark.refused) == (6, {})


@needs_compiler
def test_encoder_of_our_kernels_equals_onnx_runtime(
    encoder: tuple[str, onnx.ModelProto, Any], tmp_path: Path
) -> None:
    text = encoder[0]
    found, plain, wanted, chosen = emulate(encoder, tmp_path)
    refused = {node: one.reason for node, one in chosen.choices.items() if one.kind == "tvm"}
    assert refused == {}
    products = [one for one in chosen.choices.values() if one.kind == "gemm"]
    assert len(products) == 4
    # Only the model's own result is wide: no value between two kernels.
    assert [k.arguments[-1].dtype for k in chosen.kernels.values()].count("float32") == 1
    assert all(one.reason.startswith("int8") for one in products)
    assert np.linalg.norm(found - wanted) <= ALLOWED[kind_of(text)] * np.linalg.norm(wanted)
    if kind_of(text) == "dynamic":
        # Steps of rows are no coarser than those of the tensor.
        assert np.linalg.norm(found - plain) <= np.linalg.norm(wanted - plain)


# Values lie in float16 between the kernels, so one on the edge of two codes may become either; a
# dynamic step is the row's and not the tensor's.
ALLOWED = {"static": 0.008, "dynamic": 0.015}


def emulate(encoder: tuple[str, onnx.ModelProto, Any], folder: Path) -> tuple[Any, Any, Any, Any]:
    """Return what our kernels, the floats and the quantised graph make of an input."""
    text, model, mod = encoder
    after, chosen = selected(mod)
    feeds = feeds_of(0)
    [found] = EmulatedModule(after, chosen, folder)(feeds)
    twin = quantised_twin(model, constants(mod), kind_of(text))
    return found, on_onnx_runtime(model, feeds), on_onnx_runtime(twin, feeds), chosen


MISTAKES = {
    "static": ("rintf(x / by.step) + by.point", "rintf(x / by.step)", "common"),
    "dynamic": ("end.row_zero[row]", "0.0f", "gemm"),
}


@needs_compiler
def test_a_zero_point_that_is_left_out_is_noticed(
    encoder: tuple[str, onnx.ModelProto, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = encoder[0]
    plant(monkeypatch, *MISTAKES[kind_of(text)])
    found, _, wanted, _ = emulate(encoder, tmp_path)
    assert np.linalg.norm(found - wanted) > 2 * ALLOWED[kind_of(text)] * np.linalg.norm(wanted)


@pytest.mark.parametrize("text", TEXTS)
def test_launches_of_a_layer(text: str) -> None:
    low = [lower_cuda(quantised(text, layers)[1], TARGET, "float16") for layers in (1, 2)]
    first, second = (launches(mod) for mod in low)
    # QKV, attention (, codes), output, norm and codes, FFN (, codes), FFN, norm and codes.
    assert len(second) - len(first) == {"static": 7, "dynamic": 9}[kind_of(text)], second
    assert not any("cast" in kernel and "fused" not in kernel for kernel in second), second
    counts = [captured(for_graph(mod), TARGET) for mod in low]
    assert {count.graphs for count in counts} == {1}
    names = {name for mod in low for name in weights_of(mod)}
    assert any(name.count("+") == 2 for name in names)


def weights_of(mod: Any) -> list[str]:
    """Return the names of the int8 matrices of a module."""
    found: list[str] = []

    def visit(expr: Any) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and str(expr.value.dtype) == "int8":
            found.append(const_name(expr))

    relax.analysis.post_order_visit(mod["main"], visit)
    return found
