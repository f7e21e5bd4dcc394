"""A BERT sentence classifier as an ONNX graph: encoder, pooler at the first token, classes."""

from __future__ import annotations

import numpy as np
import onnx

from icd_tvm.errors import ShapeError
from icd_tvm.models.bert import BertConfig, Size, encode_graph
from icd_tvm.models.weights import Weights, origin


def build_bert_classifier(
    config: BertConfig,
    weights: Weights,
    seq: Size = 128,
    batch: Size = 1,
    *,
    trained: bool = False,
    name: str = "bert-classifier",
) -> onnx.ModelProto:
    """Build an encoder with a classification head, as BertForSequenceClassification has it.

    Parameters
    ----------
    config, weights, seq, batch, trained, name
        As of `icd_tvm.models.bert.build_bert`. The weights also hold ``pooler.dense`` (hidden to
        hidden) and ``classifier`` (hidden to classes), each ``weight`` [out, in] and ``bias``.

    Returns
    -------
    onnx.ModelProto
        Inputs of `build_bert`; output ``logits``, float32 ``[batch, classes]``.

    Raises
    ------
    ShapeError, ConfigError
        As of `build_bert`, also for the head.
    """
    classes = _check_head(config, weights)
    graph, hidden = encode_graph(config, weights, seq, batch)
    first = graph.constant("/pooler/first", 0, np.int64)
    first = graph.node("Gather", "/pooler/Gather", hidden, first, axis=1)
    pooled = graph.dense("/pooler/dense", "pooler.dense", first, bias=True)
    pooled = graph.node("Tanh", "/pooler/Tanh", pooled)
    logits = graph.dense("/classifier", "classifier", pooled, bias=True)
    source = origin(weights, trained)
    return graph.model((batch, seq), name, source, logits, "logits", (batch, classes))


def _check_head(config: BertConfig, weights: Weights) -> int:
    """Return the number of classes."""
    classes = len(weights["classifier.bias"]) if "classifier.bias" in weights else 0
    for module, rows in (("pooler.dense", config.hidden), ("classifier", classes)):
        for part, shape in (("bias", (rows,)), ("weight", (rows, config.hidden))):
            found = weights.get(f"{module}.{part}")
            if found is None or tuple(found.shape) != shape:
                what = "is missing" if found is None else f"has shape {found.shape}, not {shape}"
                raise ShapeError(f"weight '{module}.{part}' {what}")
    return classes
