"""One attention over a cache that it appends to, with parts that can be changed."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from icd_tvm._tvm import named_const, relax

SLOTS, KV, SHARE, DIM = 12, 2, 2, 8
STATES = (("keys", "new_keys"), ("values", "new_values"))


def appending_step(kind: str = "", dim: int = DIM, dtype: str = "float32", stored: str = "") -> Any:
    """Return ``main(q, k, v, length, keys, values)``; ``kind`` changes the append to the keys.

    With ``stored`` the states have that dtype, rows are narrowed and what is read is widened.
    """
    state = stored or dtype
    rows = 2 if kind == "wide row" else 1
    cache, row = (1, KV, SLOTS, dim), (1, KV, rows if rows == 1 else SLOTS, dim)
    sizes = {
        "q": ((1, KV * SHARE, 1, dim), dtype), "k": (row, dtype), "v": ((1, KV, 1, dim), dtype),
        "length": ((2,) if kind == "two lengths" else (1,), "int64"),
        "keys": (cache, state), "values": (cache, state),
    }  # fmt: skip
    params = {name: relax.Var(name, relax.TensorType(*own)) for name, own in sizes.items()}
    q, k, v, length, keys, values = params.values()
    builder = relax.BlockBuilder()
    emit = builder.emit
    with builder.function("main", list(params.values())):
        with builder.dataflow():
            new, mask = _marks(emit, kind, length)
            other = emit(relax.op.negative(k)) if kind == "kept elsewhere" else keys
            name = "stored" if kind == "other output" else "new_keys"
            if kind == "not where":
                new_keys = emit(relax.op.add(keys, k), name)
            else:
                row = emit(relax.op.astype(k, stored)) if stored else k
                new_keys = emit(relax.op.where(new[0], row, other), name)
            read_keys = emit(relax.op.astype(new_keys, dtype)) if stored else new_keys
            row = emit(relax.op.astype(v, stored)) if stored else v
            new_values = emit(relax.op.where(new[1], row, values), "new_values")
            read_values = emit(relax.op.astype(new_values, dtype)) if stored else new_values
            out = emit(_attention(emit, q, read_keys, read_values, mask, dim), "out")
            if kind == "read twice":
                out = emit(relax.op.add(out, emit(relax.op.sum(keys))), "out")
            if kind == "other output":
                new_keys = emit(relax.op.negative(new_keys), "new_keys")
            outs = builder.emit_output(relax.Tuple([out, new_keys, new_values]))
        builder.emit_func_output(outs)
    return builder.get()


def _marks(emit: Any, kind: str, length: Any) -> tuple[tuple[Any, Any], Any]:
    numbers = named_const(np.arange(SLOTS), "slots")
    whole = emit(relax.op.sum(length, keepdims=True)) if kind == "two lengths" else length

    def column(mark: Any) -> Any:
        return emit(relax.op.reshape(mark, (SLOTS, 1)))

    plain = keys = column(emit(relax.op.equal(numbers, whole)))
    if kind == "reversed":
        keys = column(emit(relax.op.equal(named_const(np.arange(SLOTS)[::-1], "back"), length)))
    if kind == "not equal":
        keys = column(emit(relax.op.less(numbers, length)))
    if kind == "computed":
        one = emit(relax.op.add(length, named_const(np.array([1]), "one")))
        keys = column(emit(relax.op.equal(numbers, one)))
    if kind == "row mark":
        keys = emit(relax.op.broadcast_to(plain, (SLOTS, 8)))
    after = emit(relax.op.greater(numbers, whole))
    low, zero = (relax.const(np.float32(n)) for n in (np.finfo(np.float32).min, 0))
    return (keys, plain), emit(relax.op.where(after, low, zero))


def _attention(emit: Any, q: Any, k: Any, v: Any, mask: Any, dim: int) -> Any:
    def wide(x: Any) -> Any:
        x = emit(relax.op.expand_dims(x, 2))
        x = emit(relax.op.broadcast_to(x, (1, KV, SHARE, SLOTS, dim)))
        return emit(relax.op.reshape(x, (1, KV * SHARE, SLOTS, dim)))

    if str(k.ty.dtype) != "float32":
        q, k, v = (emit(relax.op.astype(x, "float32")) for x in (q, k, v))
    turned = emit(relax.op.permute_dims(wide(k), [0, 1, 3, 2]))
    scores = emit(relax.op.add(emit(relax.op.matmul(q, turned)), mask))
    return relax.op.matmul(emit(relax.op.nn.softmax(scores, axis=-1)), wide(v))


def feeds(length: int = 5, dim: int = DIM, seed: int = 0) -> dict[str, np.ndarray]:
    """Return inputs of the unchanged step."""
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (1, KV * SHARE, 1, dim), "k": (1, KV, 1, dim), "v": (1, KV, 1, dim),
        "keys": (1, KV, SLOTS, dim), "values": (1, KV, SLOTS, dim),
    }  # fmt: skip
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return {**arrays, "length": np.array([length])}


def attended(q: np.ndarray, keys: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Return float64 attention over slots 0 .. length."""
    k, v = (np.repeat(a[:, :, : length + 1].astype(np.float64), SHARE, 1) for a in (keys, values))
    return np.asarray(special.softmax(q @ k.transpose(0, 1, 3, 2), axis=-1) @ v)
