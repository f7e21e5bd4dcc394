"""Bundles and loaded models: they compute what the original computes, and notice damage."""

from __future__ import annotations

import doctest
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import tvm
import tvm_ffi
import typing_extensions
from tiny_model import D, tiny_onnx

import icd_tvm
from icd_tvm.cli import main
from icd_tvm.errors import ConfigError, ModelFileError, OutputError, ShapeError
from icd_tvm.runtime import loaded as loaded_module
from icd_tvm.runtime.bundle import PACKAGES, ROOT, SUMS, verify_bundle, write_bundle
from icd_tvm.runtime.progress import Progress

X = np.random.default_rng(3).standard_normal((4, D)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = {
        "model": {"path": str(model)},
        "measure": {"enabled": False},
        "cache": {"enabled": False, "dir": str(model.parent)},
        "threads": 1,
    }
    out = tmp_path_factory.mktemp("runs") / "a"
    return icd_tvm.run(keys, out=out, progress=Progress(quiet=True)).folder


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    return np.asarray(ort.InferenceSession(model).run(None, {"x": X})[0])


@pytest.fixture(scope="module")
def archive(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.tar.gz"
    write_bundle(finished, path)
    return path


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(archive, folder)
    return folder / ROOT


# Three lines.


def test_a_run_directory(finished: Path, expected: np.ndarray) -> None:
    loaded = icd_tvm.load(finished)
    for outputs in (loaded({"x": X}), loaded(X), loaded(x=X), loaded(X.tolist())):
        assert list(outputs) == ["y"]
        np.testing.assert_allclose(outputs["y"], expected, rtol=1e-4, atol=1e-5)
    assert [(i.name, i.shape, i.dtype) for i in loaded.inputs] == [("x", (4, D), "float32")]
    assert [(o.name, o.shape, o.dtype) for o in loaded.outputs] == [("y", (4, D), "float32")]


def test_a_bare_library_knows_the_names_of_its_inputs(finished: Path, expected: np.ndarray) -> None:
    loaded = icd_tvm.load(finished / "module.so")
    assert [(i.name, i.shape) for i in loaded.inputs] == [("x", None)]
    outputs = loaded({"x": X})
    np.testing.assert_allclose(outputs["output_0"], expected, rtol=1e-4, atol=1e-5)


def test_an_unpacked_bundle(unpacked: Path, expected: np.ndarray) -> None:
    np.testing.assert_allclose(icd_tvm.load(unpacked)(X)["y"], expected, rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_compiler_out(finished: Path) -> None:
    code = (
        "import sys, numpy, icd_tvm; y = icd_tvm.load(sys.argv[1])(numpy.ones((4, 64), 'f4'))['y'];"
        "import tvm.base; print(tvm.base._RUNTIME_ONLY, *tvm.base._LOADED_LIBS, y.sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, finished],
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    only, *libraries, total = done.stdout.split()
    assert only == "True"
    assert "tvm_compiler" not in libraries
    expected = icd_tvm.load(finished)(np.ones((4, D), np.float32))["y"].sum()
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)


def test_examples(finished: Path) -> None:
    found = doctest.testmod(loaded_module, extraglobs={"run_folder": finished})
    assert (found.failed, found.attempted) == (0, 4)


def test_an_output_whose_shape_values_decide(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    metrics = folder / "metrics.json"
    record = json.loads(metrics.read_text())
    record["model"]["outputs"][0]["shape"] = None
    metrics.write_text(json.dumps(record))
    loaded = icd_tvm.load(folder)
    assert loaded.outputs[0].shape is None
    assert loaded(X)["y"].shape == (4, D)


@pytest.mark.parametrize(
    ("arrays", "named", "text"),
    [
        ((), {}, "input 'x' is missing"),
        ((X, X), {}, "2 inputs are given, the model has 1"),
        ((), {"x": X, "z": X}, "unknown input 'z'"),
        ((X[:2],), {}, r"shape \(2, 64\), not \(4, 64\)"),
        ((X.astype(np.float64),), {}, r"dtype float64.*astype\('float32'\)"),
    ],
)
def test_refused_inputs(
    finished: Path, arrays: tuple[Any, ...], named: Mapping[str, Any], text: str
) -> None:
    with pytest.raises(ShapeError, match=text):
        icd_tvm.load(finished)(*arrays, **named)


def _truncate(folder: Path) -> None:
    (folder / "module.so").write_bytes(b"ELF")


def _unsign(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"model": {"name": "a", "inputs": [{}], "outputs": []}}')


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (_truncate, "must come from TVM"),
        (_unsign, "cannot read the inputs"),
        (lambda folder: (folder / "module.so").unlink(), "is its run finished"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_refused_places(
    finished: Path, tmp_path: Path, harm: Callable[[Path], None], text: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    harm(folder)
    with pytest.raises(ModelFileError, match=text):
        icd_tvm.load(folder)


# The archive.


def test_members(archive: Path, finished: Path) -> None:
    found = verify_bundle(archive)
    assert set(found) == {
        "README.md",
        "config.resolved.yaml",
        "model.json",
        "module.so",
        "perm.json",
        "requirements.txt",
        "run.py",
    }
    assert found["module.so"] == hashlib.sha256((finished / "module.so").read_bytes()).hexdigest()


def test_no_trace_of_this_machine(archive: Path, model: Path) -> None:
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        assert [m.name for m in members] == sorted(m.name for m in members)
        texts = {m.name: tar.extractfile(m).read() for m in members if m.name[-3:] != ".so"}  # type: ignore[union-attr]
    assert b"path: tiny.onnx" in texts[f"{ROOT}/config.resolved.yaml"]
    assert not any(str(model.parent).encode() in text for text in texts.values())


def test_equal_runs_make_equal_archives(archive: Path, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(finished, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    write_bundle(copy, tmp_path / "b.tar.gz")
    assert (tmp_path / "b.tar.gz").read_bytes() == archive.read_bytes()


def test_exact_versions(unpacked: Path) -> None:
    lines = (unpacked / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in lines] == list(PACKAGES)
    assert f"numpy=={np.__version__}" in lines


def _run(unpacked: Path, tmp_path: Path, *flags: str, **more: str) -> tuple[np.ndarray, str]:
    np.savez(tmp_path / "in.npz", x=X)
    done = subprocess.run(
        [sys.executable, *flags, "run.py", tmp_path / "in.npz", tmp_path / "out.npz"],
        cwd=unpacked,
        env={"PATH": os.defpath, "TVM_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    with np.load(tmp_path / "out.npz") as outputs:
        return outputs["y"], done.stdout


def test_it_runs(unpacked: Path, finished: Path, tmp_path: Path) -> None:
    y, text = _run(unpacked, tmp_path)
    assert text == "y float32 (4, 64)\n"
    np.testing.assert_array_equal(y, icd_tvm.load(finished)(X)["y"])


def test_it_runs_on_the_small_runtime(unpacked: Path, finished: Path, tmp_path: Path) -> None:
    """Only the packages that are named, TVM without compiler, headers and sources."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for module in (np, ml_dtypes, tvm_ffi):
        (packages / module.__name__).symlink_to(Path(str(module.__file__)).parent)
    numpy_libraries = Path(str(np.__file__)).parents[1] / "numpy.libs"
    if numpy_libraries.exists():
        (packages / "numpy.libs").symlink_to(numpy_libraries)
    (packages / "typing_extensions.py").symlink_to(str(typing_extensions.__file__))
    left_out = {"libtvm_compiler.so", "3rdparty", "src", "include", "web", "__pycache__"}
    here = Path(str(tvm.__file__)).parent
    shutil.copytree(
        here, packages / "tvm", ignore=lambda _, names: [n for n in names if n in left_out]
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", "import tvm; print(tvm.base._RUNTIME_ONLY, tvm.__file__)"],
        env={"PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.split() == ["True", str(packages / "tvm" / "__init__.py")]
    y, _ = _run(unpacked, tmp_path, "-S", PYTHONPATH=str(packages))
    np.testing.assert_array_equal(y, icd_tvm.load(finished)(X)["y"])


def _empty_wheels(folder: Path, requirements: list[str]) -> None:
    for item in requirements:
        name, _, version = item.partition("==")
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(b"wheel")


def test_wheels(unpacked: Path, finished: Path, tmp_path: Path) -> None:
    needed = (unpacked / "requirements.txt").read_text().split()
    _empty_wheels(tmp_path, needed)
    names = write_bundle(finished, tmp_path / "b.tar.gz", tmp_path)
    assert len([name for name in names if name.startswith("wheels/")]) == len(needed)
    next(tmp_path.glob("ml_dtypes*.whl")).unlink()
    with pytest.raises(ConfigError, match=r"no wheel of ml-dtypes==.*pip download"):
        write_bundle(finished, tmp_path / "b.tar.gz", tmp_path)


def _rewritten(archive: Path, path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    with tarfile.open(archive) as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    change(content)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update({f"{ROOT}/run.py": b"print()"}), "run.py is damaged"),
        (lambda c: c.pop(f"{ROOT}/module.so"), "module.so is damaged, missing"),
        (lambda c: c.update({f"{ROOT}/more": b""}), "more is damaged, missing or not listed"),
        (lambda c: c.pop(f"{ROOT}/{SUMS}"), "is no bundle"),
        (lambda c: c.update({f"{ROOT}/{SUMS}": b"x"}), "no sound bundle"),
        (lambda c: c.update({f"{ROOT}/../x": b""}), "is no file of a bundle"),
        (lambda c: c.update({"/etc/x": b""}), "is no file of a bundle"),
    ],
)
def test_damage(
    archive: Path, tmp_path: Path, change: Callable[[dict[str, bytes]], object], text: str
) -> None:
    with pytest.raises(ModelFileError, match=text):
        verify_bundle(_rewritten(archive, tmp_path / "b.tar.gz", change))


def test_a_link_is_no_member(tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"{ROOT}/module.so")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ModelFileError, match="is no file of a bundle"):
        verify_bundle(path)


# The header of gzip holds the second: named, or two workers collect tests of different names.
@pytest.mark.parametrize(
    "data",
    [b"", b"no archive", gzip.compress(b"no tar" * 200)],
    ids=["empty", "text", "no tar"],
)
def test_no_archive(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "b.tar.gz").write_bytes(data)
    with pytest.raises(ModelFileError, match=r"is no (sound )?bundle"):
        verify_bundle(tmp_path / "b.tar.gz")


def test_a_truncated_archive(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match="no sound bundle"):
        verify_bundle(tmp_path / "b.tar.gz")


def test_refused_runs(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is no finished run"):
        write_bundle(tmp_path, tmp_path / "b.tar.gz")
    with pytest.raises(OutputError, match="is missing or read-only"):
        write_bundle(finished, tmp_path / "absent" / "b.tar.gz")
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "environment.json").write_text("{")
    with pytest.raises(ModelFileError, match="is no sound run"):
        write_bundle(copy, tmp_path / "b.tar.gz")
    assert not (tmp_path / "b.tar.gz").exists()


def test_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.tar.gz"
    assert main(["bundle", str(finished), "-o", str(path)]) == 0
    assert "7 files" in capsys.readouterr().out
    assert main(["bundle", "--verify", str(path), "--json"]) == 0
    assert "module.so" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("more", [[], ["a"], ["-o", "b"], ["a", "-o", "b", "--verify", "c"]])
def test_refused_flags(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", *more]) == 2
    assert capsys.readouterr().err.startswith("error ICD-E201: nothing to do")
