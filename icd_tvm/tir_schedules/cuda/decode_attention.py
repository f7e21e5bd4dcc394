"""Attention of one decoding step over a cache whose live slots were moved together."""

from __future__ import annotations

from icd_tvm.tir_schedules.cuda.archs import SMS
from icd_tvm.tir_schedules.cuda.source_kernel import (
    WIDTHS,
    Argument,
    Rule,
    SourceKernel,
    operand,
    or_null,
    refused,
)

WARPS = 4


def decode_attention_rule(
    batch: int,
    kv_heads: int,
    shared_heads: int,
    capacity: int,
    size: int,
    dtype: str,
    *,
    cache: str | None = None,
    arch: str = "sm_90",
) -> Rule:
    """Return the kernels of one step: partial sums over parts of the slots, then their combination.

    Parameters
    ----------
    batch, kv_heads, shared_heads, size : int
        q and out are [batch, kv_heads, shared_heads, size]: query heads that share keys and values
        lie together.
    capacity : int
        Slots of the cache [batch, kv_heads, capacity, size]; ``live`` int32[batch, kv_heads] says
        how many of them, from the first, count.
    dtype : str
        ``float16`` or ``bfloat16``, of q and out.
    cache : str, optional
        Dtype of the cache: ``dtype``, ``float32``, or ``int8`` with ``k_scale`` and ``v_scale``
        float32[batch, kv_heads, capacity].
    arch : str
        Whose number of multiprocessors decides the parts.

    Returns
    -------
    Rule
        Two kernels. Arguments by name: ``q``, ``k``, ``v``, scales, ``live``, ``parts``; ``out``.
    """
    cache = cache or dtype
    if dtype not in ("float16", "bfloat16") or cache not in (dtype, "float32", "int8"):
        return refused(f"no kernel for {dtype} queries and a cache of {cache}")
    if size not in (64, 128):
        return refused(f"heads of {size} are not made; 64 and 128 are")
    if not 1 <= shared_heads <= 8:
        return refused(f"{shared_heads} query heads share one cache; at most 8 fit registers")
    # Two blocks for each multiprocessor, and parts of at least 64 slots.
    wanted = -(-2 * SMS[arch] // (batch * kv_heads))
    parts = max(1, min(wanted, capacity // 64, 64))
    config = (
        f"icd::DecodeConfig<{operand(dtype)}, {operand(cache)}, {size}, {shared_heads}, {WARPS}>"
    )
    heads = (batch, kv_heads)
    record = Argument("parts", (*heads, parts, shared_heads, size + 2), "float32")
    q = Argument("q", (*heads, shared_heads, size), dtype)
    scaled, wide = cache == "int8", batch * kv_heads
    arguments = [q, *(Argument(name, (*heads, capacity, size), cache) for name in "kv")]
    if scaled:
        arguments += [Argument(f"{name}_scale", (*heads, capacity), "float32") for name in "kv"]
    arguments += [Argument("live", heads, "int32"), record]
    scales = ", ".join(or_null(f"{name}_scale", scaled, "float") for name in "kv")
    slots = wide * capacity
    partial = SourceKernel(
        family="decode_attention",
        config=config,
        call=f"icd::decode_attention<G>(parts, q, k, v, {scales}, (const int*)live, {capacity}, "
        f"{size**-0.5!r}f, shared)",
        arguments=tuple(arguments),
        grid=(parts, kv_heads, batch),
        threads=WARPS * 32,
        shared=4 * WARPS * shared_heads * (size + 2),
        flop=4.0 * slots * shared_heads * size,
        bytes=2.0 * slots * (size * WIDTHS[cache] + 4 * scaled),
        unit="fp32",
    )
    combine = SourceKernel(
        family="decode_attention",
        config=config,
        call=f"icd::decode_combine<G>(out, (const float*)parts, {parts})",
        arguments=(record, Argument("out", q.shape, dtype)),
        grid=(wide, 1, 1),
        threads=shared_heads * size,
        shared=0,
        flop=2.0 * wide * parts * shared_heads * size,
        bytes=4.0 * wide * parts * shared_heads * (size + 2) + 2.0 * wide * shared_heads * size,
        unit="fp32",
    )
    return Rule((partial, combine))
