"""The data that a quality budget is spent on, for the models that have a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import onnx

from icd_tvm.config import Config, ModelKeys
from icd_tvm.errors import ConfigError
from icd_tvm.measure.quality_plugins import make_task, parse_quality
from icd_tvm.measure.quality_task import QualityTask
from icd_tvm.models.calibration import reads_text
from icd_tvm.models.importer import ImportedModel
from icd_tvm.models.registry import MODELS
from icd_tvm.models.registry import build as build_model
from icd_tvm.models.tokenize import encode

DEFAULT_METRIC = "stsb"
ENCODER_METRICS = ("stsb", "sst2")
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


Find = Callable[[ImportedModel, ModelKeys, int | None], BudgetTasks]


def find_tasks(imported: ImportedModel, config: Config) -> BudgetTasks:
    """Return the data that a model's quality budget is spent on: that of ``quality.metric``.

    Raises
    ------
    ConfigError
        If the model does not fit the task, or has no task that tells its quality.
    MissingDependencyError
        If the data or the tokenizer is absent.
    """
    metric, limit = parse_quality(config.quality.metric or DEFAULT_METRIC)
    return TASKS[metric](imported, config.model, limit)


def _stsb(imported: ImportedModel, keys: ModelKeys, limit: int | None) -> BudgetTasks:
    _require_trained(imported, "stsb")
    batch, seq = imported.inputs[0].shape
    free = _free_form(keys)
    size = batch if free is None else FREE_BATCH
    search, held_out = (
        replace(task, batch=size, fixed=free is None)
        for task in (_part("stsb", imported, limit, True), _part("stsb", imported, limit, False))
    )
    # Absent data is a reason to refuse before anything is done.
    for task in (search, held_out):
        _ = task.source
    encode([""], seq)
    return BudgetTasks(search, held_out, replace(held_out, batch=batch, fixed=True), free)


def _plugin(metric: str) -> Find:
    """Return what finds both parts of a task in the shape that the model was imported with."""

    def find(imported: ImportedModel, keys: ModelKeys, limit: int | None) -> BudgetTasks:
        _require_trained(imported, metric)
        search, held_out = (_part(metric, imported, limit, part) for part in (True, False))
        for task in (search, held_out):
            _ = task.source
        return BudgetTasks(search, held_out, held_out)

    return find


def _part(metric: str, imported: ImportedModel, limit: int | None, search: bool) -> Any:
    text = metric if limit is None else f"{metric}:{limit}"
    return make_task(text, imported.inputs, search=search)


# Name of the metric -> (model, its configuration, number of samples) -> data.
TASKS: dict[str, Find] = {
    "stsb": _stsb,
    **{metric: _plugin(metric) for metric in ("sst2", "bytes", "wikitext")},
}


def _require_trained(imported: ImportedModel, metric: str) -> None:
    why = ""
    if metric in ENCODER_METRICS and not reads_text(imported):
        why = "it does not read BERT-uncased tokens"
    elif {p.key: p.value for p in imported.model.metadata_props}.get("weights") == "random":
        why = "its weights are random"
    if why:
        raise ConfigError(
            f"quality.budget: {imported.name} has no quality that {metric} tells: {why}",
            f"quality.metric names another task: {', '.join(TASKS)}; or give rates instead",
        )


def _free_form(keys: ModelKeys) -> onnx.ModelProto | None:
    """Return a built-in model with symbolic sizes; a file has the sizes it was compiled for."""
    if keys.name is None:
        return None
    if not {"seq", "batch"} <= inspect.signature(MODELS[keys.name][0]).parameters.keys():
        return None
    return build_model(keys.name, seq="seq", batch="batch")
