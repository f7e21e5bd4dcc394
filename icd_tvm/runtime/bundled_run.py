"""Run the model: python run.py [INPUTS.npz [OUTPUTS.npz]]; without a file, on made-up inputs."""

import json
import sys
from pathlib import Path

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    about = json.loads((here / "model.json").read_text())
    machine = VirtualMachine(tvm.runtime.load_module(str(here / "module.so")), tvm.cpu())
    rng = np.random.default_rng(0)
    # Integers may be indices: 0 is inside every table.
    feeds = (
        dict(np.load(sys.argv[1]))
        if len(sys.argv) > 1
        else {i["name"]: rng.random(i["shape"]).astype(i["dtype"]) for i in about["inputs"]}
    )
    inputs = [np.asarray(feeds[i["name"]], i["dtype"], order="C") for i in about["inputs"]]
    found = machine["main"](*map(tvm.runtime.tensor, inputs))
    tensors = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
    outputs = {o["name"]: t.numpy() for o, t in zip(about["outputs"], tensors, strict=True)}
    for name, array in outputs.items():
        print(name, array.dtype, array.shape)
    if len(sys.argv) > 2:
        np.savez(sys.argv[2], **outputs)
