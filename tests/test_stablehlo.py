"""The StableHLO proof of concept says what docs/StableHLO.md says; needs jaxlib below 0.9."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import stablehlo as poc

WHY = "StableHLO's MLIR bindings come with jaxlib<0.9"
ir = pytest.importorskip("jaxlib.mlir.ir", reason=WHY)
OLD = hasattr(ir.ShapedType, "isinstance")
needs_old = pytest.mark.skipif(not OLD, reason="TVM's importer needs jaxlib below 0.9")


@needs_old
@pytest.mark.parametrize(
    ("case", "answer"),
    [
        ("x @ w", "right"),
        ("x @ w.T (PyTorch's linear)", "WRONG"),
        ("broadcast a column", "WRONG"),
        ("tanh", "refused: Unsupported operation stablehlo.tanh"),
    ],
)
def test_the_importer(case: str, answer: str) -> None:
    assert poc.imported(poc.CASES[case]) == answer


@pytest.mark.parametrize("place", poc.PLACES)
def test_a_json_string_survives_every_form(place: str) -> None:
    source = poc.annotated(poc.VALUES["string (JSON)"], place)
    assert all(poc.round_trip(source, form) for form in ("text", "bytecode", "portable"))


def test_a_dense_array_on_an_operation_has_no_portable_form() -> None:
    source = poc.annotated(poc.VALUES["dense array"], "operation")
    assert poc.round_trip(source, "bytecode")
    assert not poc.round_trip(source, "portable")
