"""What dropping tokens costs MiniLM on STS-B, and what it gains.

Quality: every distinct sentence runs in the shortest of LENGTHS that holds it, so that hardly any
padding is there to be dropped for nothing; "real" is the share of real tokens that went. Time: one
full sequence, arms interleaved in one process.

Run: python benchmarks/token_drop.py [--drops 0.1 0.2] [--layers 0 2] [--pairs 1500] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from icd_tvm.adapters.token_spec import TokenSpec
from icd_tvm.adapters.units import kept_count
from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.latency import interleave
from icd_tvm.measure.quality import stsb_pairs
from icd_tvm.measure.statistics import ratio, summarise
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.minilm import build_minilm
from icd_tvm.models.tokenize import encode
from icd_tvm.relax_passes.drop_tokens import DropTokens
from icd_tvm.runtime.build import Built, build
from icd_tvm.tir_schedules.target import host_target

LENGTHS = (10, 20, 30, 40, 60, 128)


def compiled(tokens: int, spec: TokenSpec | None) -> Built:
    mod = import_onnx(build_minilm(tokens, pooled=True)).mod
    if spec is not None:
        passed = DropTokens(spec)
        mod = passed(mod)
        assert not passed.meta["skipped"], passed.meta["why"]
    return build(mod, host_target(1))


def by_length(texts: list[str]) -> dict[int, list[int]]:
    """Return length -> numbers of the sentences that run in it."""
    sizes = encode(texts, LENGTHS[-1])["attention_mask"].sum(axis=1)
    places = np.searchsorted(LENGTHS, sizes)
    return {n: np.nonzero(places == i)[0].tolist() for i, n in enumerate(LENGTHS)}


def embeddings(
    texts: list[str], groups: dict[int, list[int]], specs: list[TokenSpec | None]
) -> tuple[list[np.ndarray], list[float]]:
    """Return unit vectors and the share of dropped real tokens of every request."""
    vectors = [np.zeros((len(texts), 384)) for _ in specs]
    lost, total = np.zeros(len(specs)), 0
    for tokens, rows in groups.items():
        if not rows:
            continue
        feeds = [encode([texts[row]], tokens) for row in rows]
        real = np.array([feed["attention_mask"].sum() for feed in feeds])
        total += int(real.sum())
        for i, spec in enumerate(specs):
            built = compiled(tokens, spec)
            for row, feed in zip(rows, feeds, strict=True):
                vectors[i][row] = built.run_all(feed)[0][0]
            if spec is not None:
                lost[i] += np.maximum(real - kept_count(tokens, spec.drop), 0).sum()
    return [v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors], list(lost / total)


def quality(specs: list[TokenSpec | None], limit: int) -> list[dict[str, Any]]:
    pairs = stsb_pairs("dev", limit)
    texts = sorted({text for first, second, _ in pairs for text in (first, second)})
    row = {text: index for index, text in enumerate(texts)}
    vectors, lost = embeddings(texts, by_length(texts), specs)
    left, right = ([row[pair[i]] for pair in pairs] for i in (0, 1))
    found = []
    for own, share in zip(vectors, lost, strict=True):
        cosines = (own[left] * own[right]).sum(axis=1)
        value = stats.spearmanr(cosines, [score for *_, score in pairs]).statistic
        agree = (own * vectors[0]).sum(axis=1)
        found.append(
            {
                "spearman_points": 100 * float(value),
                "real_tokens_dropped": float(share),
                "cosine_mean": float(agree.mean()),
                "cosine_min": float(agree.min()),
            }
        )
    return found


def timing(specs: list[TokenSpec | None], tokens: int, repeats: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (1, tokens))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
    calls = {str(spec): compiled(tokens, spec).caller(feeds) for spec in specs}
    samples = interleave(calls, repeats=repeats, warmup=10)
    whole = samples[str(specs[0])]
    return [
        {
            "tokens": tokens,
            "ms": summarise(own)["median"],
            "min_ms": 1e3 * float(own.min()),
            "min_ratio": float(own.min() / whole.min()),
            "ratio": dict(ratio(own, whole)) if own is not whole else None,
        }
        for own in samples.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drops", type=float, nargs="*", default=[0.1, 0.2])
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    specs: list[TokenSpec | None] = [None]
    specs += [TokenSpec(drop, layer) for drop in arguments.drops for layer in arguments.layers]
    rows = [{"request": str(spec) if spec else "whole"} for spec in specs]
    record: dict[str, Any] = {"model": "MiniLM-L6", "env": fingerprint(), "rows": rows}
    for tokens in arguments.tokens:
        for row, found in zip(rows, timing(specs, tokens, arguments.repeats), strict=True):
            row.setdefault("time", []).append(found)
            print(f"{row['request']:36s} {json.dumps(found)}")
    for row, found in zip(rows, quality(specs, arguments.pairs), strict=True):
        row["quality"] = found
        print(f"{row['request']:36s} {json.dumps(found)}")
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
