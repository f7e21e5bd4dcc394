"""``benchmarks/repro.py``: goes on after failures, resumes, skips with reasons, holds gates."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import repro
import repro_docs
import repro_gates as gates
from repro_gates import Figure

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of small scripts in place of the benchmarks."""
    monkeypatch.setattr(repro, "ROOT", tmp_path)
    (tmp_path / "good.py").write_text("import sys; open(sys.argv[1], 'a').write('x')")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "slow.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); child.wait()"
    )
    return tmp_path


def ended(pid: str) -> bool:
    """Say whether a process is gone, or dead and not waited for, within some seconds."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def grown(out: Path) -> Iterator[Figure]:
    yield gates.most("times run", len((out / "ran").read_text()), 1, digits=0)


STEPS = (
    repro.Step("bad", "bad.py", 60),
    repro.Step("absent", "gone.py", 60),
    repro.Step("needy", "good.py {out}/needy", 60, needs=(lambda: "no data: set X",)),
    repro.Step("good", "good.py {out}/ran", 60, grown),
)


def test_goes_on_resumes_and_reports(
    scripts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repro, "CPU", STEPS)
    arguments = ["--out", str(scripts / "out"), "--work", str(scripts / "work")]
    for _ in range(2):
        assert repro.main(arguments) == 1
        text = (scripts / "out" / "README.md").read_text()
        assert "| bad | failed |" in text
        assert "exit status 3; see " in text
        assert "gone.py is missing from this tree" in text
        assert "no data: set X" in text
        assert "| times run | 1 | at most 1 | met |" in text
    assert "good: done before" in capsys.readouterr().out
    assert repro.main([*arguments, "--fresh", "--only", "good"]) == 1
    assert "**missed**" in (scripts / "out" / "README.md").read_text()
    state = json.loads((scripts / "work" / "cpu" / "state.json").read_text())
    assert state["good"]["status"] == "done"


def test_a_step_over_its_limit_ends_with_its_children(scripts: Path) -> None:
    step = repro.Step("slow", "slow.py {out}/pid", 3)
    found = repro.run_step(step, scripts, scripts)
    assert found["status"] == "failed"
    assert "limit of 3 s" in found["reason"]
    assert ended((scripts / "pid").read_text())


def test_a_gpu_is_asked_for_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(repro, "needs_gpu", lambda: "no NVIDIA driver (install it)")
    assert repro.main(["--gpu", "--out", str(tmp_path)]) == 2
    assert "repro-gpu needs a GPU: no NVIDIA driver" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        repro.main(["--only", "nothing"])
    assert "no step nothing; there are doctor" in capsys.readouterr().err


def test_the_limits_fit_two_hours_and_the_scripts_exist() -> None:
    assert sum(step.limit_s for step in repro.CPU) <= 2 * 3600
    for step in repro.CPU:
        for argv in (step.argv(ROOT), step.lengthened().argv(ROOT)):
            assert argv[1] == "-m" or (ROOT / argv[1]).is_file()
    assert len({step.name for step in repro.CPU}) == len(repro.CPU)


def test_quoted_arguments_and_long_forms() -> None:
    short = repro.Step("s", "x.py 'a b' --out {out}/r", 5, long="x.py --out {out}/r")
    assert short.argv(Path("/o p"))[1:] == ["x.py", "a b", "--out", "/o p/r"]
    long = short.lengthened()
    assert long.argv(Path("/o p"))[1:] == ["x.py", "--out", "/o p/r"]
    assert long.limit_s == 50
    only = repro.Step("s", "x.py", 5)
    assert only.lengthened() is only


def test_the_long_form_is_run_where_there_is_one(
    scripts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (
        repro.Step("both", "bad.py", 60, long="good.py {out}/long"),
        repro.Step("one", "good.py {out}/short", 60),
    )
    monkeypatch.setattr(repro, "CPU", steps)
    assert repro.main(["--long", "--out", str(scripts), "--work", str(scripts / "work")]) == 0
    assert (scripts / "long").exists()
    assert (scripts / "short").exists()


def test_an_unreadable_record_misses_its_gate(tmp_path: Path) -> None:
    step = repro.Step("s", "x", 1, gates.calibration)
    (tmp_path / "calibration.json").write_text("{}")
    (figure,) = repro.figures(step, {"status": "done"}, tmp_path)
    assert figure.met is False
    assert repro.recorded((step,), tmp_path / "nowhere") == {}


def _write(path: Path, record: object) -> None:
    path.write_text(json.dumps(record))


def test_gates_know_a_miss(tmp_path: Path) -> None:
    interval = {"lo": 0.7, "hi": 0.9}
    for case in gates.MAIN_JOB:
        for threads, median in ((1, 0.79), (2, 0.86)):
            ratios = {"iterative/linear": {"median": median, **interval}}
            _write(tmp_path / f"main-job-{case}-{threads}t.json", {"ratios": ratios})
    assert [f.met for f in gates.main_job(tmp_path)] == [*[True, False] * 3, None, None]
    rows = [{"first_error_pct": -6.0, "last_error_pct": 1.0}]
    _write(tmp_path / "cache-model.json", {"kernels": rows})
    assert [f.met for f in gates.cache_model(tmp_path)] == [False]
    _write(tmp_path / "aa-test.json", {"trials": 20, "interval_holds_1": 19, "slowdown_found": 18})
    assert [f.met for f in gates.aa_test(tmp_path)] == [True, False]
    rows = [{"request": "int8", "bar": 0.1, "delta": -0.2}, {"request": "fp8", "delta": 9.0}]
    _write(tmp_path / "quality-quant.json", {"minilm": {"rows": rows}})
    assert [f.met for f in gates.quality_quant(tmp_path)] == [False]


ROW = {
    "latency": {"value": 0.9, "interval": [0.8, 1.0], "verdict": "missed"},
    "quality": {"order_points": -0.2, "transform_points": -1.0},
    "l2": {"linear": {"levels": [{"misses": 2e6}]}, "iterative": {"levels": [{"misses": 1e6}]}},
    "ept": {"value": "not measured", "reason": "no counter"},
}


def test_the_acceptance_table_has_its_gates(tmp_path: Path) -> None:
    gap = {"max_abs_difference": 1.0, "max_abs_logit": 10.0}
    step = {"median": 0.9, "lo": 0.8, "hi": 1.0}
    orders = {"drop 0.5": {"kernels": 0.5, "step": step, **gap}}
    rows: list[dict[str, object]] = [
        {"transform": "S-unit", **ROW},
        {"transform": "int8", **ROW, "latency": {**ROW["latency"], "verdict": "no bar: dense"}},
        {
            "transform": "S+Q", **ROW,
            "latency": {"value": None, "verdict": "no opportunity", "reason": "nothing to move"},
            "quality": {"order_points": None, "reason": "no data"},
            "l2": {"source": "model", "value": None, "reason": "left out"},
        },
        {"transform": "K", "orders": orders},
        {"transform": "S-vec", "failed": "killed"},
        {"transform": "all", "absent": "typeseg is missing"},
    ]  # fmt: skip
    record = {
        "bars": {"latency": 0.8, "quality_points": 0.1},
        "rows": [{"workload": "minilm", **row} for row in rows],
    }
    _write(tmp_path / "acceptance.json", record)
    found = {figure.what: figure for figure in gates.acceptance(tmp_path)}
    missed = [what for what, figure in found.items() if figure.met is False]
    assert missed == [
        "minilm S-unit: iterative/linear",
        "minilm S-unit: what the order changes, points",
        "minilm int8: what the order changes, points",
        "minilm K drop 0.5: difference of their logits",
        "minilm S-vec",
    ]
    assert found["minilm int8: iterative/linear"].bar == "no bar: dense"
    assert found["minilm S+Q: iterative/linear"].value == "not measured: nothing to move"
    assert found["minilm S+Q: quality"].value == "not measured: no data"
    assert found["minilm S+Q: L2 misses (model)"].value == "not measured: left out"
    assert found["minilm K drop 0.5, attention: iterative/linear, minima"].met
    assert found["minilm all"].value == "not measured: typeseg is missing"
    assert found["energy per token"].value == "not measured: no counter"


def test_mamba_is_gated_by_time_outputs_and_tokens(tmp_path: Path) -> None:
    record = {
        "size": "130m",
        "ratios": {"iterative/linear": {"median": 0.7, "lo": 0.6, "hi": 0.8}},
        "iterative_against_linear": {"max_rel": 0.1},
        "greedy_tokens": {"linear": [1, 2], "iterative": [1, 3]},
    }
    _write(tmp_path / "mamba-big.json", record)
    assert [f.met for f in gates.mamba_big(tmp_path)] == [True, False, False]


def test_absent_peers_are_not_measured_and_robustness_has_its_gates(tmp_path: Path) -> None:
    head = {"case": "c", "threads": 1, "arm": "linear", "bar": 0.95}
    line = {**head, "median": 1.0, "fastest_median": "openvino", "missing": ["torch"]}
    _write(tmp_path / "cpu-peers-minilm.json", [line, {**head, "failed": "no openvino"}])
    found = list(gates.cpu_peers(tmp_path))
    assert [f.met for f in found] == [False, None]
    assert found[0].value == "1.000 of openvino, without torch"
    assert found[1].value == "not measured: no openvino"
    _write(tmp_path / "crash-quick.json", {"cases": [{"wrong": ""}, {"wrong": "left behind"}]})
    assert [f.met for f in gates.crash(tmp_path)] == [False]
    _write(tmp_path / "fuzz-quick.json", {"a": {"refused": 3}, "b": {"read": 1, "wrong": 1}})
    (figure,) = gates.fuzz(tmp_path)
    assert (figure.met, figure.what) == (False, "damaged inputs that broke a reader, of 5")


def test_a_row_of_a_decode_step_is_gated_by_the_bandwidth(tmp_path: Path) -> None:
    def line(rows: int, kind: str, share: float, most: float = 1.0) -> dict[str, object]:
        head = {"case": f"GEMV {rows} x 64 x 32 {kind}", "threads": 1, "bar": 0.85, "most": most}
        return {**head, "bandwidth": 3e10, "share": {"median": share, "best": 1.0}}

    lines = [line(1, "fp32", 0.85), line(8, "fp32", 0.7), line(1, "int8", 0.84)]
    _write(tmp_path / "cpu-decode-quick.json", [*lines, line(8, "int8", 0.4, most=0.5)])
    *single, more = gates.cpu_decode(tmp_path)
    assert [figure.met for figure in single] == [True, False]
    assert single[1].value == "0.840 of 30.0 GB/s"
    assert more.what == "lowest share of 2 with 8 rows: GEMV 8 x 64 x 32 int8"
    assert (more.value, more.met) == ("0.400, the multiply-adds allow 0.50", None)


def test_a_bar_in_a_cell_does_not_end_it(tmp_path: Path) -> None:
    step = repro.Step("s", "x", 1, lambda out: iter([Figure("|x|", "1", "", True)]))
    text = repro.table([step], {"s": {"status": "done", "seconds": 1.0}}, tmp_path)
    assert text.splitlines()[-1] == r"| s | done | 1 | \|x\| | 1 |  | met |"


def test_ending_the_run_ends_its_step(scripts: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import repro\n"
        f"repro.ROOT = Path({str(scripts)!r})\n"
        "repro.CPU = (repro.Step('slow', 'slow.py {out}/pid', 60),)\n"
        "sys.exit(repro.main(sys.argv[1:]))"
    )
    arguments = ["--out", str(scripts), "--work", str(scripts / "work")]
    found = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    run = subprocess.Popen([sys.executable, "-c", program, *arguments], env=found)
    pid = scripts / "pid"
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.05)
    run.terminate()
    assert run.wait(30) == 143
    assert ended(pid.read_text())


def test_the_documents_take_their_figures_from_the_records(tmp_path: Path) -> None:
    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "lo": 0.1, "hi": 0.9}

    names = ("iterative/linear", "dense/onnxruntime", "iterative/onnxruntime")
    metrics = {
        "arms": {arm: {"lat_ms": {"median": 2.0}} for arm in ("dense", "linear", "iterative")},
        "ratios": {name: ratio(i / 4) for i, name in enumerate(names, 1)},
    }
    for case in repro_docs.CASES:
        for threads in (1, 2):
            _write(tmp_path / f"main-job-{case}-{threads}t.json", metrics)
    (tmp_path / "docs").mkdir()
    readme, guide = tmp_path / "README.md", tmp_path / "docs" / "Repro.md"
    readme.write_text("| a dense model | - | 9 | why |\n| W8A8 alone | 9 | 9 | why |\nW8A8 alone\n")
    guide.write_text("before\n\n| transform | x |\n|---|---|\n| old | 9 |\n| old | 9 |\n\nafter\n")
    assert repro_docs.rewrite(tmp_path, tmp_path) == [readme, guide]
    assert readme.read_text() == (
        "| a dense model | - | 0.50 (`dense`) | why |\n| W8A8 alone | 0.25 | 0.75 | why |\n"
        "W8A8 alone\n"
    )
    lines = guide.read_text().splitlines()
    assert lines[:4] == ["before", "", "| transform | x |", "|---|---|"]
    assert lines[4] == (
        "| `unit:0.5` | 1 | 2.00 | 2.00 | 2.00 | 0.250 [0.100, 0.900] | 0.500 | 0.750 |"
    )
    assert lines[12:] == ["", "after"]
    assert repro_docs.rewrite(tmp_path, tmp_path) == []


def test_bars_of_a_gpu_are_read_from_its_newest_record(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no record of a GPU"):
        list(gates.gpu_suite(tmp_path))
    parts = ("copy_rate", "times", "peers", "models", "model_energy", "model_counters")
    record = dict.fromkeys(parts, "not measured: late")
    record |= {"schema": "icd/gpu-suite/v2", "predicted": {}, "device": {"name": "X"}}
    for began, correct in (("2026-02-01", True), ("2026-01-01", False)):
        checked = {"correctness": {"a": {"correct": correct}}, "began": began}
        name = f"x-{began}" if correct else f"y-{began}"
        _write(tmp_path / f"{name}.json", {**record, **checked})
    first, *others = gates.gpu_suite(tmp_path)
    assert first.met is True
    assert {figure.met for figure in others} == {None}
    assert all(figure.value == "not measured: late" for figure in others)
