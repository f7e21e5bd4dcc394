"""Node cases of the onnx package: a fixed list stays right, a fixed sample mostly imports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from onnx_coverage import Case, Outcome, node_cases, run_cases

HERE = Path(__file__).parent
LISTED = tuple((HERE / "onnx_node_cases.txt").read_text().split())
SAMPLE_STEP = 16
SAMPLE_SHARE = 0.75
# Right up to the rounding of the type, which the cases' tolerance of 1e-7 around zero does not
# allow: float16 attention, and a transform whose exact result is zero.
ROUNDING = ("fp16", "dft_inverse", "float16")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return node_cases()


@pytest.fixture(scope="module")
def outcomes(cases: list[Case]) -> dict[str, Outcome]:
    wanted = {*LISTED, *(case.name for case in cases[::SAMPLE_STEP])}
    found = run_cases([case for case in cases if case.name in wanted], workers=2)
    return {outcome.name: outcome for outcome in found}


def test_every_listed_case_is_right(outcomes: dict[str, Outcome]):
    present = [name for name in LISTED if name in outcomes]
    assert len(present) >= 0.9 * len(LISTED), "the onnx package lacks many of the listed cases"
    broken = [outcomes[name] for name in present if not outcomes[name].right]
    assert not broken


def test_most_of_a_sample_imports(cases: list[Case], outcomes: dict[str, Outcome]):
    sample = [outcomes[case.name] for case in cases[::SAMPLE_STEP]]
    assert len(sample) >= 100
    share = sum(outcome.right for outcome in sample) / len(sample)
    assert share >= SAMPLE_SHARE


def test_what_imports_from_the_sample_is_right(cases: list[Case], outcomes: dict[str, Outcome]):
    sample = [outcomes[case.name] for case in cases[::SAMPLE_STEP]]
    broken = [o for o in sample if o.status != "refused" and not o.right]
    assert not [o for o in broken if not any(word in o.name for word in ROUNDING)]


def test_every_refusal_gives_a_code_and_a_reason(outcomes: dict[str, Outcome]):
    refused = [o for o in outcomes.values() if o.status == "refused"]
    assert refused
    assert all(o.reason.startswith("ICD-E") and len(o.reason) > 20 for o in refused)
