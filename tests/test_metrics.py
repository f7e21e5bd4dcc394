"""Metrics records: what is accepted, what is refused, how they are written, printed and gated."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from icd_tvm.commands.run import GATES
from icd_tvm.errors import ConfigError, MeasurementError, OutputError
from icd_tvm.measure.gates import evaluate_gates, failed_gates, worse_counter
from icd_tvm.measure.metrics import (
    SCHEMA,
    arm_record,
    arms_table,
    validate_metrics,
    write_metrics,
)
from icd_tvm.measure.schema import violations
from icd_tvm.measure.statistics import ratio

LINEAR = np.linspace(0.010, 0.011, 30)


@pytest.fixture
def record() -> dict:
    samples = {"linear": LINEAR, "iterative": 0.6 * LINEAR, "onnxruntime": 0.8 * LINEAR}
    return {
        "schema": SCHEMA,
        "model": "minilm",
        "target": "llvm",
        "env": {"hash": "0"},
        "arms": {name: arm_record(s, tokens_per_call=128) for name, s in samples.items()},
        "ratios": {"iterative/linear": ratio(samples["iterative"], samples["linear"])},
        "equivalence": {"max_abs": 1e-6, "max_rel": np.float32(1e-7)},
        "quality": {
            "metric": "spearman",
            "arms": {"dense": 0.867, "iterative": 0.8665},
            "changes": {"iterative/dense": {"agreement": 0.999, "interval_points": [-0.2, 0.1]}},
        },
        "groups": [],
        "gates": [],
        "decision": {"accepted": True, "reason": "faster"},
        "peers": {"onnxruntime": {}},
        "not_measured": {
            "l2_hit_pct": "no counters",
            "dram_bytes": "no counters",
            "ept_j_per_tok": "no counter",
        },
    }


def test_round_trip(record: dict, tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "new" / "metrics.json", record)
    back = json.loads(path.read_text())
    assert back["arms"]["linear"]["lat_ms"]["median"] == pytest.approx(10.5)
    assert back["arms"]["linear"]["toks_per_s"] == pytest.approx(128 / 0.0105)
    assert back["ratios"]["iterative/linear"]["p_faster"] == 1.0
    validate_metrics(back)
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_arm_record_says_what_was_measured() -> None:
    arm = arm_record(LINEAR, l2_hit_pct=71.0)
    assert arm["source"]["l2_hit_pct"] == "measured"
    assert arm["source"]["dram_bytes"] == "not measured"
    assert arm["toks_per_s"] is None
    with pytest.raises(ConfigError, match="unknown counter 'l3'"):
        arm_record(LINEAR, l3=1.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", "v0", "expected 'icd/metrics/v1'"),
        ("arms.linear.lat_ms.median", float("nan"), "arms.linear.lat_ms.median is nan"),
        ("arms.linear.lat_ms.median", float("inf"), "not a finite number"),
        ("arms.linear.lat_ms.n", 2.5, "n is float, expected integer"),
        ("arms.linear.lat_ms.n", True, "n is bool"),
        ("arms.linear.l2_hit_pct", 101.0, "above 100"),
        ("arms.linear.lat_ms.min", -1.0, "below 0"),
        ("env.deep", [{"x": float("nan")}], r"env.deep\[0\].x is nan"),
        ("ratios.iterative/linear.p_faster", 1.5, "above 1"),
        ("decision.accepted", "yes", "accepted is str, expected boolean or null"),
        ("gates", [{"name": "x"}], r"gates\[0\].status is missing"),
        ("env.3", {3: 1}, "which is no string"),
    ],
)
def test_wrong_values_are_refused(record: dict, path: str, value: object, message: str) -> None:
    *parents, last = path.split(".")
    place = record
    for name in parents:
        place = place[name]
    place[last] = value
    with pytest.raises(MeasurementError, match=message):
        validate_metrics(record)


@pytest.mark.parametrize("field", ["arms", "decision", "not_measured", "ratios", "groups"])
def test_missing_fields_are_refused(record: dict, field: str) -> None:
    del record[field]
    with pytest.raises(MeasurementError, match=f"{field} is missing"):
        validate_metrics(record)


@pytest.mark.parametrize("field", ["dram_bytes", "quality"])
def test_null_needs_a_reason(record: dict, field: str) -> None:
    record["quality"] = None
    record["not_measured"]["quality"] = "not asked for"
    validate_metrics(record)
    del record["not_measured"][field]
    with pytest.raises(MeasurementError, match=f"{field} is null without a reason"):
        validate_metrics(record)


def test_null_peers_need_a_reason(record: dict) -> None:
    record["peers"] = None
    with pytest.raises(MeasurementError, match="peers is null without a reason"):
        validate_metrics(record)
    record["not_measured"]["peers"] = "timed elsewhere"
    validate_metrics(record)


def test_undecided_is_allowed(record: dict) -> None:
    record["decision"]["accepted"] = None
    validate_metrics(record)


def test_invalid_record_leaves_the_old_file(record: dict, tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.json", record)
    before = path.read_text()
    broken = copy.deepcopy(record)
    broken["equivalence"]["max_abs"] = float("nan")
    with pytest.raises(MeasurementError):
        write_metrics(path, broken)
    assert path.read_text() == before


def test_unwritable_folder(record: dict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_metrics(tmp_path / "file" / "metrics.json", record)


def test_target_that_is_a_folder_leaves_no_temporary_file(record: dict, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_metrics(tmp_path / "metrics.json", record)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_table(record: dict) -> None:
    head, *rows = arms_table(record).splitlines()
    cells = {row.split()[0]: row.split() for row in rows}
    assert "/linear" in head
    assert "/onnxruntime" in head
    assert cells["linear"][1:6] == ["10.500", "10.050", "10.950", "10.000", "1.000"]
    assert cells["iterative"][5:] == ["0.600", "[0.600,", "0.600]", "1.000", "0.750"]
    assert len({len(line.rstrip()) for line in (head, *rows)}) == 1


def test_table_without_the_baseline(record: dict) -> None:
    del record["arms"]["linear"]
    record["ratios"] = {}
    assert arms_table(record, peers=()).splitlines()[1].split()[5:] == ["-", "-", "-"]


def gates(record: dict, **options: float) -> dict:
    return {gate["name"]: gate for gate in evaluate_gates(record, **options)}


def test_gates_pass_and_unmeasured(record: dict) -> None:
    found = gates(record)
    assert {name: gate["status"] for name, gate in found.items()} == {
        "latency": "pass",
        "l2": "not measured",
        "energy": "not measured",
        "quality": "pass",
    }
    assert found["latency"]["value"] == pytest.approx(40)
    assert found["l2"]["reason"] == "no counters"
    assert found["quality"]["value"] == pytest.approx(-0.05)
    assert found["latency"]["interval"] == pytest.approx([40, 40])
    assert found["quality"]["interval"] == [-0.2, 0.1]
    assert found["l2"]["interval"] is None
    record["gates"] = list(found.values())
    validate_metrics(record)


@pytest.mark.parametrize("quality", [0.87, 0.86])
def test_gates_fail(record: dict, quality: float) -> None:
    record["quality"]["arms"]["iterative"] = quality
    found = gates(record, latency_gain_pct=50)
    assert found["latency"]["status"] == "fail"
    assert found["quality"]["status"] == "fail"


def test_equal_quality_of_other_outputs_fails(record: dict) -> None:
    change = record["quality"]["changes"]["iterative/dense"]
    change["agreement"] = 0.9
    assert gates(record)["quality"]["status"] == "fail"
    assert gates(record, quality_agreement=0.9)["quality"]["status"] == "pass"
    record["quality"]["changes"] = {}
    unknown = gates(record)["quality"]
    assert (unknown["status"], unknown["value"]) == ("not measured", None)
    assert "agreement" in unknown["reason"]


@pytest.mark.parametrize(
    ("asked", "names"),
    [((), ["quality"]), (("latency",), []), (("l2",), ["l2"]), (("energy", "quality"), 2)],
)
def test_gates_that_stop_a_caller(record: dict, asked: tuple, names: list | int) -> None:
    record["quality"]["arms"]["iterative"] = 0.8
    found = failed_gates(list(gates(record).values()), asked)
    if isinstance(names, int):
        assert len(found) == names
    else:
        assert [line.split(":")[0] for line in found] == names


def test_a_gate_that_is_asked_for_and_missing_stops_a_caller() -> None:
    assert failed_gates([], ["energy"]) == ["energy: not measured, the record has no such gate"]
    assert failed_gates([], []) == []


def test_an_interval_around_the_threshold_is_told(record: dict) -> None:
    record["ratios"]["iterative/linear"] |= {"median": 0.77, "lo": 0.7, "hi": 0.9}
    latency = gates(record)["latency"]
    assert latency["status"] == "pass"
    assert latency["interval"] == pytest.approx([10, 30])
    assert "more calls may decide otherwise" in latency["reason"]
    record["ratios"]["iterative/linear"]["hi"] = 0.79
    assert "otherwise" not in gates(record)["latency"]["reason"]


def test_energy_has_the_interval_of_its_windows(record: dict) -> None:
    def windows(*joules: float) -> dict:
        return {"windows": [{"joules": value, "calls": 1, "seconds": 5.0} for value in joules]}

    for arm, value in (("linear", 4.0), ("iterative", 3.0)):
        record["arms"][arm]["ept_j_per_tok"] = value
    assert gates(record)["energy"]["interval"] is None
    record["energy"] = {"linear": windows(4, 8, 4, 8), "iterative": windows(3, 6, 3, 6)}
    # The chip's drift is in both windows of a pair.
    assert gates(record)["energy"]["interval"] == pytest.approx([25, 25])
    record["energy"]["iterative"] = windows(3, 6.6, 2.7, 6)
    low, high = gates(record)["energy"]["interval"]
    logs = np.log([0.75, 0.825, 0.675, 0.75])
    # Student's 97.5 % point for three degrees of freedom, from a table.
    reach = 3.182 * logs.std(ddof=1) / 2
    expected = [100 * (1 - np.exp(logs.mean() + s * reach)) for s in (1, -1)]
    assert [low, high] == pytest.approx(expected, rel=1e-3)
    record["energy"]["iterative"] = windows(3)
    assert gates(record)["energy"]["interval"] is None


def test_command_line_knows_the_gates(record: dict) -> None:
    assert tuple(gates(record)) == GATES


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"joules_per_call": 1.0}, {"joules_per_call": 1.1}, "energy"),
        ({"l2_hit_pct": 70.0}, {"l2_hit_pct": 69.0}, "L2"),
        ({"joules_per_call": 1.0}, {"joules_per_call": 1.01}, ""),
        ({"joules_per_call": 1.0}, {"l2_hit_pct": 1.0}, ""),
        ({}, {}, ""),
    ],
)
def test_a_worse_counter_is_named(old: dict, new: dict, said: str) -> None:
    found = worse_counter({"linear": old, "iterative": new}, "iterative", "linear")
    assert found.startswith(said)
    assert bool(found) is bool(said)


def test_counters_are_gated(record: dict) -> None:
    for name, hit, energy in (("linear", 60.0, 2.0), ("iterative", 72.0, 1.9)):
        record["arms"][name]["l2_hit_pct"] = hit
        record["arms"][name]["ept_j_per_tok"] = energy
    found = gates(record)
    assert (found["l2"]["status"], found["l2"]["value"]) == ("pass", 12.0)
    assert found["energy"]["status"] == "fail"
    assert found["energy"]["value"] == pytest.approx(5)


def test_gates_without_arms(record: dict) -> None:
    record.update(arms={}, ratios={}, quality=None)
    assert {gate["status"] for gate in gates(record).values()} == {"not measured"}


def test_schema_types() -> None:
    schema = {"properties": {"a": {"type": ["array", "null"]}}, "additionalProperties": False}
    assert list(violations({"a": None}, schema, schema)) == []
    assert list(violations({"a": 1}, schema, schema)) == ["a is int, expected array or null"]
    assert list(violations({"b": 1}, schema, schema)) == ["b is unknown"]
