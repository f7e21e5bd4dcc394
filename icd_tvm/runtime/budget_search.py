"""The sparsity that a quality budget allows: searched once, kept in ``budget.json``."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from icd_tvm.adapters.sparsity import SparsitySpec, parse_sparsity
from icd_tvm.errors import ConfigError, TransformError
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.layer_rules import LayerRule, LayerRules
from icd_tvm.runtime.budget_tasks import find_tasks
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.quality_budget import Budget, search_strengths
from icd_tvm.runtime.run_folder import BUDGET
from icd_tvm.runtime.strengths import RATES
from icd_tvm.runtime.transforms import Transform

FORMAT = "icd/budget/v1"
MAX_BYTES = 16 << 20


def prepare_budget(job: Job) -> None:
    """Read what an earlier process found, or refuse a model or machine that cannot be searched.

    Raises
    ------
    ConfigError
        If the model has no task, or the stored result is damaged.
    MissingDependencyError
        If the data is absent.
    """
    if job.config.quality.budget is None:
        return
    stored = None if job.folder is None else job.folder.path(BUDGET)
    if stored is not None and stored.exists():
        job.budget = read_budget(stored)
    else:
        find_tasks(job.result.imported, job.config)


def within_budget(job: Job, item: Transform, statistics: Mapping[str, Any]) -> Transform:
    """Return a sparsity transform with the rates that the budget allows.

    Raises
    ------
    TransformError
        If no sparsity fits.
    """
    if job.budget is None:
        job.budget = _searched(job, item, statistics)
        if job.folder is not None:
            job.folder.write_json(BUDGET, job.budget)
    if not job.budget["found"]:
        raise TransformError(job.budget["reason"])
    rules = _rules(job.budget)
    return replace(item, make=lambda found, seed: ApplySparsity(rules, found, seed=seed))


def read_budget(path: Path) -> dict[str, Any]:
    """Read the result of an earlier search.

    Raises
    ------
    ConfigError
        If the file is damaged.
    """
    try:
        with path.open("rb") as stream:
            found = json.loads(stream.read(MAX_BYTES))
        if found["format"] != FORMAT or not isinstance(found["reason"], str):
            raise ValueError("another format")
        if bool(_rules(found).rules) != found["found"]:
            raise ValueError("its rules do not say what it found")
        return dict(found)
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"cannot read {str(path)!r}: {error}", "remove it to search again"
        ) from error


def _rules(found: Mapping[str, Any]) -> LayerRules[SparsitySpec]:
    rules = (LayerRule(pattern, parse_sparsity(text)) for pattern, text in found["rules"].items())
    return LayerRules(SparsitySpec("none"), tuple(rules))


def _searched(job: Job, item: Transform, statistics: Mapping[str, Any]) -> dict[str, Any]:
    keys, began = job.config.quality, time.perf_counter()
    rules, tasks = item.rules, find_tasks(job.result.imported, job.config)
    if rules is None or keys.budget is None:
        raise ValueError(f"{item.name} {item.text} is not to be searched")
    budget = Budget(keys.budget, keys.agreement_floor)
    result = search_strengths(
        job.result.imported,
        rules,
        tasks.calibration,
        tasks.held_out,
        budget,
        target=job.target,
        statistics=statistics,
        rates=_rates(rules),
        model=tasks.model,
        final=tasks.final,
        seed=job.config.seed,
    )
    return {
        "format": FORMAT,
        "points": budget.points,
        "agreement_floor": budget.agreement,
        "seconds": time.perf_counter() - began,
        **result.to_json(),
    }


def _rates(rules: LayerRules[SparsitySpec]) -> list[float]:
    """Return the usual rates and the strongest of every rule."""
    specs = [rules.default, *(rule.spec for rule in rules.rules)]
    return sorted({*RATES, *(spec.rate for spec in specs if spec is not None and spec.rate > 0)})
