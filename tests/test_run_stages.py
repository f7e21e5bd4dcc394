"""Parts of a run alone: sources of W, when the order is decided again, events, the cache."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_support import not_to_be_called
from tiny_model import D, F, tiny_onnx

from icd_tvm._tvm import tvm
from icd_tvm.config import Config
from icd_tvm.config_file import make_config
from icd_tvm.core.access_graph import build_w, load_w
from icd_tvm.errors import ConfigError, IcdError, OutputError, PermutationError
from icd_tvm.relax_passes.coaccess_attr import read_accesses
from icd_tvm.runtime import orders
from icd_tvm.runtime.access_graphs import access_graphs
from icd_tvm.runtime.arms import IDENTITY
from icd_tvm.runtime.events import EventLog, read_events
from icd_tvm.runtime.graph_file import save_graphs
from icd_tvm.runtime.job import Job
from icd_tvm.runtime.measured_file import read_measured, save_measured
from icd_tvm.runtime.order_file import AFTER, BEFORE, orders_text, output_widths, read_orders
from icd_tvm.runtime.orders import made_from
from icd_tvm.runtime.prepare import prepare
from icd_tvm.runtime.progress import Progress, Stage, timed
from icd_tvm.runtime.stages.load import load
from icd_tvm.runtime.stages.order import first_order
from icd_tvm.runtime.stages.repermute import second_order
from icd_tvm.runtime.stages.transform import changed_accesses, transform
from icd_tvm.runtime.states import State
from icd_tvm.runtime.trace_file import read_trace
from icd_tvm.runtime.transforms import KINDS, Transform
from icd_tvm.tir_schedules.target import cuda_target, host_target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_onnx(tmp_path_factory.mktemp("model") / "tiny.onnx")


def job_of(model: Path, *overrides: str) -> Job:
    """Return a job at READY."""
    base = {"model": {"path": str(model)}, "threads": 1, "cache": {"enabled": False}}
    config = make_config(base, overrides)
    job = Job(config, *prepare(config), Progress(quiet=True))
    load(job, Stage("READY", 0.0))
    return job


def hidden(job: Job) -> str:
    return next(group.id for group in job.result.groups.free if group.size == F)


# W from a trace.


def _trace(path: Path, axis: str, **arrays: np.ndarray) -> Path:
    np.savez(path, **{f"{axis}/{name}": array for name, array in arrays.items()})
    return path


def _blocks() -> dict[str, np.ndarray]:
    """Each window touches 16 indices that lie 4 apart."""
    windows = np.repeat(np.arange(4), 16)
    return {"windows": windows, "indices": (np.arange(64) * 4 + windows) % F}


def test_trace_decides_the_order(model: Path, tmp_path: Path) -> None:
    axis = hidden(job_of(model))
    path = _trace(tmp_path / "t.npz", axis, **_blocks())
    job = job_of(model, "graph.source=trace", f"graph.trace='{path}'")
    found, _ = orders.decided(job, BEFORE, job.result.imported.mod)
    [decision] = [d for d in found if d.group == axis]
    assert decision.stats["W"] == "trace"
    assert decision.improved
    tiles = decision.perm.reshape(4, 16) % 4
    assert all(len(set(tile)) == 1 for tile in tiles.tolist())


BROKEN: dict[str, Any] = {
    "empty": {},
    "no indices": {"windows": np.arange(3)},
    "no events": {"windows": np.empty(0, int), "indices": np.empty(0, int)},
    "out of range": {"windows": np.zeros(2, int), "indices": np.array([0, F])},
    "fractions": {"windows": np.zeros(2), "indices": np.zeros(2)},
    "objects": {"windows": np.array([{}, {}]), "indices": np.zeros(2, int)},
}


@pytest.mark.parametrize("arrays", BROKEN.values(), ids=BROKEN)
def test_broken_trace(model: Path, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    axis = hidden(job_of(model))
    path = _trace(tmp_path / "t.npz", axis, **arrays)
    keys = ("graph.source=trace", f"graph.trace='{path}'")
    job = job_of(model, *keys)
    assert access_graphs(job, BEFORE, job.result.imported.mod).source == "mock"
    assert "planted" in job.flags[0].reason
    stopping = job_of(model, *keys, "graph.on_broken_trace=stop")
    with pytest.raises(IcdError):
        access_graphs(stopping, BEFORE, stopping.result.imported.mod)


def test_trace_of_another_model_and_noise(model: Path, tmp_path: Path) -> None:
    other = _trace(tmp_path / "other.npz", "elsewhere", **_blocks())
    noise = tmp_path / "noise.npz"
    noise.write_bytes(np.random.default_rng(0).bytes(400))
    for path in (other, noise, tmp_path / "absent.npz"):
        keys = ("graph.source=trace", f"graph.trace='{path}'", "graph.on_broken_trace=stop")
        job = job_of(model, *keys)
        with pytest.raises(ConfigError, match="trace"):
            access_graphs(job, BEFORE, job.result.imported.mod)


def test_planted_graph_orders_every_movable_axis(model: Path) -> None:
    job = job_of(model, "graph.source=mock")
    graphs = access_graphs(job, BEFORE, job.result.imported.mod)
    assert {axis: w.shape for axis, w in (graphs.planted or {}).items()} == {hidden(job): (F, F)}


def test_graph_file_holds_all_axes(tmp_path: Path) -> None:
    graphs = {str(n): build_w("mock", n=n, blocks=2) for n in (16, 32)}
    rows = save_graphs(tmp_path / "W.npz", graphs, "mock", 7)
    whole, about = load_w(tmp_path / "W.npz")
    assert rows == {"16": [0, 16], "32": [16, 48]}
    assert (about["source"], about["seed"]) == ("mock", 7)
    for axis, (start, stop) in rows.items():
        assert (whole[start:stop, start:stop] != graphs[axis]).nnz == 0


def test_trace_of_a_strange_archive(tmp_path: Path) -> None:
    path = _trace(tmp_path / "t.npz", "a", **_blocks())
    data = bytearray(path.read_bytes())
    # The compression method of the first member, in its header and in the directory.
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(mark) + offset] = 97
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="method"):
        read_trace(path, {"a": F})


# When the order is decided again.


def _at_transformed(model: Path, *overrides: str) -> Job:
    job = job_of(model, *overrides)
    first_order(job, Stage("PERMUTED", 0.0))
    transform(job, Stage("TRANSFORMED", 0.0))
    return job


@pytest.mark.parametrize(
    ("sparsity", "policy", "decides"),
    [
        ("unit:0.5; min-size=0", "auto", True),
        ("unit:0.5; min-size=0", "delta", True),
        ("unit:0.5; min-size=0", "never", False),
        # Zeros that no order can exploit: the mask changed, no layout did.
        ("unstructured:0.5; min-size=0", "auto", True),
        ("unstructured:0.5; min-size=0", "delta", False),
        ("unstructured:0.5; min-size=0", "always", True),
        ("none", "delta", True),
    ],
)
def test_repermute_policy(model: Path, sparsity: str, policy: str, decides: bool) -> None:
    job = _at_transformed(
        model,
        f"transform.sparsity={sparsity}",
        f"pipeline.post_transform_repermute={policy}",
        "solver.time_budget_s=1",
    )
    event = Stage("REPERMUTED", 0.0)
    second_order(job, event)
    assert bool(job.result.after) is decides
    assert ("skipped" in event.meta) is not decides
    if policy == "never":
        assert job.perms["after"] is None
    elif not decides:
        assert job.perms["after"] is job.perms["before"]


def test_changed_accesses(model: Path) -> None:
    job = _at_transformed(
        model, "transform.sparsity=unit:0.5; min-size=0", "solver.time_budget_s=1"
    )
    dense, pruned = (job.result.arms[name].mod for name in ("dense", "identity"))
    assert changed_accesses(dense, pruned)
    assert not changed_accesses(dense, job_of(model).result.imported.mod)


def test_a_transform_is_one_entry_of_a_table(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Noted:
        def __init__(self, text: str) -> None:
            self.text, self.meta = text, {"quant": {"spec": text, "delta_layout": False}}

        def __call__(self, mod: Any) -> Any:
            order.append(self.text)
            return mod

    def noted(text: str, config: Config) -> Transform:
        return Transform("quant", text, lambda mod: {}, lambda statistics, seed: Noted(text))

    monkeypatch.setitem(KINDS, "quant", noted)
    job = _at_transformed(
        model,
        "transform.sparsity=unit:0.5; min-size=0",
        "transform.quant=int8",
        "solver.time_budget_s=1",
    )
    assert [item.name for item in job.transforms] == ["sparsity", "quant"]
    assert order == ["int8"]
    meta = job.result.transform
    assert (meta["quant"]["spec"], meta["delta_layout"]) == ("int8", True)


# Orders kept in a file or in the cache.


def _stored(job: Job, tmp_path: Path, **changes: Any) -> Path:
    decisions, _ = orders.decided(job, BEFORE, job.result.imported.mod)
    content = json.loads(orders_text({BEFORE: decisions}, orders.made_from(job)))
    content["orders"][BEFORE][0] |= changes
    path = tmp_path / "perm.json"
    path.write_text(json.dumps(content))
    return path


def _read(job: Job, path: Path) -> Any:
    result = job.result
    return read_orders(path, result.groups, result.widths, job.model_hash)


def test_order_file_round_trips(model: Path, tmp_path: Path) -> None:
    job = job_of(model, "graph.source=mock")
    found, version = _read(job, _stored(job, tmp_path))
    assert len(version) == 64
    assert found[BEFORE][0].improved


@pytest.mark.parametrize(
    "changes",
    [
        {"perm": [0] * F},
        {"perm": list(range(F - 1))},
        {"perm": [[0, 1], [2]]},
        {"perm": "abc"},
        {"perm": None},
        {"group": "elsewhere"},
        {"group": "out:elsewhere"},
        {"stats": {}},
        {"stats": 3},
        {"w_nnz": "many"},
        {"w_nnz": 1e400},
    ],
)
def test_damaged_order_file(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    job = job_of(model, "graph.source=mock")
    with pytest.raises(PermutationError):
        _read(job, _stored(job, tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "[" * 100_000])
def test_unreadable_order_file(model: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "perm.json"
    path.write_text(text)
    with pytest.raises(PermutationError):
        _read(job_of(model), path)
    with pytest.raises(PermutationError):
        _read(job_of(model), tmp_path / "absent.json")


def test_output_orders_have_the_width_of_their_matmul(model: Path) -> None:
    assert output_widths(job_of(model).result.imported.mod["main"]) == {"out:up": F, "out:down": D}


def test_cached_order_needs_no_solver(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("graph.source=mock", "cache.enabled=true", f"cache.dir='{tmp_path}'")
    first, how = orders.decided(job_of(model, *keys), BEFORE, job_of(model).result.imported.mod)
    assert how == "solver"

    def solve(*arguments: Any) -> Any:
        raise AssertionError("solved twice")

    monkeypatch.setattr(orders, "_fit", solve)
    again, how = orders.decided(job_of(model, *keys), BEFORE, job_of(model).result.imported.mod)
    assert how == "cache"
    assert [d.perm.tolist() for d in again] == [d.perm.tolist() for d in first]
    assert again[0].stats["U"] == first[0].stats["U"]
    with pytest.raises(RuntimeError, match="solved twice"):
        other = job_of(model, *keys, "graph.mock.seed=1")
        orders.decided(other, BEFORE, other.result.imported.mod)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (
            "transform.sparsity='vec16:0.5; min-size=5000'",
            "4096 elements are below the least size of 5000",
        ),
        ("transform.quant='int8; min-size=5000'", "4096 elements are below the least size of 5000"),
    ],
)
def test_a_transform_that_changes_nothing_says_why(model: Path, request_: str, why: str) -> None:
    job = job_of(model, request_)
    transform(job, Stage("TRANSFORMED", 0.0))
    [flag] = job.flags
    assert "changed nothing" in flag.reason
    assert why in flag.reason


def test_an_order_is_not_shared_with_a_run_whose_transform_was_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request, but what it made of the model differs."""
    keys = (
        "transform.sparsity='unit:0.5; min-size=0'",
        "graph.source=mock",
        "cache.enabled=true",
        f"cache.dir='{tmp_path}'",
    )

    def source(sparse: bool) -> str:
        job = job_of(model, *keys)
        if not sparse:
            [item] = job.transforms
            job.transforms = [replace(item, make=not_to_be_called)]
        transform(job, Stage("TRANSFORMED", 0.0))
        return orders.decided(job, AFTER, job.result.arms[IDENTITY].mod)[1]

    assert [source(False), source(True), source(True)] == ["solver", "solver", "cache"]


def test_out_of_memory_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def solve(*arguments: Any) -> Any:
        raise MemoryError

    keys = ("graph.source=mock", "cache.enabled=true", f"cache.dir='{tmp_path}'")
    with monkeypatch.context() as patch:
        patch.setattr(orders, "_fit", solve)
        job = job_of(model, *keys)
        assert orders.decided(job, BEFORE, job.result.imported.mod) == ([], "nothing")
    job = job_of(model, *keys)
    assert orders.decided(job, BEFORE, job.result.imported.mod)[1] == "solver"


# Events and samples.


def test_a_clock_that_is_set_back_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1000.0, 0.0, 0.0])
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(clock))
        with timed("x") as stage:
            pass
    assert 0 <= stage.seconds < 5
    assert stage.t_start == pytest.approx(1000, abs=1)


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path).state(State.READY) as event:
        event.meta["n"] = 1
    with path.open("a") as file:
        file.write('{"stage": "W_BUI')
    with pytest.raises(KeyError), EventLog(path).state(State.W_BUILT):
        raise KeyError("x")
    found = read_events(path)
    assert [(e["stage"], e["ok"]) for e in found] == [("READY", True), ("W_BUILT", False)]
    assert found[1]["meta"]["error"] == "KeyError: 'x'"
    assert read_events(tmp_path / "absent") == []


def test_events_that_cannot_be_written_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        EventLog(tmp_path / "absent" / "events.jsonl").append(Stage("READY", 0.0))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None])
def test_damaged_samples(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "measured.npz"
    if content is None:
        np.savez(path, meta=np.array("{}"))
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="remove it"):
        read_measured(path)


def test_nothing_measured_round_trips(tmp_path: Path) -> None:
    save_measured(tmp_path / "m.npz", None, {"n": 1}, ["why"])
    assert read_measured(tmp_path / "m.npz") == (None, {"n": 1}, ["why"])


def test_accesses_follow_the_transform(model: Path) -> None:
    job = _at_transformed(
        model, "transform.sparsity=unit:0.5; min-size=0", "solver.time_budget_s=1"
    )
    before = access_graphs(job, BEFORE, job.result.imported.mod)
    after = access_graphs(job, "after", job.result.arms["identity"].mod)
    axis = hidden(job)
    touched = [int(read_accesses(g.mod)[axis][0].degrees().max()) for g in (before, after)]
    assert touched == [F, F // 2]
    assert isinstance(before.mod, tvm.IRModule)


@pytest.mark.parametrize(
    ("target", "device"), [("cuda:sm_90:float16", True), ("cuda:sm_90", False), ("host", False)]
)
def test_orders_are_for_the_kernels_of_the_device(model: Path, target: str, device: bool) -> None:
    job = job_of(model)
    job.config = job.config.model_copy(update={"target": target})
    wanted = cuda_target("sm_90") if device else job.target
    assert str(job.order_target) == made_from(job)["target"] == str(wanted)
    found = read_accesses(access_graphs(job, BEFORE, job.result.imported.mod).mod)[hidden(job)]
    # What makes the axis, and what reads it.
    assert len(found) == 1 + device
    assert str(job.target) == str(host_target(1))
