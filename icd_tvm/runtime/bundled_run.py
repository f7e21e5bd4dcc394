"""Run the model: python run.py [INPUTS.npz [OUTPUTS.npz]]; without a file, on made-up inputs."""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

CUDART = "libcudart.so.13"


def find_device(kind: str | None, folder: Path) -> Any:
    """Return the device that a library is for; TVM's runtime loads its CUDA part only when told."""
    if kind != "cuda":
        return tvm.cpu()
    runtime = Path(tvm.base._LOADED_LIBS["tvm_runtime"]._name).resolve()
    try:
        beside = folder / CUDART
        ctypes.CDLL(str(beside) if beside.exists() else CUDART, ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(runtime.with_name("libtvm_runtime_cuda.so")))
    except OSError as error:
        raise RuntimeError(f"this model needs an NVIDIA driver and {CUDART}: {error}") from error
    if not tvm.cuda(0).exist:
        raise RuntimeError("this model needs an NVIDIA GPU, and none is found")
    return tvm.cuda(0)


def typed(array: Any, dtype: str) -> Any:
    """Return an input with its dtype; a numpy file keeps bytes of bfloat16, but not what they are.

    Arrays of any other dtype stay as they are.
    """
    own = np.dtype(dtype)
    return array.view(own) if array.dtype == np.dtype(f"V{own.itemsize}") else array


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    about = json.loads((here / "model.json").read_text())
    device = find_device(about.get("device"), here)
    machine = VirtualMachine(tvm.runtime.load_module(str(here / "module.so")), device)
    rng = np.random.default_rng(0)
    # Integers may be indices: 0 is inside every table.
    feeds = (
        dict(np.load(sys.argv[1]))
        if len(sys.argv) > 1
        else {i["name"]: rng.random(i["shape"]).astype(i["dtype"]) for i in about["inputs"]}
    )
    inputs = [
        np.asarray(typed(feeds[i["name"]], i["dtype"]), i["dtype"], order="C")
        for i in about["inputs"]
    ]
    found = machine["main"](*(tvm.runtime.tensor(array, device) for array in inputs))
    tensors = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
    outputs = {o["name"]: t.numpy() for o, t in zip(about["outputs"], tensors, strict=True)}
    for name, array in outputs.items():
        print(name, array.dtype, array.shape)
    if len(sys.argv) > 2:
        np.savez(sys.argv[2], **outputs)
