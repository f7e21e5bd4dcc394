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
    later = {"acceptance", "mamba-big"}
    assert sum(step.limit_s for step in repro.CPU) <= 2 * 3600
    for step in repro.CPU:
        script = step.command.split()[0]
        assert script == "-m" or step.name in later or (ROOT / script).is_file()
    assert len({step.name for step in repro.CPU}) == len(repro.CPU)


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
