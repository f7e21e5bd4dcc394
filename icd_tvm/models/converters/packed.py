"""Unpack integers of fewer than eight bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unpack_bits(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the unsigned integers of ``bits`` bits packed along the last axis, lowest first.

    Parameters
    ----------
    packed : uint8[..., n]
    bits : {1, 2, 4, 8}

    Returns
    -------
    uint8[..., n * 8 / bits]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    mask = np.uint8((1 << bits) - 1)
    spread = (packed[..., None] >> shifts) & mask
    return spread.reshape(*packed.shape[:-1], packed.shape[-1] * len(shifts))
