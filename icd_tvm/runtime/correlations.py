"""Co-activation of a model's units, from calibration inputs that run through the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import scipy.sparse as sp
from numpy.typing import NDArray

from icd_tvm._tvm import apply_pass, tvm
from icd_tvm.core import correlation
from icd_tvm.core.cost import Csr
from icd_tvm.errors import ConfigError, ShapeError
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import validate_inputs
from icd_tvm.relax_passes.axis_groups import find_axis_groups
from icd_tvm.relax_passes.collect_activation_stats import CollectActivationStats
from icd_tvm.relax_passes.hidden_groups import hidden_groups
from icd_tvm.runtime.build import build
from icd_tvm.tir_schedules.target import host_target

Model: TypeAlias = str | Path | onnx.ModelProto | ImportedModel | tvm.IRModule
Feeds = Mapping[str, NDArray[Any]]

_DEFAULTS: dict[str, Any] = {"matmul": None, "rows": 4096, "seed": 0, "target": None}


def collect_correlations(
    model: Model, inputs: Feeds | Sequence[Feeds], cfg: Mapping[str, Any] | None = None
) -> tuple[Csr, dict[str, Any]]:
    """Return the graph of absolute correlation between the units that feed chosen matmuls.

    Parameters
    ----------
    model, inputs, cfg
        As for :func:`collect_activations`; ``cfg`` also takes the keys of
        :func:`icd_tvm.core.correlation.collect_correlations` (``neighbours``, ``threshold``,
        ``center``, ``block``).

    Returns
    -------
    matrix : csr_matrix of float32, shape [units, units]
        One matmul: W of its reduced axis. Several: their graphs one after the other on the
        diagonal, without an edge between them.
    meta : dict
        ``axes``: matmul -> ``start`` and ``stop`` of its units in the matrix, ``samples`` and
        ``constant`` (units that never change, without edges); ``units``; and cfg.

    Raises
    ------
    ConfigError, ShapeError, NonFiniteError, TransformError
        If the model, an input or a key of ``cfg`` is invalid.
    """
    own, graph_cfg = _split(cfg)
    activations = _collect(model, inputs, own)
    parts = {
        name: correlation.collect_correlations(rows, graph_cfg)
        for name, rows in activations.items()
    }
    axes, stop = {}, 0
    for name, (_, meta) in parts.items():
        start, stop = stop, stop + meta["units"]
        axes[name] = {"start": start, "stop": stop} | {k: meta[k] for k in ("samples", "constant")}
    matrix = sp.csr_matrix(sp.block_diag([graph for graph, _ in parts.values()], format="csr"))
    return matrix, {"axes": axes, "units": stop, "rows": own["rows"], "seed": own["seed"]} | {
        **correlation.DEFAULTS,
        **graph_cfg,
    }


def collect_activations(
    model: Model, inputs: Feeds | Sequence[Feeds], cfg: Mapping[str, Any] | None = None
) -> dict[str, NDArray[np.float32]]:
    """Run calibration inputs and return a sample of the left operands of chosen matmuls.

    ``build_w("trace", activations=rows)`` makes W of one of them.

    Parameters
    ----------
    model : str, Path, onnx.ModelProto, ImportedModel or tvm.IRModule
        An ONNX file or graph, or a Relax module whose weights are bound constants.
    inputs : mapping of str to ndarray, or a sequence of them
        Calibration inputs by name, one mapping a batch.
    cfg : mapping, optional
        ``matmul`` (str or sequence of str): names of matmul bindings, which are the names of
        their ONNX nodes; by default the consumer of every hidden group (hidden_groups.py).
        ``rows`` (int, default 4096): the most samples kept of one matmul over all batches, in
        equal parts of at least one; where a batch has more tokens, they are drawn without
        replacement, the same places of every batch. ``seed`` (int, default 0) of that draw.
        ``target`` (tvm.target.Target): where to run; this machine by default.

    Returns
    -------
    dict of str to ndarray
        float32 [samples, units] by matmul.

    Raises
    ------
    ConfigError, ShapeError, NonFiniteError, TransformError
        If the model, an input or a key of ``cfg`` is invalid.
    """
    own, rest = _split(cfg)
    if rest:
        raise ConfigError(f"collect_activations: unknown key {sorted(rest)[0]!r}")
    return _collect(model, inputs, own)


def _split(cfg: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    given = dict(cfg or {})
    rest = {key: value for key, value in given.items() if key not in _DEFAULTS}
    own = {**_DEFAULTS, **{key: value for key, value in given.items() if key in _DEFAULTS}}
    if not isinstance(own["rows"], int) or own["rows"] < 1:
        raise ConfigError(f"collect_activations: rows={own['rows']!r} must be at least 1")
    return own, rest


def _collect(
    model: Model, inputs: Feeds | Sequence[Feeds], cfg: Mapping[str, Any]
) -> dict[str, NDArray[np.float32]]:
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not batches:
        raise ConfigError("collect_activations: no inputs", "give at least one calibration batch")
    mod = _module(model, batches)
    names = _matmuls(mod, cfg["matmul"])
    cap = max(1, cfg["rows"] // len(batches))
    statistics = CollectActivationStats(dict.fromkeys(names, "rows"), row_cap=cap, seed=cfg["seed"])
    runner = build(apply_pass(statistics, mod), cfg["target"] or host_target(), tune=False)
    found = [runner.run_all(feeds)[-len(names) :] for feeds in batches]
    return {
        name: np.concatenate(rows)
        for name, rows in zip(names, zip(*found, strict=True), strict=True)
    }


def _module(model: Model, batches: Sequence[Feeds]) -> Any:
    """Return the Relax module of ``model``, whose inputs ``batches`` must be."""
    if isinstance(model, tvm.IRModule):
        names = [param.name for param in model["main"].params]
        for feeds in batches:
            if missing := sorted(set(names) ^ set(feeds)):
                raise ShapeError(
                    f"input {missing[0]!r} is missing or unknown", f"inputs: {', '.join(names)}"
                )
        return model
    imported = model if isinstance(model, ImportedModel) else import_onnx(model)
    for feeds in batches:
        validate_inputs(imported, feeds)
    return imported.mod


def _matmuls(mod: Any, asked: str | Sequence[str] | None) -> list[str]:
    if asked is not None:
        names = [asked] if isinstance(asked, str) else list(dict.fromkeys(asked))
        if not names:
            raise ConfigError("collect_activations: cfg['matmul'] names no matmul")
        return names
    func = mod["main"]
    groups = hidden_groups(func, find_axis_groups(func))
    takers = [next(u.node for u in group.weights if u.side == "K") for group in groups]
    if not takers:
        raise ConfigError(
            "collect_activations: the model has no hidden units between two matmuls",
            "name a matmul in cfg['matmul']",
        )
    return list(dict.fromkeys(takers))
