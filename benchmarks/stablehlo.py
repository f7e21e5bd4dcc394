"""StableHLO proof of concept: what TVM's importer takes, and which form keeps our attributes.

Needs MLIR's Python bindings with StableHLO, which ``jaxlib`` ships; nothing of this package does.
TVM 0.27's importer calls ``Type.isinstance``, which is gone from jaxlib 0.9.

Run: pip install "jaxlib<0.9" && python benchmarks/stablehlo.py [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SQUARE = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 10.0]], np.float32)
ROW = np.array([1.0, 2.0, 3.0], np.float32)
S, R = "tensor<3x3xf32>", "tensor<3xf32>"


class Case(NamedTuple):
    """One operator: the text of a function, its inputs, and what numpy says of them."""

    inputs: tuple[np.ndarray, ...]
    body: str
    result: str
    expected: Callable[..., np.ndarray]


def _dot(left: int, right: int) -> str:
    dims = f"contracting_dims = [{left}] x [{right}]"
    return f"stablehlo.dot_general %a0, %a1, {dims} : ({S}, {S}) -> {S}"


def _spread(dim: int) -> str:
    return f"stablehlo.broadcast_in_dim %a0, dims = [{dim}] : ({R}) -> {S}"


def _reduced(operator: str) -> str:
    start = "%c = stablehlo.constant dense<0.0> : tensor<f32>\n "
    call = f"stablehlo.reduce(%a0 init: %c) applies stablehlo.{operator}"
    return f"{start}%0 = {call} across dimensions = [1] : ({S}, tensor<f32>) -> {R}"


TWO = (SQUARE, SQUARE + 1)
CASES = {
    "add": Case(TWO, f"stablehlo.add %a0, %a1 : {S}", S, np.add),
    "x @ w": Case(TWO, _dot(1, 0), S, np.matmul),
    "x @ w.T (PyTorch's linear)": Case(TWO, _dot(1, 1), S, lambda x, w: x @ w.T),
    "broadcast a row": Case((ROW,), _spread(1), S, lambda x: np.tile(x, (3, 1))),
    "broadcast a column": Case((ROW,), _spread(0), S, lambda x: np.tile(x[:, None], (1, 3))),
    "transpose": Case(
        (SQUARE,), f"stablehlo.transpose %a0, dims = [1, 0] : ({S}) -> {S}", S, np.transpose
    ),
    "tanh": Case((SQUARE,), f"stablehlo.tanh %a0 : {S}", S, np.tanh),
    "reduce add": Case((SQUARE,), _reduced("add"), R, lambda x: x.sum(1)),
    "reduce maximum": Case((SQUARE,), _reduced("maximum"), R, lambda x: x.max(1)),
}
VALUES = {
    "string (JSON)": r'"{\22n\22: 3}"',
    "dense tensor": "dense<[2, 0, 1]> : tensor<3xi32>",
    "dense array": "array<i32: 2, 0, 1>",
}
PLACES = ("module", "function", "operation")


def context() -> Any:
    """Return an MLIR context that knows ``func`` and ``stablehlo``."""
    from jaxlib.mlir import ir
    from jaxlib.mlir._mlir_libs import _jax_mlir_ext
    from jaxlib.mlir.dialects import stablehlo

    registry = ir.DialectRegistry()
    _jax_mlir_ext.register_dialects(registry)
    made = ir.Context()
    made.append_dialect_registry(registry)
    made.load_all_available_dialects()
    stablehlo.register_dialect(made)
    return made


def text(case: Case) -> str:
    """Return the case as a module."""
    arguments = ", ".join(f"%a{i}: {S if x.ndim == 2 else R}" for i, x in enumerate(case.inputs))
    body = case.body if case.body.startswith("%c") else f"%0 = {case.body}"
    signature = f"func.func @main({arguments}) -> {case.result}"
    return f"{signature} {{\n {body}\n func.return %0 : {case.result}\n}}"


def imported(case: Case) -> str:
    """Import and run one case: ``right``, ``WRONG``, or the importer's refusal."""
    import tvm
    from jaxlib.mlir import ir
    from tvm import relax
    from tvm.relax.frontend.stablehlo.stablehlo_translator import StableHLOImporter

    module = ir.Module.parse(text(case), context())
    try:
        mod = StableHLOImporter().from_stablehlo(module, None)
    except (AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        return f"refused: {str(error).splitlines()[0]}"
    vm = relax.VirtualMachine(tvm.compile(mod, tvm.target.Target("llvm")), tvm.cpu())
    found = vm["main"](*map(tvm.runtime.tensor, case.inputs)).numpy()
    expected = case.expected(*case.inputs)
    same = found.shape == expected.shape and np.allclose(found, expected, rtol=1e-5)
    return "right" if same else "WRONG"


def annotated(value: str, place: str) -> str:
    """Return a module with ``icd.layout_perm`` at one place."""
    at = {name: f"{{icd.layout_perm = {value}}}" if name == place else "" for name in PLACES}
    module, function = (f"attributes {at[p]}" if at[p] else "" for p in ("module", "function"))
    return (
        f"module {module} {{ func.func @main(%a: {S}) -> {S} {function} {{\n"
        f" %0 = stablehlo.add %a, %a {at['operation']} : {S}\n func.return %0 : {S}\n}} }}"
    )


def round_trip(source: str, form: str) -> bool:
    """Say whether a module comes back the same from ``text``, ``bytecode`` or ``portable``."""
    from jaxlib.mlir import ir

    module = ir.Module.parse(source, context())
    # Making the portable artifact turns the module itself into VHLO.
    before = str(module)
    if form == "text":
        return str(ir.Module.parse(before, context())) == before
    if form == "bytecode":
        buffer = io.BytesIO()
        module.operation.write_bytecode(buffer)
        return str(ir.Module.parse(buffer.getvalue(), context())) == before
    return _portable(module) == before


def _portable(module: Any) -> str:
    """Return the module after StableHLO's versioned artifact; empty where that refuses it."""
    from jaxlib.mlir.dialects import stablehlo

    version = stablehlo.get_current_version()
    try:
        artifact = stablehlo.serialize_portable_artifact(module, version)
    except ValueError:
        return ""
    return str(stablehlo.deserialize_portable_artifact(context(), artifact))


def round_trips() -> dict[str, dict[str, bool]]:
    """Return "value on place" -> form -> whether the attribute came back."""
    return {
        f"{name} on {place}": {
            form: round_trip(annotated(value, place), form)
            for form in ("text", "bytecode", "portable")
        }
        for name, value in VALUES.items()
        for place in PLACES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the record here")
    arguments = parser.parse_args()
    import jaxlib
    import tvm

    record: dict[str, Any] = {"tvm": tvm.__version__, "jaxlib": jaxlib.__version__}
    record["import"] = {name: imported(case) for name, case in CASES.items()}
    record["round_trip"] = round_trips()
    for part in ("import", "round_trip"):
        for name, found in record[part].items():
            print(f"{name:28s} {found}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
