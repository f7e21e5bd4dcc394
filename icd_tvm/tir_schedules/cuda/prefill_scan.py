"""A prompt through a Mamba layer: the convolution, and the scan in chunks that run side by side."""

from __future__ import annotations

from dataclasses import dataclass

from icd_tvm.tir_schedules.cuda.archs import SMS
from icd_tvm.tir_schedules.cuda.source_kernel import (
    Argument,
    Rule,
    SourceKernel,
    operand,
    refused,
)

TAPS, THREADS, RUN = 4, 128, 32
STEPS = 16  # in shared memory at once; a chunk has a multiple of them


def prefill_conv_rule(
    batch: int, length: int, channels: int, dtype: str, *, taps: int = TAPS
) -> Rule:
    """Return the kernel of ``silu(causal convolution + bias)`` with the window after the last step.

    Parameters
    ----------
    batch, length, channels : int
        Of x and out, ``dtype`` [batch, length, channels]; ``window`` float32[batch, channels, 4]
        holds the four inputs before, oldest first; ``weight`` is float32[channels, 4].
    dtype : str
        ``float16`` or ``bfloat16``.
    taps : int
        Of the convolution; only 4 is made.
    """
    if taps != TAPS:
        return refused(f"{taps} taps are not made; {TAPS} are")
    work = _Work(batch, length, channels, 16, dtype, True, length)
    reason = work.refusal()
    return refused(reason) if reason else Rule((work.convolve(),))


def prefill_scan_rule(
    batch: int,
    length: int,
    channels: int,
    states: int,
    dtype: str,
    *,
    conv: bool = False,
    chunk: int | None = None,
    arch: str = "sm_90",
) -> Rule:
    """Return the kernels of the scan over ``length`` steps, softplus to gate, and the last state.

    Parameters
    ----------
    batch, length, channels, states : int
        ``x``, ``z``, ``dt`` and ``out`` are ``dtype`` [batch, length, channels]; ``b`` and ``c``
        float32[batch, length, states]; ``state`` and ``state_out`` float32[batch, channels,
        states]; ``a`` (-exp(A_log)) float32[channels, states]; ``d`` and ``dt_bias``
        float32[channels].
    dtype : str
        ``float16`` or ``bfloat16``; states and sums are float32.
    conv : bool
        x is the input of the convolution, which is made on the fly with its SiLU: ``window``,
        ``weight`` and ``bias`` as in `prefill_conv_rule`, and ``window_out``. For layers whose b, c
        and dt are not made of its output (Dao, Gu, Mamba-2, 2024), or are made of a copy of it.
    chunk : int, optional
        Steps of a chunk, instead of what fills the device.
    arch : str
        Whose number of multiprocessors decides the chunks.

    Returns
    -------
    Rule
        One kernel where one chunk fills the device, else three: chunks from zero, the states
        between them, chunks from those.
    """
    blocks = batch * -(-channels * max(1, states // 16) // THREADS)
    wanted = -(-2 * SMS[arch] // max(1, blocks))
    # Every step but those of the last chunk is made twice.
    steps = chunk or (length if wanted == 1 else max(64, -(-length // wanted)))
    steps = -(-steps // STEPS) * STEPS
    work = _Work(batch, length, channels, states, dtype, conv, steps)
    reason = work.refusal()
    if reason:
        return refused(reason)
    before = () if work.chunks == 1 else (work.carry(), work.join())
    return Rule((*before, work.scan()))


@dataclass(frozen=True)
class _Work:
    batch: int
    length: int
    channels: int
    states: int
    dtype: str
    conv: bool
    steps: int

    def refusal(self) -> str:
        if self.states not in (4, 8, 16, 32, 64, 128):
            return f"{self.states} states are not made; powers of two from 4 to 128 are"
        if self.dtype not in ("float16", "bfloat16"):
            return f"activations of {self.dtype} are not made; use float16 or bfloat16"
        if self.length < 1:
            return f"{self.length} steps are no prompt"
        if self.channels % 8:
            return f"rows of {self.channels} {self.dtype} are not whole pieces of 16 bytes"
        return ""

    @property
    def chunks(self) -> int:
        return max(1, -(-self.length // self.steps))

    @property
    def _config(self) -> str:
        conv = str(self.conv).lower()
        return f"icd::PrefillConfig<{operand(self.dtype)}, {self.states}, {conv}>"

    @property
    def _blocks(self) -> int:
        return -(-self.channels // (THREADS // self._lanes))

    @property
    def _lanes(self) -> int:
        return max(1, self.states // 16)

    @property
    def _shared(self) -> int:
        return 2 * STEPS * (3 * 2 * THREADS // self._lanes + 2 * 4 * self.states)

    def _activation(self, name: str) -> Argument:
        return Argument(name, (self.batch, self.length, self.channels), self.dtype)

    def _rates(self, name: str) -> Argument:
        return Argument(name, (self.batch, self.length, self.states), "float32")

    def _states(self, name: str, chunks: int | None = None) -> Argument:
        lead = (self.batch,) if chunks is None else (self.batch, chunks)
        return Argument(name, (*lead, self.channels, self.states), "float32")

    def _by_channel(self, name: str, *last: int) -> Argument:
        return Argument(name, (self.channels, *last), "float32")

    def _window(self, name: str) -> Argument:
        return Argument(name, (self.batch, self.channels, TAPS), "float32")

    @property
    def _convolution(self) -> tuple[Argument, ...]:
        weight = self._by_channel("weight", TAPS)
        return (self._window("window"), weight, self._by_channel("bias")) if self.conv else ()

    @property
    def _taps(self) -> str:
        return "window, weight, (const float*)bias" if self.conv else "nullptr, nullptr, nullptr"

    @property
    def _totals(self) -> Argument:
        return Argument("totals", (self.batch, self.chunks - 1, self.channels), "float32")

    @property
    def _steps(self) -> int:
        return self.batch * self.length * self.channels

    def carry(self) -> SourceKernel:
        """Return the kernel of all chunks but the last, from zeros."""
        inputs = [self._activation("x"), self._activation("dt"), self._rates("b")]
        tables = [self._by_channel("a", self.states), self._by_channel("dt_bias")]
        outputs = (self._states("carry", self.chunks - 1), self._totals)
        share = 1 - 1 / self.chunks
        return SourceKernel(
            family="prefill_scan",
            config=self._config,
            call="icd::prefill_scan<G, true>(nullptr, carry, (float*)totals, nullptr, "
            "icd::ScanInputs{x, nullptr, dt, b, nullptr}, nullptr, a, nullptr, "
            f"(const float*)dt_bias, {self._taps}, {self.length}, {self.channels}, {self.steps}, "
            "shared)",
            arguments=(*inputs, *tables, *self._convolution, *outputs),
            grid=(self._blocks, self.chunks - 1, self.batch),
            threads=THREADS,
            shared=self._shared,
            flop=6.0 * self._steps * self.states * share,
            bytes=4.0 * self._steps * share,
            unit="fp32",
            outputs=2,
        )

    def join(self) -> SourceKernel:
        """Return the kernel of the states between chunks."""
        arguments = (
            self._states("state"),
            self._states("carry", self.chunks - 1),
            self._totals,
            self._by_channel("a", self.states),
            self._states("starts", self.chunks),
        )
        size = self.batch * self.channels * self.states
        return SourceKernel(
            family="prefill_scan",
            config=self._config,
            call="icd::join_chunks<G>(starts, state, carry, (const float*)totals, a, "
            f"{self.channels}, {self.chunks})",
            arguments=arguments,
            grid=(-(-self.channels * self.states // (4 * THREADS)), 1, self.batch),
            threads=THREADS,
            shared=0,
            flop=3.0 * size * self.chunks,
            bytes=8.0 * size * self.chunks,
            unit="fp32",
        )

    def scan(self) -> SourceKernel:
        """Return the kernel of all chunks from their states."""
        starts = self._states("state") if self.chunks == 1 else self._states("starts", self.chunks)
        activations = [self._activation(name) for name in ("x", "z", "dt")]
        rates = [self._rates(name) for name in "bc"]
        tables = [
            starts,
            self._by_channel("a", self.states),
            self._by_channel("d"),
            self._by_channel("dt_bias"),
        ]
        outputs = [self._states("state_out"), self._activation("out")]
        if self.conv:
            outputs.insert(1, self._window("window_out"))
        window_out = "window_out" if self.conv else "nullptr"
        return SourceKernel(
            family="prefill_scan",
            config=self._config,
            call=f"icd::prefill_scan<G, false>(out, state_out, nullptr, {window_out}, "
            f"icd::ScanInputs{{x, z, dt, b, c}}, {starts.name}, a, (const float*)d, "
            f"(const float*)dt_bias, {self._taps}, {self.length}, {self.channels}, {self.steps}, "
            "shared)",
            arguments=(*activations, *rates, *tables, *self._convolution, *outputs),
            grid=(self._blocks, self.chunks, self.batch),
            threads=THREADS,
            shared=self._shared,
            flop=8.0 * self._steps * self.states,
            bytes=8.0 * self._steps + 4.0 * self.batch * self.channels * self.states,
            unit="fp32",
            outputs=len(outputs),
        )

    def convolve(self) -> SourceKernel:
        """Return the kernel of the convolution alone."""
        inputs = (self._activation("x"), *self._convolution)
        return SourceKernel(
            family="prefill_scan",
            config=self._config,
            call="icd::prefill_conv<G>(out, window_out, x, window, weight, (const float*)bias, "
            f"{self.length}, {self.channels})",
            arguments=(*inputs, self._window("window_out"), self._activation("out")),
            grid=(-(-self.channels // THREADS), -(-self.length // RUN), self.batch),
            threads=THREADS,
            shared=0,
            flop=(2.0 * TAPS + 8) * self._steps,
            bytes=4.0 * self._steps,
            unit="fp32",
            outputs=2,
        )
