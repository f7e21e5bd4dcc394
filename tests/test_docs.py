"""Code in the documents runs: blocks of one document in order, in one folder, sharing names.

A block after ``<!-- not run: reason -->`` is only parsed: its Python compiles, its commands exist
and take their arguments. A ``text`` block after a Python block is what that block prints;
``ICD_WRITE_DOCS=1`` rewrites such blocks instead of comparing them.
"""

import ast
import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_model import tiny_onnx

import icd_tvm
from icd_tvm import cli, errors

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
SHELL = ("", "sh", "bash")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``reason`` says why it is not run, if it is not."""

    language: str
    code: str
    reason: str
    start: int
    end: int


def blocks(text: str) -> list[Block]:
    return [
        Block(m["language"], m["code"], m["reason"] or "", m.start("code"), m.end("code"))
        for m in BLOCK.finditer(text)
    ]


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command; continued lines are joined, comments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def parsed(words: list[str]) -> None:
    """Check that a command exists and takes its arguments; nothing is run."""
    if words[:2] == ["python", "-m"] and words[2].startswith("icd_tvm."):
        words = ["icd", *words[3:]] if words[2] == "icd_tvm.cli" else ["icd", *_module(words)]
    if words[0] == "icd":
        if words[1] == "models" or words[1].startswith("models."):
            return
        command = cli.load_command(words[1])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                command.parser().parse_args(words[2:])
            except (SystemExit, errors.IcdError):
                pytest.fail(f"{shlex.join(words)}: {said.getvalue()}")
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in words[1:]), words
    elif words[0] == "python":
        assert words[1] in ("-m", "-c") or (ROOT / words[1]).is_file(), words


def _module(words: list[str]) -> list[str]:
    return [words[2].removeprefix("icd_tvm."), *words[3:]]


def run_command(words: list[str]) -> None:
    """Run one of our commands in this process; others have to say why they are not run."""
    assert words[0] == "icd", f"{words[0]} is not ours: mark the block as not run, with a reason"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as e:
        status = cli.main(words[1:])
    assert status == 0, (words, e.getvalue())


def printed(code: str, names: dict[str, Any], path: Path) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, str(path), "exec"), names)
    return said.getvalue()


def run_blocks(path: Path, text: str) -> str:
    """Run or parse every block of a document; return it with what its code prints now."""
    names: dict[str, Any] = {"__name__": "document"}
    said, new, at = "", "", 0
    for block in blocks(text):
        new += text[at : block.start]
        at = block.end
        code = block.code
        if block.language == "python":
            ast.parse(code)
            # Blank lines before the code make tracebacks name the line of the document.
            code_at = "\n" * text.count("\n", 0, block.start) + code
            said = "" if block.reason else printed(code_at, names, path)
        elif block.language in SHELL:
            for words in commands(code):
                (parsed if block.reason else run_command)(words)
        elif block.language == "yaml":
            assert yaml.safe_load(code)
        elif block.language == "text" and said:
            code = said
        new += code
    return new + text[at:]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder as a reader has it: ``configs``, and a ``model.onnx`` of their own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tiny_onnx(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code(path: Path, place: Path) -> None:
    text = path.read_text()
    found = run_blocks(path, text)
    if os.environ.get("ICD_WRITE_DOCS"):
        path.write_text(found)
    else:
        assert found == text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_fence_is_seen(path: Path) -> None:
    text = path.read_text()
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(blocks(text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|benchmarks|tests|configs|icd_tvm)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_error_codes() -> None:
    """The table of ICD.md is the exception tree."""
    text = (ROOT / "docs" / "ICD.md").read_text()
    rows = re.findall(r"^\| `(ICD-E\d+)` \| `(\w+)` \|", text, re.M)
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert rows == [(c.code, c.__name__) for c in classes if issubclass(c, errors.IcdError)]


def test_every_pass_is_documented() -> None:
    text = (ROOT / "docs" / "Pass_Doc.md").read_text()
    files = (ROOT / "icd_tvm" / "relax_passes").glob("*.py")
    names = {
        n for f in files for n in re.findall(r'_pass\(opt_level=0, name="(\w+)"', f.read_text())
    }
    assert names == set(re.findall(r"^### (\w+)$", text, re.M))


def test_imports_point_upwards_in_the_table_of_parts() -> None:
    text = (ROOT / "docs" / "SAS.md").read_text()
    folders = re.findall(r"^\| `(\w+)/`", text, re.M)
    assert len(folders) == 9
    for i, folder in enumerate(folders):
        files = (ROOT / "icd_tvm" / folder).rglob("*.py")
        # Recipes train models on the data sets of measure; nothing imports them.
        sources = (file.read_text() for file in files if "recipes" not in file.parts)
        # Examples in docstrings, which are indented, import what a reader would.
        text = "".join(line for s in sources for line in s.splitlines(True) if ">>>" not in line)
        used = set(re.findall(r"(?:from|import) icd_tvm\.(\w+)", text))
        assert not used & set(folders[i + 1 :]), folder


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs" / "USAGE.md").read_text()
    assert not [name for name in cli.COMMANDS if f"`icd {name}`" not in text]


def test_public_names_are_documented() -> None:
    reference = (ROOT / "docs" / "api" / "index.rst").read_text()
    assert re.findall(r"^   (\w+)$", reference, re.M)[:-1] == icd_tvm.__all__
    for name in icd_tvm.__all__:
        assert getattr(icd_tvm, name).__doc__, name


@pytest.mark.parametrize(
    "line", ["icd compile minilm --no-such-flag", "icd nothing", "make nothing", "python gone.py"]
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((AssertionError, errors.IcdError, pytest.fail.Exception)):
        parsed(shlex.split(line))


def test_wrong_code_is_found(place: Path) -> None:
    with pytest.raises(NameError):
        run_blocks(ROOT / "x.md", "```python\nno_such_name\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(ROOT / "x.md", "```\nmake demo\n```\n")
    changed = "```python\nprint(1)\n```\n\n```text\n2\n```\n"
    assert run_blocks(ROOT / "x.md", changed) == changed.replace("2", "1")
