"""This machine, and the portable CPUs whose code it runs."""

from icd_tvm.tir_schedules.target import host_target, vector_bits

HOST = host_target(1)
# Code for AVX-512 runs only where the CPU has it.
RUNNABLE = ["x86-64-v3", "x86-64", *(["x86-64-v4"] if vector_bits(HOST) == 512 else [])]
