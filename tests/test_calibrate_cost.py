"""The pilot that ranks the cost terms: statistics on planted times, the record, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from icd_tvm.cli import main
from icd_tvm.commands.calibrate import table
from icd_tvm.core.cost import Weights
from icd_tvm.core.permutation import as_permutation, identity
from icd_tvm.errors import ConfigError, MeasurementError, OutputError, VerificationError
from icd_tvm.measure import calibrate_cost, layout_pilot
from icd_tvm.measure.calibrate_cost import (
    calibrate,
    calibration_path,
    case_record,
    fit_weights,
    load_calibration,
    machine_hash,
    read_calibration,
    save_calibration,
    summarise,
)
from icd_tvm.measure.layout_pilot import (
    PilotCase,
    PilotTimes,
    case_access,
    layout_scores,
    masked_weight,
    pilot_orders,
    run_case,
    shuffled,
)
from icd_tvm.measure.rank_correlation import (
    kendall_rows,
    lower_quartiles,
    rank_correlation,
    repeatability,
    spearman_rows,
)
from icd_tvm.tir_schedules.cpu.block_sparse import kept_rows

TINY = PilotCase("vrow16", 8, 32, 64, "vec", 0.5)
SCORE_NAMES = ("U", "U_sum", "U_wrong", "-Q", "C", "J")


def noisy(times: list[float], rounds: int = 30, noise: float = 0.01, seed: int = 0) -> np.ndarray:
    """Samples [rounds, layouts] around planted times, with slow outliers."""
    rng = np.random.default_rng(seed)
    table = np.array(times) * (1 + noise * np.abs(rng.standard_normal((rounds, len(times)))))
    table[rng.random(table.shape) < 0.1] *= 3
    return table


def planted(times: list[float], units: list[float] | None = None, **kwargs: Any) -> PilotTimes:
    """A case whose U is ``units`` (by default the times) and whose other scores oppose it."""
    scores = [
        {
            "U": u,
            "U_sum": 2.0,
            "U_wrong": -u,
            "-Q": -0.1 * u,
            "C": 1 / (1 + u),
            "J": u,
            "U_max": 9.0,
        }
        for u in (units or times)
    ]
    orders = {f"layout {k}": identity(4) for k in range(len(times))}
    return PilotTimes(TINY, orders, scores, noisy(times, **kwargs))


# --- statistics ---------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=12))
def test_coefficients_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=np.float64).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(spearman_rows(a[None], b[None])[0])
        assert np.isnan(kendall_rows(a[None], b[None])[0])
        return
    assert spearman_rows(a[None], b[None])[0] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall_rows(a[None], b[None])[0] == pytest.approx(stats.kendalltau(a, b).statistic)


def test_planted_times_are_ranked_through_noise_and_outliers() -> None:
    times = [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]
    samples = noisy(times)
    found = rank_correlation(times, samples)
    assert found["spearman"] == found["kendall"] == pytest.approx(1.0)
    opposed = rank_correlation([-t for t in times], samples)
    assert opposed["spearman"] == pytest.approx(-1.0)
    np.testing.assert_allclose(lower_quartiles(samples), times, rtol=0.05)


def test_interval_widens_when_the_score_is_unrelated() -> None:
    times = np.linspace(1, 2, 12)
    related = rank_correlation(times, noisy(times.tolist()))
    shuffled_score = np.random.default_rng(3).permutation(12)
    unrelated = rank_correlation(shuffled_score, noisy(times.tolist()))
    near, far = related["spearman_interval"], unrelated["spearman_interval"]
    assert near is not None
    assert far is not None
    assert near[1] - near[0] < 0.2 < far[1] - far[0]
    assert far[0] < unrelated["spearman"] < far[1]


def test_constant_scores_and_times_have_no_rank() -> None:
    samples = noisy([1.0, 2.0, 3.0])
    assert rank_correlation([5, 5, 5], samples)["spearman"] is None
    assert "score" in rank_correlation([5, 5, 5], samples)["reason"]
    assert "time" in rank_correlation([1, 2, 3], np.ones((4, 3)))["reason"]


@pytest.mark.parametrize(
    ("score", "samples"),
    [
        ([1, 2], np.ones((4, 2))),
        ([1, 2, 3], np.ones((4, 2))),
        ([1, 2, 3], np.ones((0, 3))),
        ([1, 2, math.nan], np.ones((4, 3))),
        ([1, 2, 3], np.full((4, 3), math.inf)),
        ([[1, 2, 3]], np.ones((4, 3))),
    ],
)
def test_bad_samples_are_refused(score: Any, samples: np.ndarray) -> None:
    with pytest.raises(MeasurementError):
        rank_correlation(score, samples)


def test_repeatability_tells_signal_from_noise() -> None:
    ceiling, noise = repeatability(noisy([1.0, 2.0, 3.0, 4.0]))
    assert ceiling == pytest.approx(1.0)
    assert noise < 0.02
    assert repeatability(np.ones((4, 3))) == (None, 0.0)
    with pytest.raises(MeasurementError):
        repeatability(np.ones((1, 3)))


# --- records ------------------------------------------------------------------------------


def test_a_case_records_correlations_spread_and_padding() -> None:
    record = case_record(planted([1.0, 1.5, 2.0, 4.0]))
    assert record["scores"]["U"]["spearman"] == pytest.approx(1.0)
    assert record["scores"]["C"]["spearman"] == pytest.approx(-1.0)
    assert record["scores"]["U_sum"]["spearman"] is None
    assert record["spread"] == pytest.approx(3.0, rel=0.1)
    assert record["padding"] == [0.5, 0.75, 1.0, 2.0]
    assert not record["indifferent"]
    assert [row["name"] for row in record["layouts"]] == [f"layout {k}" for k in range(4)]


def test_layouts_of_one_speed_are_indifferent_and_left_out_of_the_median() -> None:
    flat = case_record(planted([1.0] * 8, list(range(1, 9)), noise=0.2))
    assert flat["indifferent"]
    steep = case_record(planted([1.0, 1.5, 2.0, 4.0]))
    summary = summarise([flat, steep, steep])
    assert (summary["ranked"], summary["indifferent"]) == (2, 1)
    assert summary["median"]["U"] == {"spearman": 1.0, "kendall": 1.0, "cases": 2}
    assert summary["median"]["U_sum"] == {"spearman": None, "kendall": None, "cases": 0}
    alone = summarise([flat])
    assert alone["weights"] is None
    assert alone["reason"]


def test_weights_go_to_the_term_that_ranks() -> None:
    # C opposes time here and -Q agrees with U, so only weight on C can be wrong.
    weights, found = fit_weights([case_record(planted([1.0, 1.5, 2.0, 4.0]))])
    assert weights == Weights(0.0, 0.0, 1.0)
    assert found == pytest.approx(1.0)
    assert fit_weights([]) == (None, None)


def record_of(weights: Any = None) -> dict[str, Any]:
    cases = [case_record(planted([1.0, 1.5, 2.0, 4.0]))]
    summary = summarise(cases)
    if weights is not None:
        summary["weights"] = weights
    return {
        "format": calibrate_cost.FORMAT,
        "hash": machine_hash(),
        "cases": cases,
        "summary": summary,
    }


def test_file_round_trip(tmp_path: Path) -> None:
    record = record_of({"c": 0.5, "q": 0.25, "u": 0.25})
    path = save_calibration(record, calibration_path(tmp_path))
    assert read_calibration(path) == json.loads(json.dumps(record))
    assert load_calibration(cache=tmp_path) == Weights(0.5, 0.25, 0.25)
    assert load_calibration(path) == Weights(0.5, 0.25, 0.25)


def test_defaults_serve_where_nothing_was_calibrated(tmp_path: Path) -> None:
    assert load_calibration(cache=tmp_path) == Weights()
    record = record_of()
    record["summary"]["weights"] = None
    assert load_calibration(save_calibration(record, tmp_path / "c.json")) == Weights()
    with pytest.raises(ConfigError):
        load_calibration(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "weights",
    [
        {"c": 1.0, "q": 0.0},
        {"c": -1.0, "q": 1.0, "u": 1.0},
        {"c": 0, "q": 0, "u": 0},
        {"c": "1", "q": 0, "u": 0},
        [1, 0, 0],
    ],
)
def test_broken_weights_are_refused(weights: Any, tmp_path: Path) -> None:
    path = save_calibration(record_of(weights), tmp_path / "c.json")
    with pytest.raises(ConfigError, match="weights"):
        load_calibration(path)


def test_broken_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for text in ("", "[]", "{}", json.dumps({"format": calibrate_cost.FORMAT})):
        path.write_text(text)
        with pytest.raises(ConfigError):
            read_calibration(path)
    save_calibration({**record_of(), "hash": "0" * 16}, path)
    with pytest.raises(ConfigError, match="another machine"):
        load_calibration(path)
    with pytest.raises(OutputError):
        save_calibration(record_of(), tmp_path / "c.json" / "below.json")


def test_threads_do_not_change_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    one = machine_hash()
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    assert machine_hash() == one


# --- the pilot ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "density", "tile_rows"),
    [("vec", 0.5, 32), ("block", 0.25, 16), ("unstructured", 0.1, 0)],
)
def test_masks_hold_what_they_say(mask: str, density: float, tile_rows: int) -> None:
    case = PilotCase("vrow16", 8, 64, 64, mask, density)
    weight = masked_weight(case, 0)
    assert np.count_nonzero(weight) == pytest.approx(density * weight.size, rel=0.01)
    np.testing.assert_array_equal(weight, masked_weight(case, 0))
    if tile_rows:
        best = pilot_orders(case_access(case, weight != 0), 2.0, 0)["solver"]
        scores = layout_scores(case, weight != 0, case_access(case, weight != 0), best)
        # One list length for all groups costs nothing where all groups keep the same rows.
        assert scores["U"] == scores["U_sum"] == tile_rows * 4


def test_units_are_what_the_kernel_packs() -> None:
    case = PilotCase("vrow32", 8, 48, 96, "unstructured", 0.1)
    mask = masked_weight(case, 0) != 0
    access = case_access(case, mask)
    for order in pilot_orders(access, 1.0, 0).values():
        as_permutation(order, 96)
        units = layout_scores(case, mask, access, order)["U"]
        assert units == 3 * kept_rows(mask[:, order], 32)


def test_a_row_list_is_ordered_along_the_reduced_axis() -> None:
    case = PilotCase("rowlist", 8, 64, 32, "rows", 0.5)
    mask = masked_weight(case, 0) != 0
    access = case_access(case, mask)
    order = pilot_orders(access, 1.0, 0)["solver"]
    assert layout_scores(case, mask, access, order)["U"] == 8 * 32 / 16


def test_shuffles_move_only_their_share() -> None:
    order = np.random.default_rng(0).permutation(200).astype(np.int32)
    for share in (0.05, 0.5):
        moved = shuffled(order, share, np.random.default_rng(1))
        as_permutation(moved, 200)
        assert 0 < np.count_nonzero(moved != order) <= share * 200


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        PilotCase("vrow32", 8, 32, 64, "unstructured", 0.2),
        PilotCase("rowlist", 8, 64, 32, "rows", 0.5),
    ],
    ids=lambda case: case.name,
)
def test_a_tiny_pilot_measures_finite_numbers(case: PilotCase) -> None:
    record = calibrate([case], rounds=3, solve_s=1.0, layouts=5)
    (found,) = record["cases"]
    assert 3 <= len(found["layouts"]) <= 5
    for row in found["layouts"]:
        values = [row["seconds"], *(row[name] for name in SCORE_NAMES)]
        assert np.all(np.isfinite(values))
        assert row["seconds"] >= row["seconds_min"] > 0
    json.dumps(record, allow_nan=False)
    assert len(record["hash"]) == 16


def test_a_layout_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layout_pilot.pack_vrow

    def wrong(weight: np.ndarray, v: int) -> tuple[np.ndarray, np.ndarray]:
        idx, data = right(weight, v)
        return idx, data * 2

    monkeypatch.setattr(layout_pilot, "pack_vrow", wrong)
    with pytest.raises(VerificationError, match="layout"):
        run_case(TINY, rounds=2, solve_s=1.0, layouts=3)


@pytest.mark.parametrize(
    "fields",
    [
        ("dense", 8, 32, 64, "vec", 0.5),
        ("vrow16", 8, 32, 64, "nm", 0.5),
        ("vrow16", 0, 32, 64, "vec", 0.5),
        ("vrow16", 8, 32, 64, "vec", 1.0),
        ("vrow16", 8, 32, 60, "vec", 0.5),
    ],
)
def test_bad_cases_are_refused(fields: Any) -> None:
    with pytest.raises(ConfigError):
        PilotCase(*fields)


def test_an_empty_pilot_is_refused() -> None:
    with pytest.raises(MeasurementError):
        calibrate([])
    with pytest.raises(MeasurementError):
        calibrate([TINY], rounds=1)


# --- the command --------------------------------------------------------------------------


@pytest.fixture
def tiny_pilot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make every pilot tiny and keep the cache in ``tmp_path``."""
    monkeypatch.setattr(calibrate_cost, "QUICK", (TINY,))
    monkeypatch.setattr(calibrate_cost, "FULL", (TINY, TINY))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    return tmp_path


def test_the_command_prints_a_table_and_fills_the_cache(
    tiny_pilot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "| vrow16 8x32x64 vec 50 %" in out
    assert "weights of J" in out
    assert isinstance(load_calibration(), Weights)
    assert [path.name for path in (tiny_pilot / "icd_tvm").iterdir()] == [calibration_path().name]


def test_the_command_writes_where_it_is_told(
    tiny_pilot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_pilot / "cost.json"
    assert main(["calibrate", "--json", "--out", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert len(printed["cases"]) == 2


def test_refusals(tiny_pilot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--out", str(tiny_pilot)]) == 2
    assert capsys.readouterr().err.startswith("error ICD-E301: ")
    assert main(["calibrate", "--fast"]) == 2
    assert capsys.readouterr().err.startswith("error ICD-E201: ")


def test_the_table_says_what_could_not_be_ranked() -> None:
    flat = case_record(planted([1.0] * 8, list(range(1, 9)), noise=0.2))
    text = table({"cases": [flat], "summary": summarise([flat])})
    assert "(indifferent)" in text
    assert "constant" in text
    assert "no case" in text
