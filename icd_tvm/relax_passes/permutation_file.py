"""Store permutations of axis groups, bound to the model that they were decided for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from icd_tvm._tvm import Call, GenericConst, Var, relax
from icd_tvm.errors import PermutationError
from icd_tvm.files import write_atomically
from icd_tvm.relax_passes.axis_groups import AxisGroups
from icd_tvm.relax_passes.axis_structure import Index
from icd_tvm.relax_passes.permute_constants import leaf_permutations, validate_permutation

_FORMAT = "icd/group_perms/v1"


def model_hash(func: Any) -> str:
    """Return the sha256 of a function's graph, shapes, attributes and constants.

    Names of bindings do not count, nor do names of constants.
    """
    digest = hashlib.sha256()
    numbers: dict[Any, int] = {}
    for param in func.params:
        numbers[param] = len(numbers)
        digest.update(str(param.ty).encode())
    for block in func.body.blocks:
        for binding in block.bindings:
            _hash_expr(digest, binding.value, numbers)
            numbers[binding.var] = len(numbers)
            digest.update(str(binding.var.ty).encode())
    _hash_expr(digest, func.body.body, numbers)
    return digest.hexdigest()


def _hash_expr(digest: Any, expr: Any, numbers: Mapping[Any, int]) -> None:
    if isinstance(expr, Var) and expr in numbers:
        digest.update(f"%{numbers[expr]}".encode())
    elif isinstance(expr, GenericConst):
        digest.update(str(expr.ty).encode())
        digest.update(np.ascontiguousarray(expr.value.numpy()).tobytes())
    elif isinstance(expr, Call):
        digest.update(f"{expr.op}{expr.attrs}".encode())
        for arg in expr.args:
            _hash_expr(digest, arg, numbers)
    elif isinstance(expr, relax.Tuple):
        for item in expr.fields:
            _hash_expr(digest, item, numbers)
    elif isinstance(expr, relax.TupleGetItem):
        _hash_expr(digest, expr.tuple_value, numbers)
        digest.update(f"[{expr.index}]".encode())
    else:
        digest.update(str(expr).encode())


def save_permutations(path: str | Path, perms: Mapping[str, ArrayLike], model_hash: str) -> None:
    """Write permutations as JSON.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    content = {
        "format": _FORMAT,
        "model_hash": model_hash,
        "perms": {group: np.asarray(perm).tolist() for group, perm in perms.items()},
    }
    text = json.dumps(content)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def load_permutations(path: str | Path, groups: AxisGroups, model_hash: str) -> dict[str, Index]:
    """Read permutations written by `save_permutations` and check them against a model.

    Returns
    -------
    dict of str to numpy.ndarray
        Group id -> int64 permutation.

    Raises
    ------
    PermutationError
        If the file is missing or malformed, belongs to another model, or holds a permutation
        that the model's groups do not allow.
    """
    content = _read_json(path)
    if content.get("format") != _FORMAT or not isinstance(content.get("perms"), dict):
        raise PermutationError(
            f"{str(path)!r} is no permutation file", f"expected format {_FORMAT!r}"
        )
    found = str(content.get("model_hash"))
    if found != model_hash:
        raise PermutationError(
            f"{str(path)!r} belongs to another model: hash {found[:12]}, not {model_hash[:12]}",
            "decide the permutations again for this model",
        )
    perms = {
        str(group): validate_permutation(groups.get(group), perm)
        for group, perm in content["perms"].items()
    }
    leaf_permutations(groups, perms)
    return perms


def _read_json(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PermutationError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PermutationError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise PermutationError(f"{str(path)!r} is no permutation file")
    return content
