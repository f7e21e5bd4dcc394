"""Layer norm and RMS norm over the last axis, with an addition before it or none."""

from __future__ import annotations

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

_THREADS, _PAIRS = 128, 16
# Rows from which a warp for each of them fills a device.
_MANY = 1024


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
) -> Rule:
    """Return the kernel of ``(h - mean) / sqrt(var + eps) * gamma + beta``, or of the RMS norm.

    Parameters
    ----------
    rows, width : int
        x and out are [rows, width]; ``gamma`` and ``beta`` float32[width].
    x, out : str
        ``float16``, ``bfloat16`` or ``float32``; sums are float32.
    eps : float
        Added to the variance, or to the mean square.
    centre : bool
        Layer norm; else the RMS norm ``h / sqrt(mean(h^2) + eps) * gamma``.
    beta : bool
        Whether there is one.
    residual : bool
        Whether h is ``x + residual``, of x's shape and dtype.

    Returns
    -------
    Rule
        Arguments by name: ``x``, ``residual``, ``gamma``, ``beta``, ``out``.
    """
    if {x, out} - {"float16", "bfloat16", "float32"}:
        return refused(f"no norm of {x} that writes {out}")
    if width % 2 or width > 1024 * 2 * _PAIRS:
        return refused(f"rows of {width} are not made; even ones up to {2048 * _PAIRS} are")
    warps = _warps(rows, width)
    pairs = -(-width // (64 * warps))
    in_block = max(1, _THREADS // (32 * warps))
    arguments = [Argument("x", (rows, width), x)]
    if residual:
        arguments.append(Argument("residual", (rows, width), x))
    arguments.append(Argument("gamma", (width,), "float32"))
    if beta:
        arguments.append(Argument("beta", (width,), "float32"))
    arguments.append(Argument("out", (rows, width), out))
    flags = ", ".join(map(cpp_bool, (centre, beta, residual)))
    read = WIDTHS[x] * (1 + residual)
    return Rule(
        (
            SourceKernel(
                family="norm",
                config=f"icd::NormConfig<{operand(x)}, {operand(out)}, {warps}, {in_block}, "
                f"{pairs}, {flags}>",
                call=f"icd::norm<G>(out, x, {or_null('residual', residual)}, gamma, "
                f"{or_null('beta', beta)}, {rows}, {width}, {eps!r}f, shared)",
                arguments=tuple(arguments),
                grid=(-(-rows // in_block), 1, 1),
                threads=in_block * warps * 32,
                shared=4 * in_block * warps,
                flop=8.0 * rows * width,
                bytes=rows * width * (read + WIDTHS[out]) + 4.0 * width * (1 + beta),
                unit="fp32",
                eps=eps,
            ),
        )
    )


def _warps(rows: int, width: int) -> int:
    """Return how many warps share a row: more where there are few rows, as registers last."""
    most = 4 if rows < _MANY else _PAIRS
    warps = 1
    while width > 64 * warps * most and warps < 32:
        warps *= 2
    return warps
