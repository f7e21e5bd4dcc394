"""Products of one float row with codes, as calls that `HoldWeightOnly` leaves for the kernels.

They are packed calls that no library has: what folds constants leaves their weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from icd_tvm._tvm import relax
from icd_tvm.relax_passes.int8_product import side_by_side
from icd_tvm.relax_passes.relax_graph import packed_fields, static_shape

_PRODUCT = "icd.weight_only_matmul"
_RANGES = {"int4": 8, "int8": 128}


class Codes(NamedTuple):
    """A weight ``codes * scales``: int8 [K, N], and float32 [N] or [N, K / group]."""

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]

    @property
    def group(self) -> int:
        """Rows that share a scale; 0 where a whole column does."""
        return 0 if self.scales.ndim == 1 else len(self.codes) // self.scales.shape[1]

    @property
    def widths(self) -> list[str]:
        """The types that hold the codes, narrowest first."""
        low, high = int(self.codes.min()), int(self.codes.max())
        return [name for name, half in _RANGES.items() if -half <= low and high < half]

    @property
    def form(self) -> str:
        """What weights of one product have in common, in words."""
        shared = f"{self.group} inputs" if self.group else "a column"
        return f"{self.widths[0]} with a scale for {shared}"


class HeldProduct(NamedTuple):
    """A product of one row of floats with codes, in float32.

    Attributes
    ----------
    x : relax.Expr
        float32 [..., K], one row.
    weight : relax.GenericConst
        int8 [K, N].
    scale : relax.GenericConst
        float32 [N] or [N, K / group].
    """

    x: Any
    weight: Any
    scale: Any

    def call(self) -> Any:
        """Return the expression."""
        *lead, _ = static_shape(self.x) or ()
        kind = relax.TensorType((*lead, int(self.weight.value.shape[1])), "float32")
        return relax.call_dps_packed(_PRODUCT, relax.Tuple(list(self)), kind)

    @property
    def codes(self) -> Codes:
        """The weight as numpy."""
        return Codes(self.weight.value.numpy(), self.scale.value.numpy())


def held_product(value: Any) -> HeldProduct | None:
    """Return the parts of a product, or None."""
    fields = packed_fields(value, _PRODUCT)
    return None if fields is None else HeldProduct(*fields)


def joined_held(products: Sequence[HeldProduct], visit: Callable[[Any], Any]) -> HeldProduct:
    """Return one product of the same row, the columns side by side.

    Parameters
    ----------
    products : sequence of HeldProduct
        Of one `Codes.form`. Constants are named after theirs, joined by ``+``.
    visit : callable
        Rewrites the row.
    """
    weight = side_by_side([one.weight for one in products], axis=1)
    scale = side_by_side([one.scale for one in products], axis=0)
    return HeldProduct(visit(products[0].x), weight, scale)
