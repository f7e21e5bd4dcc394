"""The clock record and the pinned thread."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from icd_tvm.commands.threads import set_threads
from icd_tvm.measure import conditions
from icd_tvm.measure.conditions import clock, pinned

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no sched_setaffinity"
)


def test_clock_and_temperature_of_a_planted_system(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    lines = "".join(f"processor: {i}\ncpu MHz\t\t: {mhz}\n" for i, mhz in enumerate((2500.5, 3000)))
    (tmp_path / "proc/cpuinfo").write_text(lines)
    for zone, text in enumerate(("41000", "57500", "damaged")):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{zone}"
        folder.mkdir(parents=True)
        (folder / "temp").write_text(text)
    assert clock(tmp_path) == {
        "mhz": {"min": 2500.5, "median": 2750.25, "max": 3000.0},
        "celsius": 57.5,
        "reasons": {},
    }


def test_what_the_system_does_not_tell_is_null_with_a_reason(tmp_path: Path) -> None:
    found = clock(tmp_path)
    assert (found["mhz"], found["celsius"]) == (None, None)
    assert set(found["reasons"]) == {"mhz", "celsius"}


@needs_affinity
def test_one_cpu_inside_the_block_and_all_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Workers of a pool that an earlier test started may be bound to every CPU.
    monkeypatch.setattr(conditions, "_bound_elsewhere", list)
    before = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError), pinned() as threads:
        assert threads["pinned"]
        assert os.sched_getaffinity(0) == set(threads["cpus"])
        assert len(threads["cpus"]) == 1
        raise RuntimeError
    assert os.sched_getaffinity(0) == before


@needs_affinity
def test_a_cpu_that_a_worker_is_bound_to_is_left_to_it() -> None:
    usable = sorted(os.sched_getaffinity(0))
    done, ready = threading.Event(), threading.Barrier(2)

    def worker() -> None:
        os.sched_setaffinity(0, {usable[0]})
        ready.wait()
        done.wait()

    thread = threading.Thread(target=worker)
    thread.start()
    ready.wait()
    try:
        with pinned() as threads:
            assert usable[0] in threads["workers"]
            assert usable[0] not in threads["cpus"] or not threads["pinned"]
            assert threads["pinned"] or "worker" in threads["reason"]
    finally:
        done.set()
        thread.join()


@needs_affinity
def test_nothing_is_bound_where_it_was_not_asked_for() -> None:
    before = os.sched_getaffinity(0)
    with pinned(False) as threads:
        assert os.sched_getaffinity(0) == before
    assert (threads["pinned"], threads["cpus"]) == (False, sorted(before))
    assert "pin_threads" in threads["reason"]


@needs_affinity
def test_sizing_the_pool_leaves_the_calling_thread_free() -> None:
    """In a fresh process: a pool keeps the size that it was given first."""
    code = (
        "import os\n"
        "from icd_tvm.config_file import make_config\n"
        "from icd_tvm.runtime.prepare import prepare\n"
        "before = os.sched_getaffinity(0)\n"
        "prepare(make_config({'model': {'name': 'minilm'}, 'threads': 1}))\n"
        "assert os.sched_getaffinity(0) == before, (before, os.sched_getaffinity(0))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "before", "found"), [(3, "5", "3"), (None, "5", "5"), (None, None, "usable")]
)
def test_threads_of_the_pool_are_asked_for_or_inherited_or_all_that_are_usable(
    monkeypatch: pytest.MonkeyPatch, given: int | None, before: str | None, found: str
) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", before or "")
    if before is None:
        monkeypatch.delenv("TVM_NUM_THREADS")
    set_threads(given)
    usable = str(len(os.sched_getaffinity(0)))
    assert os.environ["TVM_NUM_THREADS"] == (usable if found == "usable" else found)
