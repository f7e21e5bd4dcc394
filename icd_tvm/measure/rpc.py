"""Time compiled libraries on a device that a TVM RPC tracker lends, interleaved.

TVM's RPC is neither encrypted nor authenticated, and a server runs what it is sent: trusted
networks only. Start one with ``python -m tvm.exec.rpc_tracker`` and, on the device,
``python -m tvm.exec.rpc_server --tracker HOST:PORT --key KEY`` (``pip install apache-tvm[rpc]``).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm._tvm import relax, tvm
from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.latency import Samples, balanced_orders
from icd_tvm.steps import steps

# Seconds to wait for an answer of the tracker, and for a device that is free.
WAIT_S = 60.0
CPU_QUERY = "target.llvm_get_system_cpu"


@dataclass(frozen=True)
class Device:
    """A device that is lent to this process.

    Attributes
    ----------
    session : tvm.rpc.RPCSession
    tracker, key, address : str
        Where it was asked for, under which key, and ``HOST:PORT`` of its server.
    cpu : str or None
        LLVM's name of its CPU; None where its TVM has no LLVM.
    """

    session: Any
    tracker: str
    key: str
    address: str
    cpu: str | None

    def record(self, target: Any) -> dict[str, Any]:
        """Return what a metrics record says about the device and what it ran."""
        return {
            "tracker": self.tracker,
            "key": self.key,
            "address": self.address,
            "cpu": self.cpu,
            "target": str(target),
        }


@dataclass(frozen=True)
class RemoteArm:
    """A library loaded on a device: its outputs on the given inputs, and one timed call."""

    outputs: list[np.ndarray]
    seconds: Callable[[], float]


@contextmanager
def lent_device(tracker: str, key: str, wait_s: float = WAIT_S) -> Iterator[Device]:
    """Borrow a device and give it back.

    Parameters
    ----------
    tracker : str
        ``HOST:PORT``.
    key : str
        What the device registered under.
    wait_s : float
        Seconds to wait for the tracker, and for a free device.

    Raises
    ------
    MeasurementError
        If no tracker answers, it knows no such key, all devices stay busy, or the server speaks
        another version of TVM's protocol.
    """
    with _tracker(tracker, wait_s) as line:
        host, port, match = _lease(line, tracker, key, wait_s)
    address = f"{host}:{port}"
    try:
        session = tvm.rpc.connect(host, port, match)
    except Exception as error:
        raise MeasurementError(
            f"cannot use device {key!r} at {address}: {_last_line(error)}",
            f"it must run an RPC server of TVM {tvm.__version__}",
        ) from error
    try:
        yield Device(session, tracker, key, address, _cpu(session))
    finally:
        # A broken connection is closed already.
        with suppress(Exception):
            session.get_function("CloseRPCConnection")()


def check_cpu(device: Device, target: Any) -> None:
    """Refuse code for a CPU that the device is known not to have.

    Raises
    ------
    MeasurementError
        If both CPUs are known and differ; a portable level such as ``x86-64-v3`` is not checked.
    """
    wanted = str(target.attrs.get("mcpu", ""))
    if device.cpu and wanted and "x86-64" not in wanted and wanted != device.cpu:
        raise MeasurementError(
            f"the arms are compiled for {wanted}, the device {device.key!r} is {device.cpu}",
            "choose a target that both have, e.g. target: x86-64-v3",
        )


def set_remote_threads(device: Device, threads: int) -> None:
    """Give the device's runtime ``threads`` workers."""
    with _talking(f"set {threads} threads on device {device.key!r}"):
        device.session.get_function("runtime.config_threadpool")(1, threads)


def load_arm(device: Device, library: Path, inputs: Sequence[np.ndarray]) -> RemoteArm:
    """Upload a library, run its ``main`` once, and prepare its timing.

    Parameters
    ----------
    device : Device
    library : Path
        From ``export_library``; the file name must differ from those uploaded before.
    inputs : sequence of numpy.ndarray
        In the order of the parameters of ``main``.

    Raises
    ------
    MeasurementError
        If the device cannot load or run it.
    """
    session = device.session
    with _talking(f"load {library.name} on device {device.key!r}", f"TVM {tvm.__version__}"):
        session.upload(str(library))
        remote = session.cpu()
        machine = relax.VirtualMachine(session.load_module(library.name), remote)
    with _talking(f"run {library.name} on device {device.key!r}"):
        arguments = [tvm.runtime.tensor(np.asarray(a, order="C"), remote) for a in inputs]
        machine.set_input("main", *arguments)
        machine.invoke_stateful("main")
        outputs = [tensor.numpy() for tensor in _flat(machine.get_outputs("main"))]
        # The outputs stay there: sending them back is no part of the model's time.
        machine.save_function("main", "icd_timed", *arguments, include_return=False)
        timer = machine.time_evaluator("icd_timed", remote, number=1, repeat=1)
    return RemoteArm(outputs, lambda: float(timer().results[0]))


def interleave_remotely(
    arms: Mapping[str, RemoteArm], *, repeats: int, warmup: int, seed: int = 0
) -> dict[str, Samples]:
    """Time every arm once a round, in an order that is balanced over positions.

    The device's own clock is read, around the call alone: the network is not in it. TVM makes an
    untimed call before each timed one, so caches hold this arm's data, not that of the arm before.

    Parameters
    ----------
    arms : mapping of str to RemoteArm
    repeats, warmup : int
        Rounds to take, and to take first and throw away.
    seed : int
        Of the order.

    Returns
    -------
    dict of str to float64 array, shape [repeats]
        Seconds per call.

    Raises
    ------
    MeasurementError
        If a call fails or the connection breaks.
    """
    names, orders = list(arms), balanced_orders(len(arms), seed)
    table = np.empty((repeats, len(names)))
    for row in steps(range(-warmup, repeats), "measuring rounds"):
        for column in next(orders):
            with _talking(f"time arm {names[column]!r}"):
                seconds = arms[names[column]].seconds()
            if row >= 0:
                table[row, column] = max(seconds, 1e-9)
    return {name: table[:, i].copy() for i, name in enumerate(names)}


@contextmanager
def _tracker(address: str, wait_s: float) -> Iterator[socket.socket]:
    """Connect to a tracker and exchange greetings."""
    base = tvm.rpc.base
    host, _, port = address.rpartition(":")
    try:
        line = socket.create_connection((host.strip("[]"), int(port)), wait_s)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MeasurementError(
            f"no RPC tracker answers at {address}: {reason}",
            "start one: python -m tvm.exec.rpc_tracker",
        ) from error
    with line:
        try:
            line.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            answer = base.recvall(line, 4)
        except OSError:
            answer = b""
        if answer != struct.pack("<i", base.RPC_TRACKER_MAGIC):
            raise MeasurementError(
                f"{address} is no RPC tracker of TVM {tvm.__version__}",
                "is it the server's port, or another version?",
            )
        yield line


def _lease(line: socket.socket, tracker: str, key: str, wait_s: float) -> tuple[str, int, str]:
    """Return host, port and one-time key of a device that is free."""
    code = tvm.rpc.base.TrackerCode
    known = _ask(line, tracker, [code.SUMMARY])["server_info"]
    keys = sorted({str(item["key"]).partition(":")[2] for item in known})
    # The tracker would let a request for an unknown key wait for ever.
    if key not in keys:
        raise MeasurementError(
            f"tracker {tracker} knows no device with key {key!r}",
            f"its keys: {', '.join(keys)}" if keys else "no device has registered there",
        )
    try:
        host, port, match = _ask(line, tracker, [code.REQUEST, key, "", 1])
    except TimeoutError as error:
        raise MeasurementError(
            f"no device with key {key!r} was free within {wait_s:g} s", "another process uses it"
        ) from error
    return str(host), int(port), str(match)


def _ask(line: socket.socket, tracker: str, question: list[Any]) -> Any:
    base = tvm.rpc.base
    try:
        base.sendjson(line, question)
        code, answer = base.recvjson(line)
    except TimeoutError:
        raise
    except (OSError, ValueError, TypeError, struct.error) as error:
        raise MeasurementError(f"RPC tracker {tracker} gives no answer: {error}") from error
    if code != base.TrackerCode.SUCCESS:
        raise MeasurementError(f"RPC tracker {tracker} refused: {answer}")
    return answer


def _cpu(session: Any) -> str | None:
    try:
        return str(session.get_function(CPU_QUERY)())
    except Exception:
        return None


@contextmanager
def _talking(action: str, needs: str = "") -> Iterator[None]:
    """Turn whatever TVM raises about a remote call into one line."""
    try:
        yield
    except IcdError:
        raise
    except Exception as error:
        hint = f"the device must run {needs}" if needs else "does the device still run?"
        raise MeasurementError(f"cannot {action}: {_last_line(error)}", hint) from error


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _flat(outputs: Any) -> list[Any]:
    if isinstance(outputs, tvm.runtime.Tensor):
        return [outputs]
    return [tensor for item in outputs for tensor in _flat(item)]
