"""Which ONNX operators and models import, and whether they compute what ONNX says.

    OMP_NUM_THREADS=1 TVM_NUM_THREADS=1 python benchmarks/onnx_coverage.py --node
    python benchmarks/onnx_coverage.py --suite light --suite pytorch-converted
    python benchmarks/onnx_coverage.py --real FOLDER --json runs/onnx.json
    python benchmarks/onnx_coverage.py --json runs/onnx.json --doc docs/ONNX_Support.md

Cases run in forked workers: one that crashes or hangs is counted and the rest go on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.loader as loader
from onnx import numpy_helper
from onnx_real_models import run_real
from onnx_support_doc import write_tables

from icd_tvm._tvm import relax, tvm
from icd_tvm.errors import IcdError
from icd_tvm.models.importer import ImportedModel, import_onnx

# Inputs that decide shapes or structure: a compiler needs their value, exporters store them as
# initializers. A case that declares one has it bound to the value stored with the case.
STRUCTURAL_INPUTS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "Compress": (1,),
    "ConstantOfShape": (0,),
    "CumProd": (1,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "NonMaxSuppression": (2, 3, 4),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "SequenceAt": (1,),
    "SequenceErase": (1,),
    "SequenceInsert": (2,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "SplitToSequence": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
TIMEOUT_S = 45.0
ATTEMPTS = 2
SUITES = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")


@dataclass(frozen=True)
class Case:
    """One model with inputs and expected outputs."""

    name: str
    load: Callable[[], tuple[onnx.ModelProto, list[Any], list[Any]]]
    rtol: float = 1e-3
    atol: float = 1e-7
    structural: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one case: ok, folded, refused, wrong, failed or crashed."""

    name: str
    status: str
    ops: str = ""
    reason: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether the case imports and computes what it should."""
        return self.status in ("ok", "folded")


def node_cases() -> list[Case]:
    """Return the cases that the onnx package generates for single operators."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package computes overflows on purpose
        tests = loader.load_model_tests(kind="node")
    structural = {test.name: _structural(test.model) for test in tests}
    return [
        Case(
            test.name,
            lambda test=test: (test.model, *map(list, test.data_sets[0])),
            test.rtol,
            test.atol,
            structural.get(re.sub(r"_expanded.*", "", test.name), structural[test.name]),
        )
        for test in sorted(tests, key=lambda test: test.name)
    ]


def _structural(model: onnx.ModelProto) -> tuple[str, ...]:
    names: list[str] = []
    for node in model.graph.node:
        for index in STRUCTURAL_INPUTS.get(node.op_type, ()):
            if index < len(node.input) and node.input[index]:
                names.append(node.input[index])
    declared = {value.name for value in model.graph.input}
    return tuple(sorted(declared.intersection(names)))


def stored_cases(kind: str) -> list[Case]:
    """Return the cases the onnx package stores as files."""
    root = Path(loader.DATA_DIR) / kind
    if kind == "light":
        paths = sorted(root.glob("light_*.onnx"))
        return [Case(p.stem, lambda p=p: _load_light(p), 1e-3, 1e-6) for p in paths]
    return [
        Case(
            test.name,
            lambda folder=Path(test.model_dir): _load_stored(folder),
            test.rtol,
            test.atol,
        )
        for test in sorted(loader.load_model_tests(kind=kind), key=lambda test: test.name)
    ]


def _load_stored(folder: Path) -> tuple[onnx.ModelProto, list[Any], list[Any]]:
    model = onnx.load(folder / "model.onnx")
    data = folder / "test_data_set_0"
    given = len(list(data.glob("input_*.pb")))
    weights = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in weights]
    if len(values) != given:
        values = list(model.graph.input)[:given]
    inputs = [_load_value(data / f"input_{i}.pb", v.type) for i, v in enumerate(values)]
    outputs = [
        _load_value(data / f"output_{i}.pb", v.type) for i, v in enumerate(model.graph.output)
    ]
    return model, inputs, outputs


def _load_value(path: Path, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        sequence = onnx.SequenceProto.FromString(path.read_bytes())
        return numpy_helper.to_list(sequence)
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def _load_light(path: Path) -> tuple[onnx.ModelProto, list[Any], list[Any]]:
    """The light models store an output for the ramp input that onnx's runner generates."""
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in weights]
    inputs = []
    for value in values:
        shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        size = int(np.prod(shape))
        inputs.append((np.arange(size).reshape(shape) / size).astype(np.float32))
    stored = path.with_name(f"{path.stem}_output_0.pb")
    output = numpy_helper.to_array(onnx.TensorProto.FromString(stored.read_bytes()))
    return model, inputs, [output]


def run_case(case: Case) -> Outcome:
    """Import, compile and run one case and compare its outputs."""
    start = time.perf_counter()
    try:
        model, values, expected = case.load()
    except Exception as error:
        return Outcome(case.name, "failed", reason=f"cannot load: {error}")
    ops = ",".join(sorted({node.op_type for node in model.graph.node}))
    status, reason = _judge(case, model, values, expected)
    return Outcome(case.name, status, ops, reason, round(time.perf_counter() - start, 3))


def _judge(
    case: Case, model: onnx.ModelProto, values: list[Any], expected: list[Any]
) -> tuple[str, str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    if len(names) != len(values):
        names = [value.name for value in model.graph.input][: len(values)]
    feeds = {n: _to_numpy(v) for n, v in zip(names, values, strict=True)}
    structural = _structural(model) if case.structural is None else case.structural
    # The value of an empty tensor is known as soon as its shape is.
    bound = {
        name: value
        for name, value in feeds.items()
        if isinstance(value, np.ndarray) and (name in structural or not value.size)
    }
    shapes = {
        name: value.shape
        for name, value in feeds.items()
        if name not in bound and isinstance(value, np.ndarray)
    }
    try:
        imported = import_onnx(model, shapes=shapes, constants=bound)
    except IcdError as error:
        return "refused", f"{error.code} {error}"
    try:
        results = run_imported(imported, feeds)
    except Exception as error:
        return "failed", _last_line(error)
    problem = compare_all(results, expected, case.rtol, case.atol)
    if problem:
        return "wrong", problem
    return ("ok" if imported.inputs else "folded"), ""


def _to_numpy(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:300]


def run_imported(imported: ImportedModel, feeds: dict[str, Any]) -> list[np.ndarray]:
    """Compile for the host CPU without options and run once."""
    target = tvm.target.Target("llvm")
    machine = relax.VirtualMachine(tvm.compile(imported.mod, target), tvm.cpu())
    arguments = [
        tvm.runtime.tensor(np.ascontiguousarray(feeds[s.name]).reshape(s.shape))
        for s in imported.inputs
    ]
    result = machine["main"](*arguments)
    results = [result] if len(imported.outputs) == 1 else list(result)
    return [_to_values(item) for item in results]


def _to_values(item: Any) -> Any:
    """Return a tensor as an array and a sequence as a list of arrays."""
    return item.numpy() if hasattr(item, "numpy") else [_to_values(entry) for entry in item]


def compare_all(
    results: Sequence[np.ndarray], expected: Sequence[Any], rtol: float, atol: float
) -> str:
    """Return the first difference, or an empty string."""
    if len(results) != len(expected):
        return f"{len(results)} outputs, {len(expected)} expected"
    for index, (got, want) in enumerate(zip(results, expected, strict=True)):
        if isinstance(got, list):
            problem = compare_all(got, want, rtol, atol)
        else:
            problem = compare(got, np.asarray(_to_numpy(want)), rtol, atol)
        if problem:
            return f"output {index}: {problem}"
    return ""


def compare(got: np.ndarray, want: np.ndarray, rtol: float, atol: float) -> str:
    if got.shape != want.shape:
        return f"shape {got.shape}, expected {want.shape}"
    if got.dtype != want.dtype:
        return f"dtype {got.dtype}, expected {want.dtype}"
    if got.dtype.kind in "OSU":
        return "" if np.array_equal(got, want) else "strings differ"
    if got.dtype.name == "bfloat16":
        rtol = max(rtol, 2.0**-6)
    if got.dtype.kind not in "iubc":
        got, want = got.astype(np.float64), want.astype(np.float64)
    if np.allclose(got, want, rtol=rtol, atol=atol, equal_nan=True):
        return ""
    with np.errstate(all="ignore"):
        difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
    bad = ~np.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
    return f"{int(bad.sum())} of {bad.size} values differ, by {np.nanmax(difference):.3g} at most"


def _serve(cases: list[Case], pipe: Connection) -> None:
    try:
        while (index := pipe.recv()) is not None:
            pipe.send(run_case(cases[index]))
    except (EOFError, KeyboardInterrupt):
        return


class _Worker:
    """A forked process that runs one case at a time."""

    def __init__(self, cases: list[Case]) -> None:
        self.pipe, child = mp.Pipe()
        self.process = mp.get_context("fork").Process(target=_serve, args=(cases, child))
        self.process.daemon = True
        self.process.start()
        child.close()
        self.index = -1
        self.deadline = 0.0

    def give(self, index: int) -> None:
        self.index, self.deadline = index, time.monotonic() + TIMEOUT_S
        self.pipe.send(index)

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join()

    def take(self, cases: list[Case]) -> Outcome | None:
        """Return the finished outcome, one that says crashed, or None while it still runs."""
        name = cases[self.index].name
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Outcome(name, "crashed", reason=f"exit code {self.process.exitcode}")
        if time.monotonic() > self.deadline:
            self.process.kill()
            self.process.join()
            return Outcome(name, "crashed", reason=f"no result after {TIMEOUT_S:.0f} s")
        return None


def run_cases(cases: list[Case], workers: int = 2) -> Iterator[Outcome]:
    """Run every case in forked workers; yield outcomes as they come.

    A case whose worker crashes or hangs is given to a fresh one before it counts as crashed.
    """
    todo = list(reversed(range(len(cases))))
    lost: Counter[int] = Counter()
    pool = [_Worker(cases) for _ in range(min(workers, len(cases)))]
    for worker in pool:
        worker.give(todo.pop())
    while pool:
        wait([worker.pipe for worker in pool], timeout=1.0)
        for position in reversed(range(len(pool))):
            outcome = pool[position].take(cases)
            if outcome is None:
                continue
            index = pool[position].index
            if outcome.status == "crashed":
                pool[position] = _Worker(cases)
                lost[index] += 1
                if lost[index] < ATTEMPTS:
                    pool[position].give(index)
                    continue
            yield outcome
            if todo:
                pool[position].give(todo.pop())
            else:
                pool.pop(position).stop()


def report(title: str, outcomes: Iterable[Outcome], groups: int) -> None:
    """Print the share that imports and the largest groups of failures."""
    outcomes = list(outcomes)
    counts = Counter(outcome.status for outcome in outcomes)
    imported = sum(outcome.status != "refused" for outcome in outcomes)
    right = sum(outcome.right for outcome in outcomes)
    print(f"{title}: {len(outcomes)} cases, {dict(counts.most_common())}")
    print(f"  right {right} ({right / max(1, len(outcomes)):.1%}), not refused {imported}")
    reasons = Counter(
        (o.status, _generic(o.reason)) for o in outcomes if o.status not in ("ok", "folded")
    )
    for (status, reason), count in reasons.most_common(groups):
        print(f"  {count:4d} {status}: {reason[:200]}")


def _generic(reason: str) -> str:
    return re.sub(r"'[^']*'|\d+", "_", reason)


def report_real(folder: Path, pattern: str) -> list[Outcome]:
    """Print one line a real model and return the outcomes."""
    outcomes = []
    for row in run_real(folder, pattern):
        print(f"{row.label:26s} {row.status:8s} {row.text} ({row.seconds:.1f} s)", flush=True)
        outcomes.append(Outcome(row.label, row.status, "", row.text, round(row.seconds, 1)))
    return outcomes


def store(path: Path | None, suite: str, outcomes: Iterable[Outcome]) -> None:
    """Write the outcomes of a suite into a JSON file, beside those of other suites."""
    if path is None:
        return
    old = json.loads(path.read_text()) if path.exists() else {}
    old.setdefault(suite, {}).update({o.name: asdict(o) for o in outcomes})
    path.write_text(json.dumps(old, indent=0, sort_keys=True) + "\n")


def _filter(cases: list[Case], pattern: str) -> list[Case]:
    return [case for case in cases if re.search(pattern, case.name)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--node", action="store_true", help="the node cases of the onnx package")
    parser.add_argument("--suite", action="append", default=[], choices=SUITES)
    parser.add_argument("--real", type=Path, help="folder of unpacked model packages")
    parser.add_argument("--only", default="", help="regular expression on case names")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--groups", type=int, default=40, help="groups of failures to print")
    parser.add_argument("--json", type=Path, help="write (and update) the outcomes here")
    parser.add_argument("--doc", type=Path, help="rewrite the tables of this file from --json")
    args = parser.parse_args()
    if args.real:
        store(args.json, "real", report_real(args.real, args.only))
    for suite in (["node"] if args.node else []) + args.suite:
        cases = _filter(node_cases() if suite == "node" else stored_cases(suite), args.only)
        outcomes = list(run_cases(cases, args.workers))
        report(suite, outcomes, args.groups)
        store(args.json, suite, outcomes)
    if args.doc:
        write_tables(args.doc, json.loads(args.json.read_text()))


if __name__ == "__main__":
    main()
