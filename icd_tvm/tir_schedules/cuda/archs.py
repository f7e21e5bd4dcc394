"""What CUDA architectures offer; knows no TVM."""

from __future__ import annotations

# sm_90 with the instructions that compute capability 9.0 alone has: those of warpgroups.
HOPPER = "sm_90a"
# Shared memory a block may ask for, and L2, in bytes (CUDA C Programming Guide, compute
# capabilities 8.0 and 9.0; A100 and H200 data sheets).
CUDA_ARCHS = {"sm_80": (166912, 40 << 20), "sm_90": (232448, 60 << 20), HOPPER: (232448, 60 << 20)}
# Multiprocessors of the A100 and of the H200.
SMS = {"sm_80": 108, "sm_90": 132, HOPPER: 132}


def runs_on(arch: str, device: str) -> bool:
    """Tell whether machine code of an architecture runs on a device.

    Parameters
    ----------
    arch : str
        A key of `CUDA_ARCHS`.
    device : str
        The device's compute capability, e.g. ``sm_90``; it has no suffix.
    """
    return arch.removesuffix("a") == device
