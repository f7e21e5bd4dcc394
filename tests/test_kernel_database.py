"""The database of kernel times: what counts as the same question, and what damage does."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from icd_tvm import cli
from icd_tvm.errors import OutputError
from icd_tvm.tir_schedules.cpu import kernel_database
from icd_tvm.tir_schedules.cpu.kernel_database import FILE_NAME, KernelDatabase

QUESTION = {"target": "llvm", "shape": [128, 64, 96], "rows": {"dense": 64, "vcol8": 32}}
SECONDS = {"dense": 2e-5, "vcol8": 1.5e-5}


@pytest.fixture
def database(tmp_path: Path) -> KernelDatabase:
    return KernelDatabase(tmp_path / "cache" / FILE_NAME)


def test_times_outlive_the_object_that_kept_them(database: KernelDatabase) -> None:
    assert database.get(QUESTION) is None
    assert database.put(QUESTION, SECONDS) == ""
    assert KernelDatabase(database.path).get(dict(reversed(QUESTION.items()))) == SECONDS


def test_the_newest_times_count(database: KernelDatabase) -> None:
    database.put(QUESTION, SECONDS)
    database.put(QUESTION, {"dense": 1e-5, "vcol8": 3e-5})
    assert database.get(QUESTION) == {"dense": 1e-5, "vcol8": 3e-5}


@pytest.mark.parametrize(
    "other",
    [{"target": "llvm -mcpu=x"}, {"shape": [127, 64, 96]}, {"rows": {"dense": 64, "vcol8": 31}}],
)
def test_another_question_has_no_answer(database: KernelDatabase, other: dict[str, Any]) -> None:
    database.put(QUESTION, SECONDS)
    assert database.get({**QUESTION, **other}) is None


@pytest.mark.parametrize(
    ("name", "value"), [("_machine", {"cpu": "another"}), ("_code", "0"), ("threads", 99)]
)
def test_times_of_another_machine_or_code_do_not_count(
    database: KernelDatabase, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    database.put(QUESTION, SECONDS)
    if name == "threads":
        other = {**kernel_database._circumstances(), "threads": value}
        monkeypatch.setattr(kernel_database, "_circumstances", lambda: other)
    else:
        monkeypatch.setattr(kernel_database, name, lambda: value)
    assert database.get(QUESTION) is None


def record(without: str = "", **changes: Any) -> str:
    circumstances = kernel_database._circumstances()
    fields: dict[str, Any] = {"format": kernel_database.FORMAT, **circumstances, **QUESTION}
    fields |= {"seconds": SECONDS, **changes}
    return json.dumps({name: value for name, value in fields.items() if name != without})


def test_a_whole_record_is_read(database: KernelDatabase) -> None:
    database.path.parent.mkdir()
    database.path.write_text(record())
    assert database.get(QUESTION) == SECONDS
    assert database.damaged == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"format": "icd/kernel-times/v1", "shape": [12',
        "[]",
        "null",
        "\x00\x00",
        record(format="else"),
        record(format=3),
        record(seconds={"dense": 1e-5}),
        record(seconds={"dense": 1e-5, "vcol8": -1.0}),
        record(seconds={"dense": 1e-5, "vcol8": "fast"}),
        record(seconds=[1.0]),
        record(rows=None),
        record(shape=128),
        record(without="shape"),
        record(without="threads"),
        record().replace("2e-05", "Infinity"),
        "[" * 100_000,
    ],
)
def test_a_damaged_line_costs_its_own_times_only(
    database: KernelDatabase, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    database.put(QUESTION, SECONDS)
    # What a killed writer leaves has no end of line.
    with database.path.open("a") as file:
        file.write(line)
    other = {**QUESTION, "shape": [1, 2, 3]}
    database.put(other, SECONDS)
    with caplog.at_level(logging.WARNING, "icd_tvm"):
        assert database.get(QUESTION) == database.get(other) == SECONDS
    assert database.damaged == 1
    assert [str(database.path) in message for message in caplog.messages] == [True]


def test_a_line_of_a_later_format_is_left_alone(database: KernelDatabase) -> None:
    database.put(QUESTION, SECONDS)
    with database.path.open("a") as file:
        file.write('{"format": "icd/kernel-times/v2", "times": 1}\n')
    assert len(database.records()) == 1
    assert database.damaged == 0


def test_a_folder_that_cannot_be_written_costs_the_database_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    database = KernelDatabase(tmp_path / "file" / FILE_NAME)
    assert database.put(QUESTION, SECONDS)
    assert database.get(QUESTION) is None
    with pytest.raises(OutputError, match="file"):
        database.clear()


def _write(path: Path, writer: int) -> None:
    for number in range(50):
        KernelDatabase(path).put({**QUESTION, "shape": [writer, number, 1]}, SECONDS)


def test_writers_at_one_time_lose_nothing(database: KernelDatabase) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(database.path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    shapes = {tuple(r["shape"]) for r in database.records()}
    assert shapes == {(writer, number, 1) for writer in range(4) for number in range(50)}
    assert database.damaged == 0


def test_the_command_line_lists_and_clears(
    database: KernelDatabase, capsys: pytest.CaptureFixture[str]
) -> None:
    database.put(QUESTION, SECONDS)
    folder = str(database.path.parent)
    assert cli.main(["cache", "kernels", "--cache", folder]) == 0
    assert "128x64x96" in capsys.readouterr().out
    assert cli.main(["cache", "kernels", "--cache", folder, "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 1
    assert not database.path.exists()
    assert cli.main(["cache", "kernels", "--cache", folder]) == 0
    assert capsys.readouterr().out.startswith("0 comparisons")
