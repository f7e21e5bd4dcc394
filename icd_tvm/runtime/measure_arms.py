"""Time our arms interleaved in this process, and peers, each in a process of its own, in turns."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from icd_tvm.config import Config
from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.conditions import clock, pinned
from icd_tvm.measure.environment import last_level_cache_bytes
from icd_tvm.measure.latency import Account, Samples, StopRule, interleave
from icd_tvm.measure.peers import Peer, compare_with_peer
from icd_tvm.measure.statistics import Ratio, Summary, ratio, ratios, summarise

# Calls of each side in one turn; a turn must be long against the time that threads take to settle.
BLOCK_REPEATS = 20
# The buffer that empties the caches, in sizes of the last-level cache.
COLD_CACHE_SIZES = 2
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
    conditions : dict
        What it ran under: ``clock`` {before, after}, ``threads`` (pinning), ``cold_cache_bytes``,
        ``stop_half_width``, ``rounds_asked``, ``time_evaluator`` by arm, ``overhead_s``.
    device : dict or None
        The device that was timed over RPC; None for this machine.
    """

    samples: dict[str, Samples]
    feeds: Mapping[str, np.ndarray]
    peer_info: dict[str, dict[str, str]] = field(default_factory=dict)
    peer_outputs: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    peer_differences: dict[str, float] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
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
        timed = [pair for pair in PAIRS if set(pair) <= set(self.samples)]
        return ratios(self.samples, timed, seed)


def measure_arms(
    callers: Mapping[str, Callable[[], Any]],
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    config: Config,
    peers: Sequence[str] = (),
) -> Measured:
    """Time all arms, and peers beside them.

    Parameters
    ----------
    callers : Mapping[str, Callable]
        Our arms; each call runs the model once.
    model : onnx.ModelProto
        What the peers run.
    feeds : Mapping[str, numpy.ndarray]
        The peers' inputs.
    config : Config
        Repeats, warm-up, threads and seed.
    peers : sequence of str
        Names of :data:`icd_tvm.measure.peer_worker.PEERS`.

    Raises
    ------
    MeasurementError
        If an arm fails; :class:`icd_tvm.measure.peers.PeerError` if a peer does.
    """
    account, began = Account(), time.perf_counter()
    before = clock()
    overhead = time.perf_counter() - began
    if peers:
        measured = _with_peers(callers, model, feeds, config, peers, account)
    else:
        measured = _alone(callers, feeds, config, account)
    began = time.perf_counter()
    measured.conditions |= {
        "clock": {"before": before, "after": clock()},
        "rounds_asked": config.pipeline.repeats,
        "stop_half_width": config.measure.stop_half_width,
    }
    overhead += time.perf_counter() - began + account.overhead_s
    measured.conditions["overhead_s"] = overhead
    return measured


def _alone(
    callers: Mapping[str, Callable[[], Any]],
    feeds: Mapping[str, np.ndarray],
    config: Config,
    account: Account,
) -> Measured:
    keys = config.measure
    pairs = [pair for pair in PAIRS if set(pair) <= set(callers)][:1]
    width = keys.stop_half_width
    cold = COLD_CACHE_SIZES * last_level_cache_bytes() if keys.cold_cache else 0
    _first_calls(callers)
    with pinned(keys.pin_threads) as threads:
        samples = interleave(
            callers,
            repeats=config.pipeline.repeats,
            warmup=config.pipeline.warmup_iter,
            seed=config.seed,
            stop=StopRule(pairs, width) if width is not None and pairs else None,
            cold_cache_bytes=cold,
            account=account,
        )
    return Measured(samples, feeds, conditions={"threads": threads, "cold_cache_bytes": cold})


def _with_peers(
    callers: Mapping[str, Callable[[], Any]],
    model: onnx.ModelProto,
    feeds: Mapping[str, np.ndarray],
    config: Config,
    peers: Sequence[str],
    account: Account,
) -> Measured:
    blocks = -(-config.pipeline.repeats // BLOCK_REPEATS)
    threads = config.threads or os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="icd-model-"))
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        _first_calls(callers)
        # The peers' processes start before the pinning, so that they do not inherit it.
        running = {name: stack.enter_context(Peer(name, path, feeds, threads)) for name in peers}
        pinning = stack.enter_context(pinned(config.measure.pin_threads))
        samples = compare_with_peer(
            callers,
            running,
            blocks=blocks,
            block_repeats=BLOCK_REPEATS,
            seed=config.seed,
            account=account,
        )
        conditions = {"threads": pinning, "cold_cache_bytes": 0}
        info = {name: peer.info for name, peer in running.items()}
        outputs = {name: peer.outputs for name, peer in running.items()}
        return Measured(samples, feeds, info, outputs, conditions=conditions)


def _first_calls(callers: Mapping[str, Callable[[], Any]]) -> None:
    """Run every arm once: TVM starts its workers, and binds them, at the first call."""
    for name, call in callers.items():
        try:
            call()
        except IcdError:
            raise
        except Exception as error:
            raise MeasurementError(
                f"arm {name!r} failed: {type(error).__name__}: {error}",
                "run the arm alone to see the failure",
            ) from error
