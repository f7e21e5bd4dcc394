"""This machine, the portable CPUs whose code it runs, and what code is made for them."""

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
