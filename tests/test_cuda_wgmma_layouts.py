"""What the emulator of warpgroup products reads: layouts of shared memory, and descriptors."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest
from cuda_cases import needs_compiler
from cuda_emulation import HERE

from icd_tvm.tir_schedules.cuda.source_kernel import source_of

# One product of 64 x 128 x 16 on an image of shared memory, by descriptors.
SNIPPET = """
#include "{emulator}"
{common}
struct Job {{
  const unsigned char* image;
  int bytes, trans_a, trans_b;
  unsigned long long a, b;
  float* d;
}};
static void one(void* p) {{
  Job& job = *(Job*)p;
  // Address 2048 of the window.
  if (threadIdx.x == 0) memcpy(emu::shared_begin + 2048 - emu::SHARED_BASE, job.image, job.bytes);
  icd::sync_block();
  float c[16][4] = {{}};
  icd::wgmma_fence();
  emu::start<icd::F16>(&c[0][0], job.a, job.b, 128, job.trans_a, job.trans_b);
  icd::wgmma_commit();
  icd::wgmma_wait<0>();
  memcpy(job.d + threadIdx.x * 64, c, sizeof c);
}}
extern "C" long run(Job* job, unsigned char* shared, int bytes) {{
  const int grid[3] = {{1, 1, 1}};
  return emulate(one, job, grid, 128, shared, bytes, 2);
}}
"""


class Job(ctypes.Structure):
    """What `SNIPPET` takes."""

    _fields_ = (
        ("image", ctypes.c_void_p),
        ("bytes", ctypes.c_int),
        ("trans_a", ctypes.c_int),
        ("trans_b", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("d", ctypes.c_void_p),
    )


@pytest.fixture(scope="module")
def snippet(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("snippet")
    text = SNIPPET.format(emulator=HERE / "cuda_emulator.h", common=source_of("common"))
    (folder / "one.cpp").write_text(text)
    flags = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
    out = folder / "one.so"
    subprocess.run(["g++", *flags, "-o", str(out), str(folder / "one.cpp")], check=True)
    library = ctypes.CDLL(str(out))
    library.run.restype = ctypes.c_long
    library.emulator_failure.restype = ctypes.c_char_p
    return library


def lines_of(matrix: np.ndarray) -> np.ndarray:
    """Return lines of 128 bytes [..., 8, 64] with their chunks of 16 swapped by line."""
    chunks = matrix.reshape(*matrix.shape[:-1], 8, 8)
    line = np.arange(8)[:, None]
    return np.asarray(chunks[..., line, line ^ np.arange(8), :].reshape(matrix.shape))


def k_major(matrix: np.ndarray) -> np.ndarray:
    """Return [rows, 64 of K] as patterns of 8 rows."""
    return lines_of(matrix.reshape(-1, 8, 64)).reshape(-1)


def mn_major(matrix: np.ndarray) -> np.ndarray:
    """Return [rows, 16 of K] as patterns of 64 rows and 8 of K, those of the same rows together."""
    patterns = matrix.reshape(-1, 64, 2, 8).transpose(0, 2, 3, 1)
    return lines_of(np.asarray(patterns, order="C")).reshape(-1)


def descriptor(address: int, leading: int, stride: int) -> int:
    return address >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 62


def sums(library: ctypes.CDLL, image: np.ndarray, **given: int) -> np.ndarray:
    """Return D [64, 128] of the snippet, put in order from the threads' registers."""
    found, shared = np.zeros((4, 8, 4, 16, 2, 2), np.float32), np.zeros(40960, np.uint8)
    job = Job(image=image.ctypes.data, bytes=image.nbytes, d=found.ctypes.data, **given)
    address = shared.ctypes.data + -shared.ctypes.data % 64
    status = library.run(ctypes.byref(job), ctypes.c_void_p(address), 40000)
    assert status == 0, library.emulator_failure().decode()
    # Warp, row of 8, pair of columns, 8 columns, row 8 below, neighbour.
    return found.transpose(0, 4, 1, 3, 2, 5).reshape(64, 128)


@needs_compiler
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_both_major_layouts_are_those_of_the_isa(
    trans_a: int, trans_b: int, snippet: ctypes.CDLL
) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, (rows, 64)).astype(np.float16) for rows in (64, 128))
    # K from 16 on: 32 bytes into the lines where they hold K.
    parts = [
        mn_major(x[:, 16:32]) if trans else k_major(x) for x, trans in ((a, trans_a), (b, trans_b))
    ]
    image = np.concatenate(parts)
    starts = (2048 + 32 * (not trans_a), 2048 + parts[0].nbytes + 32 * (not trans_b))
    one, other = (descriptor(start, 2048, 1024) for start in starts)
    found = sums(snippet, image, a=one, b=other, trans_a=trans_a, trans_b=trans_b)
    expected = a[:, 16:32].astype(float) @ b[:, 16:32].astype(float).T
    np.testing.assert_array_equal(found, expected)


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "why"),
    [(1 << 49, "base offset"), (1 << 46, "reserved"), (1 << 63, "swizzle"), (3 << 60, "reserved")],
)
def test_a_descriptor_that_is_not_modelled_is_refused(
    changed: int, why: str, snippet: ctypes.CDLL
) -> None:
    good = descriptor(2048, 16, 1024)
    image = np.zeros(24576, np.uint8)
    assert (sums(snippet, image, a=good, b=good) == 0).all()
    with pytest.raises(AssertionError, match=why):
        sums(snippet, image, a=good, b=good ^ changed)
