"""Timing on a device of a TVM RPC tracker: both on loopback, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import D, tiny_onnx

import icd_tvm
from icd_tvm.cli import main
from icd_tvm.commands.run import config_from, parser
from icd_tvm.config_file import make_config
from icd_tvm.errors import ConfigError, MeasurementError, VerificationError
from icd_tvm.measure import rpc
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.runtime import measure_remote
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.measured_file import read_measured
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.stages import measure

KEY = "loopback"
MISSING = [n for n in ("psutil", "cloudpickle", "tornado") if not importlib.util.find_spec(n)]
needs_server = pytest.mark.skipif(
    bool(MISSING), reason=f"pip install apache-tvm[rpc]: no {', '.join(MISSING)}"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(what: str, port: int, *more: str) -> Iterator[None]:
    ports = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    command = [sys.executable, "-m", f"tvm.exec.{what}", *ports, "--silent", *more]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # In a session of its own, so that the workers it forks end with it.
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(ready: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            ready()
            return
        except (OSError, MeasurementError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="module")
def tracker() -> Iterator[str]:
    """Address of a tracker that lends one device, this machine."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        stack.enter_context(serving("rpc_tracker", port))
        wait_for(lambda: socket.create_connection(("127.0.0.1", port), 1).close())
        here = ["--tracker", address, "--key", KEY, "--custom-addr", "127.0.0.1"]
        stack.enter_context(serving("rpc_server", free_port(), *here))

        def registered() -> None:
            with rpc.lent_device(address, KEY, 5):
                pass

        wait_for(registered)
        yield address


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture(scope="module")
def built(model: Path) -> Built:
    return build(icd_tvm.import_onnx(model).mod, icd_tvm.host_target(1))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSES_S", (0.0, 0.0))


def settings(model: Path, tracker: str, key: str = KEY) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "pipeline": {"repeats": 30, "warmup_iter": 1},
        "transform": {"sparsity": "unit:0.5; min-size=0"},
        "measure": {"rpc": tracker, "rpc_key": key, "peer": "onnxruntime"},
        "cache": {"enabled": False},
        "threads": 1,
    }


@needs_server
def test_a_run_is_timed_on_the_device(model: Path, tracker: str, tmp_path: Path) -> None:
    keys = settings(model, tracker)
    found = icd_tvm.run(keys, out=tmp_path, progress=Progress(quiet=True))
    record = found.metrics
    assert record["flags"] == []
    assert set(record["arms"]) == {"dense", "identity", "random", "linear", "iterative"}
    assert {arm["lat_ms"]["n"] for arm in record["arms"].values()} == {30}
    device = record["device"]
    assert (device["tracker"], device["key"]) == (tracker, KEY)
    assert device["address"].startswith("127.0.0.1:")
    assert device["cpu"] in device["target"]
    assert record["peers"] is None
    assert "another device" in record["not_measured"]["peers"]
    validate_metrics(record)
    kept = read_measured(found.paths["measured.npz"])[0]
    assert kept is not None
    assert kept.device == device


@needs_server
def test_compile_over_rpc(model: Path, tracker: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--threads", "1", "--repeats", "30", "--quiet", "--rpc", tracker, "--rpc-key", KEY]
    assert main(["compile", str(model), "--sparsity", "unit:0.5; min-size=0", *flags]) == 0
    assert f"timed on {KEY} at 127.0.0.1:" in capsys.readouterr().out


@needs_server
def test_outputs_and_times_of_one_arm(built: Built, tracker: str, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((4, D)).astype(np.float32)
    built.export(str(tmp_path / "arm.so"))
    with rpc.lent_device(tracker, KEY) as device:
        arm = rpc.load_arm(device, tmp_path / "arm.so", [x])
        samples = rpc.interleave_remotely({"a": arm, "b": arm}, repeats=5, warmup=1)
    np.testing.assert_array_equal(arm.outputs[0], built.run_all({"x": x})[0])
    assert {name: values.shape for name, values in samples.items()} == {"a": (5,), "b": (5,)}
    assert min(values.min() for values in samples.values()) > 0


def test_rounds_are_balanced_and_warm_up_is_thrown_away() -> None:
    calls: list[str] = []

    def arm(name: str) -> rpc.RemoteArm:
        def seconds() -> float:
            calls.append(name)
            return float(len(calls))

        return rpc.RemoteArm([], seconds)

    samples = rpc.interleave_remotely({"a": arm("a"), "b": arm("b")}, repeats=4, warmup=2)
    rounds = [calls[i : i + 2] for i in range(4, 12, 2)]
    assert len(calls) == 12
    assert sorted(map(tuple, rounds)) == [("a", "b"), ("a", "b"), ("b", "a"), ("b", "a")]
    for name, values in samples.items():
        assert values.tolist() == [5 + 2 * i + pair.index(name) for i, pair in enumerate(rounds)]


# What can be wrong.


def refused(address: str, key: str = KEY, wait_s: float = 5) -> str:
    with pytest.raises(MeasurementError) as caught, rpc.lent_device(address, key, wait_s):
        pytest.fail("a device was lent")
    return str(caught.value)


def test_no_tracker() -> None:
    text = refused(f"127.0.0.1:{free_port()}")
    assert "no RPC tracker answers" in text
    assert "tvm.exec.rpc_tracker" in text


@pytest.mark.parametrize("address", ["127.0.0.1:99999", f"{'a' * 64}.b:9190"])
def test_an_impossible_address(address: str) -> None:
    assert "no RPC tracker answers" in refused(address)


@contextmanager
def answering(reply: Callable[[socket.socket], None]) -> Iterator[str]:
    """A listener that treats each of two connections with ``reply``."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def loop() -> None:
            for _ in range(2):
                try:
                    line, _ = server.accept()
                    with line:
                        reply(line)
                except OSError:
                    return

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_not_a_tracker() -> None:
    with answering(lambda line: line.sendall(b"HTTP/1.1 400\r\n")) as address:
        assert "is no RPC tracker" in refused(address)


def test_a_silent_listener() -> None:
    with answering(lambda line: time.sleep(1)) as address:
        assert "is no RPC tracker" in refused(address, wait_s=0.2)


class FakeTracker:
    """Speaks the tracker's protocol and lends ``address``; with none, all devices are busy."""

    def __init__(self, address: tuple[str, int] | None) -> None:
        self.address = address

    def __call__(self, line: socket.socket) -> None:
        base = rpc.tvm.rpc.base
        base.recvall(line, 4)
        line.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        base.recvjson(line)
        known = [{"key": f"server:{KEY}", "addr": ["", 0]}]
        base.sendjson(line, [0, {"server_info": known, "queue_info": {}}])
        base.recvjson(line)
        if self.address is None:
            time.sleep(1)
            return
        base.sendjson(line, [0, [*self.address, f"{KEY}:1"]])


def test_all_devices_busy() -> None:
    with answering(FakeTracker(None)) as address:
        assert "was free within 0.3 s" in refused(address, wait_s=0.3)


def test_another_version_of_the_protocol() -> None:
    def older(line: socket.socket) -> None:
        line.recv(64)
        line.sendall(struct.pack("<i", 0xFF27))

    with answering(older) as server:
        host, _, port = server.partition(":")
        with answering(FakeTracker((host, int(port)))) as address:
            text = refused(address)
    assert f"cannot use device '{KEY}' at {server}" in text
    assert f"RPC server of TVM {rpc.tvm.__version__}" in text


def test_a_tracker_that_breaks_off() -> None:
    def brief(line: socket.socket) -> None:
        line.recv(4)
        line.sendall(struct.pack("<i", rpc.tvm.rpc.base.RPC_TRACKER_MAGIC))

    with answering(brief) as address:
        assert "gives no answer" in refused(address)


@needs_server
def test_no_such_key(tracker: str) -> None:
    text = refused(tracker, "h200")
    assert "knows no device with key 'h200'" in text
    assert f"its keys: {KEY}" in text


@needs_server
def test_a_library_the_device_cannot_load(tracker: str, tmp_path: Path) -> None:
    (tmp_path / "bad.so").write_bytes(b"of another machine")
    with (
        rpc.lent_device(tracker, KEY) as device,
        pytest.raises(MeasurementError, match=r"cannot load bad\.so.*must run TVM"),
    ):
        rpc.load_arm(device, tmp_path / "bad.so", [])


def test_another_cpu() -> None:
    device = rpc.Device(None, "t:1", KEY, "h:2", "cortex-a76")
    with pytest.raises(MeasurementError, match="the device 'loopback' is cortex-a76"):
        rpc.check_cpu(device, icd_tvm.host_target(1))
    rpc.check_cpu(device, icd_tvm.parse_target("x86-64-v3", 1))


@needs_server
def test_other_outputs_on_the_device(
    model: Path, built: Built, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = rpc.load_arm

    def wrong(*arguments: Any) -> rpc.RemoteArm:
        arm = honest(*arguments)
        return rpc.RemoteArm([arm.outputs[0] + 1], arm.seconds)

    monkeypatch.setattr(measure_remote, "load_arm", wrong)
    feeds = {"x": np.ones((4, D), np.float32)}
    with pytest.raises(VerificationError, match="arm 'dense' differs by"):
        measure_remote.measure_remotely(
            {"dense": built}, feeds, make_config(settings(model, tracker)), icd_tvm.host_target(1)
        )


def test_a_run_without_its_tracker_accepts_nothing(model: Path, tmp_path: Path) -> None:
    keys = settings(model, f"127.0.0.1:{free_port()}")
    found = icd_tvm.run(keys, out=tmp_path, progress=Progress(quiet=True))
    assert found.failure is None
    assert (found.metrics["arms"], found.metrics["device"]) == ({}, None)
    assert "no RPC tracker answers" in found.metrics["not_measured"]["lat_ms"]
    assert found.metrics["decision"]["accepted"] is not True


@pytest.mark.parametrize(
    "keys",
    [
        {"rpc": "tracker", "rpc_key": "a"},
        {"rpc": "tracker:x", "rpc_key": "a"},
        {"rpc": "a b:9190", "rpc_key": "a"},
        {"rpc": "tracker:9190"},
        {"rpc_key": "a"},
        {"rpc": "tracker:9190", "rpc_key": ""},
    ],
)
def test_refused_keys(keys: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="measure"):
        make_config({"model": {"name": "minilm"}, "measure": keys})


def test_flags_are_overrides(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(f"model: {{path: {model}}}\nmeasure: {{peer: onnxruntime}}\n")
    flags = ["-c", str(config), "--rpc", "[::1]:9190", "--rpc-key", "h200"]
    keys = config_from(parser().parse_args(flags)).measure
    assert (keys.rpc, keys.rpc_key, keys.peer) == ("[::1]:9190", "h200", ["onnxruntime"])
