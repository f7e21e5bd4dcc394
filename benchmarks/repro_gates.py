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
    """Right on a smaller cache, and faster at 4,096 slots than with the dropped slots masked."""
    record = _read(out / "kv-step-4096.json")
    for row in record["verify"]:
        cache = f"drop {row['drop']}, {row['dtype'] or 'float32'}"
        what = f"{cache}: same token as attention over the kept tokens"
        yield least(what, row["same_token_as_reference"], 1.0)
    yield from cache_orders(record["time"][0]["orders"])


def cache_orders(orders: dict[str, Any]) -> Iterator[Figure]:
    """iterative/linear of a compacted cache: the kernels that touch it, and the whole step."""
    for drop, row in orders.items():
        yield most(f"{drop}, attention: iterative/linear, minima", row["kernels"], 0.80)
        step = row["step"]
        text = f"{step['median']:.3f} [{step['lo']:.3f}, {step['hi']:.3f}]"
        yield Figure(f"{drop}, whole step: iterative/linear", text)
        gap = row["max_abs_difference"] / row["max_abs_logit"]
        met = gap <= 1e-3
        yield Figure(f"{drop}: difference of their logits", f"{gap:.1e}", "at most 0.001", met)


def acceptance(out: Path) -> Iterator[Figure]:
    """Latency, caches and quality of every row; energy where a row has it."""
    record = _read(out / "acceptance.json")
    for row in record["rows"]:
        name = f"{row['workload']} {row['transform']}"
        if "absent" in row:
            yield Figure(name, f"not measured: {row['absent']}")
        elif "failed" in row:
            yield Figure(name, f"failed: {row['failed']}", "runs", False)
        elif "orders" in row:
            for figure in cache_orders(row["orders"]):
                yield figure._replace(what=f"{name} {figure.what}")
        else:
            yield from _acceptance_row(name, row, record["bars"])
    reasons = {row.get("ept", {}).get("reason") for row in record["rows"]} - {None}
    for reason in sorted(reasons):
        yield Figure("energy per token", f"not measured: {reason}")


def _acceptance_row(name: str, row: dict[str, Any], bars: dict[str, float]) -> Iterator[Figure]:
    fast, good, l2 = row["latency"], row["quality"], row["l2"]
    if fast["value"] is None:
        yield Figure(f"{name}: iterative/linear", f"not measured: {fast['reason']}")
    elif fast["verdict"] in ("met", "missed"):
        note = f" [{fast['interval'][0]:.3f}, {fast['interval'][1]:.3f}]"
        yield most(f"{name}: iterative/linear", fast["value"], bars["latency"], note)
    else:
        yield Figure(f"{name}: iterative/linear", f"{fast['value']:.3f}", fast["verdict"])
    if good["order_points"] is None:
        yield Figure(f"{name}: quality", f"not measured: {good['reason']}")
    else:
        note = f" (the transform: {good['transform_points']:+.2f})"
        what = f"{name}: what the order changes, points"
        yield most(what, abs(good["order_points"]), bars["quality_points"], note)
    if "linear" in l2:
        orders = [l2[order]["levels"][-1] for order in ("linear", "iterative") if order in l2]
        text = " -> ".join(f"{level['misses'] / 1e6:.3f} M" for level in orders)
        yield Figure(f"{name}: L2 misses, linear -> iterative (model)", text)
    else:
        yield Figure(f"{name}: L2 misses (model)", f"not measured: {l2['reason']}")


def mamba_big(out: Path) -> Iterator[Figure]:
    """iterative/linear of a decode step, and that both are one function."""
    record = _read(out / "mamba-big.json")
    size, ratio = record["size"], record["ratios"]["iterative/linear"]
    note = f" [{ratio['lo']:.3f}, {ratio['hi']:.3f}]"
    yield most(f"Mamba {size}, unit:0.5 + int8: iterative/linear", ratio["median"], 0.80, note)
    gap = record["iterative_against_linear"]["max_rel"]
    yield Figure("difference of their outputs", f"{gap:.1e}", "at most 1e-3", gap <= 1e-3)
    tokens = record["greedy_tokens"]
    same = tokens["iterative"] == tokens["linear"]
    yield Figure("their next tokens", "equal" if same else "different", "equal", same)


def cpu_peers(out: Path) -> Iterator[Figure]:
    """Ours over the fastest peer that is installed; "not measured" where none is."""
    for line in _read(out / "cpu-peers-minilm.json"):
        what = f"{line['case']}, {line['threads']} thread(s): {line['arm']}/fastest peer"
        if "failed" in line:
            yield Figure(what, f"not measured: {line['failed']}")
            continue
        missing = f", without {', '.join(line['missing'])}" if line["missing"] else ""
        note = f" of {line['fastest_median']}{missing}"
        yield most(what, line["median"], line["bar"], note)


def cpu_decode(out: Path) -> Iterator[Figure]:
    """Share of the read bandwidth: every product of one row, the lowest one of more rows."""
    products: dict[int, list[dict[str, Any]]] = {}
    for line in _read(out / "cpu-decode-quick.json"):
        products.setdefault(int(line["case"].split()[1]), []).append(line)
    for line in products.pop(1):
        note = f" of {line['bandwidth'] / 1e9:.1f} GB/s"
        what = f"{line['case']}, {line['threads']} thread(s): share of the bandwidth"
        yield least(what, line["share"]["median"], line["bar"], note)
    for rows, lines in products.items():
        low = min(lines, key=lambda line: line["share"]["median"])
        value = f"{low['share']['median']:.3f}, the multiply-adds allow {low['most']:.2f}"
        yield Figure(f"lowest share of {len(lines)} with {rows} rows: {low['case']}", value)


# Of quality_quant.py, which has more; the others stand in docs/Quantisation.md.
REQUESTS = (
    "int8",
    "int8:w8a8:smooth0.75",
    "int8:w8a8:attention:smooth0.75",
    "bf16:attention",
)


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


def crash(out: Path) -> Iterator[Figure]:
    """How many killed runs ended as if nothing had been."""
    cases = _read(out / "crash-quick.json")["cases"]
    right = sum(not case["wrong"] for case in cases)
    yield least(f"resumed runs that ended right, of {len(cases)}", right, len(cases), digits=0)


def fuzz(out: Path) -> Iterator[Figure]:
    """How many damaged inputs were neither refused nor read."""
    kinds = _read(out / "fuzz-quick.json")
    wrong = sum(kind.get("wrong", 0) for kind in kinds.values())
    count = wrong + sum(kind.get(how, 0) for kind in kinds.values() for how in ("refused", "read"))
    yield most(f"damaged inputs that broke a reader, of {count}", wrong, 0, digits=0)


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
