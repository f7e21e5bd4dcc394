"""The bytes and wikitext tasks on the trained models they are for, where their packages are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from icd_tvm.measure.quality import data_dir
from icd_tvm.measure.quality_plugins import WindowTask, make_task
from icd_tvm.models import smollm2

needs_data = pytest.mark.skipif(data_dir() is None, reason="no evaluation data: set ICD_DATA")


def package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


@needs_data
@pytest.mark.skipif(package("typeseg") is None, reason="the package typeseg is not installed")
def test_a_trained_mamba_tells_the_kind_of_bytes() -> None:
    ort = pytest.importorskip("onnxruntime")
    path = package("typeseg") / "data" / "mamba_al.onnx"
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(feeds: dict[str, Any]) -> Any:
        return session.run(None, feeds)[0]

    task = make_task("bytes:8", [SimpleNamespace(name="ids", shape=(512,))])
    score = task.evaluate(run)
    # 35 classes: chance is 3 %. The same windows compiled by us gave 62.70 % and 1.9957 nats.
    assert score.points == pytest.approx(62.695, abs=0.1)
    assert score.figures["nll"] == pytest.approx(1.9957, abs=1e-3)


@needs_data
@pytest.mark.skipif(package(smollm2.PACKAGE) is None, reason=f"{smollm2.PACKAGE} is not installed")
def test_wikitext_windows_are_those_of_the_models_tokenizer() -> None:
    task = make_task("wikitext:2", [SimpleNamespace(name="input_ids", shape=(1, 128))])
    assert isinstance(task, WindowTask)
    assert [feeds["input_ids"].shape for feeds in task.feeds] == [(1, 128)] * 2
    for feeds, targets in zip(task.feeds, task.targets, strict=True):
        assert np.array_equal(feeds["input_ids"][0, 1:], targets)
    assert 0 <= task.targets.min() < task.targets.max() < 49152
