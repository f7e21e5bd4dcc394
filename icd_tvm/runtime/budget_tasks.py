"""The data that a quality budget is spent on, for the models that have a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import onnx

from icd_tvm.config import Config, ModelKeys
from icd_tvm.errors import ConfigError
from icd_tvm.measure.quality_task import QualityTask, StsbTask
from icd_tvm.models.calibration import reads_text
from icd_tvm.models.importer import ImportedModel
from icd_tvm.models.registry import MODELS
from icd_tvm.models.registry import build as build_model
from icd_tvm.models.tokenize import encode
from icd_tvm.runtime.evaluate import parse_quality

DEFAULT_METRIC = "stsb"
# Every 16th pair of STS-B train, 360 in all, judges candidates.
SEARCH_STEP = 16
FREE_BATCH = 16


@dataclass(frozen=True)
class BudgetTasks:
    """What :func:`icd_tvm.runtime.quality_budget.search_strengths` judges candidates on.

    Attributes
    ----------
    calibration, held_out : QualityTask
        On disjoint data.
    final : QualityTask
        ``held_out`` in the shape that is compiled.
    model : onnx.ModelProto or None
        The model with free shapes, where there is one: short inputs then cost less.
    """

    calibration: QualityTask
    held_out: QualityTask
    final: QualityTask
    model: onnx.ModelProto | None = None


def _stsb(imported: ImportedModel, keys: ModelKeys) -> BudgetTasks:
    _require_trained_encoder(imported)
    batch, seq = imported.inputs[0].shape
    free = _free_form(keys)
    size = batch if free is None else FREE_BATCH
    train, dev = (
        StsbTask(split, step=step, seq=seq, batch=size, fixed=free is None)
        for split, step in (("train", SEARCH_STEP), ("dev", 1))
    )
    # Absent data is a reason to refuse before anything is done.
    for task in (train, dev):
        _ = task.source
    encode([""], seq)
    return BudgetTasks(train, dev, StsbTask("dev", seq=seq, batch=batch), free)


# Name of the metric -> (model, its configuration) -> data.
TASKS: dict[str, Callable[[ImportedModel, ModelKeys], BudgetTasks]] = {"stsb": _stsb}


def find_tasks(imported: ImportedModel, config: Config) -> BudgetTasks:
    """Return the data that a model's quality budget is spent on.

    Raises
    ------
    ConfigError
        If the model has no task.
    MissingDependencyError
        If the data or the tokenizer is absent.
    """
    metric, _ = parse_quality(config.quality.metric or DEFAULT_METRIC)
    return TASKS[metric](imported, config.model)


def _require_trained_encoder(imported: ImportedModel) -> None:
    why = ""
    if not reads_text(imported):
        why = "it does not read BERT-uncased tokens"
    elif {p.key: p.value for p in imported.model.metadata_props}.get("weights") == "random":
        why = "its weights are random"
    if why:
        raise ConfigError(
            f"quality.budget: {imported.name} has no task that tells its quality: {why}",
            "only sentence encoders such as minilm can be searched; give rates instead",
        )


def _free_form(keys: ModelKeys) -> onnx.ModelProto | None:
    """Return a built-in model with symbolic sizes; a file has the sizes it was compiled for."""
    if keys.name is None:
        return None
    if not {"seq", "batch"} <= inspect.signature(MODELS[keys.name][0]).parameters.keys():
        return None
    return build_model(keys.name, seq="seq", batch="batch")
