"""Docstrings of public names are what Sphinx can read: no bare ``|x|``, sections underlined."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "icd_tvm"
SECTIONS = (
    "Parameters", "Returns", "Yields", "Raises", "Attributes", "Notes", "Examples", "References",
)  # fmt: skip
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def problems(text: str) -> Iterator[str]:
    """Yield what is wrong with one docstring."""
    bare = re.sub(r"``.*?``", "", text, flags=re.S)
    for found in re.findall(r"(?<![\w|])\|(?! )[^|\n]+(?<! )\|(?![\w|])", bare):
        yield f"{found} is a substitution: write abs(...) or ``...``"
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip() in SECTIONS and below.strip() != "-" * len(line.strip()):
            yield f"section {line.strip()} is not underlined by as many dashes"
    if text.count("``") % 2:
        yield "`` is not closed"


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED):
            name = getattr(node, "name", "module")
            text = None if name.startswith("_") else ast.get_docstring(node)
            if text:
                yield name, text


def test_all() -> None:
    wrong, seen = [], 0
    for path in sorted(ROOT.rglob("*.py")):
        for name, text in docstrings(path):
            seen += 1
            wrong += [f"{path.relative_to(ROOT)}: {name}: {problem}" for problem in problems(text)]
    assert seen > 500
    assert not wrong


@pytest.mark.parametrize(
    "text", ["The |cosine| of x.", "Parameters\n---\nx : int", "The ``name of it.", "Returns\nint"]
)
def test_a_wrong_one_is_found(text: str) -> None:
    assert list(problems(text))


@pytest.mark.parametrize("text", ["int | None or str | None", "``|x|``", "Raises\n------\nError"])
def test_a_right_one_passes(text: str) -> None:
    assert not list(problems(text))
