"""All CUDA kernels on a GPU host in one call of at most eight minutes.

    python benchmarks/gpu_suite.py --build gpu-kernels        # anywhere nvcc is; then take it along
    python benchmarks/gpu_suite.py --kernels gpu-kernels      # on the GPU host

Needs numpy and ml_dtypes, neither TVM nor the toolkit. Each part has a share of the time, so that a
short slot still gives whole results: correctness against float64, times by CUDA events around
graphs of launches (`icd_tvm.measure.cuda_timing` says what cold and warm are), energy of windows by
NVML, counters by ncu where that is permitted, cuBLAS by torch where it is installed. Without a GPU
it comes to its end too, and says "not measured" everywhere.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.cuda_driver import CudaDevice
from icd_tvm.measure.cuda_reference import make_trial
from icd_tvm.measure.cuda_roofline import predict
from icd_tvm.measure.cuda_timing import (
    CHOSEN,
    MAX_SETS,
    PARTS,
    REPEATS,
    Buffers,
    Clock,
    check_values,
    copy_rate,
    count_joules,
    measure_times,
    sets_of,
)
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS
from icd_tvm.tir_schedules.cuda.catalogue import Entry, catalogue
from icd_tvm.tir_schedules.cuda.source_kernel import SourceKernel, whole_text

LIMIT_S = 480.0


def peers(clock: Clock) -> dict[str, Any]:
    """Time cuBLAS and fused attention through torch, with buffers in turn as ours."""
    try:
        import torch
    except ImportError as error:
        raise MeasurementError("torch is not installed") from error
    if not torch.cuda.is_available():
        raise MeasurementError("torch finds no GPU")
    found: dict[str, Any] = {"torch": torch.__version__}
    shapes = {f"bert ffn1 {m} rows fp16": (m, 3072, 768) for m in (128, 1024, 4096, 16384)}
    shapes |= {"mamba in_proj fp16": (1, 10240, 2560), "mamba out_proj fp16": (1, 2560, 5120)}
    for name, (m, n, k) in shapes.items():
        if clock.over("peers"):
            found[name] = "not measured: no time is left"
            continue
        sets = int(np.clip(200e6 // (2 * (m * k + n * k + m * n)) + 1, 2, MAX_SETS))
        make = [torch.randn(size, dtype=torch.half, device="cuda") for size in ((m, k), (n, k))]
        pairs = [[tensor.clone() for tensor in make] for _ in range(sets)]
        found[name] = _torch_us(torch, pairs, torch.nn.functional.linear)
    return found


def _torch_us(torch: Any, sets: list[Any], function: Callable[..., Any]) -> dict[str, float]:
    for arguments in sets:
        function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            function(*arguments)
    times = []
    for _ in range(REPEATS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e3 / len(sets))
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"us": middle, "q25": low, "q75": high}


def counters(arguments: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Profile the chosen arms with ncu, in a process of its own, cold and as they follow."""
    from icd_tvm.measure import ncu

    if arguments.kernels is None:
        raise MeasurementError("ncu starts the program often: give --kernels")
    found: dict[str, Any] = {}
    for name in CHOSEN:
        for control, replay in (("all", "kernel"), ("none", "application")):
            left = clock.limit_s - clock.spent()
            if clock.over("counters") or left < 10:
                found[f"{name} ({control})"] = "not measured: no time is left"
                continue
            program = [sys.executable, __file__, "--kernels", str(arguments.kernels)]
            line = ncu.command(
                [*program, "--child", name],
                kernel="icd_",
                launch_skip=5,
                launch_count=3,
                cache_control=control,  # type: ignore[arg-type]
                replay=replay,  # type: ignore[arg-type]
            )
            found[f"{name} ({control})"] = ncu.as_json(ncu.profile(line, timeout_s=left))
    return found


def child(device: CudaDevice, entries: Iterable[Entry], name: str) -> None:
    """Start one rule ten times, with buffers in turn: what ncu looks at."""
    entry = next(entry for entry in entries if entry.name == name)
    sets = sets_of(device, entry, 10)
    buffers = Buffers(device, entry, make_trial(entry.rule, rows=1).inputs, sets)
    for index in range(10):
        buffers.call(index)
    device.wait()


def build(folder: Path) -> None:
    """Write the machine code of every kernel of the catalogue, for every architecture."""
    from icd_tvm.measure.cuda_toolkit import find_nvcc

    folder.mkdir(parents=True, exist_ok=True)
    for arch in CUDA_ARCHS:
        source = folder / f"{arch}.cu"
        source.write_text(whole_text(kernels_of(catalogue(arch))), "utf-8")
        command = [find_nvcc(), "-O3", "-std=c++17", "-w", f"-arch={arch}", "-cubin"]
        subprocess.run([*command, "-o", str(folder / f"{arch}.cubin"), str(source)], check=True)


def kernels_of(entries: Iterable[Entry]) -> list[SourceKernel]:
    return [kernel for entry in entries for kernel in entry.rule.kernels]


def open_device(folder: Path | None) -> tuple[CudaDevice, list[Entry]]:
    """Return the device with all kernels loaded, and their catalogue."""
    device = CudaDevice()
    if device.arch not in CUDA_ARCHS:
        raise MeasurementError(f"kernels are made for {', '.join(CUDA_ARCHS)}, not {device.arch}")
    entries = catalogue(device.arch)
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            build(folder := Path(temporary))
        file = folder / f"{device.arch}.cubin"
        if not file.exists():
            raise MeasurementError(f"{file} is not there; make it with --build where nvcc is")
        device.load(file.read_bytes(), kernels_of(entries))
    return device, entries


def run_suite(
    opened: Callable[[], tuple[CudaDevice, list[Entry]]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return the record of all parts; one that fails says why, and the next one follows."""
    clock = Clock(arguments.limit)
    record: dict[str, Any] = {
        "schema": "icd/gpu-suite/v1",
        "device": None,
        "limit_s": clock.limit_s,
    }
    try:
        device, entries = opened()
    except (IcdError, OSError, subprocess.CalledProcessError) as error:
        reason = f"not measured: {error}"
        return record | dict.fromkeys(("copy_rate", *PARTS), reason) | {"predicted": _predicted()}
    record["device"] = {
        "name": device.name,
        "arch": device.arch,
        "l2_bytes": device.l2_bytes,
        "multiprocessors": device.multiprocessors,
    }
    parts: dict[str, Callable[[], Any]] = {
        "copy_rate": lambda: copy_rate(device),
        "correctness": lambda: check_values(device, entries, clock),
        "times": lambda: measure_times(device, entries, clock),
        "energy": lambda: count_joules(device, entries, clock),
        "peers": lambda: peers(clock),
        "counters": lambda: counters(arguments, clock),
    }
    for name, part in parts.items():
        try:
            record[name] = part()
        except Exception as error:
            record[name] = f"not measured: {type(error).__name__}: {error}"
        print(f"{name}: {clock.spent():.0f} s", file=sys.stderr)
    return record | {"predicted": _predicted(device.arch), "seconds": clock.spent()}


def _predicted(arch: str = "sm_90") -> dict[str, Any]:
    return {"arch": arch} | {
        item.name: {"us": item.microseconds, "bound": item.bound, "bytes": item.mbytes * 1e6}
        for item in predict(catalogue(arch), arch)
    }


def table(record: Mapping[str, Any]) -> str:
    """Return the record as Markdown."""
    device = record["device"]
    head = f"{device['name']}, {device['arch']}" if device else "no GPU: nothing was run"
    rate = record["copy_rate"]
    copied = rate if isinstance(rate, str) else f"{rate / 1e12:.2f} TB/s"
    lines = [f"# {head}", "", f"Copy on the device: {copied}.", ""]
    lines.append("| kernel | error / allowed | cold us | warm us | predicted bound us | torch us |")
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, bound in record["predicted"].items():
        if name != "arch":
            cells = [
                _cell(record["correctness"], name, "error_of_allowed", ".2f"),
                _cell(record["times"], name, "cold", ".2f"),
                _cell(record["times"], name, "warm", ".2f"),
                f"{bound['us']:.2f}",
                _cell(record["peers"], name, "us", ".2f"),
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for part in ("energy", "counters"):
        value = record[part]
        lines += ["", f"{part}: {value}" if isinstance(value, str) else f"{part}: in the record"]
    return "\n".join(lines) + "\n"


def _cell(part: Any, name: str, key: str, style: str) -> str:
    found = part if isinstance(part, str) else part.get(name, "-")
    if isinstance(found, str):
        return "not measured" if found.startswith("not measured") else found
    value = found[key]["us"] if isinstance(found[key], dict) else found[key]
    return format(value, style)


def main() -> int:
    """Run the suite, and write its record and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--build", type=Path, metavar="DIR", help="write the machine code, run none"
    )
    parser.add_argument(
        "--kernels", type=Path, metavar="DIR", help="take the machine code from here"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for results")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for everything")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.build)
        return 0
    if arguments.child:
        child(*open_device(arguments.kernels), arguments.child)
        return 0
    record = run_suite(lambda: open_device(arguments.kernels), arguments)
    device = record["device"]["name"] if record["device"] else "no-gpu"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    stem = arguments.out / f"{device.lower().replace(' ', '-')}-{date}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    stem.with_suffix(".md").write_text(table(record))
    print(table(record))
    checked = record["correctness"]
    wrong = (
        []
        if isinstance(checked, str)
        else [
            name for name, item in checked.items() if isinstance(item, dict) and not item["correct"]
        ]
    )
    print(f"wrong: {', '.join(wrong)}" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
