"""One version, a complete lock file, and only permissive licences at run time."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageMetadata, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import icd_tvm

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
LOCKED = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
PERMISSIVE = re.compile(
    r"\b(MIT|MIT-CMU|BSD|[023]-Clause|BSD-[23]-Clause|0BSD|Apache|Apache-2\.0|PSF|PSF-2\.0|ISC"
    r"|HPND|Zlib|CC0-1\.0|Python Software Foundation)\b"
)
COPYLEFT = re.compile(r"\b(A?GPL|LGPL|MPL|EUPL|SSPL|GNU)\b", re.I)


def _declared(section: str) -> list[Requirement]:
    (block,) = re.findall(rf"^{section} = \[(.*?)\]\n", PROJECT, re.S | re.M)
    return [Requirement(text) for text in re.findall(r'^ *"([^"]+)"', block, re.M)]


def _runtime() -> Iterator[PackageMetadata]:
    """Yield the installed metadata of every run-time dependency, and of theirs."""
    todo, seen = _declared("dependencies"), set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        found = distribution(wanted.name)
        todo += [Requirement(text) for text in found.requires or ()]
        yield found.metadata


def _licence(metadata: PackageMetadata) -> str:
    """Return what the package calls its licence: an expression, classifiers, or a first line."""
    classifiers = [c for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    texts = (metadata.get("License-Expression"), *classifiers)
    text = "; ".join(filter(None, texts))
    return text or (metadata.get("License") or "").partition("\n")[0]


def _is_permissive(licence: str) -> bool:
    """Say whether a licence is one of ours; each part of an AND must be, one of an OR."""
    return all(
        any(PERMISSIVE.search(p) and not COPYLEFT.search(p) for p in part.split(" OR "))
        for part in licence.split(" AND ")
    )


def test_run_time_licences_are_permissive() -> None:
    found = {metadata["Name"]: _licence(metadata) for metadata in _runtime()}
    assert len(found) >= 20
    assert not {name: text for name, text in found.items() if not _is_permissive(text)}


@pytest.mark.parametrize(
    ("licence", "permissive"),
    [
        ("MIT AND BSD-3-Clause", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND LGPL-2.1-or-later", False),
        ("License :: OSI Approved :: GNU General Public License (GPL)", False),
        ("", False),
        ("Proprietary", False),
    ],
)
def test_the_licence_rule(licence: str, permissive: bool) -> None:
    assert _is_permissive(licence) == permissive


def test_the_version_stands_in_one_place() -> None:
    assert 'dynamic = ["version"]' in PROJECT
    assert 'attr = "icd_tvm.__version__"' in PROJECT
    assert not re.search(r"^version = \"", PROJECT, re.M)
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.M)[1] == icd_tvm.__version__


@pytest.mark.parametrize("wanted", _declared("dependencies"), ids=str)
def test_the_lock_holds_a_version_that_fits(wanted: Requirement) -> None:
    locked = {canonicalize_name(name): version for name, version in LOCKED.items()}
    assert locked[canonicalize_name(wanted.name)] in wanted.specifier


def test_every_locked_package_has_a_hash() -> None:
    entries = re.split(r"\n(?=\w)", (ROOT / "requirements.lock").read_text().strip())
    packages = [entry for entry in entries if "==" in entry.partition("\n")[0]]
    assert len(packages) == len(LOCKED)
    assert all("--hash=sha256:" in entry for entry in packages)


# Neither file can be built without a registry, so what they refer to is checked instead.


def _instructions(text: str) -> list[list[str]]:
    """Return the words of every instruction of a Dockerfile, lines joined and comments gone."""
    joined = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    return [line.split() for line in joined.splitlines() if line.strip()]


def _problems(dockerfile: str, ignored: str, root: Path) -> list[str]:
    """Return what a Dockerfile copies that is not in its context, or from no earlier stage."""
    allowed = {line[1:] for line in ignored.splitlines() if line.startswith("!")}
    stages: set[str] = set()
    problems = []
    for word, *arguments in _instructions(dockerfile):
        if word == "FROM" and "AS" in arguments:
            stages.add(arguments[-1])
        if word != "COPY":
            continue
        flags = dict(a[2:].split("=") for a in arguments if a.startswith("--"))
        sources = [a for a in arguments if not a.startswith("--")][:-1]
        if "from" in flags:
            problems += [f"no stage {flags['from']}"] * (flags["from"] not in stages)
            continue
        problems += [f"{s} is missing" for s in sources if not (root / s).exists()]
        problems += [f"{s} is ignored" for s in sources if s not in allowed]
    return problems


def test_the_dockerfile_copies_what_is_there() -> None:
    text, ignored = ((ROOT / name).read_text() for name in ("Dockerfile", ".dockerignore"))
    assert sum(words[0] == "COPY" for words in _instructions(text)) >= 4
    assert _problems(text, ignored, ROOT) == []


def test_what_a_dockerfile_lacks_is_found(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    text = "FROM a AS first\nCOPY gone here \\\n  ./\n"
    text += "".join(f"COPY --from={stage} /x /x\n" for stage in ("second", "first"))
    assert _problems(text, "*\n!gone", tmp_path) == [
        "gone is missing", "here is ignored", "no stage second",
    ]  # fmt: skip


def test_both_environments_have_the_python_that_the_lock_was_made_for() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pinned,) = (d for d in environment["dependencies"] if d.startswith("python="))
    version = pinned.partition("=")[2]
    images = [words[1] for words in _instructions((ROOT / "Dockerfile").read_text())
              if words[0] == "FROM"]  # fmt: skip
    assert images == [f"python:{version}-slim"] * len(images)
    (bound,) = re.findall(r'^requires-python = "(.*)"', PROJECT, re.M)
    assert version in SpecifierSet(bound)
    assert f"Python {version}" in (ROOT / "docs" / "Repro.md").read_text()
