"""Worker process of a peer runtime: loads a model, then times it on request.

Started by :mod:`icd_tvm.measure.peers` with the arguments ``BACKEND MODEL FEEDS OUTPUTS THREADS``.
It reads one command a line from its standard input (``run N``, ``evaluate JSON`` or ``quit``) and
answers with one JSON object a line. Between commands it is blocked on the pipe. It ends when the
pipe closes, so it cannot outlive its parent. The source runs under any Python 3.10+ that has numpy
and the runtime, so it imports nothing of this package.
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

# Rows of a weight that share a scale in `onnxruntime_int8_weights`.
BLOCK = 64
Feeds = Mapping[str, npt.NDArray[Any]]
Outputs = dict[str, npt.NDArray[Any]]
# Runs the model once on what the arrays of the feeds hold now, and returns host arrays.
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


def onnxruntime_int8_weights(
    model: Path, feeds: Feeds, threads: int
) -> tuple[Step, dict[str, str]]:
    """Store weights as bytes in blocks (MatMulNBits); its kernel rounds activations by blocks."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="icd-int8-") as folder:
        path = Path(folder) / "int8.onnx"
        # Folds what stands between a constant and its product, such as a transpose.
        quant_pre_process(str(model), str(path), skip_onnx_shape=True, skip_symbolic_shape=True)
        proto = onnx.load(path)
        _weights_by_blocks(proto.graph)
        proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        onnx.save(proto, path)
        step, info = onnxruntime_backend(path, feeds, threads)
    return step, {**info, "precision": f"int8 weights in blocks of {BLOCK}, accuracy level 4"}


def _weights_by_blocks(graph: Any) -> None:
    """Replace products with constant matrices by MatMulNBits, as its documentation has it."""
    from onnx import helper, numpy_helper

    constants = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        found = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if found is None or len(found.dims) != 2:
            continue
        weight = numpy_helper.to_array(found).T
        parts = dict(zip(("codes", "scales"), _by_blocks(weight), strict=True))
        names = [f"{node.output[0]}.{part}" for part in parts]
        graph.initializer.extend(map(numpy_helper.from_array, parts.values(), names))
        sizes = {"N": weight.shape[0], "K": weight.shape[1], "block_size": BLOCK, "bits": 8}
        inputs, domain = [node.input[0], *names], "com.microsoft"
        node.CopyFrom(
            helper.make_node(
                "MatMulNBits", inputs, node.output, domain=domain, accuracy_level=4, **sizes
            )
        )
    used = {name for node in graph.node for name in node.input}
    kept = [constant for constant in graph.initializer if constant.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _by_blocks(weight: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Return codes [N, blocks, BLOCK], 128 for zero, and the scales of all blocks."""
    n, k = weight.shape
    blocks = np.pad(weight, ((0, 0), (0, -k % BLOCK))).reshape(n, -1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True) / 127, 1e-30)
    codes = (np.rint(blocks / scale) + 128).astype(np.uint8)
    return codes, scale.astype(np.float32).reshape(-1)


def openvino_backend(
    model: Path, feeds: Feeds, threads: int, precision: str = "f32", quantise: str = ""
) -> tuple[Step, dict[str, str]]:
    """Load a model in OpenVINO: latency hint, one stream, static shapes of the feeds."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(str(model))
    graph.reshape({name: list(array.shape) for name, array in feeds.items()})
    info = {"runtime": "openvino", "version": openvino.__version__, "precision": precision}
    inputs = dict(feeds)
    if quantise == "weights":
        import nncf

        graph = nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
        info |= {"precision": "int8 weights", "nncf": nncf.__version__}
    elif quantise:
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
    if precision == "int8":
        module = _dynamic_int8(module)
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


def _dynamic_int8(module: Any) -> Any:
    """Make products with constants linear layers, which PyTorch quantises dynamically."""
    import torch

    for node in module.graph.nodes:
        if node.op != "call_module" or len(node.args) != 2 or node.args[1].op != "get_attr":
            continue
        holder, _, name = node.args[1].target.rpartition(".")
        weight = getattr(module.get_submodule(holder), name)
        if type(module.get_submodule(node.target)).__name__ == "OnnxMatMul" and weight.ndim == 2:
            layer = torch.nn.Linear(*weight.shape, bias=False)
            layer.weight = torch.nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
            module.set_submodule(node.target, layer)
            node.args = node.args[:1]
    module.recompile()
    return torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, torch.qint8)


def deepsparse_backend(model: Path, feeds: Feeds, threads: int) -> tuple[Step, dict[str, str]]:
    """Load a model in DeepSparse; its last release wants IR version 9 and opset 17 at most."""
    import deepsparse

    engine = deepsparse.Engine(str(model), batch_size=None, num_cores=threads)
    inputs = [np.ascontiguousarray(feeds[name]) for name in engine.input_names]

    def step() -> Outputs:
        return dict(zip(engine.output_names, engine.run(inputs, val_inp=False), strict=True))

    return step, {"runtime": "deepsparse", "version": str(deepsparse.__version__)}


def llamacpp_backend(model: Path, feeds: Feeds, threads: int) -> tuple[Step, dict[str, str]]:
    """Decode one token with llama.cpp after as many others as the cache holds.

    The model is a GGUF file; of the feeds only ``input_ids`` and ``cache_length`` count, and
    ``prompt``, the tokens before (arbitrary ones if absent). The cache is llama.cpp's own, of
    float16.
    """
    import llama_cpp

    room = int(feeds["cache_length"][0]) + 1
    prompt = [int(token) for token in feeds.get("prompt", 1 + np.arange(room) % 1000)]
    llm = llama_cpp.Llama(
        str(model),
        n_ctx=room,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def step() -> Outputs:
        length = int(feeds["cache_length"][0])
        if llm.n_tokens < length:
            llm.eval(prompt[llm.n_tokens : length])
        # Evaluation goes on from here and forgets what was behind.
        llm.n_tokens = length
        llm.eval([int(feeds["input_ids"][0, 0])])
        # Its array of scores is not written unless every token's logits are asked for.
        last = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        logits = np.ctypeslib.as_array(last, (llm.n_vocab(),))
        return {"logits": logits.reshape(1, 1, -1).copy()}

    return step, {"runtime": "llama.cpp", "version": str(llama_cpp.__version__)}


BACKENDS: dict[str, Backend] = {
    "onnxruntime": onnxruntime_backend,
    "onnxruntime-int8": onnxruntime_int8,
    "onnxruntime-int8w": onnxruntime_int8_weights,
    "openvino": openvino_backend,
    "openvino-bf16": partial(openvino_backend, precision="bf16"),
    "openvino-int8": partial(openvino_backend, quantise="all"),
    "openvino-int8w": partial(openvino_backend, quantise="weights"),
    "torch": torch_backend,
    "torch-bf16": partial(torch_backend, precision="bf16"),
    "torch-int8": partial(torch_backend, precision="int8"),
    "deepsparse": deepsparse_backend,
    "llamacpp": llamacpp_backend,
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


def evaluate(step: Step, feeds: Feeds, request: Mapping[str, Any]) -> None:
    """Run once after some inputs were changed, in place, and write some outputs.

    Parameters
    ----------
    step : callable
    feeds : mapping of str to array
    request : mapping
        ``feeds``, ``out``: files (.npz); ``inputs``, ``outputs``: names, in the files' order.
    """
    with np.load(request["feeds"]) as archive:
        for place, name in enumerate(request["inputs"]):
            np.copyto(feeds[name], archive[str(place)])
    found = step()
    arrays: dict[str, Any] = {str(i): found[name] for i, name in enumerate(request["outputs"])}
    np.savez(request["out"], **arrays)


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
            if words[0] == "evaluate":
                evaluate(step, feeds, json.loads(line.partition(" ")[2]))
                _answer(answers, {})
            else:
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
