"""Give every graph input a static shape."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import onnx

from icd_tvm.errors import DynamicShapeError, ShapeError, UnsupportedOpError
from icd_tvm.models.onnx_file import printable, real_inputs

Dim = int | str | None
# No tensor of these can be passed to a module; older onnx packages lack some of the names.
NARROW_TYPES = frozenset({"INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1"})


def declared_shape(value: onnx.ValueInfoProto) -> list[Dim] | None:
    """Return a value's dimensions: sizes, symbol names, or None where nothing is known.

    Returns
    -------
    list of (int, str or None), or None
        None when even the rank is unknown.
    """
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [_dim(dim) for dim in tensor.shape.dim]


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return int(dim.dim_value)
    # Paddle writes "?" for every unknown size: no symbol that two axes share.
    return None if dim.dim_param in ("", "?") else printable(dim.dim_param)


def fix_input_shapes(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Write static input shapes into the model, in place.

    A symbol that a given shape fixes (``batch`` of one input) holds for every other input that
    uses it. Stale symbolic shapes of outputs and inner values are removed.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place.
    shapes : mapping of str to sequence of int, optional
        Full shape of an input by name; sizes are at least 1.

    Raises
    ------
    ShapeError
        Unknown input name, wrong rank, a size below 1, or a size that contradicts the model.
    DynamicShapeError
        A dimension is still symbolic; the hint gives the flag to add.
    UnsupportedOpError
        An input is not a tensor of numbers.
    """
    given = {name: tuple(int(size) for size in shape) for name, shape in (shapes or {}).items()}
    inputs = {value.name: value for value in real_inputs(model.graph)}
    for name, value in inputs.items():
        _check_type(name, value.type)
    symbols: dict[str, int] = {}
    for name, shape in given.items():
        if name not in inputs:
            raise _unknown_input(name, list(inputs))
        _bind(name, declared_shape(inputs[name]), shape, symbols)
    for name, value in inputs.items():
        _write_shape(value, given.get(name) or _resolve(name, declared_shape(value), symbols))
    _drop_symbolic(model.graph)


def check_outputs(model: onnx.ModelProto) -> None:
    """Refuse constant outputs of several axes without elements, which TVM cannot store.

    Raises
    ------
    UnsupportedOpError
        Naming the output.
    """
    outputs = {value.name for value in model.graph.output}
    for tensor in model.graph.initializer:
        if tensor.name in outputs and len(tensor.dims) > 1 and 0 in tensor.dims:
            raise UnsupportedOpError(f"output {tensor.name!r} is empty: shape {list(tensor.dims)}")


def _check_type(name: str, kind: onnx.TypeProto) -> None:
    if not kind.HasField("tensor_type"):
        what = kind.WhichOneof("value") or "untyped"
        raise UnsupportedOpError(f"input {name!r} is not a tensor but {what}")
    element = kind.tensor_type.elem_type
    names = {number: text for text, number in onnx.TensorProto.DataType.items()}
    what = names.get(element, f"number {element}, which ONNX does not define")
    if element not in names or what in ("UNDEFINED", "STRING") or what in NARROW_TYPES:
        raise UnsupportedOpError(f"input {name!r} has element type {what}")


def _unknown_input(name: str, names: list[str]) -> ShapeError:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {printable(near[0])}? " if near else ""
    return ShapeError(
        f"shape given for unknown input {name!r}",
        f"{hint}inputs: {', '.join(map(printable, names))}",
    )


def _bind(
    name: str, declared: list[Dim] | None, shape: tuple[int, ...], symbols: dict[str, int]
) -> None:
    """Check a given shape against the declared one and record the symbols it fixes."""
    text = "x".join(map(str, shape))
    if any(size < 1 for size in shape):
        raise ShapeError(f"shape {text} of input {name!r} has a size below 1")
    if declared is None:
        return
    if len(declared) != len(shape):
        raise ShapeError(
            f"shape {text} of input {name!r} has rank {len(shape)}, the model says {len(declared)}"
        )
    for axis, (dim, size) in enumerate(zip(declared, shape, strict=True)):
        fixed = symbols.setdefault(dim, size) if isinstance(dim, str) else dim
        if fixed is not None and fixed != size:
            label = f" ({dim})" if isinstance(dim, str) else ""
            raise ShapeError(
                f"axis {axis}{label} of input {name!r} is {fixed}, not {size} as {text} asks"
            )


def _resolve(name: str, declared: list[Dim] | None, symbols: dict[str, int]) -> tuple[int, ...]:
    if declared is None:
        raise DynamicShapeError(f"input {name!r} has no shape", f"--shape {printable(name)}=1x128")
    sizes = [symbols.get(dim) if isinstance(dim, str) else dim for dim in declared]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        return tuple(known)
    free = [str(dim or "?") for dim, size in zip(declared, sizes, strict=True) if size is None]
    raise DynamicShapeError(
        f"input {name!r} has symbolic dimensions: {', '.join(free)}",
        f"--shape {printable(name)}={_example(sizes)}",
    )


def _example(sizes: list[int | None]) -> str:
    """Fill symbolic sizes the way most models mean them: a leading batch of 1, then 128."""
    guess = [size or (1 if axis == 0 else 128) for axis, size in enumerate(sizes)]
    return "x".join(map(str, guess))


def _write_shape(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    tensor = value.type.tensor_type
    tensor.ClearField("shape")
    tensor.shape.SetInParent()
    for size in shape:
        tensor.shape.dim.add(dim_value=size)


def _is_static(value: onnx.ValueInfoProto) -> bool:
    shape = declared_shape(value)
    return shape is not None and all(isinstance(dim, int) for dim in shape)


def _drop_symbolic(graph: onnx.GraphProto) -> None:
    for index in reversed(range(len(graph.value_info))):
        if not _is_static(graph.value_info[index]):
            del graph.value_info[index]
    for value in graph.output:
        if value.type.HasField("tensor_type") and not _is_static(value):
            value.type.tensor_type.ClearField("shape")
