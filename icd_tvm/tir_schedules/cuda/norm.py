"""Layer norm and RMS norm over the last axis, with an addition before it and codes behind it."""

from __future__ import annotations

from icd_tvm.tir_schedules.cuda.row_codes import LONGEST, RowCodes, row_tile
from icd_tvm.tir_schedules.cuda.source_kernel import (
    WIDTHS,
    Argument,
    Rule,
    SourceKernel,
    cpp_bool,
    operand,
    or_null,
    refused,
)


def norm_rule(
    rows: int,
    width: int,
    x: str,
    out: str,
    eps: float,
    *,
    centre: bool,
    beta: bool = False,
    residual: bool = False,
    codes: RowCodes | None = None,
) -> Rule:
    """Return the kernel of ``(h - mean) / sqrt(var + eps) * gamma + beta``, or of the RMS norm.

    Parameters
    ----------
    rows, width : int
        x and out are [rows, width]; ``gamma`` and ``beta`` float32[width].
    x, out : str
        ``float16``, ``bfloat16`` or ``float32``; sums are float32. ``out`` may be ``int8``: nothing
        but the codes is written then.
    eps : float
        Added to the variance, or to the mean square.
    centre : bool
        Layer norm; else the RMS norm ``h / sqrt(mean(h^2) + eps) * gamma``.
    beta : bool
        Whether there is one.
    residual : bool
        Whether h is ``x + residual``, of x's shape and dtype.
    codes : RowCodes, optional
        int8 codes of the result, which are written too.

    Returns
    -------
    Rule
        Arguments by name: ``x``, ``residual``, ``gamma``, ``beta``, those of
        `icd_tvm.tir_schedules.cuda.quantize.quantize_rule`, ``out``.
    """
    alone = out == "int8"
    if {x, "float32" if alone else out} - {"float16", "bfloat16", "float32"}:
        return refused(f"no norm of {x} that writes {out}")
    if alone and codes is None:
        return refused("a norm that writes int8 wants to know what the codes stand for")
    if width % 2 or width > LONGEST:
        return refused(f"rows of {width} are not made; even ones up to {LONGEST} are")
    arguments = [Argument("x", (rows, width), x)]
    if residual:
        arguments.append(Argument("residual", (rows, width), x))
    arguments.append(Argument("gamma", (width,), "float32"))
    if beta:
        arguments.append(Argument("beta", (width,), "float32"))
    written = [] if codes is None else codes.arguments(rows, width)
    written += [] if alone else [Argument("out", (rows, width), out)]
    tile, flags = row_tile(rows, width), ", ".join(map(cpp_bool, (centre, beta, residual)))
    more = "" if codes is None else f", {codes.mode}"
    place = "" if codes is None else f", {codes.place}"
    moved = WIDTHS[x] * (1 + residual) + sum(WIDTHS[a.dtype] for a in written if len(a.shape) > 1)
    return Rule(
        (
            SourceKernel(
                family="norm",
                config=f"icd::NormConfig<{operand(x)}, {operand('float32' if alone else out)}, "
                f"{tile.sizes}, {flags}{more}>",
                call=f"icd::norm<G>({or_null('out', not alone)}, x, "
                f"{or_null('residual', residual)}, gamma, {or_null('beta', beta)}, {rows}, "
                f"{width}, {eps!r}f, shared{place})",
                arguments=(*arguments, *written),
                outputs=len(written),
                grid=(-(-rows // tile.rows), 1, 1),
                threads=tile.threads,
                shared=tile.shared,
                flop=8.0 * rows * width,
                bytes=rows * width * moved + 4.0 * width * (1 + beta),
                unit="fp32",
                eps=eps,
                codes=(0.0, 0.0) if codes is None else codes.pair,
            ),
        )
    )
