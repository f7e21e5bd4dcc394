"""What ``repro.py`` reads from the raw records of its steps, each figure beside its bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One line of the table; ``met`` is None where there is no bar."""

    what: str
    value: str
    bar: str = ""
    met: bool | None = None


Gate = Callable[[Path], Iterator[Figure]]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def most(what: str, value: float, bar: float, note: str = "", digits: int = 3) -> Figure:
    """Return a figure that must not lie above its bar."""
    return Figure(what, f"{value:.{digits}f}{note}", f"at most {bar:g}", value <= bar)


def least(what: str, value: float, bar: float, note: str = "", digits: int = 3) -> Figure:
    """Return a figure that must not lie below its bar."""
    return Figure(what, f"{value:.{digits}f}{note}", f"at least {bar:g}", value >= bar)


# File -> bar of iterative/linear; as in main_job.py.
MAIN_JOB = {
    "unit-0.5": 0.80,
    "vec16-0.5": 0.85,
    "unit-0.5-int8-w8a8-smooth0.75": 0.80,
    "int8-w8a8-smooth0.75": None,
}


def main_job(out: Path) -> Iterator[Figure]:
    """iterative/linear of every case, its outputs, and dense against ONNX Runtime."""
    for case, bar in MAIN_JOB.items():
        for threads in (1, 2):
            record = _read(out / f"main-job-{case}-{threads}t.json")
            ratio = record["ratios"]["iterative/linear"]
            note = f" [{ratio['lo']:.3f}, {ratio['hi']:.3f}]"
            what = f"{case}, {threads} thread(s): iterative/linear"
            if bar is None:
                yield Figure(what, f"{ratio['median']:.3f}{note}")
            else:
                yield most(what, ratio["median"], bar, note)
            peer = record["ratios"].get("dense/onnxruntime")
            if peer is not None:
                yield most(f"{case}, {threads} thread(s): dense/ORT", peer["median"], 1.0)


def calibration(out: Path) -> Iterator[Figure]:
    """Rank correlation of U with measured time."""
    summary = _read(out / "calibration.json")["summary"]
    found = summary["median"][summary["decision"]]
    yield least(f"median Spearman of {summary['decision']} and time", found["spearman"], 0.6)


def cache_model(out: Path) -> Iterator[Figure]:
    """The largest error of the cache model against cachegrind."""
    rows = _read(out / "cache-model.json")["kernels"]
    worst = max(max(abs(r["first_error_pct"]), abs(r["last_error_pct"])) for r in rows)
    yield most(f"largest error over {len(rows)} kernels, %", worst, 5.0)


def aa_test(out: Path) -> Iterator[Figure]:
    """How often equal arms are called equal, and a planted slowdown is found."""
    record = _read(out / "aa-test.json")
    for key in ("interval_holds_1", "slowdown_found"):
        yield least(f"{key}, share of {record['trials']}", record[key] / record["trials"], 0.95)


def overhead(out: Path) -> Iterator[Figure]:
    """The worst shares of bookkeeping."""
    records = _read(out / "overhead.json")["records"]
    for key, bar in (("events_pct", 1.0), ("profiling_pct", 5.0)):
        yield most(f"worst {key}", max(r[key] for r in records), bar)


def solver(out: Path) -> Iterator[Figure]:
    """On how many cases no peer is better."""
    verdicts = _read(out / "solver-quick.json")["against the best peer"]
    won = sum(v["ok"] for v in verdicts)
    yield least(f"cases not beaten by a peer, of {len(verdicts)}", won, len(verdicts), digits=0)


def kv_step(out: Path) -> Iterator[Figure]:
    """Right on a smaller cache, and faster at 4,096 slots."""
    record = _read(out / "kv-step-4096.json")
    for row in record["verify"]:
        what = f"drop {row['drop']}: same token as attention over the kept tokens"
        yield least(what, row["same_token_as_reference"], 1.0)
    row = record["time"][0]
    for drop, bar in (("drop 0.3", None), ("drop 0.5", 0.80)):
        ratio = row["kv_min_ms"][drop] / row["kv_min_ms"]["whole"]
        what = f"{drop}: kernels that touch the cache, ratio of minima"
        yield most(what, ratio, bar) if bar else Figure(what, f"{ratio:.3f}")
        yield Figure(
            f"{drop}: whole step, ratio", f"{row['ratios'][drop + '/whole']['median']:.3f}"
        )


# Of quality_quant.py, which has more; the others stand in docs/Quantisation.md.
REQUESTS = ("int8", "int8:w8a8:smooth0.75")


def quality_quant(out: Path) -> Iterator[Figure]:
    """The change of quality of MiniLM that each request makes."""
    for row in _read(out / "quality-quant.json")["minilm"]["rows"]:
        if row["request"] in REQUESTS:
            what = f"{row['request']}: size of the change of STS-B, points"
            yield most(what, abs(row["delta"]), row["bar"])


def sparsity_quality(out: Path) -> Iterator[Figure]:
    """What each format costs; pruning in one shot has no bar."""
    rows = _read(out / "sparsity-quality.json")["table"]
    for row in (row for row in rows if row["removed"] > 0.45):
        removed = f"{100 * row['removed']:.0f} % removed"
        points = f"{row['stsb_delta_points']:+.2f}"
        yield Figure(f"{row['format']}, {removed}: change of STS-B, points", points)


def kv_quality(out: Path) -> Iterator[Figure]:
    """Perplexity on the smaller cache; a trade, not a gate."""
    rows = _read(out / "kv-quality-quick.json")["rows"]
    for row in (row for row in rows if row["score"] == "attention_mass"):
        what = f"drop {row['drop']}, {row['score']}, {row['scope']}: perplexity"
        yield Figure(what, f"{row['ppl']:.2f} (whole {row['ppl_whole']:.2f})")


def gpu_suite(out: Path) -> Iterator[Figure]:
    """The bars of the newest record of a GPU; what was not measured has no verdict."""
    # Only this needs the tree's root on the path: the suite is a package.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.gpu.gates import UNKNOWN, evaluate

    records = [_read(path) for path in sorted(out.glob("*-20??-??-??.json"))]
    found = [r for r in records if r.get("schema") == "icd/gpu-suite/v2" and r["device"]]
    if not found:
        raise FileNotFoundError(f"{out} holds no record of a GPU")
    latest = max(found, key=lambda record: record["began"])
    for gate in evaluate(latest):
        met = None if gate.verdict == UNKNOWN else gate.verdict == "met"
        value = f"{gate.value} ({gate.reason})" if gate.value else f"not measured: {gate.reason}"
        yield Figure(gate.what, value, "", met)


def exit_status(out: Path) -> Iterator[Figure]:
    """The script's exit status is its gate."""
    yield Figure("exit status", "0", "0", True)
