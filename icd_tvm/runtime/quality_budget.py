"""Spend a quality budget on sparsity: how strong may each layer or group be pruned?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx

from icd_tvm._tvm import apply_pass
from icd_tvm.measure.quality_compare import agreement_of
from icd_tvm.measure.quality_task import QualityTask, Run, TaskScore
from icd_tvm.models.importer import ImportedModel
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, Rules
from icd_tvm.runtime.budget_result import Budget, BudgetResult, Candidate
from icd_tvm.runtime.build import build
from icd_tvm.runtime.candidates import CandidateModel
from icd_tvm.runtime.strengths import RATES, Strengths
from icd_tvm.steps import counted, steps

__all__ = ["Budget", "BudgetResult", "Candidate", "search_strengths"]

# Shares of the strongest choice that are tried on held-out data when that one fails there.
RETREATS = (1.0, 0.75, 0.5, 0.25)
# Least rise in disagreement that counts: below it layers are equally insensitive.
LEAST_LOSS = 1e-6


def search_strengths(
    imported: ImportedModel,
    spec: Rules,
    calibration: QualityTask,
    held_out: QualityTask,
    budget: Budget,
    *,
    target: Any,
    statistics: Mapping[str, np.ndarray] | None = None,
    rates: Sequence[float] = RATES,
    model: onnx.ModelProto | None = None,
    final: QualityTask | None = None,
    seed: int = 0,
) -> BudgetResult:
    """Find the rate of every layer or group that a quality budget allows.

    One target at a time is tried at every rate (the sensitivity profile); then the rate that
    removes most for its loss of agreement is raised, again and again, and every state is judged
    on ``calibration``. A target whose next rate breaks a gate stays where it is. The strongest
    state is judged on ``held_out``; if it fails there, the state nearest to three quarters, half
    and a quarter of its removed share. The one that passes is compiled by this package and judged
    once more, against the same dense outputs.

    Candidates run in one ONNX Runtime session with the weights as inputs; only the final one is
    compiled.

    Parameters
    ----------
    imported : ImportedModel
    spec : SparsitySpec or LayerRules
        Which targets are searched and the sparsity type of each.
    calibration, held_out : QualityTask
        On disjoint data.
    budget : Budget
    target : tvm.target.Target
        What the final candidate is compiled for.
    statistics : Mapping[str, numpy.ndarray], optional
        Gram matrices by matmul binding: see
        :func:`icd_tvm.relax_passes.apply_sparsity.calibration_requests` and
        :func:`icd_tvm.runtime.calibrate.calibrate`. Without them nothing is refitted.
    rates : sequence of float
        Rates to choose from.
    model : onnx.ModelProto, optional
        The same model with free shapes, for tasks that need them; ``imported.model`` if omitted.
    final : QualityTask, optional
        ``held_out`` in the shape that was compiled, where the two differ.
    seed : int
        Seed of the adapters.

    Returns
    -------
    BudgetResult

    Raises
    ------
    ConfigError
        Nothing to search, a rate out of range, or a weight that ``model`` does not have.
    MeasurementError
        The metric is undefined or the outputs are not finite.
    """
    strengths = Strengths(imported.mod, spec, statistics or {}, rates, seed=seed)
    strengths.drop_failing()
    names = strengths.names
    runner = CandidateModel(imported.model if model is None else model, names).runner
    calibration, held_out = (_fitted(task, runner({})) for task in (calibration, held_out))
    search = _Search(strengths, budget, runner)
    path = search.greedy(calibration, search.profile(calibration))
    passed = search.held_out(held_out, path)
    if passed is not None:
        rewritten = ApplySparsity(
            strengths.rules(passed.rates),
            statistics,
            seed=seed,
        )
        compiled = _compiled(imported, apply_pass(rewritten, imported.mod), target)
        last = held_out if final is None else _fitted(final, runner({}))
        passed = search.final(last, passed, compiled)
    return search.result(passed)


class _Search:
    """Candidates in the order they are judged."""

    def __init__(
        self, strengths: Strengths, budget: Budget, runner: Callable[[Mapping[str, Any]], Run]
    ) -> None:
        self.strengths, self.budget, self.runner = strengths, budget, runner
        self.candidates: list[Candidate] = []
        self._dense: dict[str, TaskScore] = {}

    def judge(self, stage: str, task: QualityTask, rates: Mapping[str, float]) -> Candidate:
        """Run one choice of rates and record it."""
        score = task.evaluate(self.runner(self.strengths.arrays(rates)))
        return self._record(stage, rates, score, self.dense(task))

    def dense(self, task: QualityTask) -> TaskScore:
        """Return the dense model's score, evaluated once a task."""
        if task.source not in self._dense:
            self._dense[task.source] = task.evaluate(self.runner({}))
        return self._dense[task.source]

    def profile(self, task: QualityTask) -> dict[tuple[str, float], Candidate]:
        """Try every target alone at every rate."""
        alone = [(key, spec.rate) for key, tried in self.strengths.ladder.items() for spec in tried]
        return {
            (key, rate): self.judge("profile", task, {key: rate})
            for key, rate in steps(alone, "rates alone")
        }

    def greedy(
        self, task: QualityTask, profile: Mapping[tuple[str, float], Candidate]
    ) -> list[Candidate]:
        """Raise one rate at a time; return the states that fit, weakest first."""
        rates: dict[str, float] = {}
        path: list[Candidate] = []
        blocked: set[str] = set()
        # As many as there are where none is blocked.
        with counted("raising rates", len(profile)) as advance:
            while raises := [
                s
                for key in self.strengths.ladder
                if key not in blocked
                for s in self._next(key, rates, profile)
            ]:
                _, key, rate = max(raises, key=lambda step: step[0])
                found = self.judge("greedy", task, {**rates, key: rate})
                advance()
                if found.fits:
                    rates[key] = rate
                    path.append(found)
                else:
                    blocked.add(key)
        return path

    def _next(
        self,
        key: str,
        rates: Mapping[str, float],
        profile: Mapping[tuple[str, float], Candidate],
    ) -> list[tuple[float, str, float]]:
        """Return the next rate of a target and what it removes for its loss of agreement."""
        now = rates.get(key, 0.0)
        above = [spec.rate for spec in self.strengths.ladder[key] if spec.rate > now]
        if not above:
            return []
        old, new = profile.get((key, now)), profile[key, above[0]]
        removed = new.removed - (old.removed if old else 0.0)
        lost = (old.agreement if old else 1.0) - new.agreement
        return [(removed / max(lost, LEAST_LOSS), key, above[0])]

    def held_out(self, task: QualityTask, path: Sequence[Candidate]) -> Candidate | None:
        """Return the strongest of a few states of the path that fits on held-out data."""
        tried: list[Candidate] = []
        for share in RETREATS if path else ():
            wanted = share * path[-1].removed
            state = min(path, key=lambda c: abs(c.removed - wanted))
            if all(state.rates != other.rates for other in tried):
                tried.append(self.judge("held-out", task, state.rates))
                if tried[-1].fits:
                    return tried[-1]
        return None

    def final(self, task: QualityTask, passed: Candidate, run: Run) -> Candidate | None:
        """Judge the compiled candidate; what compiling changes counts against the budget too."""
        found = self._record("final", passed.rates, task.evaluate(run), self.dense(task))
        return found if found.fits else None

    def result(self, passed: Candidate | None) -> BudgetResult:
        """Put the outcome in words."""
        dense = {source: score.points for source, score in self._dense.items()}
        if passed is None:
            best = min(self._last_judged(), key=self._excess)
            rates: dict[str, float] = {}
            reason = f"no sparsity fits this budget; the nearest, {_text(best)}"
        else:
            best, rates = passed, passed.rates
            reason = f"within the budget: {_text(best)}"
        rules = self.strengths.rules(rates) if rates else None
        skipped = self.strengths.skipped
        return BudgetResult(rates, rules, reason, best, dense, self.candidates, skipped)

    def _last_judged(self) -> list[Candidate]:
        """Candidates of the last stage that was reached; every one of them failed a gate there."""
        stage = self.candidates[-1].stage
        return [c for c in self.candidates if c.stage == stage]

    def _excess(self, candidate: Candidate) -> float:
        """How far a candidate is over the budget: the larger of both gates' ratios."""
        points = abs(candidate.delta) / max(self.budget.points, LEAST_LOSS)
        allowed = max(1 - self.budget.agreement, LEAST_LOSS)
        return max(points, (1 - candidate.agreement) / allowed)

    def _record(
        self, stage: str, rates: Mapping[str, float], score: TaskScore, dense: TaskScore
    ) -> Candidate:
        delta = score.points - dense.points
        agreed = agreement_of(dense, score)
        fits = abs(delta) <= self.budget.points and agreed >= self.budget.agreement
        removed = self.strengths.removed(rates)
        self.candidates.append(Candidate(stage, dict(rates), removed, delta, agreed, fits))
        return self.candidates[-1]


def _fitted(task: QualityTask, dense: Run) -> QualityTask:
    """Return the task with what it learns from the dense model, where it learns anything."""
    fit = getattr(task, "fitted", None)
    return task if fit is None else cast(QualityTask, fit(dense))


def _compiled(imported: ImportedModel, mod: Any, target: Any) -> Run:
    built = build(mod, target, tune=False)
    types = {spec.name: spec.dtype for spec in imported.inputs}

    def run(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return built.run_all({name: feeds[name].astype(t) for name, t in types.items()})[0]

    return run


def _text(candidate: Candidate) -> str:
    return (
        f"{candidate.removed:.1%} of the weights removed, {candidate.delta:+.3f} points, "
        f"agreement {candidate.agreement:.4f} ({candidate.stage})"
    )
