"""The issue's bars, held against a record: met, missed, or not measured with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.cases import RESIDENT
from icd_tvm.tir_schedules.cuda.catalogue import LAYERS, PROJECTIONS, ROWS

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
GEMM_SHARE, GEMV_SHARE, LATENCY, ENERGY, L2_POINTS = 0.80, 0.85, 0.75, 0.80, 10.0
MODELS = ("bert-base", "mamba-2.8b")


class GateResult(NamedTuple):
    """One bar: what, its verdict, the value as text, and the reason or what it was measured at."""

    what: str
    verdict: str
    value: str
    reason: str


def evaluate(record: Mapping[str, Any]) -> list[GateResult]:
    """Return every bar; what was not measured is never met."""
    gates = [_correct(record), _equal(record), _gemm(record, ""), _gemm(record, ", wgmma")]
    gates.append(_gemv(record))
    for model in MODELS:
        for mode in ("warm", "cold"):
            gates.append(_latency(record, model, mode))
        gates.append(_energy(record, model))
    return [*gates, _resident(record)]


def _unknown(what: str, reason: object) -> GateResult:
    text = str(reason)
    return GateResult(what, UNKNOWN, "", text.removeprefix("not measured: "))


def _lookup(part: Any, *keys: str) -> Any:
    """Return what lies under the keys, or the text that stands in its place."""
    for key in keys:
        if isinstance(part, str):
            return part
        part = part.get(key, f"{UNKNOWN}: nothing is recorded for {key}")
    return part


def wrong_values(record: Mapping[str, Any]) -> list[str]:
    """Return the bars on values that are missed: those no speed makes up for."""
    gates = (_correct(record), _equal(record))
    return [f"{gate.what}: {gate.reason}" for gate in gates if gate.verdict == MISSED]


def _correct(record: Mapping[str, Any]) -> GateResult:
    what, found = "kernels against float64", record["correctness"]
    if isinstance(found, str):
        return _unknown(what, found)
    wrong = [name for name, item in found.items() if isinstance(item, dict) and not item["correct"]]
    missing = [name for name, item in found.items() if isinstance(item, str)]
    if wrong:
        return GateResult(what, MISSED, f"{len(wrong)} of {len(found)} wrong", ", ".join(wrong))
    if missing or not found:
        return _unknown(what, f"{len(missing)} of {len(found)}: {_lookup(found, *missing[:1])}")
    return GateResult(what, MET, f"all {len(found)}", "")


def _equal(record: Mapping[str, Any]) -> GateResult:
    what, found = "outputs of a model's arms are equal", record["models"]
    if isinstance(found, str):
        return _unknown(what, found)
    items = {name: item for name, item in found.items() if isinstance(item, dict)}
    checks = {name: item["values"] for name, item in items.items() if "values" in item}
    wrong = [name for name, values in checks.items() if not values["equal"]]
    if wrong:
        return GateResult(what, MISSED, f"{len(wrong)} of {len(checks)} differ", ", ".join(wrong))
    if not checks:
        return _unknown(what, next((v for v in found.values() if isinstance(v, str)), "no model"))
    return GateResult(what, MET, f"all {len(checks)} that ran", "")


def _worst(what: str, names: list[str], value: Callable[[str], Any], least: float) -> GateResult:
    """Hold the lowest share over all names against the least."""
    shares = {name: value(name) for name in names}
    for found in shares.values():
        if isinstance(found, str):
            return _unknown(what, found)
    name = min(shares, key=lambda key: shares[key])
    verdict = MET if shares[name] >= least else MISSED
    return GateResult(what, verdict, f"{100 * shares[name]:.0f} %", f"least at {name}")


def _gemm(record: Mapping[str, Any], path: str) -> GateResult:
    def share(name: str) -> Any:
        ours = _lookup(record["times"], f"{name}{path}", "cold", "us")
        peer = _lookup(record["peers"], name, "us")
        text = next((part for part in (ours, peer) if isinstance(part, str)), None)
        return text or peer / ours

    names = [f"bert {layer} {m} rows fp16" for m in ROWS if m >= 1024 for layer in LAYERS]
    return _worst(
        f"GEMM fp16{path}, speed over cuBLAS >= {100 * GEMM_SHARE:.0f} %", names, share, GEMM_SHARE
    )


def _gemv(record: Mapping[str, Any]) -> GateResult:
    def share(name: str) -> Any:
        ours, copied = _lookup(record["times"], name, "cold", "us"), record["copy_rate"]
        text = next((part for part in (ours, copied) if isinstance(part, str)), None)
        return text or record["predicted"][name]["bytes"] / (ours * 1e-6) / copied

    names = [f"mamba {layer} fp16" for layer in PROJECTIONS]
    what = f"GEMV, share of the copy's bandwidth >= {100 * GEMV_SHARE:.0f} %"
    return _worst(what, names, share, GEMV_SHARE)


def _best(
    record: Mapping[str, Any], what: str, part: str, model: str, keys: tuple[str, ...], bar: float
) -> GateResult:
    """Hold the lowest ratio of a model's float16 cases against the most it may be."""
    found = record[part]
    if isinstance(found, str):
        return _unknown(what, found)
    values = {n: _lookup(item, *keys) for n, item in found.items() if n.startswith(f"{model} ")}
    known = {name: value for name, value in values.items() if not isinstance(value, str)}
    if not known:
        return _unknown(what, next(iter(values.values()), f"no case of {model}"))
    name = min(known, key=lambda key: known[key])
    verdict = MET if known[name] <= bar else MISSED
    return GateResult(what, verdict, f"{known[name]:.3f}", f"{name}, best of {len(known)}")


def _latency(record: Mapping[str, Any], model: str, mode: str) -> GateResult:
    what = f"{model}: iterative/linear latency, {mode} <= {LATENCY}"
    keys = ("ratios", mode, "iterative/linear", "median")
    return _best(record, what, "models", model, keys, LATENCY)


def _energy(record: Mapping[str, Any], model: str) -> GateResult:
    what = f"{model}: iterative/linear J per token <= {ENERGY:.2f}"
    return _best(record, what, "model_energy", model, ("iterative/linear",), ENERGY)


def _resident(record: Mapping[str, Any]) -> GateResult:
    what = f"residency ({RESIDENT.name}): L2 read hits +{L2_POINTS:.0f} points"
    found = _lookup(record["model_counters"], RESIDENT.name)
    if isinstance(found, str):
        return _unknown(what, found)
    keys = [f"{arm}, warm" for arm in ("linear", "iterative")]
    hits = [_lookup(found, key, "summary", "l2_read_hit_pct") for key in keys]
    text = next((part for part in hits if isinstance(part, str) or part is None), "")
    if text != "":
        return _unknown(what, text or "the counter was not collected")
    dram = [_lookup(found, key, "summary", "dram_bytes") for key in keys]
    points = hits[1] - hits[0]
    reason = f"{hits[0]:.1f} % to {hits[1]:.1f} %, DRAM bytes {dram[0]} to {dram[1]}"
    return GateResult(what, MET if points >= L2_POINTS else MISSED, f"{points:+.1f}", reason)
