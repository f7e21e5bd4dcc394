"""Worker process of a peer runtime: loads a model, then times it on request.

Started by :mod:`icd_tvm.measure.peers` as ``python -m icd_tvm.measure.peer_worker BACKEND MODEL
FEEDS OUTPUTS THREADS``. It reads one command a line from its standard input (``run N`` or
``quit``) and answers with one JSON object a line. Between commands it is blocked on the pipe. It
ends when the pipe closes, so it cannot outlive its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
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


BACKENDS: dict[str, Backend] = {"onnxruntime": onnxruntime_backend}


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
