"""``benchmarks/gemm_figures.py``: what follows from several lines of the peers' table."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gemm_figures import figures, sparse_weight, summary


def line(case: str, threads: int, ms: float, ratio: float, **more: Any) -> dict[str, Any]:
    head = {"case": f"GEMM 2 x 4 x 8 {case}", "threads": threads, "arm": "dense"}
    return {**head, "ms": {"dense": [2 * ms, ms]}, "median": ratio, "min": ratio / 2, **more}


def test_means_of_each_type_sparse_over_dense_and_scaling() -> None:
    peak = {"of_peak": [0.5, 0.9]}
    lines = [
        line("fp32", 1, 4.0, 0.8, **peak),
        line("fp32", 2, 2.5, 0.9, **peak),
        line("bf16", 1, 2.0, 0.6),
        line("vec16 50% fp32", 1, 2.0, 0.7),
        {"case": "GEMM 2 x 4 x 8 int8", "threads": 1, "failed": "no peer"},
    ]
    mean = "geometric mean of ours / fastest peer"
    assert list(summary(lines)) == [
        f"1 products fp32, threads 1: {mean} 0.800 / 0.400 (median / min); 0.900 of the peak (min)",
        f"1 products fp32, threads 2: {mean} 0.900 / 0.450 (median / min); 0.900 of the peak (min)",
        f"1 products bf16, threads 1: {mean} 0.600 / 0.300 (median / min)",
        "GEMM 2 x 4 x 8 vec16 50% fp32, threads 1: 0.500 of our dense, bar 0.60",
        "GEMM 2 x 4 x 8 fp32: two threads are 1.60 times one, bar 1.7",
    ]


def test_only_a_measured_product_with_a_peak_has_a_rate() -> None:
    assert figures(line("bf16", 1, 2.0, 0.6)) == {}
    assert figures(line("vec16 50% fp32", 1, 2.0, 0.6)) == {}
    assert figures({"case": "GEMM 2 x 4 x 8 fp32", "threads": 1, "failed": "no peer"}) == {}


def test_every_16_columns_keep_the_same_number_of_rows_or_blocks() -> None:
    for pattern, height in (("vec16", 1), ("block16", 16)):
        weight = sparse_weight(64, 32, pattern, 75, np.random.default_rng(0))
        live = (weight.reshape(64 // height, height, 2, 16) != 0).all(axis=(1, 3))
        assert (live.sum(axis=0) == 64 // height // 4).all()
        assert (weight != 0).sum() == weight.size // 4
