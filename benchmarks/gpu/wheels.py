"""What the GPU host installs: wheels, TVM's without the compiler, and the CUDA runtime library."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from icd_tvm.errors import ConfigError
from icd_tvm.measure.cuda_toolkit import find_cudart

# The compiler and what only it reads: 4 of 96 MiB remain.
LEFT_OUT = (
    "tvm/lib/libtvm_compiler.so",
    "tvm/3rdparty/",
    "tvm/src/",
    "tvm/include/",
    "tvm/web/",
)


def add_runtime(folder: Path, wheels: Path | None) -> list[str]:
    """Copy the CUDA runtime library, and all wheels of a folder, into the suite's folder.

    Parameters
    ----------
    folder : Path
        What ``--build`` writes.
    wheels : Path, optional
        From ``pip download``, for the host's Python.

    Returns
    -------
    list of str
        Names of the wheels.

    Raises
    ------
    ConfigError
        If the folder holds no wheel of TVM.
    MissingDependencyError
        If the CUDA runtime library is not found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cudart = find_cudart()
    shutil.copyfile(cudart, folder / cudart.name)
    if wheels is None:
        return []
    found = sorted(wheels.glob("*.whl"))
    if not any(path.name.startswith("apache_tvm-") for path in found):
        hint = "pip download --only-binary=:all: -d FOLDER apache-tvm nvidia-ml-py"
        raise ConfigError(f"{str(wheels)!r} holds no wheel of apache-tvm", hint)
    (folder / "wheels").mkdir(exist_ok=True)
    for path in found:
        target = folder / "wheels" / path.name
        if path.name.startswith("apache_tvm-"):
            trim_wheel(path, target)
        else:
            shutil.copyfile(path, target)
    return [path.name for path in found]


def trim_wheel(source: Path, target: Path) -> None:
    """Write a wheel without the files that only a compiler needs; its RECORD agrees."""
    with (
        zipfile.ZipFile(source) as whole,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as part,
    ):
        for info in whole.infolist():
            if info.filename.startswith(LEFT_OUT):
                continue
            data = whole.read(info)
            if info.filename.endswith(".dist-info/RECORD"):
                rows = data.decode().splitlines(keepends=True)
                data = "".join(row for row in rows if not row.startswith(LEFT_OUT)).encode()
            part.writestr(info, data, zipfile.ZIP_DEFLATED)
