"""A decoder step's new row: queries and keys rotated, keys and values stored in the caches."""

from __future__ import annotations

from icd_tvm.tir_schedules.cuda.source_kernel import (
    WIDTHS,
    Argument,
    Rule,
    SourceKernel,
    cpp_bool,
    operand,
    or_null,
    refused,
)

_LENGTHS = {"int64": "long long", "int32": "int"}


def append_rule(
    heads: int,
    kv_heads: int,
    slots: int,
    size: int,
    dtype: str,
    *,
    cache: str | None = None,
    length: str = "int64",
    rotate: bool = True,
) -> Rule:
    """Return the kernel that appends a token to a cache, in place, and rotates its query.

    Parameters
    ----------
    heads, kv_heads, slots, size : int
        ``q`` and ``q_out`` are [heads, size], ``k`` and ``v`` [kv_heads, size]; ``keys`` and
        ``values`` [kv_heads, slots, size] are read and written.
    dtype : str
        ``float16`` or ``bfloat16``, of the rows.
    cache : str, optional
        Dtype of the caches: ``dtype`` or ``float32``.
    length : str
        ``int32`` or ``int64``: of ``length`` [1], the slot; one outside the cache stores nothing.
    rotate : bool
        Whether ``cos`` and ``sin`` float32[size] rotate queries and keys.

    Returns
    -------
    Rule
        Arguments by name: ``q``, ``k``, ``v``, ``cos``, ``sin``, ``length``; outputs ``keys``,
        ``values`` and ``q_out``.
    """
    cache = cache or dtype
    if dtype not in ("float16", "bfloat16") or cache not in (dtype, "float32"):
        return refused(f"no kernel appends {dtype} to a cache of {cache}")
    if size % 32 or size > 1024 or length not in _LENGTHS:
        return refused(f"heads of {size} with a length of {length} are not made")
    arguments = [Argument("q", (heads, size), dtype)]
    arguments += [Argument(name, (kv_heads, size), dtype) for name in "kv"]
    if rotate:
        arguments += [Argument(name, (size,), "float32") for name in ("cos", "sin")]
    arguments.append(Argument("length", (1,), length))
    arguments += [Argument(name, (kv_heads, slots, size), cache) for name in ("keys", "values")]
    arguments.append(Argument("q_out", (heads, size), dtype))
    turn = ", ".join(or_null(name, rotate, "float") for name in ("cos", "sin"))
    read, stored = (heads + 2 * kv_heads) * size, 2 * kv_heads * size
    return Rule(
        (
            SourceKernel(
                family="append",
                config=f"icd::AppendConfig<{operand(dtype)}, {operand(cache)}, {_LENGTHS[length]}, "
                f"{size}, {cpp_bool(rotate)}>",
                call=f"icd::append<G>(q_out, keys, values, q, k, v, {turn}, "
                f"(const {_LENGTHS[length]}*)length, {heads}, {kv_heads}, {slots})",
                arguments=tuple(arguments),
                grid=(heads + 2 * kv_heads, 1, 1),
                threads=size,
                shared=0,
                flop=4.0 * (heads + kv_heads) * size * rotate,
                bytes=(read + heads * size) * WIDTHS[dtype] + stored * WIDTHS[cache],
                unit="fp32",
                outputs=3,
            ),
        )
    )
