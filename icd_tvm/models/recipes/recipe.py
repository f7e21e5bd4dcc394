"""Train a classifier, prune it while it stays as good, and write both with a model card."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from icd_tvm.files import make_folder, write_atomically
from icd_tvm.models.bert import BertConfig
from icd_tvm.models.bert_classifier import build_bert_classifier
from icd_tvm.models.onnx_file import load_proto, to_array
from icd_tvm.models.recipes._jax import jax
from icd_tvm.models.recipes.ladder import Ladder, Right, Rung, climb, right_ones
from icd_tvm.models.recipes.training import Sentences, Training, train
from icd_tvm.models.recipes.units import Weights

DENSE, PRUNED, CARD = "dense.onnx", "pruned.onnx", "card.json"
JUDGED = (
    "The rung was chosen by its accuracy on the judged set, so that figure is optimistic; and one "
    "sentence is one part in n of it. The dense twin got no training beyond its own epochs."
)


@dataclass(frozen=True)
class Source:
    """What is trained, and on what.

    Attributes
    ----------
    name : str
        Of the graphs.
    config : BertConfig
    weights : dict of str to float32 array
        Trained encoder, ``pooler.dense`` and a fresh ``classifier``.
    data, judged : Sentences
        For training, and for the accuracies.
    origin : dict
        JSON-serialisable: where weights and data come from, with checksums.
    """

    name: str
    config: BertConfig
    weights: Weights
    data: Sentences
    judged: Sentences
    origin: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How to train and prune.

    Attributes
    ----------
    dense : Training
        Of the dense twin.
    ladder : Ladder
    tolerance : float
        Points of accuracy (%) that the pruned classifier may lose against its dense twin.
    """

    dense: Training = field(default_factory=Training)
    ladder: Ladder = field(default_factory=Ladder)
    tolerance: float = 0.1


def cook(
    source: Source,
    plan: Plan,
    out: Path,
    progress: Callable[[str], None] = print,
    dense: Weights | None = None,
) -> dict[str, Any]:
    """Train the dense twin, climb the ladder, and write what came of it.

    The files are brought up to date after every rung, so that a stopped run leaves what it had.

    Parameters
    ----------
    source : Source
    plan : Plan
    out : Path
        Folder for ``dense.onnx``, ``pruned.onnx`` (the sparsest rung within the tolerance; absent
        if there is none) and ``card.json``.
    progress : callable
        Is told a line now and then.
    dense : dict of str to float32 array, optional
        A dense twin that was trained before (see `read_weights`); the card then gives no time of
        its training.

    Returns
    -------
    dict
        The card.

    Raises
    ------
    OutputError
        The folder or a file cannot be written.
    ConfigError
        A sparsity leaves a layer too few units.
    ShapeError
        The weights do not fit the source's model.
    """
    make_folder(out)
    (out / PRUNED).unlink(missing_ok=True)
    start, seconds = time.perf_counter(), None
    if dense is None:
        dense = train(source.config, source.weights, source.data, plan.dense, progress=progress)
        seconds = time.perf_counter() - start
    files = {DENSE: _save(source, dense, out / DENSE)}
    right = right_ones(source.config, dense, source.judged)
    progress(f"dense: accuracy {_percent(right):.3f} %")
    card = _card(source, plan, right, seconds, files)
    for rung in climb(source.config, dense, source.data, source.judged, plan.ladder, progress):
        line = _line(source.config, rung, right, plan.tolerance)
        card["rungs"].append(line)
        progress(
            f"sparsity {line['sparsity']:.3f}: accuracy {line['accuracy_percent']:.3f} %"
            f", {line['lost']} lost and {line['gained']} gained ({rung.seconds / 60:.1f} min)"
        )
        if line["within_tolerance"]:
            card["chosen"] = line
            files[PRUNED] = _save(source, rung.weights, out / PRUNED)
        _write_card(card, out)
    _write_card(card, out)
    return card


def read_weights(path: Path) -> Weights:
    """Return the weights of a classifier that `cook` wrote, dense weights [out, in].

    Raises
    ------
    ModelFileError
        The file is missing or not ONNX.
    """
    tensors = load_proto(path).graph.initializer
    arrays = {tensor.name: to_array(tensor) for tensor in tensors}
    transposed = {
        name for name in arrays if name.endswith(".weight") and not name.startswith("embeddings.")
    }
    return {
        name: array.T if name in transposed else array
        for name, array in arrays.items()
        if name.endswith((".weight", ".bias"))
    }


def _card(
    source: Source, plan: Plan, right: Right, seconds: float | None, files: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": source.name,
        "origin": source.origin,
        "model": asdict(source.config),
        "plan": asdict(plan),
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "sentences": {"trained": len(source.data), "judged": len(source.judged)},
        "limits": JUDGED,
        "dense": {"accuracy_percent": _percent(right), "seconds": seconds},
        "rungs": [],
        "chosen": None,
        "files": files,
    }


def _line(config: BertConfig, rung: Rung, dense: Right, tolerance: float) -> dict[str, Any]:
    kept = [len(units) for units in rung.kept]
    delta = _percent(rung.right) - _percent(dense)
    return {
        "asked_sparsity": rung.asked,
        "sparsity": 1 - sum(kept) / (config.ffn * config.layers),
        "sparsity_per_layer": [1 - count / config.ffn for count in kept],
        "kept_units": kept,
        "accuracy_percent": _percent(rung.right),
        "delta_points": delta,
        "lost": int((dense & ~rung.right).sum()),
        "gained": int((rung.right & ~dense).sum()),
        "within_tolerance": delta >= -tolerance,
        "seconds": rung.seconds,
    }


def _percent(right: Right) -> float:
    return 100 * float(right.mean())


def _save(source: Source, weights: Weights, path: Path) -> dict[str, Any]:
    seq = source.judged.ids.shape[1]
    model: onnx.ModelProto = build_bert_classifier(
        source.config, weights, seq, trained=True, name=source.name
    )
    content = model.SerializeToString()
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "seq": seq}


def _write_card(card: dict[str, Any], out: Path) -> None:
    text = json.dumps(card, indent=2) + "\n"
    write_atomically(out / CARD, lambda temporary: temporary.write_text(text, "utf-8"))
