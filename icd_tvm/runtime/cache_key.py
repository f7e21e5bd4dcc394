"""What makes two decisions about an order the same decision."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icd_tvm.errors import ConfigError, ModelFileError
from icd_tvm.files import source_digest
from icd_tvm.measure.environment import PACKAGES

if TYPE_CHECKING:
    import onnx

_SCHEME = "icd/perm-key/v1"
# Beyond those of a measurement: the package whose communities start the search.
_DECIDING = (*PACKAGES, "scikit-network")
# What makes W, its cost and the order from a model. Transforms are seen by what they made.
_CODE = ("core", "relax_passes", "tir_schedules", "runtime/access_graphs.py", "runtime/orders.py")


def cache_key(
    *,
    model_hash: str,
    task: str,
    transforms: Mapping[str, Any] | Sequence[Any],
    seed: int,
    target: str,
    solver: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
) -> str:
    """Return the name under which a decision is kept.

    Parameters
    ----------
    model_hash : str
        Content of the model, of :func:`model_content_hash` or
        :func:`icd_tvm.relax_passes.permutation_file.model_hash`.
    task : str
        What is decided, such as ``"before"`` or ``"after"`` the transform.
    transforms : mapping or sequence
        The specifications of S, Q and K in full, with the data they were calibrated on. Whatever
        changes which elements a kernel touches changes W and must be here.
    seed : int
        Of the solver and of the transforms.
    target : str
        The target in full: its vector width and kernels decide what is touched together.
    solver : mapping
        Every option that changes the order: time budget, steps, objective, mode, weights, source
        of W. Not those that only change what is printed.
    versions : mapping of str to str, optional
        Package -> version; :func:`tool_versions` if omitted.

    Returns
    -------
    str
        64 hexadecimal digits: sha256 of the fields as JSON with sorted keys.

    Raises
    ------
    ConfigError
        If a field is not plain JSON, so that it has no canonical form.
    """
    fields = {
        "scheme": _SCHEME,
        "model_hash": model_hash,
        "task": task,
        "transforms": transforms,
        "seed": seed,
        "target": target,
        "solver": dict(solver),
        "versions": dict(tool_versions() if versions is None else versions),
    }
    try:
        text = json.dumps(
            fields, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_mapping
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cache key: {error}", "use numbers, text, lists and maps") from error
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def _installed() -> tuple[tuple[str, str], ...]:
    found = []
    for name in _DECIDING:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append((name, "absent"))
    found.append(("icd-tvm code", code_digest(Path(__file__).parents[1])))
    return tuple(found)


def code_digest(package: Path) -> str:
    """Return the sha256 of the modules that decide an order: their names and contents."""
    return source_digest(package, _CODE)


def tool_versions() -> dict[str, str]:
    """Return package -> version of everything that has a part in a decision, and its code."""
    return dict(_installed())


def model_content_hash(
    source: str | Path | onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None
) -> str:
    """Return the sha256 of an ONNX model's graph and weights, external ones too, and its shapes.

    The same whether weights lie in the file or beside it; different for any other difference in
    the file, names included.

    Parameters
    ----------
    source : str, Path or onnx.ModelProto
        The model; external data must lie in the same folder.
    shapes : mapping of str to sequence of int, optional
        Sizes given to symbolic inputs.

    Raises
    ------
    ModelFileError
        If the model cannot be read, or is a proto whose weights were not loaded.
    """
    from icd_tvm.models.onnx_file import iter_graphs, load_proto

    model, digest = load_proto(source), hashlib.sha256()
    for graph in iter_graphs(model.graph):
        for tensor in graph.initializer:
            # Serialised whole, a model of more than 2 GB is refused by protobuf.
            raw = tensor.raw_data
            if tensor.external_data and not raw and not isinstance(source, (str, Path)):
                raise ModelFileError(
                    f"the external data of {tensor.name!r} is not loaded", "give the model's path"
                )
            digest.update(f"{len(raw)}:".encode())
            digest.update(raw)
            for name in ("raw_data", "external_data", "data_location"):
                tensor.ClearField(name)
    digest.update(model.SerializeToString(deterministic=True))
    sizes = {name: [int(size) for size in shape] for name, shape in (shapes or {}).items()}
    digest.update(json.dumps(sizes, sort_keys=True).encode())
    return digest.hexdigest()


def _mapping(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r} is not JSON")
