"""What each sparsity format costs trained MiniLM, and how much of it fits a quality budget.

Run: OMP_NUM_THREADS=1 python benchmarks/sparsity_quality.py [--out FILE.json]
     [--only layers table search] [--least 0.5] [--budget 0.1] [--floor 0.99]
     [--formats unit:0.5 heads ...]

Calibration reads the package's own sentences; a search is judged on a part of STS-B train; every
figure that is reported comes from text that neither has seen: STS-B dev, 1,500 pairs. Sections
that are not run keep what the file holds. Quality does not depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from icd_tvm.adapters.calibration import as_calibration
from icd_tvm.adapters.sparsity import SparsitySpec, apply_sparsity, parse_sparsity
from icd_tvm.files import write_atomically
from icd_tvm.measure.quality import agreement, stsb_pairs
from icd_tvm.measure.quality_task import StsbTask
from icd_tvm.models.calibration import sentences
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.minilm import build_minilm
from icd_tvm.models.tokenize import encode
from icd_tvm.relax_passes.apply_sparsity import Rules
from icd_tvm.relax_passes.layer_rules import LayerRule, LayerRules
from icd_tvm.runtime.candidates import CandidateModel
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.quality_budget import Budget, search_strengths
from icd_tvm.runtime.strengths import Strengths
from icd_tvm.tir_schedules.target import parse_target

# The longest sentence of STS-B dev has 53 tokens: nothing is cut.
SEQ, BATCH = 56, 16
CALIBRATION_TEXTS, CHECK_TEXTS = 256, 400
ATTENTION = "*attention*"

# Formats of the layer comparison, at density one half.
LAYERWISE = (
    "vec16:0.5",
    "block16x16:0.5",
    "2:4",
    "unstructured:0.5",
    "vec16:0.5:obs",
    "2:4:obs",
    "unstructured:0.5:obs",
)
# (format, removed shares); N:M and V:N:M have one.
TABLE: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("unit:0.5", (0.05, 0.1, 0.2, 0.3, 0.5)),
    ("heads", (0.1, 0.25, 0.5)),
    ("vec16:0.5", (0.05, 0.1, 0.2, 0.3, 0.5)),
    ("block16x16:0.5", (0.05, 0.1, 0.2, 0.3, 0.5)),
    ("unstructured:0.7", (0.3, 0.5, 0.7)),
    ("2:4", (0.5,)),
    ("64:2:8", (0.75,)),
    ("vec16+2:4:0.75", (0.5, 0.75)),
)
SEARCH_RATES = (0.05, 0.1, 0.2, 0.3)
SEARCHED = ("unit:0.5", "heads", "vec16:0.5", "2:4")


def rules(text: str) -> Rules:
    """Return a spec for the feed-forward layers, or for the attention heads."""
    if text != "heads":
        return parse_sparsity(text)
    return LayerRules(SparsitySpec("none"), (LayerRule(ATTENTION, parse_sparsity("unit:0.5")),))


class Bench:
    """The dense model in both forms, and the moments of its inputs on two texts."""

    def __init__(self) -> None:
        self.free = build_minilm("seq", "batch")
        self.imported = import_onnx(build_minilm(SEQ, BATCH))
        # The halves share no sentence: a ridge is judged on text that its refit has not seen.
        halves = [moments(self.free, texts(half)) for half in (0, 1)]
        held_out = [first for first, _, _ in stsb_pairs("dev")][:: 1500 // CHECK_TEXTS]
        self.grams = {node: np.stack([half[node] for half in halves]) for node in halves[0]}
        self.check = moments(self.free, held_out)
        self.dev = StsbTask("dev", seq=SEQ, batch=BATCH, fixed=False)


def texts(half: int) -> list[str]:
    """Return one to three joined sentences of one half of the package's own."""
    rng, pool = np.random.default_rng(half), sentences()[half::2]
    return [
        " ".join(pool[i] for i in rng.integers(len(pool), size=rng.integers(1, 4)))
        for _ in range(CALIBRATION_TEXTS // 2)
    ]


def moments(model: onnx.ModelProto, lines: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the Gram matrix of each dense layer's input over real tokens, by node."""
    stored = {tensor.name for tensor in model.graph.initializer}
    sources = {
        node.name: node.input[0]
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    names = sorted(set(sources.values()))
    del wide.graph.output[:]
    for name in names:
        wide.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = CandidateModel(wide, []).session
    grams: dict[str, np.ndarray] = {}
    for first in range(0, len(lines), BATCH):
        feeds = encode(lines[first : first + BATCH], SEQ)
        real = feeds["attention_mask"] == 1
        for name, value in zip(names, session.run(names, feeds), strict=True):
            x = value[real]
            grams[name] = grams.get(name, 0) + (x.T @ x).astype(np.float64)
    return {node: grams[source] for node, source in sources.items()}


def layers(bench: Bench, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the output error of every dense layer, one-shot magnitude beside ours."""
    rows = []
    for text in LAYERWISE:
        spec, ratios, ridges = parse_sparsity(text), {}, []
        errors: dict[str, list[float]] = {"magnitude": [], "refit": []}
        for node, weight in dense_weights(bench.free).items():
            data, check = bench.grams[node], as_calibration(bench.check[node], len(weight))
            plain, _ = apply_sparsity(weight, spec.type_name, spec.rate)
            ours, meta = apply_sparsity(
                weight,
                spec.type_name,
                spec.rate,
                saliency=spec.saliency or "wanda",
                calibration=data,
                refit=True,
            )
            assert check is not None
            assert np.count_nonzero(ours) <= np.count_nonzero(plain)
            pair = [check.output_error(weight, w) or 0.0 for w in (plain, ours)]
            errors["magnitude"].append(pair[0])
            errors["refit"].append(pair[1])
            ratios[node] = pair[1] / pair[0]
            ridges.append(meta["params"]["ridge"])
        row = {
            "format": spec.type_name,
            "saliency": spec.saliency or "wanda",
            "density": 1 - spec.rate,
            "layers": len(ratios),
            "layers_better": sum(ratio < 1 for ratio in ratios.values()),
            "magnitude_error_mean": float(np.mean(errors["magnitude"])),
            "refit_error_mean": float(np.mean(errors["refit"])),
            "ratio_worst": max(ratios.values()),
            "layer_worst": max(ratios, key=ratios.__getitem__),
            "ridges": {str(ridge): ridges.count(ridge) for ridge in sorted(set(ridges))},
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def dense_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return every matmul weight [K, N] by node."""
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        node.name: stored[node.input[1]]
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in stored
    }


def table(bench: Bench, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row a format and rate, the same rate in every layer."""
    dense = bench.dev.evaluate(CandidateModel(bench.free, []).runner({}))
    rows = []
    for text, all_rates in TABLE:
        rates = tuple(rate for rate in all_rates if rate >= arguments.least)
        strengths = Strengths(bench.imported.mod, rules(text), bench.grams, rates)
        strengths.drop_failing()
        runner = CandidateModel(bench.free, strengths.names).runner
        for rate in sorted({spec.rate for ladder in strengths.ladder.values() for spec in ladder}):
            choice = dict.fromkeys(strengths.ladder, rate)
            arrays = strengths.arrays(choice)
            score = bench.dev.evaluate(runner(arrays))
            row = {
                "format": text if text == "heads" else parse_sparsity(text).type_name,
                "removed": strengths.removed(choice),
                "output_error": mean_error(bench, strengths, arrays),
                "cosine": agreement(dense.outputs, score.outputs).cosine_mean,
                "stsb_delta_points": score.points - dense.points,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def mean_error(bench: Bench, strengths: Strengths, arrays: dict[str, np.ndarray]) -> float:
    """Return the mean output error, on text that calibration has not seen, of what was refitted.

    Of units it is that of their readers: the other weights are zeroed with them.
    """
    errors = []
    for use in strengths.readers:
        check = as_calibration(bench.check[use.node], use.shape[0])
        assert check is not None
        errors.append(check.output_error(use.const.value.numpy(), arrays[use.name]) or 0.0)
    return float(np.mean(errors))


def search(bench: Bench, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the strongest rates of each layer that fit the budget."""
    calibration = StsbTask("train", step=16, seq=SEQ, batch=BATCH, fixed=False)
    rows = []
    for text in arguments.formats:
        start = time.process_time()
        result = search_strengths(
            bench.imported,
            rules(text),
            calibration,
            bench.dev,
            Budget(arguments.budget, arguments.floor),
            target=parse_target(CompileOptions(model="").target, 1),
            statistics=bench.grams,
            rates=SEARCH_RATES,
            model=bench.free,
            final=StsbTask("dev", seq=SEQ, batch=BATCH),
        )
        record = result.to_json()
        record["candidates"] = [c for c in record["candidates"] if c["stage"] != "profile"]
        record |= {
            "format": text if text == "heads" else parse_sparsity(text).type_name,
            "budget_points": arguments.budget,
            "agreement_floor": arguments.floor,
            "profile_candidates": len(result.candidates) - len(record["candidates"]),
            "cpu_s": round(time.process_time() - start, 1),
        }
        rows.append(record)
        print(f"{text}: {result.reason}; CPU {record['cpu_s']} s", flush=True)
    return rows


SECTIONS: dict[str, Callable[[Bench, argparse.Namespace], list[dict[str, Any]]]] = {
    "table": table,
    "layers": layers,
    "search": search,
}


# What tells the rows of a section apart.
KEYS = {"search": ("format", "budget_points", "agreement_floor"), "table": ("format", "removed")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file that takes the record")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--least", type=float, default=0.0, help="smallest rate of the table")
    parser.add_argument("--formats", nargs="+", default=list(SEARCHED), help="of the search")
    parser.add_argument("--budget", type=float, default=0.1, help="points of STS-B Spearman")
    parser.add_argument("--floor", type=float, default=0.99, help="mean cosine with fp32")
    arguments = parser.parse_args()
    bench = Bench()
    for name in arguments.only:
        found = SECTIONS[name](bench, arguments)
        if arguments.out:
            save(arguments.out, name, found)


def save(path: Path, section: str, rows: list[dict[str, Any]]) -> None:
    """Put a section into the record; rows of other searches and rates stay."""
    record = (
        json.loads(path.read_text()) if path.exists() else {"format": "icd/sparsity_quality/v1"}
    )
    if section in KEYS:
        keys = KEYS[section]
        new = {tuple(row[key] for key in keys) for row in rows}
        old = [r for r in record.get(section, []) if tuple(r[key] for key in keys) not in new]
        rows = [*old, *rows]
    record |= {"model": "minilm", "evaluation": "STS-B dev, 1,500 pairs", section: rows}
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
