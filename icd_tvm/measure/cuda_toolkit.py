"""What a build host without a GPU needs to make CUDA machine code: nvcc, the runtime, a stub.

Imports no TVM: the driver's library must be in the process before TVM is. TVM's CUDA runtime
links against ``libcuda.so.1``, which only a driver brings; without it TVM would embed CUDA source
text and leave compiling to the machine that loads the library.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import site
import subprocess
from pathlib import Path

from icd_tvm.errors import MissingDependencyError
from icd_tvm.files import default_cache, write_atomically

# What libtvm_runtime_cuda.so of TVM 0.27 takes from the driver, none of which is called in a build;
# and cuInit, so that whoever asks for a device is told that there is none.
DRIVER_SYMBOLS = (
    "cuInit",
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
NO_DEVICE = 100
CUDART = "libcudart.so.13"


def find_nvcc() -> str:
    """Return the path of nvcc.

    Raises
    ------
    MissingDependencyError
        If there is none on the path.
    """
    found = shutil.which("nvcc")
    if found is None:
        raise MissingDependencyError(
            "nvcc is not on the path, so no CUDA machine code can be made",
            "install the CUDA 13 toolkit; CUDA source alone is never written",
        )
    return found


def find_cudart() -> Path:
    """Return the path of the CUDA runtime library.

    Raises
    ------
    MissingDependencyError
        If it is neither beside nvcc nor in a Python package.
    """
    folders = [Path("/usr/local/cuda/lib64")]
    if nvcc := shutil.which("nvcc"):
        folders.insert(0, Path(os.path.realpath(nvcc)).parent.parent / "lib64")
    folders += [Path(place) / "nvidia/cu13/lib" for place in site.getsitepackages()]
    for folder in folders:
        if (folder / CUDART).exists():
            return folder / CUDART
    raise MissingDependencyError(f"{CUDART} is not found", "pip install nvidia-cuda-runtime")


def driver_stub(folder: Path | None = None) -> Path:
    """Return a ``libcuda.so.1`` whose functions all say that there is no device.

    Parameters
    ----------
    folder : Path, optional
        Where it is made; in the cache by default. Never put it on the library path of a host that
        has a GPU.

    Raises
    ------
    MissingDependencyError
        If there is no C compiler.
    """
    where = (folder or default_cache() / f"cuda-stub-{len(DRIVER_SYMBOLS)}").absolute()
    library = where / "libcuda.so.1"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingDependencyError("no C compiler makes the driver stub", "install gcc")
    where.mkdir(parents=True, exist_ok=True)
    source = "".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in DRIVER_SYMBOLS)
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o"]
    return write_atomically(
        library,
        lambda path: subprocess.run([*command, str(path)], input=source.encode(), check=True),
    )


def load_driver() -> str:
    """Bring a driver and the CUDA runtime into this process; to be called before ``import tvm``.

    Returns
    -------
    str
        ``driver`` where the machine has one, else ``stub``.
    """
    try:
        ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
        kind = "driver"
    except OSError:
        ctypes.CDLL(str(driver_stub()), ctypes.RTLD_GLOBAL)
        kind = "stub"
    ctypes.CDLL(str(find_cudart()), ctypes.RTLD_GLOBAL)
    return kind
