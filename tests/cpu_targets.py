"""This machine, the portable CPUs whose code it runs, and what code is made for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from icd_tvm.tir_schedules.address_trace import address_trace, lower_loops
from icd_tvm.tir_schedules.target import host_target, vector_bits

HOST = host_target(1)
# Code for AVX-512 runs only where the CPU has it.
RUNNABLE = ["x86-64-v3", "x86-64", *(["x86-64-v4"] if vector_bits(HOST) == 512 else [])]


def basic_blocks(text: str) -> list[str]:
    """Return the basic blocks of assembly."""
    blocks, block = [], ""
    for line in text.splitlines():
        if line.startswith("."):
            blocks.append(block)
            block = ""
        block += line + "\n"
    return [*blocks, block]


def assert_stays_inside(func: Any, sizes: Sequence[int], target: Any) -> None:
    """Follow every load and store of a scheduled function; ``sizes`` are those of its arguments.

    Both sides of a selection count, as the code computes both.
    """
    apart = 1 << 32
    starts = [apart * i for i in range(1, len(sizes) + 1)]
    ends = np.array([0, *sizes, apart])
    for run in address_trace(lower_loops(func, target), starts, apart * (len(sizes) + 1)):
        buffer, place = np.divmod(run.address, apart)
        assert (place + run.size <= ends[buffer]).all()
