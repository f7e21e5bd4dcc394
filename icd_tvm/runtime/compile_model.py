"""Compile a model: tags, W, order, transform, W', order, rewrite, verify, measure, decide."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from icd_tvm._tvm import tvm_ffi
from icd_tvm.adapters.sparsity import SparsitySpec, parse_sparsity
from icd_tvm.errors import VerificationError
from icd_tvm.measure.metrics import arms_table, write_metrics
from icd_tvm.models.calibration import calibration_batches
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import MODELS
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, calibration_requests
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.decide_permutation import DecidePermutation, Decision, read_permutations
from icd_tvm.relax_passes.explain import explain_text
from icd_tvm.relax_passes.verify_layout import FP32_TOLERANCE, Difference, difference
from icd_tvm.runtime.arms import DENSE, IDENTITY, ITERATIVE, LINEAR, Arm, make_arms
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.calibrate import calibrate
from icd_tvm.runtime.decide import Verdict, decide
from icd_tvm.runtime.measure_arms import Measured, measure_arms
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.output import check_writable_file, output_folder, write_atomically
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.record import make_record
from icd_tvm.tir_schedules.target import parse_target

CALIBRATION_BATCHES = 24
VERIFICATION_RUNS = 3


@dataclass
class Compilation:
    """Everything one compilation made.

    Attributes
    ----------
    record : dict
        What ``metrics.json`` holds (schema ``icd/metrics/v1``).
    verdict : Verdict
        Which arm is kept and why.
    built : dict[str, Built]
        The compiled arms by name.
    arms : dict[str, Arm]
        Their modules.
    """

    imported: ImportedModel
    arms: dict[str, Arm] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)
    before: list[Decision] = field(default_factory=list)
    after: list[Decision] = field(default_factory=list)
    transform: dict[str, Any] = field(default_factory=dict)
    equivalence: Difference = field(default_factory=lambda: Difference(0.0, 0.0))
    measured: Measured | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict(DENSE, False, "nothing was done"))
    record: dict[str, Any] = field(default_factory=dict)


def compile_model(options: CompileOptions, progress: Progress | None = None) -> Compilation:
    """Compile a model and keep the re-permuted build only if it is equal and measured faster.

    Parameters
    ----------
    options : CompileOptions
        What to do.
    progress : Progress, optional
        Where stages are shown; a new one on stderr if omitted.

    Returns
    -------
    Compilation
        The arms, the measurements, the verdict and the record that ``--out`` receives.

    Raises
    ------
    IcdError
        For every refused input; nothing half-written is left behind.
    """
    progress = progress or Progress()
    spec = parse_sparsity(options.sparsity)
    target = parse_target(options.target, options.threads)
    check_writable_file(options.library)
    if options.threads:
        tvm_ffi.get_global_func("runtime.config_threadpool")(1, options.threads)
    with output_folder(options.out) as out:
        result = Compilation(_import(options, progress))
        _decide_orders(result, options, spec, target, progress)
        _build(result, target, progress)
        _verify(result, options, progress)
        _measure(result, options, progress)
        result.verdict = decide(result.measured, result.equivalence, result.after, options)
        _export(result, options, progress)
        result.record = make_record(result, options, target, progress)
        if out is not None:
            write_metrics(out / "metrics.json", result.record)
    print(arms_table(result.record))
    return result


def load_model(name_or_path: str) -> str | onnx.ModelProto:
    """Return a built-in model by name, or the path as it is."""
    if name_or_path in MODELS and not Path(name_or_path).exists():
        return build_model(name_or_path)
    return name_or_path


def _import(options: CompileOptions, progress: Progress) -> ImportedModel:
    with progress.stage("import") as stage:
        imported = import_onnx(load_model(options.model), options.shapes or None)
        groups = find_axis_groups(imported.mod["main"])
        stage.meta = {"nodes": len(imported.model.graph.node), "free axis groups": len(groups.free)}
    if options.explain:
        print(explain_text(groups))
    return imported


def _decide_orders(
    result: Compilation, options: CompileOptions, spec: SparsitySpec, target: Any, progress: Progress
) -> None:
    dense = AttachLayoutTags()(result.imported.mod)
    given = spec.type == "none"
    # Structure that arrives with the model was put there after its order had been decided.
    before, result.before = ({}, []) if given else _solve(dense, "before", options, target, progress)
    with progress.stage("transform") as stage:
        statistics, source = _calibrate(dense, spec, target, options.seed)
        apply = ApplySparsity(spec, statistics, seed=options.seed)
        transformed = apply(dense)
        result.transform = {**apply.meta, "calibration": source}
        stage.meta = {"kind": options.sparsity, "calibration": source}
    after: Mapping[str, np.ndarray] | None = None
    if options.mode == "iterative":
        after, result.after = _solve(transformed, "after", options, target, progress)
    with progress.stage("rewrite") as stage:
        arms = make_arms(dense, transformed, before, after, options.seed)
        result.arms = {arm.name: arm for arm in arms}
        stage.meta = {"arms": ", ".join(result.arms)}


def _solve(
    mod: Any, when: str, options: CompileOptions, target: Any, progress: Progress
) -> tuple[dict[str, np.ndarray], list[Decision]]:
    with progress.stage(f"access graph {when} the transform") as stage:
        graphed = BuildAccessGraph(target)(mod)
    with progress.stage(f"order {when} the transform") as stage:
        solver = DecidePermutation(time_budget_s=options.time_budget_s / 2, seed=options.seed)
        perms = read_permutations(solver(graphed))
        stage.meta = {"axes": len(solver.decisions), "improved": len(perms)}
    return perms, solver.decisions


def _calibrate(
    mod: Any, spec: SparsitySpec, target: Any, seed: int, imported: ImportedModel | None = None
) -> tuple[dict[str, np.ndarray], str]:
    requests = calibration_requests(mod, spec)
    if not requests or imported is None:
        return {}, "none"
    batches, source = calibration_batches(imported, CALIBRATION_BATCHES, seed)
    return calibrate(mod, requests, batches, target), source


def _build(result: Compilation, target: Any, progress: Progress) -> None:
    with progress.stage("compile the arms") as stage:
        for arm in result.arms.values():
            shared = result.built.get(arm.same_as)
            result.built[arm.name] = shared or build(arm.mod, target)
        stage.meta = {"arms": len(result.built)}


def _verify(result: Compilation, options: CompileOptions, progress: Progress) -> None:
    with progress.stage("verify") as stage:
        for run in range(VERIFICATION_RUNS):
            feeds = random_inputs(result.imported, options.seed + run)
            reference = result.built[IDENTITY].run_all(feeds)
            for name in set(result.built) - {DENSE, IDENTITY}:
                found = difference(reference, result.built[name].run_all(feeds))
                if not found.within(FP32_TOLERANCE) and name != ITERATIVE:
                    raise VerificationError(f"arm {name} is not the same function: {found}")
                result.equivalence = max(result.equivalence, found, key=lambda d: d.max_rel)
        stage.meta = {"largest relative difference": f"{result.equivalence.max_rel:.1e}"}


def _measure(result: Compilation, options: CompileOptions, progress: Progress) -> None:
    if not options.measure:
        return
    with progress.stage("measure") as stage:
        feeds = random_inputs(result.imported, options.seed)
        callers = {name: built.caller(feeds) for name, built in result.built.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(result.imported.model, path)
            result.measured = measure_arms(callers, feeds, path, options)
        stage.meta = {"rounds": result.measured.rounds}


def _export(result: Compilation, options: CompileOptions, progress: Progress) -> None:
    if options.library is None:
        return
    with progress.stage("export") as stage:
        built = result.built[result.verdict.arm]
        write_atomically(options.library, lambda path: built.export(str(path)))
        stage.meta = {"arm": result.verdict.arm}


__all__ = ["LINEAR", "Compilation", "compile_model", "load_model"]
