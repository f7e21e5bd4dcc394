"""int8 codes of the rows of an activation, for products of int8."""

from __future__ import annotations

from icd_tvm.tir_schedules.cuda.row_codes import LONGEST, RowCodes, row_tile
from icd_tvm.tir_schedules.cuda.source_kernel import (
    WIDTHS,
    Argument,
    Rule,
    SourceKernel,
    operand,
    refused,
)


def quantize_rule(rows: int, width: int, x: str, codes: RowCodes) -> Rule:
    """Return the kernel that writes the codes of ``x`` [rows, width].

    Parameters
    ----------
    rows, width : int
        The width is even.
    x : str
        ``float16``, ``bfloat16`` or ``float32``.
    codes : RowCodes
        Of one step, or of the range of each row.

    Returns
    -------
    Rule
        Arguments by name: ``x``; ``row_scale`` and ``row_zero`` float32[rows] where each row has
        its own; ``codes`` int8[rows, width].
    """
    if x not in ("float16", "bfloat16", "float32"):
        return refused(f"no codes of {x}; use float16, bfloat16 or float32")
    if width % 2 or width > LONGEST:
        return refused(f"rows of {width} are not made; even ones up to {LONGEST} are")
    tile, written = row_tile(rows, width), codes.arguments(rows, width)
    return Rule(
        (
            SourceKernel(
                family="quantize",
                config=f"icd::QuantizeConfig<{operand(x)}, {tile.sizes}, {codes.mode}>",
                call=f"icd::quantize<G>(x, {rows}, {width}, shared, {codes.place})",
                arguments=(Argument("x", (rows, width), x), *written),
                outputs=len(written),
                grid=(-(-rows // tile.rows), 1, 1),
                threads=tile.threads,
                shared=tile.shared,
                flop=4.0 * rows * width,
                bytes=rows * (width * (WIDTHS[x] + 1) + (0 if codes.step else 8)),
                unit="fp32",
                codes=codes.pair,
            ),
        )
    )
