"""Products of int8 codes as calls that `MarkInt8Products` leaves for `SelectCudaKernels`.

They are packed calls that no library has: what folds constants leaves their weights alone, and
whatever reads the graph in between sees one operator from codes to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from icd_tvm._tvm import const_name, named_const, relax
from icd_tvm.relax_passes.relax_graph import packed_fields, scalar_constant, static_shape

_CODES, _PRODUCT = "icd.int8_codes", "icd.int8_product"


class CodesCall(NamedTuple):
    """Codes of ``source``, ``round(x / step) + point`` in int8.

    Attributes
    ----------
    source : relax.Expr
        float32 [..., K].
    step, point : relax.GenericConst or None
        float32 and int8 scalars. None: each row by its own range; the call then returns
        float32[rows] steps, float32[rows] codes of 0.0, and the codes.
    """

    source: Any
    step: Any = None
    point: Any = None

    def call(self) -> Any:
        """Return the expression."""
        shape = static_shape(self.source) or ()
        codes = relax.TensorType(shape, "int8")
        if self.step is not None:
            return relax.call_dps_packed(_CODES, relax.Tuple(list(self)), codes)
        by_row = relax.TensorType((prod(shape[:-1]),), "float32")
        return relax.call_dps_packed(_CODES, relax.Tuple([self.source]), [by_row, by_row, codes])

    @property
    def values(self) -> tuple[float, int]:
        """Step and point as numbers; (0, 0) where rows have their own."""
        if self.step is None:
            return 0.0, 0
        return scalar_constant(self.step) or 0.0, int(scalar_constant(self.point) or 0)


class Int8Product(NamedTuple):
    """A product of codes with a constant int8 weight, in float32.

    Attributes
    ----------
    codes : relax.Var
        int8 [..., K].
    weight : relax.GenericConst
        int8 [K, N].
    scale : relax.GenericConst
        float32[N].
    offset : relax.GenericConst
        float32[N]. For codes of one step ``sums * scale + offset``; for codes by row the sums of
        the columns of the weight: ``(sums - row_zero * offset) * row_scale * scale``.
    rows : tuple of relax.Expr
        (row_scale, row_zero), float32[rows]; empty for codes of one step.
    """

    codes: Any
    weight: Any
    scale: Any
    offset: Any
    rows: tuple[Any, ...] = ()

    def call(self) -> Any:
        """Return the expression."""
        *lead, _ = static_shape(self.codes) or ()
        kind = relax.TensorType((*lead, int(self.weight.value.shape[1])), "float32")
        return relax.call_dps_packed(_PRODUCT, relax.Tuple([*self[:4], *self.rows]), kind)

    @property
    def array(self) -> Any:
        """The weight as numpy."""
        return self.weight.value.numpy()


def codes_call(value: Any) -> CodesCall | None:
    """Return the parts of a call that makes codes, or None."""
    fields = packed_fields(value, _CODES)
    return None if fields is None else CodesCall(*fields)


def int8_product(value: Any) -> Int8Product | None:
    """Return the parts of a product, or None."""
    fields = packed_fields(value, _PRODUCT)
    if fields is None:
        return None
    codes, weight, scale, offset, *rows = fields
    return Int8Product(codes, weight, scale, offset, tuple(rows))


def side_by_side(constants: Sequence[Any], axis: int = -1) -> Any:
    """Return one constant of all along an axis, named after theirs, joined by ``+``."""
    return named_const(
        np.concatenate([const.value.numpy() for const in constants], axis),
        "+".join(const_name(const) for const in constants),
    )


def joined(products: Sequence[Int8Product], visit: Any) -> Int8Product:
    """Return one product of the same codes, the columns side by side.

    Constants are named after theirs, joined by ``+``; ``visit`` rewrites what is no constant.
    """
    weights, scales, offsets = (
        side_by_side(parts) for parts in zip(*(one[1:4] for one in products), strict=True)
    )
    first = products[0]
    rows = tuple(visit(one) for one in first.rows)
    return Int8Product(visit(first.codes), weights, scales, offsets, rows)
