"""The ncu command line, its parser on whole and damaged output, and its failures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icd_tvm.errors import ConfigError, MeasurementError
from icd_tvm.measure import ncu

HEADER = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
HEADER += ["Block Size", "Grid Size", "Device", "CC"]
READ = "lts__t_sectors_srcunit_tex_op_read"
NAMES = [f"{READ}.sum", f"{READ}_lookup_hit.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"]
NAMES += ["gpu__time_duration.sum"]


def quoted(cells: list[str]) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


def page(*kernels: tuple[str, list[str]]) -> str:
    lines = ["==PROF== Connected to process 7", quoted([*HEADER, *NAMES])]
    lines.append(quoted([""] * len(HEADER) + ["sector", "sector", "byte", "Kbyte", "nsecond"]))
    for k, (name, values) in enumerate(kernels):
        fixed = [
            str(k),
            "7",
            "python3",
            "host",
            name,
            "1",
            "7",
            "(32, 1, 1)",
            "(8, 1, 1)",
            "0",
            "9.0",
        ]
        lines.append(quoted([*fixed, *values]))
    return "\n".join([*lines, "==PROF== Disconnected", ""])


PAGE = page(
    ("fused_dense_matmul_kernel(float*, float*)", ["1,000", "900", "32000", "1", "2000"]),
    ("void cutlass::gemv_kernel_2(int)", ["3000", "300", "64000", "2", "3000"]),
)


def test_raw_page_becomes_kernels_in_base_units() -> None:
    first, second = ncu.parse(PAGE)
    assert first.values[f"{READ}.sum"] == 1000
    assert first.values["dram__bytes_write.sum"] == 1000
    assert first.values["gpu__time_duration.sum"] == pytest.approx(2e-6)
    assert first.prim_func == "fused_dense_matmul"
    assert second.values[NAMES[0]] == 3000


def test_rates_are_ratios_of_sums_and_missing_counters_stay_missing() -> None:
    summary = ncu.summarise(ncu.parse(PAGE))
    assert summary.l2_read_hit_pct == pytest.approx(100 * 1200 / 4000)
    assert summary.dram_bytes == 32000 + 64000 + 3000
    assert summary.l2_hit_pct is None
    partly = ncu.parse(page(("a", ["n/a", "1", "1", "1", "1"]), ("b", ["4", "1", "1", "1", "1"])))
    assert ncu.summarise(partly).l2_read_hit_pct is None


def test_kernels_are_attributed_to_operators() -> None:
    kernels = ncu.parse(PAGE)
    found = ncu.attribute(kernels, {"fused_dense_matmul": ["layer0/MatMul", "layer1/MatMul"]})
    assert {owner: len(members) for owner, members in found.items()} == {
        "layer0/MatMul": 1,
        "layer1/MatMul": 1,
        "": 1,
    }
    assert ncu.as_json(kernels)["summary"]["kernels"] == 2


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(PAGE)), st.integers(0, 40), st.text(max_size=6))
def test_damaged_pages_are_refused_or_keep_their_numbers(cut: int, gap: int, noise: str) -> None:
    text = PAGE[:cut] + noise + PAGE[cut + gap :]
    try:
        kernels = ncu.parse(text)
    except MeasurementError as error:
        assert str(error).startswith("ncu: ")  # noqa: PT017
        return
    widths = {len(kernel.values) for kernel in kernels}
    assert len(widths) <= 1


@pytest.mark.parametrize("text", ["", "hello", quoted(HEADER), quoted(["ID", "x"]) + '\n"",""'])
def test_output_without_a_page_is_refused(text: str) -> None:
    with pytest.raises(MeasurementError, match="ncu"):
        ncu.parse(text)


def test_torn_row_is_refused() -> None:
    with pytest.raises(MeasurementError, match="cells"):
        ncu.parse(PAGE + '"3","7"\n')


def test_command_line() -> None:
    line = ncu.command(
        ["python3", "run.py"], kernel="gemv", launch_skip=5, launch_count=3, cache_control="all",
        replay="kernel", nvtx="timed/", from_start=False, metrics=["dram__bytes_read.sum"],
    )  # fmt: skip
    assert line[:3] == ["ncu", "--metrics", "dram__bytes_read.sum"]
    assert line[-2:] == ["python3", "run.py"]
    for pair in (
        ("--print-units", "base"), ("--clock-control", "none"), ("--cache-control", "all"),
        ("--replay-mode", "kernel"), ("--kernel-name", "regex:gemv"), ("--launch-skip", "5"),
        ("--launch-count", "3"), ("--nvtx-include", "timed/"), ("--profile-from-start", "off"),
    ):  # fmt: skip
        assert line[line.index(pair[0]) + 1] == pair[1]


def test_metrics_resolve_alias_and_capability() -> None:
    chosen, notes = ncu.resolve_metrics(["l2_tex__t_sector_hit_rate.pct"], (9, 0))
    assert chosen[0] == "lts__t_sector_hit_rate.pct"
    assert "exists on no GPU" in notes[0]
    assert set(ncu.FABRIC_METRICS) <= set(chosen)
    assert len(chosen) == len(set(chosen))
    assert not set(ncu.FABRIC_METRICS) & set(ncu.resolve_metrics([], (8, 0))[0])
    with pytest.raises(ConfigError, match="no metric name"):
        ncu.resolve_metrics(["dram; rm -rf"])


def fake_ncu(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, version: str) -> None:
    script = folder / "ncu"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo "Version {version}"; exit 0; fi\n{body}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_profile_runs_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page").write_text(PAGE)
    fake_ncu(tmp_path, monkeypatch, f"cat {tmp_path / 'page'}", "2024.1.1.0")
    assert len(ncu.profile(ncu.command(["true"]))) == 2


@pytest.mark.parametrize(
    ("body", "version", "match"),
    [
        ("echo '==ERROR== ERR_NVGPUCTRPERM - no permission'; exit 1", "2024.1", "run as root"),
        ("echo '==WARNING== No kernels were profiled.'", "2024.1", "no kernel matched"),
        ("echo '==ERROR== Failed to connect'; exit 9", "2024.1", "Failed to connect"),
        ("exit 3", "2024.1", "status 3"),
        ("sleep 5", "2024.1", "longer than"),
        ("true", "2019.5", "too old"),
        ("true", "x", "understood"),
    ],
)
def test_failures_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, version: str, match: str
) -> None:
    fake_ncu(tmp_path, monkeypatch, body, version)
    with pytest.raises(MeasurementError, match=match):
        ncu.profile(ncu.command(["true"]), timeout_s=1)


def test_missing_ncu_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MeasurementError, match="not installed"):
        ncu.profile(ncu.command(["true"]))
