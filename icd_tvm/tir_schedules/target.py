"""Targets: the machine at hand, a portable x86-64 level with its vector width, a CUDA device."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from icd_tvm._tvm import tvm
from icd_tvm.errors import ConfigError
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS

_HOST_NAMES = ("host", "native")
PRECISIONS = ("float16", "bfloat16")
AARCH64 = "aarch64"
# Instructions that kernels are chosen by, and those that LLVM takes besides where a CPU has them.
_FEATURES = (
    *("avx2", "avx512f", "avx512bw", "avx512vnni", "avxvnni", "avx512bf16", "neon"),
    *("sse4.2", "avx", "fma", "f16c", "bmi", "bmi2", "avx512cd", "avx512dq", "avx512vl"),
    *("avx512vbmi", "avx512vbmi2", "avx512bitalg", "avx512vpopcntdq", "avx512fp16", "gfni"),
)


def host_target(threads: int | None = None) -> Any:
    """Return the LLVM target of this machine, with every instruction its CPU has.

    ``mcpu="native"`` is not an option: TVM falls back to plain SSE code without an error.

    Parameters
    ----------
    threads : int, optional
        Number of worker threads the kernels are balanced for; all CPUs this process may use
        if omitted.

    Returns
    -------
    tvm.target.Target

    Raises
    ------
    ConfigError
        If ``threads`` is less than one.
    """
    return _llvm_target(str(tvm.target.codegen.llvm_get_system_cpu()), threads)


def parse_target(text: str, threads: int | None = None) -> Any:
    """Return the CPU target that ``text`` names.

    Parameters
    ----------
    text : str
        ``"host"`` (or ``"native"``), a portable level such as ``"x86-64-v3"`` (AVX2) or
        ``"x86-64-v4"`` (AVX-512), any CPU name LLVM knows, or ``"aarch64"`` (Armv8 with NEON),
        whose code is compiled but has been run nowhere yet.
    threads : int, optional
        As for `host_target`.

    Returns
    -------
    tvm.target.Target

    Raises
    ------
    ConfigError
        If LLVM knows no such CPU, or ``threads`` is less than one.
    """
    name = text.strip()
    if name in _HOST_NAMES:
        return host_target(threads)
    if name == AARCH64:
        return _arm_target(threads)
    if name not in _known_cpus():
        hint = "use host, x86-64-v3, x86-64-v4 or aarch64"
        raise ConfigError(f"unknown CPU target {text!r}", hint)
    return _llvm_target(name, threads)


def is_aarch64(target: Any) -> bool:
    """Tell whether ``target`` is a 64-bit Arm CPU."""
    return bool(target.attrs.get("feature.is_aarch64", False))


def runs_here(target: Any) -> bool:
    """Tell whether this machine has every instruction that kernels for ``target`` may use."""
    if target.kind.name != "llvm":
        return False
    host, has = host_target(1), tvm.target.codegen.target_has_features
    return is_aarch64(target) == is_aarch64(host) and all(
        has(name, host) for name in _FEATURES if has(name, target)
    )


def cuda_arch(text: str) -> str | None:
    """Return the architecture that a target names (``cuda:sm_90``), or None for a CPU target.

    Raises
    ------
    ConfigError
        If no architecture is named, or kernels are not made for it or for the precision.
    """
    kind, *rest = text.strip().split(":")
    if kind != "cuda":
        return None
    if not rest or rest[0] not in CUDA_ARCHS or rest[1:] not in ([], *([p] for p in PRECISIONS)):
        known = " or ".join(f"cuda:{name}" for name in CUDA_ARCHS)
        hint = f"use {known}, then perhaps :float16 or :bfloat16"
        raise ConfigError(f"unknown CUDA target {text!r}", hint)
    return rest[0]


def cuda_precision(text: str) -> str | None:
    """Return the type that a CUDA target rounds matmul operands to; None keeps float32."""
    return next((p for p in PRECISIONS if text.strip().endswith(f":{p}")), None)


def cuda_target(arch: str, host_cpu: str = "x86-64-v3") -> Any:
    """Return the CUDA target of an architecture; its host code runs on any AVX2 machine.

    Parameters
    ----------
    arch : str
        A key of `CUDA_ARCHS`.
    host_cpu : str
        LLVM's name of the least CPU of the GPU host.

    Returns
    -------
    tvm.target.Target
    """
    shared, l2 = CUDA_ARCHS[arch]
    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_num_threads": 1024,
            "max_threads_per_block": 1024,
            "thread_warp_size": 32,
            "max_shared_memory_per_block": min(shared, 49152),
            "registers_per_block": 65536,
            "l2_cache_size_bytes": l2,
            "host": {"kind": "llvm", "mcpu": host_cpu},
        }
    )


def vector_bits(target: Any) -> int:
    """Return the width in bits of the widest floating-point vector register of ``target``.

    Raises
    ------
    ConfigError
        If ``target`` is no LLVM target.
    """
    if target.kind.name != "llvm":
        raise ConfigError(f"target kind {target.kind.name!r} has no CPU vectors", "use llvm")
    has = tvm.target.codegen.target_has_features
    if has("avx512f", target):
        return 512
    return 256 if has("avx2", target) else 128


def target_threads(target: Any) -> int:
    """Return the number of worker threads ``target`` was made for (1 if it does not say)."""
    return int(target.attrs.get("num-cores", 1))


def _llvm_target(cpu: str, threads: int | None) -> Any:
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": _count(threads)})


def _arm_target(threads: int | None) -> Any:
    triple = {"mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}
    return tvm.target.Target({"kind": "llvm", **triple, "num-cores": _count(threads)})


def _count(threads: int | None) -> int:
    count = len(os.sched_getaffinity(0)) if threads is None else threads
    if count < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}", "omit it to use all CPUs")
    return count


@lru_cache(maxsize=1)
def _known_cpus() -> frozenset[str]:
    """Return the CPU names LLVM accepts for the host's architecture."""
    listing = tvm.target.codegen.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm"}))
    return frozenset(str(name) for name in listing)
