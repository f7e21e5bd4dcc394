"""Time our arms interleaved in this process, and a peer in a process of its own, in turns."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from icd_tvm.config import Config
from icd_tvm.measure.latency import Samples, interleave
from icd_tvm.measure.peers import OrtPeer, compare_with_peer
from icd_tvm.measure.statistics import Ratio, Summary, ratio, summarise

# Calls of each side in one turn; a turn must be long against the time that threads take to settle.
BLOCK_REPEATS = 20
# The pairs that every report shows, where both arms were timed.
PAIRS = (
    ("iterative", "linear"),
    ("iterative", "identity"),
    ("linear", "identity"),
    ("random", "linear"),
    ("identity", "dense"),
    ("iterative", "dense"),
    ("identity", "dense"),
    ("dense", "onnxruntime"),
    ("iterative", "onnxruntime"),
    ("linear", "onnxruntime"),
)


@dataclass
class Measured:
    """Samples of every arm and peer, seconds per call.

    Attributes
    ----------
    samples : dict[str, numpy.ndarray]
        float64 [rounds]; sample i of all arms is from the same round.
    feeds : Mapping[str, numpy.ndarray]
        The inputs of every call.
    peer_info : dict[str, dict[str, str]]
        Name and version of each peer.
    peer_outputs : dict[str, dict[str, numpy.ndarray]]
        Outputs of each peer on the timed inputs, by ONNX name.
    peer_differences : dict[str, float]
        Largest relative difference of each peer's outputs from those of the dense arm.
    device : dict or None
        The device that was timed over RPC; None for this machine.
    """

    samples: dict[str, Samples]
    feeds: Mapping[str, np.ndarray]
    peer_info: dict[str, dict[str, str]] = field(default_factory=dict)
    peer_outputs: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    peer_differences: dict[str, float] = field(default_factory=dict)
    device: dict[str, Any] | None = None

    @property
    def rounds(self) -> int:
        """Timed rounds."""
        return len(next(iter(self.samples.values())))

    def summaries(self) -> dict[str, Summary]:
        """Return medians, percentiles and minima in milliseconds."""
        return {name: summarise(samples) for name, samples in self.samples.items()}

    def ratio(self, first: str, second: str, seed: int = 0) -> Ratio | None:
        """Return first/second, or None if one of them was not timed."""
        if first not in self.samples or second not in self.samples:
            return None
        return ratio(self.samples[first], self.samples[second], seed)

    def ratios(self, seed: int = 0) -> dict[str, Ratio]:
        """Return every pair of :data:`PAIRS` that was timed."""
        found = {f"{a}/{b}": self.ratio(a, b, seed) for a, b in PAIRS}
        return {name: value for name, value in found.items() if value is not None}


def measure_arms(
    callers: Mapping[str, Callable[[], Any]],
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    config: Config,
    peer: str | None = None,
) -> Measured:
    """Time all arms, and a peer.

    Parameters
    ----------
    callers : Mapping[str, Callable]
        Our arms; each call runs the model once.
    model : onnx.ModelProto
        What the peer runs.
    feeds : Mapping[str, numpy.ndarray]
        The peer's inputs.
    config : Config
        Repeats, warm-up, threads and seed.
    peer : str, optional
        ``onnxruntime``.

    Raises
    ------
    MeasurementError
        If an arm or the peer fails.
    """
    keys = config.pipeline
    if peer is None:
        samples = interleave(
            callers, repeats=keys.repeats, warmup=keys.warmup_iter, seed=config.seed
        )
        return Measured(samples, feeds)
    blocks = -(-keys.repeats // BLOCK_REPEATS)
    threads = config.threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="icd-model-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        with OrtPeer(path, feeds, threads) as running:
            samples = compare_with_peer(
                callers,
                {peer: running},
                blocks=blocks,
                block_repeats=BLOCK_REPEATS,
                seed=config.seed,
            )
            return Measured(samples, feeds, {peer: running.info}, {peer: running.outputs})
