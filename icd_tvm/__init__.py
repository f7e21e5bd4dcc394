"""Re-decide the memory layout of a compressed model after every compression step.

The public API lives here and nowhere else; everything below is importable by its own path.
Names are loaded on first use, so that ``TVM_NUM_THREADS`` may be set after ``import icd_tvm``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icd_tvm.adapters.quant import parse_quant
    from icd_tvm.adapters.sparsity import parse_sparsity
    from icd_tvm.compile import compile
    from icd_tvm.config import Config
    from icd_tvm.core.access_graph import build_w
    from icd_tvm.core.communities import cluster_graph
    from icd_tvm.core.solver import fit_permutation
    from icd_tvm.models.importer import import_onnx
    from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
    from icd_tvm.relax_passes.apply_quant import ApplyQuant
    from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
    from icd_tvm.relax_passes.lower_cpu import build_cpu, cpu_pipeline
    from icd_tvm.relax_passes.repermute_pass import RepermutePass
    from icd_tvm.runtime.compile_model import compile_model
    from icd_tvm.runtime.correlations import collect_activations, collect_correlations
    from icd_tvm.runtime.loaded import LoadedModel, load
    from icd_tvm.runtime.options import CompileOptions
    from icd_tvm.runtime.run import RunArtifacts, run
    from icd_tvm.tir_schedules.target import host_target, parse_target

__version__ = "0.1.0"

_HOMES = {
    "ApplyKVCompress": "icd_tvm.relax_passes.apply_kv_compress",
    "ApplyQuant": "icd_tvm.relax_passes.apply_quant",
    "ApplySparsity": "icd_tvm.relax_passes.apply_sparsity",
    "CompileOptions": "icd_tvm.runtime.options",
    "Config": "icd_tvm.config",
    "LoadedModel": "icd_tvm.runtime.loaded",
    "RunArtifacts": "icd_tvm.runtime.run",
    "RepermutePass": "icd_tvm.relax_passes.repermute_pass",
    "build_cpu": "icd_tvm.relax_passes.lower_cpu",
    "build_w": "icd_tvm.core.access_graph",
    "cluster_graph": "icd_tvm.core.communities",
    "collect_activations": "icd_tvm.runtime.correlations",
    "collect_correlations": "icd_tvm.runtime.correlations",
    "compile_model": "icd_tvm.runtime.compile_model",
    "cpu_pipeline": "icd_tvm.relax_passes.lower_cpu",
    "fit_permutation": "icd_tvm.core.solver",
    "host_target": "icd_tvm.tir_schedules.target",
    "import_onnx": "icd_tvm.models.importer",
    "load": "icd_tvm.runtime.loaded",
    "parse_quant": "icd_tvm.adapters.quant",
    "parse_sparsity": "icd_tvm.adapters.sparsity",
    "parse_target": "icd_tvm.tir_schedules.target",
    "run": "icd_tvm.runtime.run",
}

__all__ = [
    "ApplyKVCompress",
    "ApplyQuant",
    "ApplySparsity",
    "CompileOptions",
    "Config",
    "LoadedModel",
    "RepermutePass",
    "RunArtifacts",
    "build_cpu",
    "build_w",
    "cluster_graph",
    "collect_activations",
    "collect_correlations",
    "compile",
    "compile_model",
    "cpu_pipeline",
    "fit_permutation",
    "host_target",
    "import_onnx",
    "load",
    "parse_quant",
    "parse_sparsity",
    "parse_target",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "compile":
        # The module, which can be called: importing it puts it in this place for good.
        return import_module("icd_tvm.compile")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
