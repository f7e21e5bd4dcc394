"""The Python blocks of the README run as they stand, on a miniature model."""

import re
from pathlib import Path

import pytest

import icd_tvm
from icd_tvm.models.registry import build

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = block.replace('model="minilm"', 'model="bert-mini-random"')
    code = code.replace('"runs/', f'"{tmp_path}/').replace(
        '"configs/', f'"{README.parent}/configs/'
    )
    names = {"model": build("bert-mini-random")}
    exec(compile(code, str(README), "exec"), names)
    assert "Error" not in capsys.readouterr().err


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 2


def test_named_documents_exist() -> None:
    for name in re.findall(r"`(docs/[^`]+|[A-Z]+\.md)`", README.read_text()):
        assert (README.parent / name).exists(), name


def test_public_names_are_documented() -> None:
    for name in icd_tvm.__all__:
        assert getattr(icd_tvm, name).__doc__, name
