"""Make one target sparse: the new constants and a record of what was done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from icd_tvm.adapters.calibration import Calibration, as_calibration
from icd_tvm.adapters.grouping import assign_units
from icd_tvm.adapters.saliency import weight_saliency
from icd_tvm.adapters.sparsity import SparsitySpec, apply_sparsity, select_units, zero_units
from icd_tvm.adapters.units import kept_count, refit_consumer, removal_costs
from icd_tvm.errors import TransformError
from icd_tvm.relax_passes.axis_groups import AxisGroup, ConstUse, WeightUse
from icd_tvm.relax_passes.relax_graph import op_names
from icd_tvm.relax_passes.sparsity_targets import SparsityTarget
from icd_tvm.relax_passes.unit_weights import kept_places

Array = np.ndarray
Arrays = dict[Any, Array]
Statistics = Mapping[str, np.ndarray]

# Ops through which a zero of the constant is a zero of the unit, or harmless. A unit that is
# divided by zero or raised to a power would not be zero but NaN.
_ZEROED_AT = {
    "relax.add",
    "relax.matmul",
    "relax.multiply",
    "relax.nn.conv1d",
    "relax.nn.conv2d",
    "relax.subtract",
}
_WANTED = (
    "type",
    "rate",
    "density",
    "params",
    "loss",
    "bytes_before",
    "bytes_after",
    "format",
    "delta_layout",
    "skipped",
    "why",
)


def prune_target(
    func: Any,
    target: SparsityTarget,
    spec: SparsitySpec,
    statistics: Statistics,
    seed: int = 0,
    unread: Array | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    """Return the new constants of one target.

    Parameters
    ----------
    func : relax.Function
        The function that holds the target.
    target : SparsityTarget
    spec : SparsitySpec
        ``unit`` for units, any other kind for a weight.
    statistics : Mapping[str, numpy.ndarray]
        Matmul binding -> Gram matrix [K, K] of its input, or those of two halves [2, K, K].
        Where one is missing the saliency is the magnitude, unless ``spec`` names one, and nothing
        is refitted.
    seed : int
        Seed of the adapters.
    unread : numpy.ndarray, optional
        bool [units]: which units of ``target.units`` no weight reads; all are read if omitted.

    Returns
    -------
    arrays : dict
        Constant object -> its new value, of the same shape and dtype; empty if skipped.
    entry : dict
        JSON record of what was done.

    Raises
    ------
    IcdError
        A weight or a statistic that the adapters refuse.
    """
    if target.quantised:
        raise TransformError("its weights are quantised", "make them sparse before they are")
    if target.group is None:
        return _prune_weight(target, spec, statistics, seed, unread)
    return _prune_units(func, target, target.group, spec, statistics)


def _prune_weight(
    target: SparsityTarget,
    spec: SparsitySpec,
    statistics: Statistics,
    seed: int,
    unread: Array | None,
) -> tuple[Arrays, dict[str, Any]]:
    use = target.weights[0]
    weight, saliency, gram = _ranked(use, spec, statistics)
    out, meta = apply_sparsity(
        weight,
        spec.type_name,
        spec.rate,
        saliency=saliency,
        calibration=gram,
        groups=_column_groups(target, spec, statistics, unread, seed),
        seed=seed,
        refit=gram is not None,
    )
    entry = {"weight": use.name, "node": use.node, **{key: meta[key] for key in _WANTED}}
    return ({} if meta["skipped"] else {use.const: _as_kn(use, out)}), entry


def _ranked(use: WeightUse, spec: SparsitySpec, statistics: Statistics) -> tuple[Array, Any, Any]:
    """Return a weight [K, N], what ranks its elements, and the second moments of its input."""
    gram = statistics.get(use.node)
    saliency = spec.saliency or ("magnitude" if gram is None else "wanda")
    return _as_kn(use, use.const.value.numpy()), saliency, gram


def _column_groups(
    target: SparsityTarget,
    spec: SparsitySpec,
    statistics: Statistics,
    unread: Array | None,
    seed: int,
) -> Array | None:
    """Return vector groups of whole units where each has several columns; None: any will do."""
    group = target.units
    if group is None or spec.kind != "vec" or group.size % spec.vector:
        return None
    made = next(use for use in group.weights if (use.node, use.side) == (target.id, "N"))
    weight, saliency, gram = _ranked(made, spec, statistics)
    scores = weight_saliency(weight, saliency, as_calibration(gram, len(weight)))
    places, count = made.positions(group.id), kept_count(len(scores), spec.rate)
    silent = np.zeros(group.size, np.bool_) if unread is None else unread
    return assign_units(scores, places, spec.vector, count, silent, seed)


def _prune_units(
    func: Any,
    target: SparsityTarget,
    group: AxisGroup,
    spec: SparsitySpec,
    statistics: Statistics,
) -> tuple[Arrays, dict[str, Any]]:
    known = _calibrations(target, statistics)
    kept = select_units(_scores(target, group, known), spec.rate)
    if kept.all():
        return {}, {"why": f"{spec} removes no whole one of {group.size} {target.kind}"}
    ops = op_names(func)
    arrays: Arrays = {}
    for use in group.consts:
        if ops.get(use.node, "") in _ZEROED_AT:
            array = arrays.get(use.const, use.const.value.numpy())
            arrays[use.const] = zero_units(array, kept_places(use, group, kept), use.axis)
    sizes = [_bytes(use, group, kept) for use in group.consts if use.const in arrays]
    errors = []
    for taker in target.takers:
        if taker.node in known:
            arrays[taker.const], error = _refitted(taker, group, kept, known[taker.node])
            errors.append(error)
    entry = {
        "group": group.id,
        "kind": target.kind,
        "weights": [use.name for use in target.weights],
        "type": spec.type_name,
        "rate": spec.rate,
        "units": group.size,
        "kept": int(kept.sum()),
        "loss": {"frobenius": _frobenius(arrays), "output": max(errors, default=None)},
        "bytes_before": sum(before for before, _ in sizes),
        "bytes_after": sum(after for _, after in sizes),
        "delta_layout": True,
        "skipped": False,
        "why": "dropped units can be moved to the end and cut off",
    }
    return arrays, entry


def _refitted(
    use: WeightUse, group: AxisGroup, kept: np.ndarray, data: Calibration
) -> tuple[np.ndarray, float]:
    dense = _as_kn(use, use.const.value.numpy())
    refitted = refit_consumer(dense, data, kept_places(use, group, kept))
    return _as_kn(use, refitted), data.output_error(dense, refitted) or 0.0


def _calibrations(target: SparsityTarget, statistics: Statistics) -> dict[str, Calibration]:
    """Return the second moments that the readers of the units have, by matmul binding."""
    found: dict[str, Calibration] = {}
    for use in target.takers:
        data = as_calibration(statistics.get(use.node), use.shape[use.axis])
        if data is not None and data.gram is not None:
            found[use.node] = data
    return found


def _scores(
    target: SparsityTarget, group: AxisGroup, known: Mapping[str, Calibration]
) -> np.ndarray:
    """Cost of each unit: lost output energy of its readers, or the product of its norms."""
    if target.takers and all(use.node in known for use in target.takers):
        costs = []
        for use in target.takers:
            dense, gram = _as_kn(use, use.const.value.numpy()), known[use.node].gram
            assert gram is not None
            costs.append(removal_costs(dense, gram, use.positions(group.id)))
        return np.sum(costs, axis=0)
    made, read = (
        np.sum([_energies(use, group) for use in uses], axis=0)
        for uses in (target.makers, target.takers)
    )
    return np.asarray(made * read)


def _energies(use: WeightUse, group: AxisGroup) -> np.ndarray:
    array = use.const.value.numpy().astype(np.float64)
    return np.asarray((array**2).sum(axis=1 - use.axis)[use.positions(group.id)].sum(axis=1))


def _as_kn(use: WeightUse, array: np.ndarray) -> np.ndarray:
    """Turn a constant into [K, N], or back."""
    return array if (use.side == "K") == (use.axis == 0) else array.T


def _bytes(use: ConstUse, group: AxisGroup, kept: np.ndarray) -> tuple[int, int]:
    array = use.const.value.numpy()
    places = kept_places(use, group, kept)
    return array.nbytes, array.nbytes * int(places.sum()) // places.size


def _frobenius(arrays: Arrays) -> float:
    lost = total = 0.0
    for const, array in arrays.items():
        dense = const.value.numpy().astype(np.float64)
        lost += float(((array - dense) ** 2).sum())
        total += float((dense**2).sum())
    return float(np.sqrt(lost / total)) if total else 0.0
