"""Other runtimes on the same model, each in a process of its own, taking turns with our arms.

A thread pool spins for a while after each call before it sleeps: ONNX Runtime 1.31 with two
threads burned 30-36 ms of CPU time after its last call on a two-core AMD EPYC (one thread: none).
Whoever runs meanwhile is measured too slow. So the turns are blocks of calls, and after each block
both sides stay idle for ``SETTLE_S``, longer if the worker's CPU time still grows.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from icd_tvm.errors import MeasurementError, ModelFileError
from icd_tvm.measure import peer_worker
from icd_tvm.measure.latency import Account, Samples, interleave
from icd_tvm.measure.peer_worker import PEERS
from icd_tvm.steps import steps

Array = npt.NDArray[Any]

SETTLE_S = 0.05
# Longest extra wait for a worker that keeps using CPU time after its turn.
SETTLE_LIMIT_S = 1.0
# Process CPU times in /proc tick every 10 ms; this spans more than one tick.
TICK_S = 0.02


class PeerError(MeasurementError):
    """A peer that cannot run; ``backend`` names it."""

    def __init__(self, backend: str, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.backend = backend


class Peer:
    """A runtime in a worker process that waits on a pipe between its turns.

    Parameters
    ----------
    backend : str
        One of :data:`icd_tvm.measure.peer_worker.PEERS`.
    model_path : path
        ONNX file.
    feeds : mapping of str to array
        Inputs of every call, by graph input name.
    threads : int
        Threads inside an operator.
    start_timeout_s : float
        Seconds for the worker to load (and quantise) the model and run it once.
    python : str, optional
        Interpreter that has the runtime: default the environment variable
        ``ICD_PYTHON_<RUNTIME>`` (``ICD_PYTHON_DEEPSPARSE``: it wants an older numpy), then ours.

    Attributes
    ----------
    outputs : dict of str to array
        Outputs of the first call, for a numeric comparison.
    info : dict of str to str
        Name and version of the runtime.

    Raises
    ------
    ModelFileError
        On entry: the model file does not exist.
    PeerError
        The backend is unknown. On entry or during :meth:`run`: the worker failed, died or did not
        answer in time.
    """

    def __init__(
        self,
        backend: str,
        model_path: str | os.PathLike[str],
        feeds: Mapping[str, Array],
        threads: int,
        *,
        start_timeout_s: float = 300.0,
        python: str | None = None,
    ) -> None:
        if backend not in PEERS:
            raise PeerError(backend, f"unknown peer {backend!r}", f"known: {', '.join(PEERS)}")
        if threads < 1:
            raise MeasurementError(f"threads = {threads} is below 1", "pass 1 or more")
        self.backend = backend
        self.python = python or _interpreter(backend)
        self.model_path = Path(model_path)
        self.feeds = dict(feeds)
        self.threads = threads
        self.start_timeout_s = start_timeout_s
        self.outputs: dict[str, Array] = {}
        self.info: dict[str, str] = {}
        self._first_s = 0.0
        self._cleanup = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path()
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Peer:
        """Start the worker and wait until it has run once."""
        if not self.model_path.is_file():
            raise ModelFileError(f"no model file {str(self.model_path)!r}", "check the path")
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the worker."""
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._running().pid

    def run(self, count: int, timeout_s: float | None = None) -> Samples:
        """Let the worker run the model ``count`` times.

        Parameters
        ----------
        count : int
        timeout_s : float, optional
            Default: 30 s and twenty times what the first call of the model would need.

        Returns
        -------
        float64 array, shape [count]
            Seconds per call.
        """
        limit = timeout_s if timeout_s is not None else 30 + 20 * count * self._first_s
        nanoseconds = self._ask(f"run {count}", limit)["ns"]
        return np.maximum(np.asarray(nanoseconds, dtype=np.float64), 1) * 1e-9

    def evaluate(self, changed: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Let the worker run the model once with some inputs changed; they stay changed.

        Parameters
        ----------
        changed : mapping of str to array
            Inputs of the shapes and dtypes that they had.
        outputs : sequence of str
            Names of the outputs to return.

        Raises
        ------
        MeasurementError
            A name, a shape or a dtype is not the model's.
        """
        for name, array in changed.items():
            own = self.feeds.get(name)
            if own is None or (own.shape, own.dtype) != (array.shape, array.dtype):
                raise MeasurementError(
                    f"input {name!r} cannot become {array.dtype}{list(array.shape)}",
                    f"inputs: {', '.join(self.feeds)}",
                )
        missing = set(outputs) - set(self.outputs)
        if missing:
            known = ", ".join(self.outputs)
            raise MeasurementError(f"no output {min(missing)!r}", f"outputs: {known}")
        files = {name: str(self._folder / f"{name}-once.npz") for name in ("feeds", "out")}
        arrays: dict[str, Any] = {str(i): array for i, array in enumerate(changed.values())}
        np.savez(files["feeds"], **arrays)
        request = json.dumps({**files, "inputs": list(changed), "outputs": list(outputs)})
        self._ask(f"evaluate {request}", 30 + 20 * self._first_s)
        with np.load(files["out"]) as archive:
            return {name: archive[str(i)] for i, name in enumerate(outputs)}

    def _ask(self, command: str, limit: float) -> dict[str, Any]:
        process = self._running()
        try:
            assert process.stdin is not None
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
        except OSError:
            raise self._death("is gone") from None
        return self._receive(limit)

    def settle(self, seconds: float = SETTLE_S) -> float:
        """Wait past the spin time of both sides; return the seconds waited."""
        start = time.perf_counter()
        time.sleep(seconds)
        used = _cpu_seconds(self.pid)
        while used is not None and time.perf_counter() - start < SETTLE_LIMIT_S:
            time.sleep(TICK_S)
            now = _cpu_seconds(self.pid)
            if now is None or now <= used:
                break
            used = now
        return time.perf_counter() - start

    def close(self) -> None:
        """Stop the worker and remove its files; safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            _stop(process)
        self._cleanup.close()

    def _start(self) -> None:
        folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="icd-peer-")))
        self._folder = folder
        feeds: dict[str, Any] = dict(self.feeds)
        np.savez(folder / "feeds.npz", **feeds)
        self._log = self._cleanup.enter_context((folder / "stderr.txt").open("w+b"))
        # As source, not as a module: another interpreter need not have this package, and a script's
        # folder on the path would put our statistics.py before the standard library's.
        command = [self.python, "-c", Path(peer_worker.__file__).read_text(), self.backend]
        command += [
            str(self.model_path.resolve()),
            str(folder / "feeds.npz"),
            str(folder / "out.npz"),
        ]
        try:
            self._process = subprocess.Popen(
                [*command, str(self.threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                cwd=folder,
                text=True,
            )
        except OSError as error:
            raise PeerError(
                self.backend, f"the {self.backend} peer did not start: {error}", "check the path"
            ) from None
        self._answers = queue.Queue()
        reader = threading.Thread(
            target=_read_lines, args=(self._process.stdout, self._answers.put), daemon=True
        )
        reader.start()
        ready = self._receive(self.start_timeout_s)
        self._first_s = float(ready["first_ns"]) * 1e-9
        self.info = {**ready["info"], "threads": str(self.threads)}
        with np.load(folder / "out.npz") as archive:
            self.outputs = {name: archive[str(i)] for i, name in enumerate(ready["outputs"])}

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise PeerError(
                self.backend,
                f"the {self.backend} peer is not running",
                "use it inside a with statement",
            )
        return self._process

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                _stop(process)
            raise PeerError(
                self.backend,
                f"the {self.backend} peer did not answer within {timeout_s:.0f} s",
                "it was stopped; allow more time or use fewer repeats",
            ) from None
        if line is None:
            raise self._death("died")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(
                self.backend,
                f"the {self.backend} peer failed: {answer['error']}",
                self._hint(answer["error"]),
            )
        return answer

    def _hint(self, error: str) -> str:
        if error.startswith("ModuleNotFoundError"):
            name = f"ICD_PYTHON_{_runtime(self.backend)}"
            return f"pip install 'icd_tvm[peers]', or set {name} to a Python that has it"
        return f"model {self.model_path.name}, inputs {', '.join(self.feeds)}"

    def _death(self, what: str) -> PeerError:
        process = self._running()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        return PeerError(
            self.backend,
            f"the {self.backend} peer {what} with exit status {process.returncode}",
            _tail(self._log) or "it printed nothing",
        )


def _runtime(backend: str) -> str:
    return backend.partition("-")[0].upper()


def _interpreter(backend: str) -> str:
    return os.environ.get(f"ICD_PYTHON_{_runtime(backend)}") or sys.executable


def compare_with_peer(
    arms: Mapping[str, Callable[[], object]],
    peers: Mapping[str, Peer],
    *,
    blocks: int = 20,
    block_repeats: int = 20,
    block_warmup: int = 3,
    warmup: int = 20,
    settle_s: float = SETTLE_S,
    budget_s: float | None = None,
    seed: int = 0,
    account: Account | None = None,
) -> dict[str, Samples]:
    """Time our arms and other runtimes in turns.

    One turn is a block of interleaved rounds of our arms, or a block of calls of one peer. Turns
    follow each other forwards and backwards alternately (ABBA), with both sides idle in between.

    Parameters
    ----------
    arms : mapping of str to callable
        Our arms, timed in this process.
    peers : mapping of str to Peer
        Started peers, by report name.
    blocks : int
        Turns of each side.
    block_repeats : int
        Timed calls of every arm and peer in a turn.
    block_warmup : int
        Calls at the start of a turn that are thrown away: the idle time cooled the caches and
        put the threads to sleep.
    warmup : int
        Calls of every arm and peer before the first turn.
    settle_s : float
        Least idle seconds between turns.
    budget_s : float, optional
        Wall-clock seconds; at least one block is taken.
    seed : int
        Seed of the order inside our blocks.
    account : Account, optional
        Where the seconds of our turns go.

    Returns
    -------
    dict of str to float64 array, shape [blocks taken * block_repeats]
        Seconds per call; equal lengths, sample i of all from the same block.

    Raises
    ------
    MeasurementError
        No arm or peer, a name used twice, counts below 1, or a failing arm or peer.
    """
    _check(arms, peers, blocks, block_repeats)
    deadline = None if budget_s is None else time.perf_counter() + budget_s
    taken: dict[str, list[Samples]] = {name: [] for name in (*arms, *peers)}
    for peer in peers.values():
        if warmup:
            peer.run(warmup)
            peer.settle(settle_s)
    for block in steps(range(blocks), "measuring in turns"):
        extra = warmup if block == 0 else 0
        for name in _turns(peers, backwards=block % 2 == 1):
            if name is None:
                samples = interleave(
                    arms,
                    repeats=block_repeats,
                    warmup=block_warmup + extra,
                    min_repeats=block_repeats,
                    seed=seed + block,
                    account=account,
                )
                for arm, values in samples.items():
                    taken[arm].append(values)
            else:
                values = peers[name].run(block_warmup + block_repeats)[block_warmup:]
                taken[name].append(values)
            for peer in peers.values():
                peer.settle(settle_s)
        if deadline is not None and time.perf_counter() >= deadline:
            break
    return {name: np.concatenate(parts) for name, parts in taken.items()}


def _turns(peers: Mapping[str, Peer], backwards: bool) -> list[str | None]:
    """Return the order of turns; None stands for our own arms."""
    order: list[str | None] = [None, *peers]
    return order[::-1] if backwards else order


def _check(
    arms: Mapping[str, Callable[[], object]],
    peers: Mapping[str, Peer],
    blocks: int,
    block_repeats: int,
) -> None:
    if not arms or not peers:
        raise MeasurementError("a comparison needs an arm and a peer", "pass at least one of each")
    both = set(arms) & set(peers)
    if both:
        raise MeasurementError(f"{min(both)!r} names an arm and a peer", "rename one of them")
    if blocks < 1 or block_repeats < 1:
        raise MeasurementError(
            f"blocks = {blocks}, block_repeats = {block_repeats}", "both must be 1 or more"
        )


def _read_lines(stream: IO[str], put: Callable[[str | None], None]) -> None:
    for line in stream:
        put(line)
    put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        if process.stdin is not None and process.poll() is None:
            process.stdin.write("quit\n")
            process.stdin.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _cpu_seconds(pid: int) -> float | None:
    """Return the CPU time of a process; None where the kernel does not tell."""
    try:
        # The command name, in brackets, may hold spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


def _tail(log: IO[bytes] | None, length: int = 400) -> str:
    if log is None or log.closed:
        return ""
    log.seek(0)
    return " ".join(log.read().decode(errors="replace").split())[-length:]
