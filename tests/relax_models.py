"""Miniature Relax modules for pass tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from icd_tvm._tvm import named_const, relax, tvm

D, F = 32, 64


def mlp(
    w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, activation: str = "gelu", rows: int = 8
) -> Any:
    """Return main(x [1, rows, D]) = x + act(x @ w1 + b1) @ w2 with named bindings."""
    act = {"gelu": relax.op.nn.gelu, "sigmoid": relax.op.sigmoid, "relu": relax.op.nn.relu}
    x = relax.Var("x", relax.TensorType((1, rows, w1.shape[0]), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            up = builder.emit(relax.op.matmul(x, named_const(w1, "w1")), "fc1")
            up = builder.emit(relax.op.add(up, named_const(b1, "b1")), "fc1_bias")
            hidden = builder.emit(act[activation](up), "act")
            down = builder.emit(relax.op.matmul(hidden, named_const(w2, "w2")), "fc2")
            out = builder.emit_output(relax.op.add(down, x), "out")
        builder.emit_func_output(out)
    return builder.get()


def gated_mlp(w1: np.ndarray, w2: np.ndarray, rows: int = 8) -> Any:
    """Return main(x [1, rows, D]) = x + (relu(g) * u) @ w2 where g and u are halves of x @ w1."""
    x = relax.Var("x", relax.TensorType((1, rows, w1.shape[0]), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            both = builder.emit(relax.op.matmul(x, named_const(w1, "w1")), "fc1")
            halves = builder.emit(relax.op.split(both, 2, axis=-1), "halves")
            gate = builder.emit(relax.TupleGetItem(halves, 0), "gate")
            value = builder.emit(relax.TupleGetItem(halves, 1), "value")
            gate = builder.emit(relax.op.nn.relu(gate), "act")
            hidden = builder.emit(relax.op.multiply(gate, value), "gated")
            down = builder.emit(relax.op.matmul(hidden, named_const(w2, "w2")), "fc2")
            out = builder.emit_output(relax.op.add(down, x), "out")
        builder.emit_func_output(out)
    return builder.get()


def random_mlp(seed: int = 0, activation: str = "gelu") -> Any:
    """Return an MLP of width D and hidden width F with random dense weights."""
    return mlp(*mlp_weights(seed), activation=activation)


def mlp_weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return w1 [D, F], b1 [F], w2 [F, D], float32, without a zero in them."""
    rng = np.random.default_rng(seed)
    shapes = ((D, F), (F,), (F, D))
    w1, b1, w2 = (rng.standard_normal(s).astype(np.float32) / 4 for s in shapes)
    return w1, b1, w2


def run(mod: Any, x: np.ndarray) -> np.ndarray:
    """Run ``main`` through TVM's own unscheduled LLVM lowering."""
    executable = tvm.compile(mod, tvm.target.Target("llvm"))
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def example(rows: int = 8, seed: int = 1) -> np.ndarray:
    """Return an input [1, rows, D]."""
    return np.random.default_rng(seed).standard_normal((1, rows, D)).astype(np.float32)


def constants(mod: Any) -> dict[str, np.ndarray]:
    """Return every named constant of ``main``."""
    from icd_tvm._tvm import GenericConst, const_name

    found: dict[str, np.ndarray] = {}

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst) and const_name(expr):
            found[const_name(expr)] = expr.value.numpy()

    relax.analysis.post_order_visit(mod["main"], visit)
    return found
