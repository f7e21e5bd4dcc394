"""Load a compiled model and run it on numpy arrays; needs no more of TVM than its runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Not from icd_tvm._tvm, which needs the compiler: under TVM_USE_RUNTIME_LIB=1 there is none.
import tvm
from tvm.runtime.vm import VirtualMachine

from icd_tvm.errors import ModelFileError, ShapeError
from icd_tvm.runtime.bundled_run import find_device, typed
from icd_tvm.tvm_log import without_scope_lines

MODULE, SIGNATURE, METRICS = "module.so", "model.json", "metrics.json"
FORMAT = "icd/model/v1"


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and numpy dtype name of an input or output; None where the file says neither."""

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


class LoadedModel:
    """A compiled model, callable on numpy arrays.

    Parameters
    ----------
    library : Path
        A library that ``icd run`` or ``icd compile -o`` wrote.
    signature : mapping, optional
        ``inputs`` and ``outputs``, each a list of ``{name, shape, dtype}``; and ``device``, which
        is ``cuda`` for a library of a CUDA device. Without one the names
        of the inputs are those in the library, outputs are ``output_0``, ``output_1``, ...

    Attributes
    ----------
    inputs, outputs : tuple of TensorInfo
        In order; ``outputs`` is empty without a signature.
    """

    def __init__(self, library: Path, signature: Mapping[str, Any] | None = None) -> None:
        try:
            self._device = find_device((signature or {}).get("device"), library.parent)
            with without_scope_lines():
                library_module = tvm.runtime.load_module(str(library))
                self._machine = VirtualMachine(library_module, self._device)
            self._main = self._machine["main"]
            self._held: dict[str, Any] = {}
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ModelFileError(
                f"cannot load {str(library)!r}: {reason}",
                f"it must come from TVM {tvm.__version__} for this kind of machine",
            ) from error
        self.inputs = _infos(signature, "inputs") if signature else self._named_inputs()
        self.outputs = _infos(signature, "outputs") if signature else ()

    def __call__(self, *arrays: Any, **named: Any) -> dict[str, npt.NDArray[Any]]:
        """Run the model once.

        Parameters
        ----------
        *arrays : mapping of str to array_like, or array_like
            All inputs by name, or the inputs in order.
        **named : array_like
            More inputs by name. An array must have the dtype of its input; lists are converted.

        Returns
        -------
        dict of str to numpy.ndarray
            The outputs by name, in order.

        Raises
        ------
        ShapeError
            An input is missing or unknown, or has the wrong shape or dtype.
        """
        feeds = self._feeds(arrays, named)
        found = _flat(self._main(*(self._tensor(info, feeds) for info in self.inputs)))
        names = [info.name for info in self.outputs]
        names += [f"output_{i}" for i in range(len(names), len(found))]
        return {name: tensor.numpy() for name, tensor in zip(names, found, strict=True)}

    def _feeds(self, arrays: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        names = [info.name for info in self.inputs]
        expected = f"inputs: {', '.join(names)}"
        if len(arrays) == 1 and isinstance(arrays[0], Mapping):
            feeds = {**arrays[0], **named}
        elif len(arrays) > len(names):
            raise ShapeError(
                f"{len(arrays)} inputs are given, the model has {len(names)}", expected
            )
        else:
            feeds = {**dict(zip(names, arrays, strict=False)), **named}
        for name in feeds:
            if name not in names:
                raise ShapeError(f"unknown input {name!r}", expected)
        for name in names:
            if name not in feeds:
                raise ShapeError(f"input {name!r} is missing", expected)
        return feeds

    def _tensor(self, info: TensorInfo, feeds: Mapping[str, Any]) -> Any:
        value = feeds[info.name]
        array = value if isinstance(value, np.ndarray) else np.asarray(value, info.dtype)
        if info.dtype is not None:
            array = typed(array, info.dtype)
        if info.shape is not None and array.shape != info.shape:
            raise ShapeError(f"input {info.name!r} has shape {array.shape}, not {info.shape}")
        if info.dtype is not None and array.dtype != np.dtype(info.dtype):
            raise ShapeError(
                f"input {info.name!r} has dtype {array.dtype}, not {info.dtype}",
                f"convert it: .astype({info.dtype!r})",
            )
        return self._placed(info.name, np.asarray(array, order="C"))

    def _placed(self, name: str, array: npt.NDArray[Any]) -> Any:
        """Return the input on the device; a CUDA graph wants it at the same address every time."""
        if self._device == tvm.cpu():
            return tvm.runtime.tensor(array, self._device)
        held = self._held.get(name)
        if held is None or tuple(held.shape) != array.shape or str(held.dtype) != str(array.dtype):
            self._held[name] = tvm.runtime.tensor(array, self._device)
        else:
            held.copyfrom(array)
        return self._held[name]

    def _named_inputs(self) -> tuple[TensorInfo, ...]:
        ask = self._machine.module
        count = int(ask["get_function_arity"]("main"))
        name = ask["get_function_param_name"]
        return tuple(TensorInfo(str(name("main", i))) for i in range(count))


def load(path: str | Path) -> LoadedModel:
    """Load what ``icd run``, ``icd compile -o`` or ``icd bundle`` made.

    Loading a library runs code of it: load only what you trust.

    Parameters
    ----------
    path : str or Path
        A run directory, an unpacked bundle, or a library file.

    Returns
    -------
    LoadedModel

    Raises
    ------
    ModelFileError
        If there is no library, or it cannot be loaded.

    Examples
    --------
    >>> import icd_tvm
    >>> model = icd_tvm.load(run_folder)
    >>> model({"x": np.ones((4, 64), "float32")})["y"].shape
    (4, 64)
    >>> icd_tvm.load("no/such/run")
    Traceback (most recent call last):
    icd_tvm.errors.ModelFileError: 'no/such/run' does not exist
    """
    place = Path(path)
    if not place.exists():
        raise ModelFileError(f"{str(path)!r} does not exist")
    if not place.is_dir():
        return LoadedModel(place)
    library = place / MODULE
    if not library.is_file():
        raise ModelFileError(f"{str(path)!r} holds no {MODULE}", "is its run finished?")
    return LoadedModel(library, read_signature(place))


def read_signature(folder: Path) -> dict[str, Any]:
    """Return ``name``, ``inputs``, ``outputs`` and, if it is no CPU, ``device`` of a model.

    Its folder is a run directory or an unpacked bundle.

    Raises
    ------
    ModelFileError
        If neither ``model.json`` nor ``metrics.json`` is there and sound.
    """
    bundled = (folder / SIGNATURE).exists()
    file = folder / (SIGNATURE if bundled else METRICS)
    try:
        content = json.loads(file.read_text("utf-8"))
        about = content if bundled else content["model"]
        keys = ("name", "inputs", "outputs")
        result = {"format": FORMAT, **{key: about[key] for key in keys}}
        if content.get("device") == "cuda" or '"kind":"cuda"' in str(content.get("target", "")):
            result["device"] = "cuda"
        for key in keys[1:]:
            _infos(result, key)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(
            f"cannot read the inputs from {str(file)!r}: {type(error).__name__}: {error}"
        ) from error
    return result


def _infos(signature: Mapping[str, Any], key: str) -> tuple[TensorInfo, ...]:
    infos = []
    for item in signature[key]:
        shape = None if item["shape"] is None else tuple(map(int, item["shape"]))
        infos.append(TensorInfo(str(item["name"]), shape, str(item["dtype"])))
    return tuple(infos)


def _flat(outputs: Any) -> list[Any]:
    if isinstance(outputs, tvm.runtime.Tensor):
        return [outputs]
    return [tensor for item in outputs for tensor in _flat(item)]
