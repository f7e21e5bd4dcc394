"""One token of a Mamba layer: convolution with SiLU, and the scan with everything around it."""

from __future__ import annotations

from icd_tvm.tir_schedules.cuda.source_kernel import Argument, Rule, SourceKernel, operand, refused

TAPS, THREADS = 4, 128


def conv_step_rule(channels: int, dtype: str, *, taps: int = TAPS) -> Rule:
    """Return the kernel of ``silu(sum(window * weight) + bias)`` with the window moved by one.

    Parameters
    ----------
    channels : int
        Of x and out, ``dtype`` [channels]; the window and weight are float32[channels, 4].
    dtype : str
        ``float16`` or ``bfloat16``.
    taps : int
        Of the convolution; only 4 is made.
    """
    if taps != TAPS:
        return refused(f"{taps} taps are not made; {TAPS} are")
    if dtype not in ("float16", "bfloat16"):
        return refused(f"activations of {dtype} are not made; use float16 or bfloat16")
    window = (channels, TAPS)
    return Rule(
        (
            SourceKernel(
                family="mamba_step",
                config=f"icd::MambaConfig<{operand(dtype)}, 16>",
                call="icd::conv_step<G>(out, window_out, x, window, weight, (const float*)bias, "
                f"{channels})",
                arguments=(
                    Argument("x", (channels,), dtype),
                    Argument("window", window, "float32"),
                    Argument("weight", window, "float32"),
                    Argument("bias", (channels,), "float32"),
                    Argument("window_out", window, "float32"),
                    Argument("out", (channels,), dtype),
                ),
                grid=(-(-channels // THREADS), 1, 1),
                threads=THREADS,
                shared=0,
                flop=(2.0 * TAPS + 8) * channels,
                bytes=(3 * 4.0 * TAPS + 4 + 4) * channels,
                unit="fp32",
                outputs=2,
            ),
        )
    )


def scan_step_rule(channels: int, states: int, dtype: str, *, shared: str = "float32") -> Rule:
    """Return the kernel of the scan: softplus, discretisation, update, read, skip and gate.

    Parameters
    ----------
    channels, states : int
        ``state`` and ``a`` (-exp(A_log)) are float32[channels, states]; ``b`` and ``c``
        ``shared`` [states]; ``d`` and ``dt_bias`` float32[channels]; ``x``, ``z``, ``dt`` and
        ``out`` ``dtype`` [channels].
    dtype : str
        ``float16`` or ``bfloat16``.
    shared : str
        Of b and c: ``float32`` or ``dtype``.
    """
    if shared not in (dtype, "float32"):
        return refused(f"b and c of {shared} with activations of {dtype} are not made")
    if states not in (4, 8, 16, 32, 64, 128):
        return refused(f"{states} states are not made; powers of two from 4 to 128 are")
    if dtype not in ("float16", "bfloat16"):
        return refused(f"activations of {dtype} are not made; use float16 or bfloat16")
    full, lanes = (channels, states), states // 4
    vectors = [Argument(name, (channels,), dtype) for name in ("x", "z", "dt")]
    tables = [Argument(name, full, "float32") for name in ("state", "a")]
    both = [Argument(name, (states,), shared) for name in "bc"]
    scalars = [Argument(name, (channels,), "float32") for name in ("d", "dt_bias")]
    outputs = [Argument("state_out", full, "float32"), Argument("out", (channels,), dtype)]
    return Rule(
        (
            SourceKernel(
                family="mamba_step",
                config=f"icd::MambaConfig<{operand(dtype)}, {states}, {operand(shared)}>",
                call="icd::scan_step<G>(out, state_out, x, z, dt, state, a, b, c, (const float*)d, "
                f"(const float*)dt_bias, {channels})",
                arguments=(*vectors, *tables, *both, *scalars, *outputs),
                grid=(-(-channels // (THREADS // lanes)), 1, 1),
                threads=THREADS,
                shared=0,
                flop=8.0 * channels * states,
                bytes=12.0 * channels * states + 16.0 * channels,
                unit="fp32",
                outputs=2,
            ),
        )
    )
