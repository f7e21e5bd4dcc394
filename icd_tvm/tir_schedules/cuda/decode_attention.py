"""Attention of one decoding step over a cache whose live slots were moved together.

The slots of a head lie in one run, or in pages of a pool. Compaction drops whole pages from a
head's list; the pages themselves stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from icd_tvm.tir_schedules.cuda.archs import SMS
from icd_tvm.tir_schedules.cuda.source_kernel import (
    FP8,
    WIDTHS,
    Argument,
    Rule,
    SourceKernel,
    cpp_bool,
    operand,
    or_null,
    refused,
)

WARPS = 4
_SCALED = ("int8", FP8)


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
        Dtype of the cache: ``dtype``, ``float32``, or ``int8`` or ``float8_e4m3fn`` with
        ``k_scale`` and ``v_scale`` float32[batch, kv_heads, capacity].
    arch : str
        Whose number of multiprocessors decides the parts.

    Returns
    -------
    Rule
        Two kernels. Arguments by name: ``q``, ``k``, ``v``, scales, ``live``, ``parts``; ``out``.
    """
    work = _Work(batch, kv_heads, shared_heads, capacity, size, dtype, cache or dtype, arch)
    reason = work.refusal()
    return refused(reason) if reason else Rule((work.partial(), work.combine()))


def paged_attention_rule(
    batch: int,
    kv_heads: int,
    shared_heads: int,
    pages: int,
    size: int,
    dtype: str,
    *,
    page: int = 16,
    pool: int | None = None,
    cache: str | None = None,
    by_channel: bool = False,
    arch: str = "sm_90",
) -> Rule:
    """Return the kernels of one step over a cache in pages (Kwon et al., PagedAttention, 2023).

    Parameters
    ----------
    batch, kv_heads, shared_heads, size : int
        As in `decode_attention_rule`.
    pages : int
        Most pages of a head. ``pages`` int32[batch, kv_heads, pages] lists them in order, and
        ``live`` int32[batch, kv_heads] says how many slots of them, from the first, count.
    dtype : str
        ``float16`` or ``bfloat16``, of q and out.
    page : int
        Slots of a page, a power of two.
    pool : int, optional
        Pages of the pool [pool, page, size] that all heads and sequences share, each page of one
        head; batch * kv_heads * pages unless given.
    cache : str, optional
        As in `decode_attention_rule`, with scales float32[pool, page] for every slot.
    by_channel : bool
        Scales float32[pool, size] for every channel of a page instead (`adapters.kv_quant`).
    arch : str
        Whose number of multiprocessors decides the parts.

    Returns
    -------
    Rule
        Two kernels. Arguments by name: ``q``, ``k``, ``v``, scales, ``live``, ``pages``,
        ``parts``; ``out``.
    """
    if page < 1 or page & (page - 1):
        return refused(f"pages of {page} slots are not made; use a power of two")
    if pages < 1:
        return refused(f"{pages} pages hold no slot")
    work = _Work(
        batch,
        kv_heads,
        shared_heads,
        pages * page,
        size,
        dtype,
        cache or dtype,
        arch,
        _Paging(page, pool or batch * kv_heads * pages, by_channel),
    )
    reason = work.refusal()
    return refused(reason) if reason else Rule((work.partial(), work.combine()))


@dataclass(frozen=True)
class _Paging:
    page: int
    pool: int
    by_channel: bool


@dataclass(frozen=True)
class _Work:
    batch: int
    kv_heads: int
    shared_heads: int
    capacity: int
    size: int
    dtype: str
    cache: str
    arch: str
    paging: _Paging | None = None

    def refusal(self) -> str:
        if self.dtype not in ("float16", "bfloat16") or self.cache not in (
            self.dtype,
            "float32",
            *_SCALED,
        ):
            return f"no kernel for {self.dtype} queries and a cache of {self.cache}"
        if self.size not in (64, 128):
            return f"heads of {self.size} are not made; 64 and 128 are"
        if not 1 <= self.shared_heads <= 8:
            return f"{self.shared_heads} query heads share one cache; at most 8 fit registers"
        if self.paging and self.paging.by_channel and not self._scaled:
            return f"a cache of {self.cache} has no scales of channels"
        return ""

    @property
    def _scaled(self) -> bool:
        return self.cache in _SCALED

    @property
    def _heads(self) -> tuple[int, int]:
        return self.batch, self.kv_heads

    @property
    def _parts(self) -> int:
        """Two blocks for each multiprocessor, and parts of at least 64 slots."""
        wanted = -(-2 * SMS[self.arch] // (self.batch * self.kv_heads))
        return max(1, min(wanted, self.capacity // 64, 64))

    @property
    def _record(self) -> Argument:
        shape = (*self._heads, self._parts, self.shared_heads, self.size + 2)
        return Argument("parts", shape, "float32")

    @property
    def _q(self) -> Argument:
        return Argument("q", (*self._heads, self.shared_heads, self.size), self.dtype)

    @property
    def _config(self) -> str:
        paging, heads = self.paging, f"{self.size}, {self.shared_heads}, {WARPS}"
        by_channel = cpp_bool(paging.by_channel) if paging else ""
        paged = f", {paging.page}, {by_channel}" if paging else ""
        return f"icd::DecodeConfig<{operand(self.dtype)}, {operand(self.cache)}, {heads}{paged}>"

    def _cache_arguments(self) -> list[Argument]:
        paging = self.paging
        slots = (paging.pool, paging.page) if paging else (*self._heads, self.capacity)
        scales = (paging.pool, self.size) if paging and paging.by_channel else slots
        found = [Argument(name, (*slots, self.size), self.cache) for name in "kv"]
        if self._scaled:
            found += [Argument(f"{name}_scale", scales, "float32") for name in "kv"]
        found.append(Argument("live", self._heads, "int32"))
        if paging:
            listed = (*self._heads, self.capacity // paging.page)
            found.append(Argument("pages", listed, "int32"))
        return found

    def partial(self) -> SourceKernel:
        scales = ", ".join(or_null(f"{name}_scale", self._scaled, "float") for name in "kv")
        paging, slots = self.paging, self.batch * self.kv_heads * self.capacity
        wide = self.capacity // paging.page if paging else self.capacity
        last = "shared, (const int*)pages" if paging else "shared"
        scale_bytes = 4.0 * self._scaled
        if paging and paging.by_channel:
            scale_bytes *= self.size / paging.page
        return SourceKernel(
            family="decode_attention",
            config=self._config,
            call=f"icd::decode_attention<G>(parts, q, k, v, {scales}, (const int*)live, {wide}, "
            f"{self.size**-0.5!r}f, {last})",
            arguments=(self._q, *self._cache_arguments(), self._record),
            grid=(self._parts, self.kv_heads, self.batch),
            threads=WARPS * 32,
            shared=4 * WARPS * self.shared_heads * (self.size + 2),
            flop=4.0 * slots * self.shared_heads * self.size,
            bytes=2.0 * slots * (self.size * WIDTHS[self.cache] + scale_bytes),
            unit="fp32",
        )

    def combine(self) -> SourceKernel:
        wide, parts, heads = self.batch * self.kv_heads, self._parts, self.shared_heads
        return SourceKernel(
            family="decode_attention",
            config=self._config,
            call=f"icd::decode_combine<G>(out, (const float*)parts, {parts})",
            arguments=(self._record, Argument("out", self._q.shape, self.dtype)),
            grid=(wide, 1, 1),
            threads=heads * self.size,
            shared=0,
            flop=2.0 * wide * parts * heads * self.size,
            bytes=4.0 * wide * parts * heads * (self.size + 2) + 2.0 * wide * heads * self.size,
            unit="fp32",
        )
