"""``icd``: commands, and one clear line for what is refused."""

import json
from pathlib import Path

import pytest

from icd_tvm.cli import main


def test_explain_names_tensors_and_pins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "bert-mini-random"]) == 0
    text = capsys.readouterr().out
    assert "encoder.layer.0.intermediate.dense.weight" in text
    assert "graph output" in text
    assert max(map(len, text.splitlines())) <= 100


def test_explain_json_and_dot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dot = tmp_path / "groups.dot"
    assert main(["explain", "bert-mini-random", "--json", "--dot", str(dot)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert sorted(group["size"] for group in record["free"]) == [4, 4, 16, 16, 16, 16, 256, 256]
    assert dot.read_text().startswith("graph axis_groups {")


def test_compile_is_the_compile_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "absent.onnx"]) == 2
    assert "ICD-E101" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], "ICD-E201"),
        (["solvee"], "ICD-E201"),
        (["explain"], "ICD-E201"),
        (["explain", "absent.onnx"], "ICD-E101"),
        (["explain", "bert-mini-random", "--opaque-state", "past"], "ICD-E201"),
        (["explain", "bert-mini-random", "--opaque-state", "past=present"], "ICD-E402"),
    ],
)
def test_refusals(arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error {code}: ")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "icd explain model.onnx" in capsys.readouterr().out
