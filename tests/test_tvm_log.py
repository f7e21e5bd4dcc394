"""What TVM logs for nobody is dropped; everything else on standard error stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from icd_tvm.tvm_log import without_scope_lines


def test_other_lines_stay(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), without_scope_lines():
        os.write(2, b"[12:00:00] executable.cc:276: Warning: Scope Saving:\n")
        os.write(2, b"a linker's warning\n")
        print("from Python", file=sys.stderr)
        os.write(2, b"[12:00:00] executable.cc:340: Warning: Scope Loaded:\nlast")
        raise ValueError
    os.write(2, b" and after\n")
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == ["a linker's warning", "from Python", "last and after"]


def test_without_a_standard_error() -> None:
    code = (
        "import os; os.close(2); from icd_tvm.tvm_log import without_scope_lines as w\n"
        "with w(): print('body')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "body\n"
