"""Compile a model: tags, W, order, transform, W', order, rewrite, verify, measure, decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from icd_tvm._tvm import apply_pass, tvm_ffi
from icd_tvm.adapters.sparsity import SparsitySpec, parse_sparsity
from icd_tvm.errors import VerificationError
from icd_tvm.files import write_atomically
from icd_tvm.measure.metrics import arms_table, write_metrics
from icd_tvm.models.calibration import calibration_batches
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import MODELS
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, calibration_requests
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags, tagged_groups
from icd_tvm.relax_passes.axis_groups import AxisGroups
from icd_tvm.relax_passes.build_access_graph import BuildAccessGraph
from icd_tvm.relax_passes.decide_permutation import DecidePermutation, Decision, read_permutations
from icd_tvm.relax_passes.explain import explain_text
from icd_tvm.relax_passes.verify_layout import (
    FP32_TOLERANCE,
    Difference,
    difference,
    worse,
)
from icd_tvm.runtime.arms import DENSE, IDENTITY, ITERATIVE, LINEAR, Arm, ordered_arms
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.calibrate import calibrate
from icd_tvm.runtime.decide import Verdict, decide
from icd_tvm.runtime.evaluate import evaluate, parse_quality
from icd_tvm.runtime.measure_arms import Measured, measure_arms
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.output import check_writable_file, output_folder
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
    imported : ImportedModel
        The model as it came in.
    groups : AxisGroups
        Its axis groups, free and pinned.
    arms : dict[str, Arm]
        The modules that were compared.
    built : dict[str, Built]
        The same, compiled.
    before, after : list[Decision]
        What was decided before and after the transform.
    transform : dict
        What the transform did.
    equivalence : Difference
        Iterative outputs (linear in linear mode) against identity outputs.
    no_opportunity : str
        Why the new order cannot gain anything; empty if it can.
    measured : Measured or None
        None where nothing was timed.
    quality : dict or None
        Task quality of the arms, where it was asked for.
    verdict : Verdict
        Which arm is kept and why.
    record : dict
        What ``metrics.json`` holds (schema ``icd/metrics/v1``).
    """

    imported: ImportedModel
    groups: AxisGroups
    arms: dict[str, Arm] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)
    before: list[Decision] = field(default_factory=list)
    after: list[Decision] = field(default_factory=list)
    transform: dict[str, Any] = field(default_factory=dict)
    equivalence: Difference = field(default_factory=lambda: Difference(0.0, 0.0))
    no_opportunity: str = ""
    measured: Measured | None = None
    quality: dict[str, Any] | None = None
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
    if options.quality:
        parse_quality(options.quality)
    if options.threads:
        tvm_ffi.get_global_func("runtime.config_threadpool")(1, options.threads)
    with output_folder(options.out) as out:
        result = _import(options, progress)
        before, after = _transform_and_solve(result, options, spec, target, progress)
        _build_arms(result, before, after, options, target, progress)
        _verify(result, options, progress)
        _measure(result, options, progress)
        _decide(result, options)
        _evaluate(result, options, progress)
        _export(result, options, progress)
        result.record = make_record(result, options, target, progress)
        if out is not None:
            write_metrics(out / "metrics.json", result.record)
    print(_summary(result.record))
    return result


def _summary(record: Mapping[str, Any]) -> str:
    decision, lines = record["decision"], []
    if record["arms"]:
        lines += [arms_table(record), ""]
    lines += [f"{g['name']:8s} {g['status']}: {g['reason']}" for g in record["gates"]]
    verdict = {True: "accepted", False: "not accepted", None: "undecided"}[decision["accepted"]]
    return "\n".join([*lines, f"{verdict}, {decision['arm']} is kept: {decision['reason']}"])


def load_model(name_or_path: str) -> str | onnx.ModelProto:
    """Return a built-in model by name, or the path as it is."""
    if name_or_path in MODELS and not Path(name_or_path).exists():
        return build_model(name_or_path)
    return name_or_path


def _import(options: CompileOptions, progress: Progress) -> Compilation:
    with progress.stage("import") as stage:
        imported = import_onnx(load_model(options.model), options.shapes or None)
        tagged = apply_pass(AttachLayoutTags(options.opaque_states), imported.mod)
        imported, groups = replace(imported, mod=tagged), tagged_groups(tagged)
        stage.meta = {"nodes": len(imported.model.graph.node), "free axis groups": len(groups.free)}
    if options.explain:
        print(explain_text(groups))
    return Compilation(imported, groups)


def _transform_and_solve(
    result: Compilation,
    options: CompileOptions,
    spec: SparsitySpec,
    target: Any,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    dense = result.imported.mod
    before: dict[str, np.ndarray] = {}
    # Structure that arrives with the model was put there after its order had been decided:
    # then the incoming order is the one that was decided before the transform.
    if spec.kind != "none":
        before, result.before = _solve(dense, "before", options, target, progress)
    with progress.stage("transform") as stage:
        statistics, source = _calibrate(result.imported, spec, target, options.seed)
        sparsify = ApplySparsity(spec, statistics, seed=options.seed)
        transformed = apply_pass(sparsify, dense)
        result.transform = {**sparsify.meta, "calibration": source}
        stage.meta = {"kind": options.sparsity, "calibration": source}
    after = None
    if options.mode == "iterative":
        after, result.after = _solve(transformed, "after", options, target, progress)
    result.arms = {DENSE: Arm(DENSE, dense), IDENTITY: Arm(IDENTITY, transformed)}
    return before, after


def _solve(
    mod: Any, when: str, options: CompileOptions, target: Any, progress: Progress
) -> tuple[dict[str, np.ndarray], list[Decision]]:
    with progress.stage(f"access graph {when} the transform") as stage:
        graphed = apply_pass(BuildAccessGraph(target), mod)
    with progress.stage(f"order {when} the transform") as stage:
        solver = DecidePermutation(time_budget_s=options.time_budget_s / 2, seed=options.seed)
        perms = read_permutations(apply_pass(solver, graphed))
        stage.meta = {"axes": len(solver.decisions), "improved": len(perms)}
    return perms, solver.decisions


def _calibrate(
    imported: ImportedModel, spec: SparsitySpec, target: Any, seed: int
) -> tuple[dict[str, np.ndarray], str]:
    requests = calibration_requests(imported.mod, spec)
    if not requests:
        return {}, "none"
    batches, source = calibration_batches(imported, CALIBRATION_BATCHES, seed)
    return calibrate(imported.mod, requests, batches, target), source


def _build_arms(
    result: Compilation,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray] | None,
    options: CompileOptions,
    target: Any,
    progress: Progress,
) -> None:
    with progress.stage("rewrite") as stage:
        result.arms |= ordered_arms(result.arms[IDENTITY].mod, before, after, options.seed)
        result.no_opportunity = _no_opportunity(result, options)
        if result.no_opportunity and not result.transform["sparsity"]["entries"]:
            # One function in one order: what is left is a comparison of equal builds.
            dense = result.arms[DENSE]
            result.arms = {DENSE: dense, LINEAR: Arm(LINEAR, dense.mod, same_as=DENSE)}
        stage.meta = {"arms": ", ".join(result.arms)}
    with progress.stage("compile") as stage:
        for arm in result.arms.values():
            result.built[arm.name] = result.built.get(arm.same_as) or build(arm.mod, target)
        stage.meta = {"builds": len({id(built) for built in result.built.values()})}


def _no_opportunity(result: Compilation, options: CompileOptions) -> str:
    arm = result.arms.get(ITERATIVE)
    if arm is None or arm.changed:
        return ""
    if options.sparsity != "none" and not result.transform["sparsity"]["entries"]:
        return f"--sparsity {options.sparsity} found no hidden units between constant weights"
    reasons = [decision.stats.get("reason", "") for decision in result.after]
    return next(filter(None, reasons), "no matmul weight has structure on a free axis")


def _verify(result: Compilation, options: CompileOptions, progress: Progress) -> None:
    decisive = ITERATIVE if ITERATIVE in result.built else LINEAR
    reference_arm = IDENTITY if IDENTITY in result.built else DENSE
    with progress.stage("verify") as stage:
        for run in range(VERIFICATION_RUNS):
            feeds = random_inputs(result.imported, options.seed + run)
            reference = result.built[reference_arm].run_all(feeds)
            for name in sorted(set(result.built) - {DENSE, IDENTITY}):
                built = result.built[name]
                found = difference(built.comparable(reference), built.run_all(feeds))
                if name == decisive:
                    result.equivalence = worse(result.equivalence, found)
                elif not found.within(FP32_TOLERANCE):
                    raise VerificationError(f"arm {name} differs by {found.max_rel:.1e} relative")
        stage.meta = {"largest relative difference": f"{result.equivalence.max_rel:.1e}"}


def _measure(result: Compilation, options: CompileOptions, progress: Progress) -> None:
    if not options.measure:
        return
    with progress.stage("measure") as stage:
        feeds = random_inputs(result.imported, options.seed)
        callers = {name: built.caller(feeds) for name, built in result.built.items()}
        result.measured = measure_arms(callers, result.imported.model, feeds, options)
        stage.meta = {"rounds": result.measured.rounds}


def _decide(result: Compilation, options: CompileOptions) -> None:
    ratio = result.measured.ratio(ITERATIVE, LINEAR, options.seed) if result.measured else None
    result.verdict = decide(
        result.equivalence, result.no_opportunity, ratio, iterative=options.mode == ITERATIVE
    )


def _evaluate(result: Compilation, options: CompileOptions, progress: Progress) -> None:
    if options.quality is None:
        return
    with progress.stage("quality") as stage:
        result.quality = evaluate(options.quality, result.imported, result.built)
        stage.meta = {"metric": result.quality["metric"], "n": result.quality["n"]}


def _export(result: Compilation, options: CompileOptions, progress: Progress) -> None:
    if options.library is None:
        return
    with progress.stage("export") as stage:
        built = result.built[result.verdict.arm]
        write_atomically(options.library, lambda path: built.export(str(path)))
        stage.meta = {"arm": result.verdict.arm}
