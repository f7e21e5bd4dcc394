"""The search for strengths under a quality budget, on models small enough to enumerate."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
from budget_models import D, Distance, F, N, two_mlps
from onnx import numpy_helper
from relax_models import constants, gated_mlp
from scipy import stats

from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.errors import ConfigError, MeasurementError, ShapeError
from icd_tvm.measure.quality_task import Run, StsbTask, TaskScore
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.layer_rules import LayerRules
from icd_tvm.runtime.candidates import CandidateModel
from icd_tvm.runtime.options import CompileOptions
from icd_tvm.runtime.quality_budget import Budget, BudgetResult, search_strengths
from icd_tvm.runtime.strengths import Strengths
from icd_tvm.tir_schedules.target import parse_target

TARGET = parse_target(CompileOptions(model="").target, 1)
UNIT = LayerRules(parse_sparsity("unit:0.5"), min_size=0)
RATES = (0.25, 0.5)


def search(budget: Budget, held_out: Any = None, **options: Any) -> BudgetResult:
    return search_strengths(
        import_onnx(two_mlps()),
        UNIT,
        Distance(1),
        held_out or Distance(2),
        budget,
        target=TARGET,
        rates=RATES,
        **options,
    )


def test_idle_units_are_found_and_nothing_else() -> None:
    result = search(Budget(1e-3, 0.9))
    assert result.found
    assert result.rates == {"b/up:1": 0.5}
    assert result.best.stage == "final"
    assert result.best.removed == pytest.approx(0.25)
    assert abs(result.best.delta) <= 1e-3
    assert result.reason.startswith("within the budget: 25.0% of the weights removed")
    assert list(result.dense) == ["distance 1", "distance 2"]


def test_the_rules_give_the_same_model_to_the_pass() -> None:
    imported = import_onnx(two_mlps())
    strengths = Strengths(imported.mod, UNIT, {}, RATES)
    choice = {"a/up:1": 0.25, "b/up:1": 0.5}
    pass_ = ApplySparsity(strengths.rules(choice))
    pass_(imported.mod)
    entries = pass_.meta["sparsity"]["entries"]
    assert {entry["group"]: entry["rate"] for entry in entries} == choice
    zeros = sum(a.size - np.count_nonzero(a) for a in strengths.arrays(choice).values())
    assert strengths.removed(choice) == zeros / (4 * D * F) == 0.375


def test_the_rules_give_the_pass_the_columns_that_were_tried() -> None:
    """A gated layer looks at what is left of its readers: at their rate, in both."""
    rng = np.random.default_rng(6)
    w1, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((32, 192), (96, 32)))
    mod = gated_mlp(w1, w2)
    spec = LayerRules(parse_sparsity("vec16:0.5"), min_size=0)
    strengths, found = Strengths(mod, spec, {}, RATES), []
    for rates in ({"fc1": 0.5, "fc2": 0.5}, {"fc1": 0.5, "fc2": 0.25}, {"fc1": 0.5}):
        sparse = constants(ApplySparsity(strengths.rules(rates))(mod))
        tried = strengths.arrays(rates)
        assert set(tried) == {node.replace("fc", "w") for node in rates}
        for name, array in tried.items():
            np.testing.assert_array_equal(array, sparse[name])
        found.append(tried["w1"])
    assert not np.array_equal(found[0] != 0, found[2] != 0)


def test_every_candidate_is_recorded_and_gated() -> None:
    result = search(Budget(0.2, 0.97))
    record = result.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    stages = [candidate.stage for candidate in result.candidates]
    assert stages[:4] == ["profile"] * 4
    assert stages == sorted(stages, key=["profile", "greedy", "held-out", "final"].index)
    for candidate in result.candidates:
        within = abs(candidate.delta) <= 0.2 and candidate.agreement >= 0.97
        assert candidate.fits == within


def test_a_search_repeats_exactly() -> None:
    first, second = (search(Budget(0.2, 0.97)).to_json() for _ in range(2))
    assert first == second


def test_a_looser_budget_removes_more() -> None:
    removed = [search(Budget(points, 0.0)).best.removed for points in (1e-3, 0.5, 100)]
    assert removed == sorted(removed)
    assert removed[0] < removed[-1] == 0.5


def test_the_agreement_floor_stops_what_the_points_allow() -> None:
    assert search(Budget(100, 1.0)).best.removed <= 0.25
    assert search(Budget(100, 0.0)).rates == {"a/up:1": 0.5, "b/up:1": 0.5}


def test_a_rise_of_the_metric_counts_too() -> None:
    rising = Distance(2, scale=-1.0)
    assert search(Budget(0.01, 0.0), rising).rates == {"b/up:1": 0.5}


def test_nothing_fits_and_the_best_is_named() -> None:
    model = two_mlps(idle=0.0)
    task = Distance(1, model=model)
    result = search_strengths(
        import_onnx(model), UNIT, task, Distance(2), Budget(1e-9), target=TARGET, rates=RATES
    )
    assert not result.found
    assert result.rules is None
    assert result.rates == {}
    assert result.reason.startswith("no sparsity fits this budget; the nearest, ")
    weakest = min(result.candidates, key=lambda c: abs(c.delta))
    assert result.best.delta == weakest.delta


def test_held_out_data_makes_the_search_retreat() -> None:
    held_out = Distance(2, scale=50.0)
    result = search(Budget(0.5, 0.0), held_out)
    looks = [c for c in result.candidates if c.stage == "held-out"]
    assert 1 < len(looks) == result.to_json()["held_out_looks"]
    assert [look.fits for look in looks] == [False] * (len(looks) - 1) + [True]
    assert result.rates == looks[-1].rates == {"b/up:1": 0.5}


def test_held_out_data_can_refuse_everything() -> None:
    class Noise(Distance):
        def evaluate(self, run: Run) -> TaskScore:
            score = super().evaluate(run)
            return TaskScore(100.0 * self.calls, score.outputs)

    result = search(Budget(0.5, 0.0), Noise(2))
    assert not result.found
    assert result.best.stage == "held-out"


def test_what_a_task_learns_it_learns_from_the_dense_model_once_for_all() -> None:
    dense: list[np.ndarray] = []

    class Learning(Distance):
        learnt = False

        def fitted(self, run: Run) -> Any:
            dense.append(run(self.feeds))
            again = Learning(self.seed)
            again.learnt = True
            return again

        def evaluate(self, run: Run) -> TaskScore:
            assert self.learnt
            return super().evaluate(run)

    result = search_strengths(
        import_onnx(two_mlps()), UNIT, Learning(1), Learning(2), Budget(1e-3, 0.9),
        target=TARGET, rates=RATES,
    )  # fmt: skip
    assert result.rates == {"b/up:1": 0.5}
    assert len(dense) == 2
    np.testing.assert_allclose(dense[0], Distance(1).dense)


def test_decisions_are_gated_where_outputs_are_logits() -> None:
    class Classes(Distance):
        def evaluate(self, run: Run) -> TaskScore:
            score = super().evaluate(run)
            return TaskScore(50.0, score.outputs, logits=True)

    result = search_strengths(
        import_onnx(two_mlps()), UNIT, Classes(1), Classes(2), Budget(1.0, 1.0),
        target=TARGET, rates=RATES,
    )  # fmt: skip
    # Shares of eight rows, which a cosine of vectors would not be.
    assert all((8 * c.agreement).is_integer() for c in result.candidates)
    assert result.best.agreement == 1.0
    assert any(c.agreement < 1 for c in result.candidates)


def test_profile_runs_each_strength_once() -> None:
    calibration, held_out = Distance(1), Distance(2)
    result = search_strengths(
        import_onnx(two_mlps()), UNIT, calibration, held_out, Budget(1e-3, 0.9),
        target=TARGET, rates=RATES,
    )  # fmt: skip
    stages = [candidate.stage for candidate in result.candidates]
    assert calibration.calls == 1 + stages.count("profile") + stages.count("greedy")
    # The dense model, and the candidate before and after it is compiled.
    assert held_out.calls == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": -0.1}, "budget of -0.1 points is below 0"),
        ({"points": float("nan")}, "is below 0"),
        ({"agreement": 1.1}, r"agreement 1.1 is outside \[-1, 1\]"),
    ],
)
def test_bad_budgets(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Budget(**options)


def test_the_rate_of_a_spec_is_the_strongest() -> None:
    mod = import_onnx(two_mlps()).mod
    strengths = Strengths(mod, LayerRules(parse_sparsity("unit:0.25"), min_size=0), {}, RATES)
    assert {s.rate for ladder in strengths.ladder.values() for s in ladder} == {0.25}


@pytest.mark.parametrize("rates", [(), (0.0,), (0.5, 1.0)])
def test_bad_rates(rates: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"not in \(0, 1\)"):
        Strengths(import_onnx(two_mlps()).mod, UNIT, {}, rates)


def test_nothing_to_search_is_an_error_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"no layer to search .*below the least size"):
        Strengths(import_onnx(two_mlps()).mod, parse_sparsity("unit:0.5"), {})


def test_what_a_type_does_not_fit_is_left_out() -> None:
    mod = import_onnx(two_mlps()).mod
    spec = LayerRules(parse_sparsity("vec32:0.5"), min_size=0)
    strengths = Strengths(mod, spec, {}, RATES)
    strengths.drop_failing()
    # The second weights have 16 columns.
    assert list(strengths.ladder) == ["a/up", "b/up"]
    assert set(strengths.skipped) == {"a/d", "b/d"}


def test_fixed_types_have_one_strength() -> None:
    mod = import_onnx(two_mlps()).mod
    for text, rates in (("2:4", [0.5]), ("vec16+2:4:0.75", [0.5, 0.75])):
        spec = LayerRules(parse_sparsity(text), min_size=0)
        strengths = Strengths(mod, spec, {}, (0.25, 0.5, 0.75))
        assert [s.rate for s in strengths.ladder["a/up"]] == rates


# Candidates.


def test_candidates_equal_a_session_of_their_own() -> None:
    model = two_mlps()
    x = np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)
    new = {"a.1": np.full((F, D), 0.25, np.float32)}
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name in new:
            tensor.CopyFrom(numpy_helper.from_array(new[tensor.name], tensor.name))
    before = model.SerializeToString()
    candidates = CandidateModel(model, ["a.0", "a.1"])
    expected = CandidateModel(changed, []).runner({})({"x": x})
    np.testing.assert_allclose(candidates.runner(new)({"x": x}), expected, rtol=1e-6)
    np.testing.assert_allclose(
        candidates.runner({})({"x": x}), CandidateModel(model, []).runner({})({"x": x}), rtol=1e-6
    )
    assert model.SerializeToString() == before


def test_bad_candidates() -> None:
    with pytest.raises(ConfigError, match="'nothing' is no initialiser"):
        CandidateModel(two_mlps(), ["nothing"])
    candidates = CandidateModel(two_mlps(), ["a.0"])
    with pytest.raises(ConfigError, match=r"'a\.1' is not one that candidates replace"):
        candidates.runner({"a.1": np.zeros((F, D), np.float32)})
    for array in (np.zeros((D, D), np.float32), np.zeros((D, F))):
        with pytest.raises(ShapeError, match=r"candidate of 'a\.0' is float"):
            candidates.runner({"a.0": array})


# The STS-B task.

PAIRS = [
    ("a cat sat", "a cat sat", 5.0),
    ("a cat sat", "a dog sat on it", 3.0),
    ("the sun is hot", "stocks fell", 0.5),
    ("two men", "two women", 2.0),
    ("red", "blue", 1.0),
]
WORDS = sorted({word for pair in PAIRS for text in pair[:2] for word in text.split()})


def encode(texts: list[str], seq: int) -> dict[str, np.ndarray]:
    """One token a word; 0 is padding."""
    ids = np.zeros((len(texts), seq), np.int64)
    for row, text in zip(ids, texts, strict=True):
        words = [WORDS.index(word) + 1 for word in text.split()][:seq]
        row[: len(words)] = words
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


@pytest.fixture
def stsb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icd_tvm.measure.quality_task.stsb_pairs", lambda split: PAIRS)
    monkeypatch.setattr("icd_tvm.measure.quality_task.encode", encode)


class BagOfWords:
    """A model whose token vectors are one-hot."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, feeds: Any) -> np.ndarray:
        self.shapes.append(feeds["input_ids"].shape)
        return np.eye(len(WORDS) + 1)[feeds["input_ids"]]


@pytest.mark.usefixtures("stsb")
def test_stsb_is_the_correlation_at_any_shape() -> None:
    fixed, free = BagOfWords(), BagOfWords()
    first = StsbTask(seq=9, batch=4).evaluate(fixed)
    second = StsbTask(seq=9, batch=4, fixed=False).evaluate(free)
    # Cosines: equal texts 1, then two of the three and five words, none, one of two, none.
    cosines = [1.0, 2 / np.sqrt(15), 0.0, 0.5, 0.0]
    expected = 100 * stats.spearmanr(cosines, [pair[2] for pair in PAIRS]).statistic
    assert first.points == pytest.approx(expected)
    assert second.points == pytest.approx(expected)
    np.testing.assert_allclose(first.outputs, second.outputs)
    assert set(fixed.shapes) == {(4, 9)}
    assert [shape[1] for shape in free.shapes] == [2, 5]


@pytest.mark.usefixtures("stsb")
def test_stsb_parts() -> None:
    task = StsbTask("train", start=1, stop=5, step=2, seq=9)
    assert task.source == "stsb_spearman, STS-B train [1:5:2], 2 pairs"
    assert len(task.evaluate(BagOfWords()).outputs) == 4
    with pytest.raises(ConfigError, match="4::1 of STS-B dev has no two"):
        StsbTask(start=4, seq=9).evaluate(BagOfWords())


@pytest.mark.usefixtures("stsb")
def test_stsb_refuses_what_is_undefined() -> None:
    with pytest.raises(MeasurementError, match="NaN or infinity"):
        StsbTask(seq=9).evaluate(lambda feeds: np.full((*feeds["input_ids"].shape, 2), np.nan))
    with pytest.raises(MeasurementError, match="Spearman is undefined"):
        StsbTask(seq=9).evaluate(lambda feeds: np.ones((*feeds["input_ids"].shape, 2)))
