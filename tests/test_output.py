"""The output folder and atomic files."""

from pathlib import Path

import pytest

from icd_tvm.errors import OutputError
from icd_tvm.files import write_atomically
from icd_tvm.runtime.output import check_writable_file, output_folder


def test_folder_is_removed_when_the_body_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), output_folder(tmp_path / "a" / "b") as out:
        assert out is not None
        (out / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_older_folder_survives_a_failure(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("x")
    with pytest.raises(RuntimeError), output_folder(tmp_path):
        raise RuntimeError
    assert (tmp_path / "keep").exists()


def test_a_file_in_the_way_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"), output_folder(tmp_path / "file" / "a"):
        pass


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text("old")

    def fail(target: Path) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_atomically(path, lambda target: target.write_text("new") and None)
    assert path.read_text() == "new"


@pytest.mark.parametrize("bad", ["missing/lib.so", "."])
def test_library_path_is_checked_early(tmp_path: Path, bad: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        check_writable_file(tmp_path / bad)
