"""Compile kernels as C++ against the emulator, and run them on numpy arrays."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from icd_tvm.tir_schedules.cuda.source_kernel import SourceKernel, numpy_dtype, whole_text

HERE = Path(__file__).resolve().parent
GUARD = 256
ENTRY = """
static void {name}_thread(void* p) {{
  void** v = (void**)p;
  {name}_body({arguments}, emu::shared_begin);
}}
extern "C" const int {name}_count = {count};
extern "C" long {name}(void** v, const int* grid, int threads, unsigned char* shared, int bytes,
                       int order) {{
  return emulate({name}_thread, v, grid, threads, shared, bytes, order);
}}
"""


class Emulated:
    """Kernels that run on the CPU; every array lies between guards."""

    def __init__(self, kernels: Sequence[SourceKernel], folder: Path) -> None:
        unique = list({kernel.name: kernel for kernel in kernels}.values())
        entries = [
            ENTRY.format(
                name=k.name,
                count=len(k.arguments),
                arguments=", ".join(f"v[{i}]" for i in range(len(k.arguments))),
            )
            for k in unique
        ]
        source = folder / "kernels.cpp"
        text = [f'#include "{HERE / "cuda_emulator.h"}"', whole_text(unique, wrap=False), *entries]
        source.write_text("\n".join(text))
        library = folder / "kernels.so"
        flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing"]
        subprocess.run(["g++", *flags, "-o", str(library), str(source)], check=True)
        self.path = library
        self._library = ctypes.CDLL(str(library))

    def run(
        self, kernel: SourceKernel, inputs: Mapping[str, np.ndarray], order: int = 0
    ) -> dict[str, np.ndarray]:
        """Return the outputs; asserts that nothing else was written and no bank conflict met."""
        buffers, views = [], {}
        for argument in kernel.arguments:
            dtype = numpy_dtype(argument.dtype)
            count = int(np.prod(argument.shape)) * dtype.itemsize
            raw = np.full(count + 2 * GUARD + 64, 0xFF, np.uint8)
            start = GUARD + (-(raw.ctypes.data + GUARD)) % 64
            view = raw[start : start + count].view(dtype).reshape(argument.shape)
            if argument.name in inputs:
                given = inputs[argument.name]
                assert given.shape == argument.shape, argument
                assert given.dtype == dtype, argument
                view[...] = given
            buffers.append((raw, start, count))
            views[argument.name] = view
        outputs = [a.name for a in kernel.arguments[-kernel.outputs :]]
        assert set(views) - set(outputs) == set(inputs)
        self.launch(kernel, [view.ctypes.data for view in views.values()], order)
        for bytes_, start, count in buffers:
            assert (bytes_[:start] == 0xFF).all(), "written before an array"
            assert (bytes_[start + count :] == 0xFF).all(), "written behind an array"
        for name, array in inputs.items():
            assert views[name].tobytes() == np.asarray(array, order="C").tobytes(), name
        return {name: views[name].copy() for name in outputs}

    def launch(self, kernel: SourceKernel, pointers: Sequence[int], order: int = 0) -> None:
        """Run a kernel on memory; asserts that it ended well, without a bank conflict."""
        addresses = (ctypes.c_void_p * len(pointers))(*pointers)
        raw = np.zeros(kernel.shared + 64, np.uint8)
        shared = ctypes.c_void_p(raw.ctypes.data + -raw.ctypes.data % 64)
        grid = (ctypes.c_int * 3)(*kernel.grid)
        function = getattr(self._library, kernel.name)
        function.restype = ctypes.c_long
        conflicts = function(addresses, grid, kernel.threads, shared, kernel.shared, order)
        self._library.emulator_failure.restype = ctypes.c_char_p
        assert conflicts >= 0, self._library.emulator_failure().decode()
        assert conflicts == 0, f"{conflicts} bank conflicts"
