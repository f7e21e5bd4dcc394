"""What the S and Q adapters cost in quality on trained MiniLM, through ONNX Runtime.

Run: OMP_NUM_THREADS=1 python benchmarks/adapters.py [--pairs N] [--only weights w8a8 nm sparse]

Points are STS-B dev Spearman x 100. Calibration reads the package's own sentences, never STS-B.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from icd_tvm.adapters.calibration import Calibration
from icd_tvm.adapters.channel_permutation import permute_channels
from icd_tvm.adapters.quant import (
    Histogram,
    activation_scale,
    apply_quant,
    migrate_scales,
    observe,
)
from icd_tvm.adapters.sparsity import apply_sparsity, parse_sparsity
from icd_tvm.measure.quality import agreement, stsb_spearman
from icd_tvm.models.calibration import sentences
from icd_tvm.models.minilm import build_minilm
from icd_tvm.models.tokenize import encode

# The longest sentence of STS-B dev has 53 tokens: nothing is cut.
SEQ, BATCH = 56, 16
CALIBRATION_TEXTS = 256

# (request, bar on |delta| in points)
WEIGHTS: tuple[tuple[str, float | None], ...] = (
    ("int8", 0.05),
    ("int8:tensor", None),
    ("int8:compensate", None),
    ("fp8_e4m3", None),
    ("fp8_e5m2", None),
    ("int4:group128", None),
    ("int4:group128:ptq-mse", None),
    ("int4:group128:compensate", 0.10),
    ("int4:group128:ptq-mse:compensate", 0.10),
    ("int4:group128:ptq-mse:act-order:compensate", 0.10),
    ("int4:group128:ptq-mse:asym:compensate", 0.10),
    ("int4:group128:ptq-mse:asym:act-order:compensate", 0.10),
    ("int4:group128:ptq-mse:asym:act-order:salient0.01:compensate", 0.10),
)
# (label, method, symmetric, alpha of the migration; None: no migration)
W8A8: tuple[tuple[str, str, bool, float | None], ...] = (
    ("minmax", "ptq-minmax", True, None),
    ("minmax, asymmetric", "ptq-minmax", False, None),
    ("mse, asymmetric", "ptq-mse", False, None),
    ("kld, asymmetric", "ptq-kld", False, None),
    ("minmax, asymmetric, migrated 0.5", "ptq-minmax", False, 0.5),
    ("mse, asymmetric, migrated 0.5", "ptq-mse", False, 0.5),
)
W8A8_BAR = 0.10
SPARSE = (
    "unit:0.5",
    "vec16:0.5",
    "block16x16:0.5",
    "unstructured:0.5",
    "2:4",
    "16:2:8",
    "64:2:8",
    "vec16+2:4:0.75",
    "block16x16+2:4:0.75",
)


class Bench:
    """The fp32 model, its dense weights and what calibration saw of their inputs."""

    def __init__(self, pairs: int | None) -> None:
        self.pairs = pairs
        self.model = build_minilm(SEQ, BATCH)
        self.weights = dense_weights(self.model)
        self.inputs = {
            node.input[1]: node.input[0]
            for node in self.model.graph.node
            if node.op_type == "MatMul" and node.input[1] in self.weights
        }
        self.grams, self.histograms, self.tops = calibrate(self.model, set(self.inputs.values()))
        self.probe = encode(sentences()[:BATCH], SEQ)

    @cached_property
    def reference(self) -> np.ndarray:
        """Hidden states of the fp32 model."""
        return self.outputs(self.model)

    @cached_property
    def base(self) -> float:
        """Points of the fp32 model."""
        start = time.perf_counter()
        points = self.spearman(self.model)
        seconds = time.perf_counter() - start
        print(f"  fp32: {points:.4f} points, {len(self.weights)} weights, {seconds:.0f} s a run")
        return points

    def calibration(self, weight: str) -> Calibration:
        """Second moments of the weight's input."""
        gram = self.grams[self.inputs[weight]]
        return Calibration(np.diagonal(gram).copy(), gram)

    def outputs(self, model: onnx.ModelProto) -> np.ndarray:
        """Hidden states of the probe's real tokens."""
        hidden = np.asarray(session(model).run(None, self.probe)[0])
        return hidden[self.probe["attention_mask"] == 1]

    def spearman(self, model: onnx.ModelProto) -> float:
        """STS-B dev in points."""
        runner = session(model)
        result = stsb_spearman(
            lambda feeds: np.asarray(runner.run(None, feeds)[0]), SEQ, self.pairs, batch=BATCH
        )
        return 100 * result.value

    def report(self, label: str, model: onnx.ModelProto, bar: float | None, note: str = "") -> None:
        """Print the change in points, the agreement and the verdict."""
        delta = -self.base + self.spearman(model)
        cosine = agreement(self.reference, self.outputs(model)).cosine_mean
        verdict = "" if bar is None else f"  bar {bar:.2f} {'ok' if abs(delta) <= bar else 'MISS'}"
        print(f"  {label:<62} {delta:+.4f} points  token cosine {cosine:.5f}{note}{verdict}")


def session(model: onnx.ModelProto, optimise: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantised or not optimise:
        # A fused integer kernel would hide what is simulated here.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def dense_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    read = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in read}


def with_weights(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return changed


def calibrate(
    model: onnx.ModelProto, names: set[str]
) -> tuple[dict[str, np.ndarray], dict[str, Histogram], dict[str, np.ndarray]]:
    """Gram matrix, histogram and channel maxima of the inputs of the dense layers."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for name in sorted(names):
        wide.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    runner = session(wide, optimise=False)
    grams: dict[str, np.ndarray] = {}
    histograms: dict[str, Histogram] = {}
    tops: dict[str, np.ndarray] = {}
    for feeds in calibration_feeds():
        real = feeds["attention_mask"] == 1
        for name, value in zip(sorted(names), runner.run(sorted(names), feeds), strict=True):
            x = value[real].astype(np.float64)
            grams[name] = grams.get(name, 0) + x.T @ x
            histograms[name] = observe(x, histograms.get(name))
            tops[name] = np.maximum(tops.get(name, 0), np.abs(x).max(axis=0))
    return grams, histograms, tops


def calibration_feeds() -> list[dict[str, np.ndarray]]:
    """Single sentences and runs of them, in a fixed random order."""
    rng, pool = np.random.default_rng(0), sentences()
    texts = [
        " ".join(pool[i] for i in rng.integers(len(pool), size=rng.integers(1, 4)))
        for _ in range(CALIBRATION_TEXTS)
    ]
    return [encode(texts[i : i + BATCH], SEQ) for i in range(0, len(texts), BATCH)]


def weights_only(bench: Bench) -> None:
    print("\nweights quantised, activations fp32")
    for request, bar in WEIGHTS:
        start, size, errors, arrays = time.perf_counter(), 0, [], {}
        for name, weight in bench.weights.items():
            quantized, meta = apply_quant(weight, request, calibration=bench.calibration(name))
            arrays[name] = quantized.dequantize()
            errors.append(meta["loss"]["output"])
            size += meta["bytes_after"]
        seconds = time.perf_counter() - start
        note = f"  output error {np.mean(errors):.4f}  {size / 2**20:.2f} MiB  {seconds:.1f} s"
        bench.report(request, with_weights(bench.model, arrays), bar, note)


def w8a8(bench: Bench) -> None:
    print("\nint8 weights and activations (static, one scale a tensor), simulated")
    for label, method, symmetric, alpha in W8A8:
        bench.report(label, quantised_model(bench, method, symmetric, alpha), W8A8_BAR)


def quantised_model(
    bench: Bench, method: str, symmetric: bool, alpha: float | None
) -> onnx.ModelProto:
    arrays, before = {}, {}
    histograms, divisors = bench.histograms, {}
    if alpha is not None:
        divisors = migrations(bench, alpha)
        histograms = {**histograms, **migrated_histograms(bench.model, divisors)}
    for name, weight in bench.weights.items():
        source = bench.inputs[name]
        rows = divisors.get(source)
        moved = weight if rows is None else weight * rows[:, None]
        arrays[name] = apply_quant(moved, "int8")[0].dequantize()
        before[source] = activation_scale(histograms[source], "int8", method, symmetric=symmetric)
    return with_qdq(with_weights(bench.model, arrays), before, divisors)


def migrations(bench: Bench, alpha: float) -> dict[str, np.ndarray]:
    """Row scales of every dense input; in a post-norm encoder the division needs its own node."""
    readers: dict[str, list[np.ndarray]] = {}
    for name, source in bench.inputs.items():
        readers.setdefault(source, []).append(bench.weights[name])
    return {s: migrate_scales(bench.tops[s], ws, alpha) for s, ws in readers.items()}


def migrated_histograms(
    model: onnx.ModelProto, divisors: dict[str, np.ndarray]
) -> dict[str, Histogram]:
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    names = sorted(divisors)
    for name in names:
        wide.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    runner, found = session(wide, optimise=False), {}
    for feeds in calibration_feeds():
        real = feeds["attention_mask"] == 1
        for name, value in zip(names, runner.run(names, feeds), strict=True):
            found[name] = observe(value[real] / divisors[name], found.get(name))
    return found


def with_qdq(
    model: onnx.ModelProto,
    scales: dict[str, tuple[float, int]],
    divisors: dict[str, np.ndarray],
) -> onnx.ModelProto:
    """Insert division (where migrated), QuantizeLinear and DequantizeLinear before dense layers."""
    graph, nodes, extra = model.graph, [], []
    dense = {t.name for t in graph.initializer}
    done: dict[str, str] = {}
    for node in graph.node:
        source = node.input[0] if node.input else ""
        if node.op_type == "MatMul" and node.input[1] in dense and source in scales:
            if source not in done:
                done[source] = f"{source}/dequantized"
                nodes += qdq_nodes(source, scales[source], divisors.get(source), extra)
            node.input[0] = done[source]
        nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(extra)
    return model


def qdq_nodes(
    source: str,
    parameters: tuple[float, int],
    divisor: np.ndarray | None,
    extra: list[onnx.TensorProto],
) -> list[onnx.NodeProto]:
    scale, zero = f"{source}/scale", f"{source}/zero"
    extra.append(numpy_helper.from_array(np.float32(parameters[0]), scale))
    extra.append(numpy_helper.from_array(np.int8(parameters[1]), zero))
    nodes, value = [], source
    if divisor is not None:
        extra.append(numpy_helper.from_array(divisor.astype(np.float32), f"{source}/divisor"))
        value = f"{source}/divided"
        nodes.append(helper.make_node("Div", [source, f"{source}/divisor"], [value]))
    codes = f"{source}/codes"
    nodes.append(helper.make_node("QuantizeLinear", [value, scale, zero], [codes]))
    restored = f"{source}/dequantized"
    nodes.append(helper.make_node("DequantizeLinear", [codes, scale, zero], [restored]))
    return nodes


def n_m(bench: Bench) -> None:
    print("\nN:M channel permutation: retained magnitude")
    print("  of dropped: share of the magnitude dropped in the default order that is won back")
    print("  of ideal:   share of the way to the best N / M of every column (order-free bound)")
    for layer in (0, 5):
        for name in ("intermediate.dense", "output.dense"):
            weight = bench.weights[f"encoder.layer.{layer}.{name}.weight"]
            for pattern in ((2, 4), (1, 4), (4, 8)):
                permutation_row(f"layer {layer} {name}", weight, pattern)
    random = np.random.default_rng(0)
    permutation_row("normal", random.normal(size=(64, 128)), (2, 4))
    permutation_row("normal", random.normal(size=(768, 3072)), (2, 4))


def permutation_row(label: str, weight: np.ndarray, pattern: tuple[int, int]) -> None:
    start = time.process_time()
    _, meta = permute_channels(weight, pattern)
    seconds = time.process_time() - start
    print(
        f"  {label:<28} {weight.shape!s:<12} {pattern[0]}:{pattern[1]}"
        f"  of dropped {meta['recovered']:.3f}  of ideal {meta['efficacy']:.3f}"
        f"  CPU {seconds:.1f} s"
    )


def sparse(bench: Bench) -> None:
    print("\nsparse formats on layer 2: output error on calibration, without and with refit")
    for name in ("intermediate.dense", "output.dense"):
        key = f"encoder.layer.2.{name}.weight"
        weight, data = bench.weights[key], bench.calibration(key)
        order, _ = permute_channels(weight, (2, 4), energy=data.energy)
        for request in SPARSE:
            sparse_row(f"{name} {request}", weight, request, data)
        sparse_row(f"{name} 2:4 permuted", weight, "2:4", data, order)


def sparse_row(
    label: str,
    weight: np.ndarray,
    request: str,
    data: Calibration,
    order: np.ndarray | None = None,
) -> None:
    spec, errors, density = parse_sparsity(request), [], 0.0
    for refit in (False, True):
        _, meta = apply_sparsity(
            weight,
            spec.type_name,
            None if spec.kind == "n:m" else spec.rate,
            saliency="wanda",
            calibration=data,
            refit=refit,
            order=order,
        )
        errors.append(meta["loss"]["output"])
        density = meta["density"]
    print(f"  {label:<40} density {density:.3f}  plain {errors[0]:.4f}  refit {errors[1]:.4f}")


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "weights": weights_only,
    "w8a8": w8a8,
    "nm": n_m,
    "sparse": sparse,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, help="only the first pairs of STS-B dev")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    bench = Bench(arguments.pairs)
    for name in arguments.only:
        SECTIONS[name](bench)


if __name__ == "__main__":
    main()
