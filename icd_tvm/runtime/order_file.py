"""``perm.json``: what a run decided before and after the transform, bound to its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.core.permutation import as_permutation
from icd_tvm.errors import IcdError, PermutationError
from icd_tvm.relax_passes.axis_groups import AxisGroups
from icd_tvm.relax_passes.coaccess_attr import OUTPUT_ORDER
from icd_tvm.relax_passes.decide_permutation import Decision
from icd_tvm.relax_passes.permute_constants import leaf_permutations, validate_permutation
from icd_tvm.relax_passes.relax_graph import is_call

FORMAT = "icd/run_orders/v1"
MAX_BYTES = 256 << 20
BEFORE, AFTER = "before", "after"

Orders = dict[str, list[Decision]]
Record = dict[str, Any]


def version_tag(made_from: Mapping[str, Any]) -> str:
    """Return the sha256 of everything that orders were made from."""
    text = json.dumps(made_from, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def orders_text(orders: Mapping[str, Sequence[Decision]], made_from: Mapping[str, Any]) -> str:
    """Return the text of the file.

    Parameters
    ----------
    orders : Mapping[str, Sequence[Decision]]
        ``before`` and, once it is decided, ``after``.
    made_from : Mapping[str, Any]
        ``model_hash``, task, transforms, seed, target and versions.
    """
    content = {
        "format": FORMAT,
        "version": version_tag(made_from),
        "made_from": dict(made_from),
        "orders": {when: as_records(items) for when, items in orders.items()},
    }
    return json.dumps(content, default=float) + "\n"


def read_orders(
    path: Path, groups: AxisGroups, widths: Mapping[str, int], model_hash: str
) -> tuple[Orders, str]:
    """Read a file of :func:`orders_text` and check it against a model.

    Parameters
    ----------
    path : Path
    groups : AxisGroups
        Of the model.
    widths : Mapping[str, int]
        Sizes of the axes that are no group; see :func:`output_widths`.
    model_hash : str
        Of the model.

    Returns
    -------
    orders : dict of str to list of Decision
    version : str
        See :func:`version_tag`.

    Raises
    ------
    PermutationError
        If the file is missing or malformed, belongs to another model, or holds an order that
        the model does not allow.
    """
    content = _read(path)
    found = str(content["made_from"].get("model_hash"))
    if found != model_hash:
        raise PermutationError(
            f"{str(path)!r} belongs to another model: hash {found[:12]}, not {model_hash[:12]}",
            "decide the order again for this model",
        )
    try:
        orders = {
            when: as_decisions(items, groups, widths)
            for when, items in content["orders"].items()
            if when in (BEFORE, AFTER)
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PermutationError(f"{str(path)!r} is malformed: {error!r}") from error
    except IcdError as error:
        raise PermutationError(f"{str(path)!r}: {error.message}", error.hint) from error
    return orders, str(content["version"])


def as_records(decisions: Sequence[Decision]) -> list[Record]:
    """Return decisions as JSON knows them; ``stats`` may still hold numpy scalars."""
    return [
        {"group": d.group, "perm": d.perm.tolist(), "stats": d.stats, "w_nnz": d.w_nnz}
        for d in decisions
    ]


def as_decisions(
    records: Sequence[Mapping[str, Any]], groups: AxisGroups, widths: Mapping[str, int]
) -> list[Decision]:
    """Return the decisions in records of a stranger.

    Raises
    ------
    IcdError, KeyError, TypeError, ValueError
        If one is malformed, or its order is not allowed by the model.
    """
    decisions = [_decision(record, groups, widths) for record in records]
    leaf_permutations(groups, {d.group: d.perm for d in decisions if d.group not in widths})
    return decisions


def output_widths(func: Any) -> dict[str, int]:
    """Return the size of every private output order: ``out:NODE`` -> columns of that matmul."""
    bindings = (binding for block in func.body.blocks for binding in block.bindings)
    return {
        OUTPUT_ORDER + binding.var.name: int(binding.var.ty.shape.values[-1])
        for binding in bindings
        if is_call(binding.value, "relax.matmul")
    }


def _decision(item: Mapping[str, Any], groups: AxisGroups, widths: Mapping[str, int]) -> Decision:
    group, stats = str(item["group"]), dict(item["stats"])
    perm = as_permutation(item["perm"], widths.get(group))
    if group not in widths:
        validate_permutation(groups.get(group), perm)
    if not isinstance(stats.get("improved"), bool):
        raise TypeError(f"group {group!r} does not say whether it improved")
    return Decision(group, np.asarray(perm, dtype=np.int32), stats, int(item["w_nnz"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PermutationError(f"{str(path)!r} is larger than {MAX_BYTES} bytes")
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PermutationError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PermutationError(f"{str(path)!r} is not JSON: {error}") from error
    good = isinstance(content, dict) and content.get("format") == FORMAT
    if not good or not all(isinstance(content.get(k), dict) for k in ("made_from", "orders")):
        raise PermutationError(f"{str(path)!r} holds no orders of a run", f"expected {FORMAT!r}")
    return {"version": "", **content}
