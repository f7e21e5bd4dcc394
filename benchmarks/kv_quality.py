"""What a smaller KV cache costs SmolLM2-135M: drop, compact, and continue the same text.

A context is read whole; its cache is reduced; the text after it is read on top of what is left
and compared with the same text on the whole cache. "error" is the relative error of the attention
output for the queries of the whole run, "agree" the share of equal next tokens, "ppl" the
perplexity of the continuation; WikiText-2 (validation) is the text. "freed" is of a float32 cache.

Run: python benchmarks/kv_quality.py [--windows 4] [--context 512] [--tokens 128] [--block 16]
     [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.adapters.kv_quant import STATE_TYPES, StateDtype, stored_rows
from icd_tvm.adapters.kvcache import KVCache, apply_kvcache, break_even_steps
from icd_tvm.measure.datasets import token_windows
from icd_tvm.measure.quality_plugins import token_losses
from icd_tvm.models.decoder import SMOLLM2
from icd_tvm.models.decoder_reference import DecoderRun, run_decoder
from icd_tvm.models.smollm2 import decoder_weights, smollm2_file, smollm2_tokenizer

# Queries at the end of the context whose attention a recent score sees.
RECENT_QUERIES = 32
# As ApplyKVCompress(dtype=...) stores the cache, new tokens included; others quantise the context.
STEPS: dict[str, StateDtype] = {f"{name} step": name for name in STATE_TYPES}
INT8_STEP, *HALF_STEPS = STEPS


@dataclass(frozen=True)
class Case:
    """One way to reduce the cache; ``queries`` 0 sums the attention of all of them."""

    drop: float
    score: str
    scope: str = "per_head"
    dtype: str | None = None
    queries: int = 0

    @property
    def name(self) -> str:
        """Score and dtype, as the table shows them."""
        score = f"{self.score} (last {self.queries})" if self.queries else self.score
        return score if self.dtype is None else f"{score}, {self.dtype}"


def cases(quick: bool) -> Iterator[Case]:
    drops = (0.3, 0.5) if quick else (0.1, 0.3, 0.5)
    for drop in drops:
        yield Case(drop, "recency")
        for scope in ("per_head", "shared"):
            yield Case(drop, "key_norm", scope)
            yield Case(drop, "attention_mass", scope)
            yield Case(drop, "attention_mass", scope, queries=RECENT_QUERIES)
    for dtype in ("int8", "fp8_e4m3", INT8_STEP):
        yield Case(0.0, "key_norm", dtype=dtype)
        yield Case(0.3, "attention_mass", dtype=dtype, queries=RECENT_QUERIES)
    for dtype in HALF_STEPS:
        yield Case(0.0, "key_norm", dtype=dtype)


def output_error(whole: DecoderRun, small: KVCache, context: int) -> float:
    """Relative error of ``attention @ values`` of the continuation, over layers and heads."""
    share = whole.attention.shape[1] // whole.values.shape[1]
    error = total = 0.0
    for layer, attention in enumerate(whole.attention[:, :, context:]):
        values = np.repeat(whole.values[layer], share, axis=0)
        kept = np.repeat(small.positions[layer], share, axis=0)
        left = np.take_along_axis(attention, kept[:, None, :], axis=2)
        new = attention[:, :, context:]
        mass = left.sum(-1, keepdims=True) + new.sum(-1, keepdims=True)
        part = left @ np.repeat(small.values[layer], share, axis=0) + new @ values[:, context:]
        want = attention @ values
        error += float(((part / mass - want) ** 2).sum())
        total += float((want**2).sum())
    return float(np.sqrt(error / total))


def reduce_cache(
    whole: DecoderRun, case: Case, context: int, block: int
) -> tuple[KVCache, dict[str, Any]]:
    attention = None
    if case.score == "attention_mass":
        attention = whole.attention[:, :, :context, :context][:, :, -case.queries :].sum(axis=2)
    cache = KVCache(whole.keys[:, :, :context], whole.values[:, :, :context])
    small, meta = apply_kvcache(
        cache, block=block, drop=case.drop, score=case.score, scope=case.scope,
        dtype=None if case.dtype in STEPS else case.dtype, attention=attention,
    )  # fmt: skip
    if case.dtype not in STEPS:
        return small.dequantized(), meta
    dtype = STEPS[case.dtype]
    row = SMOLLM2.depth * STATE_TYPES[dtype].itemsize + 4 * (dtype == "int8")
    ratio = row / (4 * SMOLLM2.depth)
    meta["bytes_after"] = round(meta["bytes_after"] * ratio)
    meta["copy"]["break_even_steps"] = break_even_steps(meta["density"], ratio)
    keys, values = (stored_rows(rows, dtype) for rows in (small.keys, small.values))
    return replace(small, keys=keys, values=values), meta


def measure(
    weights: Any, ids: np.ndarray, chosen: list[Case], context: int, block: int
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the whole cache's losses, and one row a case."""
    whole = run_decoder(SMOLLM2, weights, ids, with_attention=True)
    logits, targets = whole.logits[context:-1], ids[context + 1 :]
    best, rows = logits.argmax(axis=-1), []
    for case in chosen:
        small, meta = reduce_cache(whole, case, context, block)
        past = (small.keys, small.values)
        stored = {}
        if case.dtype in STEPS:
            stored = {"stored": partial(stored_rows, dtype=STEPS[case.dtype])}
        run = run_decoder(SMOLLM2, weights, ids[context:], past=past, start=context, **stored)
        rows.append(
            {
                "error": output_error(whole, small, context),
                "agree": float((run.logits[:-1].argmax(axis=-1) == best).mean()),
                "loss": token_losses(run.logits[:-1], targets).mean(),
                "meta": meta,
            }
        )
    return token_losses(logits, targets), rows


def summary(case: Case, rows: list[dict[str, Any]], base: float) -> dict[str, Any]:
    meta = rows[0]["meta"]
    return {
        "drop": case.drop,
        "score": case.name,
        "scope": case.scope,
        "error": float(np.mean([row["error"] for row in rows])),
        "agree": float(np.mean([row["agree"] for row in rows])),
        "ppl": float(np.exp(np.mean([row["loss"] for row in rows]))),
        "ppl_whole": base,
        "bytes_before": meta["bytes_before"],
        "bytes_after": meta["bytes_after"],
        "pages": meta["pages"],
        "break_even_steps_model": meta["copy"]["break_even_steps"],
    }


def report(row: dict[str, Any]) -> None:
    freed = 1 - row["bytes_after"] / row["bytes_before"]
    pages, steps = row["pages"], row["break_even_steps_model"]
    print(
        f"{row['drop']:4.0%} {row['score']:34s} {row['scope']:8s} {row['error']:6.3f}"
        f" {row['agree']:7.2%} {row['ppl']:8.3f} {row['ppl'] / row['ppl_whole'] - 1:+8.2%}"
        f" {freed:6.1%} {pages['freed']:6d}/{pages['before']}"
        f" {pages['freed_without_compaction']:6d} {steps:6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="30 %% and 50 %% on one window")
    parser.add_argument("--only", default="", help="only the cases with this in their name")
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    arguments = parser.parse_args()
    start = time.perf_counter()
    weights = decoder_weights(smollm2_file(), SMOLLM2)
    count = 1 if arguments.quick else arguments.windows
    chosen = [case for case in cases(arguments.quick) if arguments.only in case.name]
    baseline, found = [], []
    for ids in token_windows(smollm2_tokenizer(), count, arguments.context + arguments.tokens):
        base, rows = measure(weights, ids, chosen, arguments.context, arguments.block)
        baseline.append(base)
        found.append(rows)
    whole = float(np.exp(np.concatenate(baseline).mean()))
    print(
        f"{count} window(s), context {arguments.context}, then {arguments.tokens} tokens; "
        f"pages of {arguments.block}; whole cache: ppl {whole:.3f}"
    )
    print(
        f"{'drop':4s} {'score':34s} {'scope':8s} {'error':>6s} {'agree':>7s} {'ppl':>8s}"
        f" {'':8s} {'freed':>6s} {'pages freed':>11s} {'in place':>8s} {'break-even (model)'}"
    )
    results = [
        summary(case, list(rows), whole)
        for case, rows in zip(chosen, zip(*found, strict=True), strict=True)
    ]
    for row in results:
        report(row)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.out:
        record = {
            "model": "SmolLM2-135M-Instruct",
            "text": "WikiText-2, validation",
            "windows": count,
            "context": arguments.context,
            "tokens": arguments.tokens,
            "block": arguments.block,
            "ppl_whole": whole,
            "rows": results,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
