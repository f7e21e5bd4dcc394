"""How the cost terms rank against measured time on this machine, and the weights that follow.

The record is kept per machine in the cache folder; :func:`load_calibration` reads the weights of
the combined cost J from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from icd_tvm.core.combined_cost import Weights, combined_cost
from icd_tvm.errors import ConfigError, MeasurementError, OutputError
from icd_tvm.files import default_cache, write_atomically
from icd_tvm.measure.environment import environment_hash, fingerprint
from icd_tvm.measure.layout_pilot import PilotCase, PilotTimes, run_case
from icd_tvm.measure.rank_correlation import (
    lower_quartiles,
    rank_correlation,
    repeatability,
    spearman_rows,
)
from icd_tvm.steps import steps

FORMAT = "icd/cost-calibration/v1"
SCORES = ("U", "U_sum", "U_wrong", "-Q", "C", "J")
# The score that layouts are chosen by.
DECISION = "U"
# Layouts whose times, or scores, differ by less than this many times the noise cannot be ranked.
_NOISE_FACTOR = 3.0
# Weights of J are tried in steps of one eighth.
_GRID = 8

FULL = (
    PilotCase("vrow16", 128, 384, 1536, "vec", 0.5),
    PilotCase("vrow16", 128, 1536, 384, "vec", 0.5),
    PilotCase("vrow32", 128, 768, 3072, "vec", 0.5),
    PilotCase("vrow16", 128, 384, 1536, "unstructured", 0.2),
    PilotCase("vrow32", 128, 384, 1536, "unstructured", 0.1),
    PilotCase("vrow16", 128, 768, 3072, "unstructured", 0.1),
    PilotCase("vrow16", 128, 1536, 384, "unstructured", 0.05),
    PilotCase("vrow32", 128, 768, 3072, "unstructured", 0.05),
    PilotCase("vrow16", 128, 384, 1536, "block", 0.5),
    PilotCase("vrow32", 128, 768, 3072, "block", 0.5),
    PilotCase("rowlist", 128, 384, 1536, "rows", 0.5),
    PilotCase("rowlist", 128, 1536, 384, "rows", 0.5),
)
QUICK = (FULL[0], FULL[6], FULL[10])

Progress = Callable[[str], None]


def calibrate(
    cases: Sequence[PilotCase] = FULL,
    *,
    rounds: int = 40,
    solve_s: float = 5.0,
    layouts: int = 14,
    seed: int = 0,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Run the pilot and return its record.

    Parameters
    ----------
    cases : sequence of PilotCase
    rounds : int
        Interleaved rounds of each case, at least two.
    solve_s : float
        Wall-clock limit of each solver run, seconds.
    layouts : int
        The most layouts of each case.
    seed : int
    progress : callable
        Gets one line before each case.

    Returns
    -------
    dict
        JSON-serialisable: ``format``, ``hash`` (:func:`machine_hash`), ``fingerprint``, ``cases``
        (:func:`case_record`), ``summary`` (:func:`summarise`), ``elapsed_s``.

    Raises
    ------
    MeasurementError
        If there are no cases, or too few rounds or layouts.
    """
    if not cases or rounds < 2:
        raise MeasurementError(f"a pilot of {len(cases)} cases and {rounds} rounds shows nothing")
    began = time.perf_counter()
    records = []
    for number, case in enumerate(steps(cases, "calibrating"), 1):
        progress(f"{number}/{len(cases)} {case.name}")
        times = run_case(case, rounds=rounds, solve_s=solve_s, layouts=layouts, seed=seed)
        records.append(case_record(times))
    machine = fingerprint()
    return {
        "format": FORMAT,
        "hash": _hash_of(machine),
        "fingerprint": machine,
        "rounds": rounds,
        "cases": records,
        "summary": summarise(records),
        "elapsed_s": time.perf_counter() - began,
    }


def case_record(times: PilotTimes) -> dict[str, Any]:
    """Return one case as JSON: layouts with scores and times, and the correlation of each score.

    ``noise`` is the larger of two relative differences: that between the two halves of the rounds,
    in the median over layouts, and that between copies of one layout, whose arrays lie elsewhere
    in memory. ``unranked`` says why a case cannot rank the decision score, if it cannot:
    the times of its layouts, or their scores, differ by less than three times the noise.
    ``ceiling`` is the Spearman correlation of one half of the rounds with the other. ``padding``
    is U / U_sum of each layout: what one list length for all groups costs.
    """
    seconds = lower_quartiles(times.samples)
    ceiling, noise = repeatability(times.samples)
    if times.copies is not None and times.copies.size:
        noise = max(noise, _spread(lower_quartiles(times.copies)))
    spread = _spread(seconds)
    reach = _spread([row[DECISION] for row in times.scores])
    layouts = [
        {"name": name, "seconds": float(t), "seconds_min": float(least), **score}
        for name, t, least, score in zip(
            times.orders, seconds, times.samples.min(axis=0), times.scores, strict=True
        )
    ]
    return {
        "case": times.case.name,
        "kernel": times.case.kernel,
        "layouts": layouts,
        "scores": {
            name: rank_correlation([row[name] for row in times.scores], times.samples)
            for name in SCORES
        },
        "spread": spread,
        "noise": noise,
        "ceiling": ceiling,
        "reach": reach,
        "unranked": _why_unranked(spread, reach, noise),
        "padding": [row["U"] / row["U_sum"] for row in times.scores],
    }


def _spread(values: ArrayLike) -> float:
    """Return by what share the largest value exceeds the least."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.max() / array.min() - 1)


def _why_unranked(spread: float, reach: float, noise: float) -> str:
    """Return why layouts cannot be ranked by the decision score, or an empty string."""
    for name, found in (("times differ", spread), (f"{DECISION} differs", reach)):
        if found < _NOISE_FACTOR * noise:
            return f"{name} by {found:.1%}, with noise of {noise:.1%}"
    return ""


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the cases that can be ranked and over all, and the weights of J.

    Parameters
    ----------
    records : sequence of dict
        From :func:`case_record`.

    Returns
    -------
    dict
        ``ranked`` and ``unranked`` (numbers of cases), ``median`` and ``median_of_all`` (score ->
        spearman, kendall, cases), ``decision``, ``weights`` (c, q, u) with ``weights_spearman``,
        and ``reason`` where there are no weights.
    """
    ranked = [record for record in records if not record["unranked"]]
    weights, found = fit_weights(ranked)
    return {
        "ranked": len(ranked),
        "unranked": len(records) - len(ranked),
        "decision": DECISION,
        "median": {name: _medians(ranked, name) for name in SCORES},
        "median_of_all": {name: _medians(records, name) for name in SCORES},
        "weights": None if weights is None else {"c": weights.c, "q": weights.q, "u": weights.u},
        "weights_spearman": found,
        "reason": "" if weights else "no case has layouts that differ by more than noise",
    }


def _medians(records: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    scores = [record["scores"][name] for record in records]
    present = [score for score in scores if score["spearman"] is not None]
    if not present:
        return {"spearman": None, "kendall": None, "cases": 0}
    return {
        **{key: float(np.median([s[key] for s in present])) for key in ("spearman", "kendall")},
        "cases": len(present),
    }


def fit_weights(records: Sequence[dict[str, Any]]) -> tuple[Weights | None, float | None]:
    """Return the weights of J whose median rank correlation with time is highest, and that value.

    Among weights in steps of one eighth; equal ones are decided by the mean correlation, then by
    the larger weight of U. (None, None) without a case.
    """
    if not records:
        return None, None
    scored = []
    for c in range(_GRID + 1):
        for q in range(_GRID + 1 - c):
            weights = Weights(c / _GRID, q / _GRID, (_GRID - c - q) / _GRID)
            found = np.nan_to_num([_correlation(record, weights) for record in records])
            scored.append((float(np.median(found)), float(found.mean()), weights.u, weights))
    best = max(scored, key=lambda row: row[:3])
    return best[3], best[0]


def _correlation(record: dict[str, Any], weights: Weights) -> float:
    rows = record["layouts"]
    joint = [combined_cost(r["C"], -r["-Q"], r["U"] / r["U_max"], weights) for r in rows]
    seconds = [r["seconds"] for r in rows]
    return float(spearman_rows(np.array([joint]), np.array([seconds]))[0])


def machine_hash() -> str:
    """Return the hash of this machine and software, whatever the number of threads.

    The pilot runs on one thread; a calibration serves callers with any number.
    """
    return _hash_of(fingerprint())


def _hash_of(machine: dict[str, Any]) -> str:
    return environment_hash({**machine, "threads": None})


def calibration_path(cache: Path | None = None) -> Path:
    """Return the file that holds the calibration of this machine in a cache folder."""
    return (cache or default_cache()) / f"cost-{machine_hash()}.json"


def save_calibration(record: dict[str, Any], path: Path | None = None) -> Path:
    """Write a record of :func:`calibrate`, by default to the cache; return the path.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    target = path or calibration_path()
    _make_folder(target.parent)
    text = json.dumps(record, indent=1, allow_nan=False)
    write_atomically(target, lambda temporary: _write(temporary, text))
    return target


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {path}: {error.strerror}", "choose another") from error


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def read_calibration(path: Path) -> dict[str, Any]:
    """Return a record of :func:`save_calibration`.

    Raises
    ------
    ConfigError
        If the file cannot be read or is no such record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read a calibration from {path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"{path} is no {FORMAT} record", "run icd calibrate")
    if not isinstance(record.get("summary"), dict) or not isinstance(record.get("hash"), str):
        raise ConfigError(f"{path} lacks a summary or a hash", "run icd calibrate")
    return record


def load_calibration(path: Path | None = None, *, cache: Path | None = None) -> Weights:
    """Return the weights of J for this machine; the default ones where it was not calibrated.

    Parameters
    ----------
    path : Path, optional
        A file of :func:`save_calibration`; that of this machine in ``cache`` if omitted.
    cache : Path, optional
        Cache folder; :func:`default_cache` if omitted.

    Returns
    -------
    Weights
        The defaults too where the pilot could rank nothing.

    Raises
    ------
    ConfigError
        If the file is broken, is of another machine, or a ``path`` that was given is missing.
    """
    file = path or calibration_path(cache)
    if path is None and not file.exists():
        return Weights()
    record = read_calibration(file)
    if record["hash"] != machine_hash():
        raise ConfigError(
            f"{file} is the calibration of another machine or software", "run icd calibrate"
        )
    found = record["summary"].get("weights")
    return Weights() if found is None else _weights(found, file)


def _weights(found: Any, path: Path) -> Weights:
    values = [found.get(name) for name in ("c", "q", "u")] if isinstance(found, dict) else [None]
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    good = len(numbers) == 3 and all(np.isfinite(v) and v >= 0 for v in numbers)
    if not good or sum(numbers) <= 0:
        raise ConfigError(f"{path}: weights {found} must be three numbers, not negative")
    return Weights(*numbers)
