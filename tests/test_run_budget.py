"""``quality.budget``: rates are searched before the transform, kept, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from budget_models import Distance, two_mlps
from run_support import not_to_be_called, quietly, settings
from tiny_model import tiny_onnx

from icd_tvm.cli import main
from icd_tvm.commands.run import config_from, parser
from icd_tvm.config import Config
from icd_tvm.config_file import make_config
from icd_tvm.errors import ConfigError, MissingDependencyError
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build
from icd_tvm.runtime import budget_search, budget_tasks
from icd_tvm.runtime.budget_search import read_budget
from icd_tvm.runtime.budget_tasks import TASKS, BudgetTasks, find_tasks
from icd_tvm.runtime.events import EventLog
from icd_tvm.runtime.progress import Stage
from icd_tvm.runtime.run import plan
from icd_tvm.runtime.states import State
from icd_tvm.runtime.transforms import find_transforms

IDLE = {"b/up:1": 0.5}


def keys(model: Path, points: float = 1e-3, sparsity: str = "unit") -> dict[str, Any]:
    return settings(
        model,
        transform={"sparsity": f"{sparsity}; min-size=0"},
        quality={"budget": points, "agreement_floor": 0.9},
        measure={"enabled": False},
    )


def stand_in(proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give ``proto`` a task: points fall with the distance from its dense outputs."""
    first, second = (Distance(seed, model=proto) for seed in (1, 2))
    monkeypatch.setitem(TASKS, "stsb", lambda *_: BudgetTasks(first, second, second))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Half of the second layer's units are idle; nothing else fits the budget."""
    path = tmp_path / "two.onnx"
    onnx.save(two_mlps(), path)
    stand_in(two_mlps(), monkeypatch)
    return path


def test_the_rates_found_are_those_of_the_transform(model: Path, tmp_path: Path) -> None:
    found = quietly(keys(model), tmp_path / "run")
    record = found.metrics
    validate_metrics(record)
    assert found.failure is None
    assert record["flags"] == []
    budget = record["quality"]["budget"]
    assert budget == json.loads((tmp_path / "run" / "budget.json").read_text())
    assert budget["rates"] == IDLE
    assert (budget["points"], budget["agreement_floor"]) == (1e-3, 0.9)
    assert [c["stage"] for c in budget["candidates"]][-2:] == ["held-out", "final"]
    entries = record["transform"]["sparsity"]["entries"]
    assert {entry["group"]: entry["rate"] for entry in entries} == IDLE


def test_the_given_rate_is_the_strongest(model: Path, tmp_path: Path) -> None:
    budget = quietly(keys(model, sparsity="unit:0.4"), tmp_path / "run").metrics["quality"][
        "budget"
    ]
    assert budget["rates"] == {"b/up:1": 0.4}
    assert max(rate for c in budget["candidates"] for rate in c["rates"].values()) == 0.4


def test_a_resumed_run_does_not_search_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def stopping(log: EventLog, stage: Stage) -> None:
        append(log, stage)
        if stage.stage == State.TRANSFORMED:
            raise Killed

    append = EventLog.append
    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "append", stopping)
        with pytest.raises(Killed):
            quietly(keys(model), tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "budget.json").read_text())
    monkeypatch.setattr(budget_search, "search_strengths", not_to_be_called)
    # Nor does it need the data.
    monkeypatch.setitem(TASKS, "stsb", not_to_be_called)
    found = quietly(keys(model), tmp_path / "run", resume=True)
    assert found.failure is None
    assert found.metrics["quality"]["budget"] == kept
    entries = found.metrics["transform"]["sparsity"]["entries"]
    assert {entry["group"]: entry["rate"] for entry in entries} == IDLE


def test_no_sparsity_fits_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = two_mlps(idle=0.0)
    onnx.save(proto, tmp_path / "busy.onnx")
    stand_in(proto, monkeypatch)
    found = quietly(keys(tmp_path / "busy.onnx", 1e-9), tmp_path / "run")
    record = found.metrics
    assert found.failure is None
    assert record["quality"]["budget"]["found"] is False
    assert record["transform"]["sparsity"]["entries"] == []
    reason = "no sparsity fits this budget; the nearest, "
    assert [reason in flag["reason"] for flag in record["flags"]] == [True]
    assert record["decision"]["reason"].startswith("no opportunity: sparsity unit; min-size=0: ")
    assert reason in record["decision"]["reason"]
    assert record["decision"]["arm"] == "linear"


# Refusals.


def test_a_model_without_a_task_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_onnx(tmp_path / "tiny.onnx")
    assert main(["compile", str(path), "--sparsity", "unit", "--quality-budget", "0.1"]) == 2
    error = capsys.readouterr().err
    assert "error ICD-E201: quality.budget: " in error
    assert "does not read BERT-uncased tokens" in error
    with pytest.raises(ConfigError, match="has no quality that stsb tells"):
        plan(keys(path), out=tmp_path / "run")


def encoder_and_config() -> tuple[Any, Config]:
    config = make_config(
        {
            "model": {"name": "bert-mini-random"},
            "transform": {"sparsity": "unit"},
            "quality": {"budget": 0.1},
        }
    )
    return import_onnx(build("bert-mini-random")), config


def test_random_weights_have_no_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_tasks, "reads_text", lambda imported: True)
    with pytest.raises(ConfigError, match="its weights are random"):
        find_tasks(*encoder_and_config())


def test_absent_data_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budget_tasks, "reads_text", lambda imported: True)
    monkeypatch.setenv("ICD_DATA", str(tmp_path / "absent"))
    imported, config = encoder_and_config()
    del imported.model.metadata_props[:]
    with pytest.raises(MissingDependencyError, match="ICD_DATA"):
        find_tasks(imported, config)


def test_stsb_tasks_are_disjoint_and_as_long_as_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_tasks, "reads_text", lambda imported: True)
    pairs = [("a", "b", 1.0)] * 40
    monkeypatch.setattr("icd_tvm.measure.quality_task.stsb_pairs", lambda split: pairs)
    monkeypatch.setattr(budget_tasks, "encode", lambda texts, seq: {})
    imported, config = encoder_and_config()
    del imported.model.metadata_props[:]
    tasks = find_tasks(imported, config)
    assert [t.split for t in (tasks.calibration, tasks.held_out, tasks.final)] == [
        "train",
        "dev",
        "dev",
    ]
    assert {t.seq for t in (tasks.calibration, tasks.held_out, tasks.final)} == {16}
    # A built-in model has a free form; what is compiled has a fixed one.
    assert [t.fixed for t in (tasks.calibration, tasks.held_out, tasks.final)] == [
        False,
        False,
        True,
    ]
    assert tasks.final.batch == 1
    assert tasks.model.graph.input[0].type.tensor_type.shape.dim[1].dim_param


@pytest.mark.parametrize("metric", ["sst2", "bytes", "wikitext"])
def test_every_plugin_has_two_parts(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def make_task(text: str, inputs: Any, *, search: bool) -> Any:
        asked.append((text, search))
        return Distance(int(search))

    monkeypatch.setattr(budget_tasks, "make_task", make_task)
    monkeypatch.setattr(budget_tasks, "reads_text", lambda imported: True)
    imported, config = encoder_and_config()
    config = config.model_copy(
        update={"quality": config.quality.model_copy(update={"metric": f"{metric}:12"})}
    )
    with pytest.raises(ConfigError, match=f"no quality that {metric} tells: its weights are rand"):
        find_tasks(imported, config)
    del imported.model.metadata_props[:]
    tasks = find_tasks(imported, config)
    assert asked == [(f"{metric}:12", True), (f"{metric}:12", False)]
    assert (tasks.calibration.seed, tasks.held_out.seed) == (1, 0)
    assert tasks.final is tasks.held_out
    assert tasks.model is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "other", "reason": "", "rules": {}, "found": false}',
        '{"format": "icd/budget/v1", "reason": "", "rules": {"a": "units:0.5"}, "found": true}',
        '{"format": "icd/budget/v1", "reason": "", "rules": {}, "found": true}',
        '{"format": "icd/budget/v1", "reason": "", "rules": [], "found": false}',
    ],
)
def test_a_damaged_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "budget.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="remove it to search again"):
        read_budget(path)


def test_the_budget_is_part_of_what_an_order_was_made_from(model: Path) -> None:
    texts = [find_transforms(make_config(keys(model, points)))[0].text for points in (0.1, 0.2)]
    assert texts[0] == "unit; min-size=0 within 0.1 points and a cosine of 0.9"
    assert texts[0] != texts[1]


def test_the_flag_of_run_is_the_key(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(settings(model)))
    arguments = parser().parse_args(["-c", str(path), "--quality-budget", "0.25"])
    assert config_from(arguments).quality.budget == 0.25
