"""Attention of an encoder: all queries of a sequence in one pass, without a score matrix."""

from __future__ import annotations

from icd_tvm.tir_schedules.cuda.row_codes import RowCodes
from icd_tvm.tir_schedules.cuda.source_kernel import (
    Argument,
    Rule,
    SourceKernel,
    operand,
    or_null,
    refused,
)

QUERIES = KEYS = 64


def attention_rule(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    size: int,
    dtype: str,
    *,
    mask: bool = True,
    merged: bool = False,
    codes: RowCodes | None = None,
) -> Rule:
    """Return the kernel of ``softmax(q k^T / sqrt(size) + mask) v``.

    Parameters
    ----------
    batch, queries, keys, heads, size : int
        q is [batch, queries, heads, size]; k and v are [batch, keys, heads, size].
    dtype : str
        ``float16`` or ``bfloat16``; sums and the softmax are float32.
    mask : bool
        Whether a float32[batch, keys] is added to the scores. A query with no key left gives zeros.
    merged : bool
        Whether one argument ``qkv`` [batch, queries, 3, heads, size] holds all three.
    codes : RowCodes, optional
        Of one step: ``out`` holds int8 codes of the result.

    Returns
    -------
    Rule
        Arguments by name: ``q``, ``k``, ``v`` or ``qkv``, ``mask``, ``out``.
    """
    if dtype not in ("float16", "bfloat16"):
        return refused(f"attention of {dtype} is not made; use float16 or bfloat16")
    if size not in (32, 64, 128):
        return refused(f"heads of {size} are not made; 32, 64 and 128 are")
    if codes is not None and not codes.step:
        return refused("a block holds one head: its codes have one step, not one for each row")
    row, stride = size * 2, heads * size
    if merged and queries != keys:
        return refused(f"{queries} queries and {keys} keys do not come from the same rows")
    width, rows = stride, "q, k, v"
    if merged:
        arguments = [Argument("qkv", (batch, queries, 3, heads, size), dtype)]
        rows = ", ".join(f"(const icd::u16*)qkv + {i * width}" for i in range(3))
        stride = 3 * width
    else:
        arguments = [Argument("q", (batch, queries, heads, size), dtype)]
        arguments += [Argument(name, (batch, keys, heads, size), dtype) for name in "kv"]
    if mask:
        arguments.append(Argument("mask", (batch, keys), "float32"))
    out = dtype if codes is None else "int8"
    arguments.append(Argument("out", (batch, queries, heads, size), out))
    place = "" if codes is None else f", {codes.values}"
    return Rule(
        (
            SourceKernel(
                family="attention",
                config=f"icd::AttentionConfig<{operand(dtype)}, {size}"
                f"{'' if codes is None else ', icd::S8'}>",
                call=f"icd::attention<G>(out, {rows}, {or_null('mask', mask, 'float')}, "
                f"{queries}, {keys}, {heads}, {stride}, {size**-0.5!r}f, shared{place})",
                arguments=tuple(arguments),
                grid=(-(-queries // QUERIES), heads, batch),
                threads=128,
                shared=QUERIES * row + 4 * KEYS * row,
                flop=4.0 * batch * heads * queries * keys * size,
                bytes=2.0 * batch * width * (2 * queries + 2 * keys) + 4.0 * batch * keys * mask,
                unit="fp16",
            ),
        )
    )
