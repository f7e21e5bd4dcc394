"""The table of the models beside their peers."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peer_table import table


def line(case: str, threads: int, median: float) -> dict[str, Any]:
    return {"case": case, "threads": threads, "median": median, "bar": 0.95}


def test_sizes_are_rows_and_what_is_above_its_bar_is_bold() -> None:
    found = table(
        [
            line("bert-base S=384 batch 1 fp32", 1, 0.951),
            line("bert-base S=384 batch 1 fp32", 2, 0.95),
            line("minilm S=128 batch 8 W8A8", 2, 0.7),
            line("minilm S=32 batch 8 fp32", 1, 0.8) | {"failed": "no peer"},
            line("GEMM 128 x 768 x 3072 fp32", 1, 0.9),
        ]
    )
    assert found.splitlines()[2:] == [
        "| bar |  |  | 0.95 | - | 0.95 | - |",
        "| minilm | 8 | 32 | failed / - | - / - | - / - | - / - |",
        "| minilm | 8 | 128 | - / - | - / - | - / 0.700 | - / - |",
        "| bert-base | 1 | 384 | **0.951** / 0.950 | - / - | - / - | - / - |",
    ]
