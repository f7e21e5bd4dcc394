"""Worker process of a peer runtime: loads a model, then times it on request.

Started by :mod:`icd_tvm.measure.peers` with the arguments ``BACKEND MODEL FEEDS OUTPUTS THREADS``.
It reads one command a line from its standard input (``run N`` or ``quit``) and answers with one
JSON object a line. Between commands it is blocked on the pipe. It ends when the pipe closes, so it
cannot outlive its parent. The source runs under any Python 3.10+ that has numpy and the runtime,
so it imports nothing of this package.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

Feeds = Mapping[str, npt.NDArray[Any]]
Outputs = dict[str, npt.NDArray[Any]]
# Runs the model once on the fixed feeds and returns host arrays.
Step = Callable[[], Outputs]
Backend = Callable[[Path, Feeds, int], tuple[Step, dict[str, str]]]


def onnxruntime_backend(model: Path, feeds: Feeds, threads: int) -> tuple[Step, dict[str, str]]:
    """Load a model in ONNX Runtime: CPU, default graph optimisations, default spinning."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    inputs = dict(feeds)

    def step() -> Outputs:
        return dict(zip(names, session.run(None, inputs), strict=True))

    return step, {"runtime": "onnxruntime", "version": onnxruntime.__version__}


def onnxruntime_int8(model: Path, feeds: Feeds, threads: int) -> tuple[Step, dict[str, str]]:
    """Quantise dynamically with ONNX Runtime's own tool (u8 activations, s8 per channel), load."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="icd-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(str(model), str(path), per_channel=True, weight_type=QuantType.QInt8)
        step, info = onnxruntime_backend(path, feeds, threads)
    return step, {**info, "precision": "int8, dynamic"}


def openvino_backend(
    model: Path, feeds: Feeds, threads: int, precision: str = "f32", quantise: bool = False
) -> tuple[Step, dict[str, str]]:
    """Load a model in OpenVINO: latency hint, one stream, static shapes of the feeds."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(str(model))
    graph.reshape({name: list(array.shape) for name, array in feeds.items()})
    info = {"runtime": "openvino", "version": openvino.__version__, "precision": precision}
    inputs = dict(feeds)
    if quantise:
        import nncf

        # Speed does not depend on the scales: one sample, the run's own inputs, calibrates them.
        data = nncf.Dataset([inputs])
        kind = nncf.ModelType.TRANSFORMER
        graph = nncf.quantize(graph, data, model_type=kind, subset_size=1)
        info |= {"precision": "int8, static", "nncf": nncf.__version__}
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(graph, "CPU", settings).create_infer_request()

    def step() -> Outputs:
        found = request.infer(inputs, share_inputs=True, share_outputs=True)
        return {port.any_name: array for port, array in found.items()}

    return step, info


def torch_backend(
    model: Path, feeds: Feeds, threads: int, precision: str = "f32"
) -> tuple[Step, dict[str, str]]:
    """Run the graph in PyTorch (through onnx2torch), eagerly, on the CPU."""
    import onnx
    import onnx2torch
    import torch

    torch.set_num_threads(threads)
    proto = onnx.load(str(model))
    module = onnx2torch.convert(proto).eval()
    names = [value.name for value in proto.graph.output]
    held = {value.name for value in proto.graph.initializer}
    order = [value.name for value in proto.graph.input if value.name not in held]
    inputs = [torch.from_numpy(feeds[name]) for name in order]

    def step() -> Outputs:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            found = module(*inputs)
        tensors = [found] if isinstance(found, torch.Tensor) else found
        return {n: t.float().numpy() for n, t in zip(names, tensors, strict=True)}

    return step, {"runtime": "torch", "version": torch.__version__, "precision": precision}


def deepsparse_backend(model: Path, feeds: Feeds, threads: int) -> tuple[Step, dict[str, str]]:
    """Load a model in DeepSparse; its last release wants IR version 9 and opset 17 at most."""
    import deepsparse

    engine = deepsparse.Engine(str(model), batch_size=None, num_cores=threads)
    inputs = [np.ascontiguousarray(feeds[name]) for name in engine.input_names]

    def step() -> Outputs:
        return dict(zip(engine.output_names, engine.run(inputs, val_inp=False), strict=True))

    return step, {"runtime": "deepsparse", "version": str(deepsparse.__version__)}


BACKENDS: dict[str, Backend] = {
    "onnxruntime": onnxruntime_backend,
    "onnxruntime-int8": onnxruntime_int8,
    "openvino": openvino_backend,
    "openvino-bf16": partial(openvino_backend, precision="bf16"),
    "openvino-int8": partial(openvino_backend, quantise=True),
    "torch": torch_backend,
    "torch-bf16": partial(torch_backend, precision="bf16"),
    "deepsparse": deepsparse_backend,
}


#: Names of the runtimes that can run beside our arms.
PEERS = tuple(BACKENDS)


def time_steps(step: Step, count: int) -> list[int]:
    """Return the nanoseconds of ``count`` runs, with the garbage collector off."""
    gc.collect()
    gc.disable()
    try:
        taken = []
        for _ in range(count):
            start = time.perf_counter_ns()
            result = step()
            taken.append(time.perf_counter_ns() - start)
            del result
        return taken
    finally:
        gc.enable()


def serve(arguments: list[str], commands: TextIO, answers: TextIO) -> int:
    """Load the model, then answer commands until ``quit`` or the end of the input.

    Parameters
    ----------
    arguments : list of str
        Backend name, model file, feeds (.npz), outputs to write (.npz), thread count.
    commands, answers : text streams
    """
    backend, model, feeds_file, outputs_file, threads = arguments
    try:
        with np.load(feeds_file) as archive:
            feeds = {name: archive[name] for name in archive.files}
        step, info = BACKENDS[backend](Path(model), feeds, int(threads))
        start = time.perf_counter_ns()
        outputs = step()
        first = time.perf_counter_ns() - start
        # Positional keys: an ONNX name may hold characters that a zip entry may not.
        arrays: dict[str, Any] = {str(i): value for i, value in enumerate(outputs.values())}
        np.savez(outputs_file, **arrays)
        _answer(answers, {"first_ns": first, "outputs": list(outputs), "info": info})
        for line in commands:
            words = line.split()
            if words == ["quit"]:
                break
            _answer(answers, {"ns": time_steps(step, int(words[1]))})
    except Exception as error:  # Reported to the parent, which raises its own error.
        text = " ".join(str(error).split())
        _answer(answers, {"error": f"{type(error).__name__}: {text}"})
        return 1
    return 0


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def main() -> int:
    """Keep the answer pipe private: whatever a library prints goes to standard error."""
    private = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(private, "w") as answers:
        return serve(sys.argv[1:], sys.stdin, answers)


if __name__ == "__main__":
    sys.exit(main())
