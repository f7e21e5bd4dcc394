"""The free axis groups of real models, each proved by permuting all of them at once.

Every free group of a model gets a random permutation, all together; the outputs must stay the
same to rounding. Weights of the light convnets are all equal in the file, which would hide a wrong
permutation, so they are replaced by random ones first.

Run: python benchmarks/axis_groups.py [NAME | FILE.onnx[:INPUT=SHAPE] ...]
     python benchmarks/axis_groups.py --parameters mamba-2.8b-step --folder runs/parameters
The second form imports with the weights as parameters (11 GB on disk), in a process of its own, and
prints the peak resident memory of import and analysis beside the size of the weights.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from icd_tvm._tvm import const_name, named_const, relax, tvm
from icd_tvm.models.importer import ImportedModel, import_onnx
from icd_tvm.models.inputs import random_inputs
from icd_tvm.models.registry import MODELS, build
from icd_tvm.relax_passes.axis_groups import AxisGroups, find_axis_groups
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.relax_passes.permute_constants import permute_groups, rewrite_constants
from icd_tvm.relax_passes.verify_layout import difference
from icd_tvm.runtime.options import parse_shape
from icd_tvm.tir_schedules.target import host_target

LIGHT = ("resnet50", "densenet121", "shufflenet", "squeezenet", "inception_v1", "inception_v2")
LARGE = ("bert-large", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b")


def light_path(name: str) -> Path:
    return Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{name}.onnx"


def without_softmax(path: Path) -> onnx.ModelProto:
    """Load a classifier up to its logits: a saturated softmax would hide a wrong permutation."""
    model = onnx.load(path)
    last = model.graph.node[-1]
    if last.op_type == "Softmax":
        model.graph.output[0].name = last.input[0]
        del model.graph.node[-1]
        model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def randomised(mod: Any) -> Any:
    """Replace float constants by random ones of a scale that keeps activations finite."""
    rng = np.random.default_rng(0)

    def replace(const: Any, var: Any, path: Any) -> Any:
        array = const.value.numpy()
        if array.dtype != np.float32:
            return const
        if array.ndim > 1:
            scale = 1.4 / np.sqrt(np.prod(array.shape[1:]))
            array = rng.standard_normal(array.shape) * scale
        else:
            array = 1 + 0.2 * rng.random(array.shape)
        return named_const(array.astype(np.float32), const_name(const))

    mod = mod.clone()
    mod["main"] = rewrite_constants(mod["main"], replace)
    return relax.transform.Normalize()(mod)


def models(names: list[str]) -> Iterator[tuple[str, ImportedModel, Any]]:
    """Yield name, imported model and the module to analyse."""
    for name in MODELS:
        if (names and name in names) or (not names and not name.startswith(LARGE)):
            imported = import_onnx(build(name))
            yield name, imported, imported.mod
    for name in names:
        path, _, shape = name.partition(":")
        if path.endswith(".onnx"):
            imported = import_onnx(path, dict([parse_shape(shape)]) if shape else None)
            yield Path(path).stem, imported, imported.mod
    for name in LIGHT:
        if not names or name in names:
            imported = import_onnx(without_softmax(light_path(name)))
            yield name, imported, randomised(imported.mod)


def states(imported: ImportedModel) -> list[tuple[str, str]]:
    """Pair each past_X input with present_X, and X with X_new."""
    outputs = set(imported.outputs)
    pairs = [(s.name, s.name.replace("past", "present", 1)) for s in imported.inputs]
    pairs += [(s.name, f"{s.name}_new") for s in imported.inputs]
    return [(a, b) for a, b in pairs if a != b and b in outputs]


def outputs_of(mod: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    vm = relax.VirtualMachine(build_cpu(mod, host_target(1), tune=False), tvm.cpu())
    result = vm["main"](*(tvm.runtime.tensor(array) for array in feeds.values()))
    tensors = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
    return [tensor.numpy() for tensor in tensors]


def describe(groups: AxisGroups) -> str:
    kinds = Counter(f"{g.role or 'channels'} {g.size}" for g in groups.free)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(6))


def row(name: str, imported: ImportedModel, mod: Any) -> str:
    """Permute every free group of a model and compare the outputs that are no states."""
    start = time.perf_counter()
    groups = find_axis_groups(mod["main"], opaque_states=states(imported))
    seconds = time.perf_counter() - start
    rng = np.random.default_rng(1)
    # State values are opaque: their order is the module's own, so they start at zero.
    own = {pair[0] for pair in states(imported)}
    feeds = {k: np.zeros_like(v) if k in own else v for k, v in random_inputs(imported).items()}
    permuted = permute_groups(mod, groups, {g.id: rng.permutation(g.size) for g in groups.free})
    hidden = {pair[1] for pair in states(imported)}
    visible = [i for i, n in enumerate(imported.outputs) if n not in hidden]
    before, after = outputs_of(mod, feeds), outputs_of(permuted, feeds)
    found = difference([before[i] for i in visible], [after[i] for i in visible])
    return (
        f"| {name} | {len(groups.free)} | {len(groups.pinned)} | {seconds:.2f} "
        f"| {found.max_rel:.1e} | {describe(groups)} |"
    )


def analyse_parameters(path: str) -> None:
    """Print one row: sizes, seconds and peak memory of import and analysis."""
    start = time.perf_counter()
    imported = import_onnx(path, parameters=True)
    read = time.perf_counter()
    groups = find_axis_groups(imported.mod["main"], opaque_states=states(imported))
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    weights = sum(array.nbytes for array in imported.parameters.values()) / 2**20
    print("| model | weights MiB | free groups | import s | analysis s | peak MiB | groups |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {imported.name} | {weights:.0f} | {len(groups.free)} | {read - start:.2f} "
        f"| {done - read:.2f} | {peak:.0f} | {describe(groups)} |"
    )


def with_parameters(name: str, folder: Path) -> None:
    """Write a model with its weights beside it, unless it is there, and analyse it apart."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(build(name, data=folder / f"{name}.bin"), path)
    code = f"import axis_groups; axis_groups.analyse_parameters({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--parameters", metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs/parameters"))
    arguments = parser.parse_args()
    if arguments.parameters:
        with_parameters(arguments.parameters, arguments.folder)
        return
    print("| model | free groups | pinned | analysis s | largest relative difference | groups |")
    print("|---|---|---|---|---|---|")
    for name, imported, mod in models(arguments.names):
        print(row(name, imported, mod), flush=True)


if __name__ == "__main__":
    main()
