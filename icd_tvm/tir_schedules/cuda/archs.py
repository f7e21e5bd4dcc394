"""What CUDA architectures offer; knows no TVM."""

from __future__ import annotations

# Shared memory a block may ask for, and L2, in bytes (CUDA C Programming Guide, compute
# capabilities 8.0 and 9.0; A100 and H200 data sheets).
CUDA_ARCHS = {"sm_80": (166912, 40 << 20), "sm_90": (232448, 60 << 20)}
# Multiprocessors of the A100 and of the H200.
SMS = {"sm_80": 108, "sm_90": 132}
