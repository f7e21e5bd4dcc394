"""``icd``: commands, and one clear line for what is refused."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from icd_tvm.cli import COMMANDS, load_command, main
from icd_tvm.commands import completion


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
        (["run"], "ICD-E201"),
        (["run", "-c", "absent.yaml", "--out", "x"], "ICD-E201"),
        (["run", "-c", "configs/mock.json"], "ICD-E201"),
        (["run", "--resume", "--out", "absent"], "ICD-E201"),
        (["run", "-c", "configs/mock.json", "--out", "x", "--override", "a"], "ICD-E201"),
        (["pair", "-c", "configs/mock.json"], "ICD-E201"),
        (["completion", "tcsh"], "ICD-E201"),
        (["explain"], "ICD-E201"),
        (["explain", "absent.onnx"], "ICD-E101"),
        (["explain", "long" * 2000], "ICD-E101"),
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


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "--overide", "seed=1"], "did you mean --override?"),
        (["cache", "ls", "--cach=x", "--jsn"], "did you mean --json?"),
        (["solve", "W.npz", "-o", "p.json", "--sead=1"], "did you mean --seed?"),
        (["doctor", "--nothing-like-it"], "see --help"),
        (["doctor", "word"], "see --help"),
    ],
)
def test_an_unknown_flag_names_the_nearest(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"({hint})")


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solvee"]) == 2
    assert "did you mean solve?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    text = load_command(command).parser().format_help()
    assert f"icd {command}" in text.partition("example")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("icd ")


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "pipeline" in json.loads(capsys.readouterr().out)["properties"]


def test_an_interrupt_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(completion, "run", stop)
    assert main(["completion", "bash"]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["schema"], ["run", "--help"], ["--version"]])
def test_a_reader_that_stops_reading_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "icd_tvm.cli", *arguments]
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert found.stderr == b""
    # From Python 3.11.3 on argparse ends its help well whatever became of it.
    assert found.returncode in ((0, 141) if "--help" in arguments else (141,))


def test_another_broken_pipe_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> None:
        raise BrokenPipeError("the peer")

    monkeypatch.setattr(completion, "run", fail)
    with (
        tempfile.TemporaryFile("w") as file,
        contextlib.redirect_stdout(file),
        pytest.raises(BrokenPipeError, match="the peer"),
    ):
        main(["completion", "bash"])


def _completed(*words: str) -> list[str]:
    line = " ".join(f"'{word}'" for word in words)
    text = f"{completion.script()}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _icd"
    bash = shutil.which("bash")
    assert bash is not None
    shell = [bash, "-c", text + '; printf "%s\\n" "${COMPREPLY[@]}"']
    return subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("icd", "ca"), ["calibrate", "cache"]),
        (("icd", "run", "--re"), ["--resume", "--reuse-perm"]),
        (("icd", "compile", "--mode", "l"), ["linear"]),
        (("icd", "completion", ""), ["bash", "zsh"]),
        (("icd", "cache", "ex"), ["export"]),
        (("icd", "run", "-c", "pypro"), ["pyproject.toml"]),
    ],
)
def test_completion(words: tuple[str, ...], expected: list[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    assert _completed(*words) == expected


def test_zsh_completion_loads_bash_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("autoload")
    assert text.endswith(completion.script())
