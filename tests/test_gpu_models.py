"""Whole models of the GPU suite: built, their weights drawn again, run and judged without a GPU."""

from __future__ import annotations

import json
import sys
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_on_cpu import Actual, NoGraphs, OnCpu, machine, opened

from benchmarks.gpu import build_models, gates, lift, model_counters, model_times, peers, wheels
from benchmarks.gpu.arm_modules import MODELS, Arms, Orders
from benchmarks.gpu.cases import ARMS, INDEX, POOL, UNIT, VECTORS, Case
from benchmarks.gpu.machine import ArmRun
from benchmarks.gpu.models import Models
from benchmarks.gpu.recipes import COLUMNS, Draws, Pool, Recipe, as_json, from_json, realise
from benchmarks.gpu.table import table
from icd_tvm._tvm import const_name, named_const
from icd_tvm.errors import ConfigError, MeasurementError
from icd_tvm.measure.cuda_timing import PARTS, Clock
from icd_tvm.measure.energy import EnergyRecord
from icd_tvm.measure.nvml import PowerSample
from icd_tvm.runtime import bundled_run

BERT_UNIT = Case("bert-base test", 2, 16, UNIT)
BERT_VECTORS = Case("bert-base test", 2, 16, VECTORS)
MAMBA = Case("mamba-2.8b test", 1, 1, UNIT)
INT8 = Case("bert-base test", 2, 16, f"{UNIT} + heads", "int8")
REFUSED = Case("bert-base test", 2, 16, f"{UNIT} + words")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    cases = (BERT_UNIT, BERT_VECTORS, MAMBA, INT8, REFUSED)
    build_models.build_models(place, OnCpu("sm_90"), cases, solver_s=2.0)
    return place


def test_arms_of_drawn_weights_are_one_function(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, device = opened(folder), NoGraphs()
    monkeypatch.setattr(model_times, "ROUNDS", 2)
    found = model_times.measure_models(device, models, Clock(480.0))  # type: ignore[arg-type]
    for case in (BERT_UNIT, BERT_VECTORS, MAMBA):
        item = found[case.name]
        assert item["values"]["equal"], item
        assert max(item["values"]["relative_differences"].values()) < 1e-4
        assert set(item["arms"]) == set(ARMS)
        assert item["ratios"]["warm"]["iterative/linear"]["median"] == 1.0
        assert item["arms"]["dense"]["by"] == "stream (no graphs here)"
    sizes = found[BERT_UNIT.name]["parameter_bytes"]
    assert sizes["iterative"] < 0.7 * sizes["linear"] == 0.7 * sizes["dense"]
    assert found[INT8.name]["values"]["equal"], found[INT8.name]
    sizes = found[INT8.name]["parameter_bytes"]
    assert sizes["iterative"] < 0.7 * sizes["linear"]
    assert "no transform" in found[REFUSED.name]
    json.dumps(found)


def test_a_weight_in_another_order_is_noticed(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    parameters = index["cases"][BERT_UNIT.name]["arms"]["iterative"]["parameters"]
    item = next(p for p in parameters if "embedding" in p.get("sources", [{}])[0].get("name", ""))
    with np.load(folder / POOL) as stored:
        pool = Pool(dict(stored))
    source = item["sources"][0]
    source["columns"] = pool.put(np.roll(pool.arrays[source["columns"]], 1))
    pool.save(tmp_path / POOL)
    for library in folder.glob("*.so"):
        (tmp_path / library.name).symlink_to(library)
    (tmp_path / INDEX).write_text(json.dumps(index))
    models = opened(tmp_path)
    values = model_times.compare(models, models.runs(BERT_UNIT.name))
    assert not values["equal"]
    assert values["relative_differences"]["iterative"] > model_times.ALLOWED
    assert values["relative_differences"]["random"] < 1e-4


@pytest.mark.parametrize("case", [BERT_VECTORS, MAMBA, replace(BERT_VECTORS, dtype="int8")])
def test_recipes_make_the_constants_of_cuda_kernels_again(case: Case) -> None:
    arms = Arms(case, Orders(2.0))
    dense = arms.drawn
    packings, names = set[str](), set[str]()
    for name in ("dense", "iterative"):
        mod = arms.make(name)[0]
        lowered = build_models.Device("sm_90").lower(arms.narrowed(mod), case.dtype)
        lifted, constants = lift.lift(lowered, dense)
        assert not lift.big_constants(lifted["main"], dense)
        assert int(lifted["main"].attrs["num_input"]) == len(lowered["main"].params)
        known = lift.Recogniser(mod, partial(arms.codes, name), dense.shapes)
        pool = Pool()
        for const in constants:
            if known.drawn(const):
                names.add(const_name(const))
                recipe = from_json(as_json(known.recipe(const), pool), pool)
                packings.add(recipe.packing)
                np.testing.assert_array_equal(realise(recipe, Actual(dense)), const.value.numpy())
    bert = case is not MAMBA
    expected = {"plain", "gemm", "gemm live"} if bert else {"plain", "transposed"}
    expected |= set(COLUMNS) if case.dtype == "int8" else set()
    assert expected <= packings
    merged = sum("+" in name and not name.endswith((".scale", ".sums")) for name in names)
    assert merged == (MODELS[case.model].layers if bert else 0)


def test_what_is_no_weight_is_refused() -> None:
    arms = Arms(BERT_UNIT, Orders(2.0))
    mod = arms.make("dense")[0]
    known = lift.Recogniser(mod, partial(arms.codes, "dense"), arms.drawn.shapes)
    const = next(iter(lift.matrices(mod).values()))
    changed = named_const(const.value.numpy() + 1, const_name(const))
    with pytest.raises(MeasurementError, match="no weight in a known packing"):
        known.recipe(changed)


def test_joined_weights_are_drawn_one_by_one() -> None:
    arms = Arms(BERT_UNIT, Orders(2.0))
    mod, arrays = arms.make("dense")[0], arms.drawn
    query = next(name for name in arrays if "query" in name)
    names = [query, query.replace("query", "key"), query.replace("query", "value")]
    joined = np.concatenate([arrays[name] for name in names], axis=1).astype(np.float16)
    known = lift.Recogniser(mod, partial(arms.codes, "dense"), arrays.shapes)
    const = named_const(joined, "+".join(names))
    recipe = known.recipe(const)
    assert [source.name for source in recipe.sources] == names
    np.testing.assert_array_equal(realise(recipe, Actual(arrays)), joined)
    assert known.drawn(const)
    assert lift.joined(f"{query}.blocks", arrays) == lift.joined(f"{query}+b", arrays) == ()
    swapped = named_const(joined, "+".join(names[::-1]))
    with pytest.raises(MeasurementError, match="no weight in a known packing"):
        known.recipe(swapped)


def test_dead_rows_and_columns_stay_dead() -> None:
    codes = np.arange(12, dtype=np.uint32).reshape(3, 4) + 0x00800000
    array = codes.view(np.float32).copy()
    array[1], array[:, 2] = 0, 0
    source = lift.source_of("w", array[[2, 1, 0]][:, [3, 2, 0]], 4)
    assert source is not None
    assert source.rows[[0, 2]].tolist() == [2, 0]
    drawn = Actual({"w": np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4)})
    made = realise(Recipe((3, 3), "float32", "plain", (source,)), drawn)
    assert made.tolist() == [[12, 0, 9], [0, 0, 0], [4, 0, 1]]
    torn = codes.view(np.float32)[:2, :2].copy()
    torn[0, 0] = array[2, 3]
    assert lift.source_of("w", torn, 4) is None


def test_draws_follow_seed_and_name() -> None:
    about = {"a": ((200, 50), -3.0, 0.5, -9.0, 3.0), "b": ((200, 50), 0.0, 1.0, -9.0, 9.0)}
    first, again = Draws(about), Draws(about)
    np.testing.assert_array_equal(first.matrix("a"), again.matrix("a"))
    assert abs(first.matrix("a").mean() + 3) < 0.05
    assert abs(first.matrix("a").std() - 0.5) < 0.05
    assert not np.array_equal(first.matrix("b"), Draws(about, seed=1).matrix("b"))
    decay = Draws({"a": ((200, 50), -3.0, 4.0, -9.0, -1.0)}).matrix("a")
    assert (decay.min(), decay.max()) == (-9.0, -1.0)


def test_missing_or_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    for place in (None, tmp_path):
        with pytest.raises(MeasurementError, match="--build"):
            Models(place, "sm_90", machine)
    with pytest.raises(MeasurementError, match="compiled for sm_90, this is sm_80"):
        Models(folder, "sm_80", machine)
    with pytest.raises(MeasurementError, match="no transform"):
        opened(folder).runs(REFUSED.name)


def test_no_gpu_is_a_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(kind: str, place: Path) -> Any:
        assert (kind, place) == ("cuda", folder)
        raise RuntimeError("this model needs an NVIDIA GPU, and none is found")

    monkeypatch.setattr(bundled_run, "find_device", missing)
    with pytest.raises(MeasurementError, match="needs an NVIDIA GPU"):
        Models(folder, "sm_90", machine)
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(MeasurementError, match="TVM's runtime cannot be loaded"):
        Models(folder, "sm_90", machine)


def test_without_time_no_model_is_begun(folder: Path) -> None:
    found = model_times.measure_models(NoGraphs(), opened(folder), Clock(-1.0))  # type: ignore[arg-type]
    found.pop("notes")
    assert set(found.values()) == {"not measured: no time is left"}


class Counter:
    """A stand-in for NVML."""

    source = "test"

    @contextmanager
    def sampling(self) -> Iterator[list[PowerSample]]:
        yield [PowerSample(t, 300.0 + t, 1700, None, 50 + int(t), 4) for t in (0.0, 1.0, 2.0)]


def test_energy_is_counted_for_each_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(calls: dict[str, Any], counter: Counter) -> dict[str, EnergyRecord]:
        for call in calls.values():
            call()
        joules = {"linear": 40.0, "iterative": 20.0}
        return {arm: EnergyRecord(counter.source, joules[arm], None, 300.0, 0.0) for arm in calls}

    monkeypatch.setattr(model_counters, "NvmlDevice", Counter)
    monkeypatch.setattr(model_counters, "measure_energy", quick)
    monkeypatch.setitem(PARTS, "model_energy", 1.0)
    found = model_counters.model_energy(NoGraphs(), opened(folder), Clock(480.0))  # type: ignore[arg-type]
    item = found[BERT_UNIT.name]
    # 20 calls of 1 ms fill the least time; 2 x 16 tokens each.
    assert item["arms"]["linear"]["joules_per_token"] == pytest.approx(40 / 20 / 32)
    assert item["iterative/linear"] == pytest.approx(0.5)
    assert item["conditions"]["sampled_watts"] == pytest.approx(301)
    assert item["conditions"]["celsius"] == [50, 52]
    assert item["conditions"]["throttle_reasons"] == 4
    assert found[REFUSED.name].startswith("not measured")
    short = model_counters.model_energy(NoGraphs(), opened(folder), Clock(1.0))  # type: ignore[arg-type]
    assert set(short.values()) == {model_counters.NO_TIME}


def test_counters_of_both_arms_in_both_cache_modes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[list[str]] = []

    def profile(line: list[str], timeout_s: float) -> list[Any]:
        lines.append(line)
        if line[line.index("--cache-control") + 1] == "all":
            raise MeasurementError("ERR_NVGPUCTRPERM")
        return []

    monkeypatch.setattr(model_counters.ncu, "missing_ncu", lambda: "")
    monkeypatch.setattr(model_counters.ncu, "profile", profile)
    found = model_counters.model_counters(opened(folder), Clock(480.0), "sm_90")
    item = found[BERT_UNIT.name]
    assert set(item) == {f"{a}, {m}" for a in ("linear", "iterative") for m in ("warm", "cold")}
    assert item["linear, cold"] == "not measured: ERR_NVGPUCTRPERM"
    assert item["linear, warm"]["summary"]["l2_read_hit_pct"] is None
    assert all(line[line.index("--clock-control") + 1] == "none" for line in lines)
    assert lines[0][-2:] == ["--child", f"{BERT_UNIT.name}/linear"]
    assert found[REFUSED.name].startswith("not measured")
    monkeypatch.setattr(model_counters.ncu, "missing_ncu", lambda: "ncu is not installed")
    with pytest.raises(MeasurementError, match="not installed"):
        model_counters.model_counters(opened(folder), Clock(480.0), "sm_90")


def test_child_runs_one_arm(folder: Path) -> None:
    models = opened(folder)
    model_counters.model_child(NoGraphs(), models, MAMBA.name, "linear")  # type: ignore[arg-type]


def test_outputs_are_given_back_after_a_call() -> None:
    def main(*_: Any) -> Any:
        return np.ones(3)

    run = ArmRun(main, [[2]], [10])
    output = weakref.ref(run())
    assert output() is None


def test_states_are_fed_back() -> None:
    def main(ids: int, state: int, weight: int) -> list[int]:
        return [state * weight, state + ids]

    run = ArmRun(main, [[2, 5]], [10])
    assert run.steps(3) == [90, 11]

    def in_place(ids: int, state: np.ndarray, weight: int) -> list[Any]:
        found = state * weight
        state += ids
        return [found, state]

    state = np.array([5])
    assert ArmRun(in_place, [[2, state]], [10]).steps(3) == [90, 11]
    assert state == 11
    assert ArmRun(lambda ids, weight: ids * weight, [[2]], [10]).steps(3) == 20


def test_peers_say_why_they_are_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = type("cuda", (), {"is_available": staticmethod(lambda: False)})
    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": cuda}))
    with pytest.raises(MeasurementError, match="torch finds no GPU"):
        peers.products(Clock(480.0))
    torch = type("torch", (), {"__version__": "9"})
    monkeypatch.setattr(peers, "find_torch", lambda: torch)
    monkeypatch.setattr(peers, "_product", lambda torch, m, n, k, sparse: {"us": float(m)})
    found = peers.products(Clock(480.0))
    assert found["bert ffn1 4096 rows fp16"] == {"us": 4096.0}
    assert "bert ffn2 4096 rows fp16, 2:4 cuSPARSELt" in found
    assert set(list(peers.products(Clock(-1.0)).values())[1:]) == {peers.NO_TIME}
    models = peers.model_peers(opened(folder).cases, Clock(480.0))
    eager = models["bert-base test 2x16, torch eager"]
    assert eager.startswith("not measured: AttributeError")
    assert len(models) == 1 + 2 * 2


def record(**parts: Any) -> dict[str, Any]:
    """Return a record in which nothing was measured but ``parts``."""
    empty = dict.fromkeys(("copy_rate", *PARTS), "not measured: no NVIDIA driver")
    predicted = {"arch": "sm_90", "mamba in_proj fp16": {"us": 10.0, "bytes": 52e6}}
    predicted["mamba out_proj fp16"] = {"us": 5.0, "bytes": 26e6}
    return {"device": None, "predicted": predicted, **empty, **parts}


def test_what_was_not_measured_is_never_met() -> None:
    found = gates.evaluate(record())
    assert {gate.verdict for gate in found} == {gates.UNKNOWN}
    assert {gate.reason for gate in found} == {"no NVIDIA driver"}
    partly = gates.evaluate(record(models={"notes": {}}, correctness={"a": "not measured: late"}))
    assert {gate.verdict for gate in partly} == {gates.UNKNOWN}
    assert table(record()).count("| not measured |") >= len(found)


@pytest.mark.parametrize(("good", "verdict"), [(True, gates.MET), (False, gates.MISSED)])
def test_bars(good: bool, verdict: str) -> None:
    m, us = (1024, 4096, 16384), 10.0 if good else 20.0
    both = {"cold": {"us": us}, "warm": {"us": us}}
    times = {f"bert {layer} {rows} rows fp16": both for rows in m for layer in gates.LAYERS}
    shared = {name: {"us": 9.0} for name in times}
    times |= {f"{name}, wgmma": both for name in shared}
    times |= {f"mamba {layer} fp16": both for layer in gates.PROJECTIONS}
    low = {"median": 0.7 if good else 0.76, "lo": 0.69, "hi": 0.71}
    ratio = {"iterative/linear": low, "iterative/best unordered": low}
    arms = {arm: {"by": "graph", "warm": {"ms": 1.0}, "cold": {"ms": 1.0}} for arm in ARMS}
    item = {"values": {"equal": good}, "ratios": {"warm": ratio, "cold": ratio}, "arms": arms}
    cases = [f"{model} x" for model in gates.MODELS]
    joules = {"iterative/linear": 0.8 if good else 0.81}
    joules["arms"] = {arm: {"joules_per_token": 1.0} for arm in ("linear", "iterative")}

    def counted(hits: float) -> dict[str, Any]:
        return {"summary": {"l2_read_hit_pct": hits, "dram_bytes": 5.0}}

    resident = {"linear, warm": counted(40.0), "iterative, warm": counted(50.0 if good else 49.9)}
    whole = record(
        copy_rate=26e6 / 10e-6 / 0.85 if good else 3e12,
        correctness={"a": {"correct": good, "error_of_allowed": 0.5}},
        times=times,
        peers={"torch": "9", **shared},
        models={"notes": {}, **dict.fromkeys(cases, item), f"{cases[0]} y": "not measured: late"},
        model_energy=dict.fromkeys(cases, joules),
        model_counters={gates.RESIDENT.name: resident},
    )
    found = gates.evaluate(whole)
    assert [gate.verdict for gate in found] == [verdict] * len(found)
    assert len(found) == 5 + 2 * 3 + 1
    text = table(whole)
    assert f"{low['median']:.3f} [0.690, 0.710]" in text
    assert "not measured: late" in text
    assert ("| 49.9 |" in text) is not good


def test_the_host_gets_wheels_without_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart = tmp_path / "libcudart.so.13"
    cudart.write_bytes(b"runtime")
    monkeypatch.setattr(wheels, "find_cudart", lambda: cudart)
    source = tmp_path / "wheels"
    source.mkdir()
    (source / "numpy-2.whl").write_bytes(b"n")
    with pytest.raises(ConfigError, match="no wheel of apache-tvm"):
        wheels.add_runtime(tmp_path / "out", source)
    members = ("tvm/base.py", "tvm/lib/libtvm_compiler.so", "tvm/src/a.cc")
    with zipfile.ZipFile(source / "apache_tvm-1.whl", "w") as archive:
        for name in members:
            archive.writestr(name, name)
        archive.writestr("tvm-1.dist-info/RECORD", "".join(f"{name},,\n" for name in members))
    assert wheels.add_runtime(tmp_path / "out", source) == ["apache_tvm-1.whl", "numpy-2.whl"]
    assert (tmp_path / "out" / "libcudart.so.13").read_bytes() == b"runtime"
    with zipfile.ZipFile(tmp_path / "out" / "wheels" / "apache_tvm-1.whl") as archive:
        assert archive.namelist() == ["tvm/base.py", "tvm-1.dist-info/RECORD"]
        assert archive.read("tvm-1.dist-info/RECORD") == b"tvm/base.py,,\n"
