"""The examples in the documentation of the public API run, and give what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
from tiny_model import tiny_onnx

import icd_tvm
import icd_tvm.errors

MODULES = [
    "icd_tvm.adapters.quant_spec",
    "icd_tvm.adapters.sparsity_spec",
    "icd_tvm.compile",
    "icd_tvm.core.access_graph",
    "icd_tvm.core.communities",
    "icd_tvm.core.solver",
    "icd_tvm.models.importer",
    "icd_tvm.relax_passes.repermute_pass",
    "icd_tvm.runtime.compile_model",
    "icd_tvm.runtime.run",
    "icd_tvm.steps",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path) -> None:
    files = {"model_file": tiny_onnx(tmp_path / "tiny.onnx"), "folder": tmp_path}
    found = doctest.testmod(import_module(name), extraglobs=files, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0
    assert found.attempted > 0


def test_every_public_name_says_what_it_is() -> None:
    for name in icd_tvm.__all__:
        assert getattr(icd_tvm, name).__doc__, name


def test_compile_is_a_function_and_a_module(tmp_path: Path) -> None:
    module = import_module("icd_tvm.compile")
    assert icd_tvm.compile is module
    with pytest.raises(TypeError, match="sparsty"):
        icd_tvm.compile("minilm", sparsty="unit:0.5")
    with pytest.raises(icd_tvm.errors.ModelFileError):
        icd_tvm.compile(tmp_path / "absent.onnx", quiet=True)
