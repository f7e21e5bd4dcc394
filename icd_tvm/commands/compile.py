"""``icd compile``: compile, re-permute, measure, accept or roll back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from icd_tvm.arguments import Parser, add_device
from icd_tvm.commands.threads import set_threads
from icd_tvm.errors import ConfigError
from icd_tvm.runtime.options import CompileOptions, parse_shape, parse_state

HELP = {
    "model": "ONNX file, or the name of a built-in model (python -m icd_tvm.models --list)",
    "seq": "tokens of a built-in model, or slots of its cache",
    "shape": "size of a symbolic input, name=1x128; repeat for more inputs",
    "sparsity": "none (exploit what the model already has), unit:RATE, vec16:RATE, ...; with "
    "--quality-budget the strongest rate to try",
    "quant": "quantisation of the weights, or none",
    "kv": "what is done to the KV cache of a decoder step, drop=0.3,block=128,dtype=int8 "
    "(or bf16, fp16); needs --opaque-state; or tokens dropped from an encoder, tokens=0.2,layer=1",
    "mode": "iterative re-decides the order after the transform; linear keeps the first one",
    "target": "host, x86-64-v3, x86-64-v4, aarch64, another CPU by LLVM's name, or cuda with "
    "--arch (compiled, not timed)",
    "cuda_graph": "with --target cuda: capture the step as a CUDA graph (default: yes)",
    "precision": "with --target cuda: float16 or bfloat16 products on tensor cores (default: "
    "float32 by TVM's own schedules)",
    "arch": "CUDA architecture: sm_80 (A100), sm_90 (H100, H200) or sm_90a (the same two alone: "
    "warpgroup products where there are many rows, not measured yet)",
    "threads": "worker threads (default: every core)",
    "repeats": "timed calls per arm, at least 30",
    "time_budget": "seconds the solver may spend",
    "seed": "of the inputs, the solver and the random arm",
    "peer": "measure these runtimes beside our arms: onnxruntime, openvino-int8, ... with commas",
    "out": "folder for metrics.json",
    "library": "write the accepted arm's compiled library here",
    "no_measure": "do not time anything; no order is accepted on speed",
    "no_tune": "predict which kernel a matmul should use instead of timing the candidates",
    "explain": "print every axis group and why the other axes are pinned",
    "quality": "evaluate quality: stsb or stsb:PAIRS (MiniLM only, needs the data)",
    "quality_budget": "points the sparsity may cost: search a rate for each layer (MiniLM only, "
    "needs the data)",
    "agreement_floor": "least mean cosine with the dense outputs in that search",
    "opaque_state": "input=output, a state that only this model reads; repeat for more states, or "
    "write 'past_*=present_*'",
}

EXAMPLES = """  icd compile minilm --sparsity unit:0.5 --peer onnxruntime
  icd compile model.onnx --shape input_ids=1x128 --out runs/a -o model.so
  icd compile minilm --sparsity unit:0.5 --target cuda --arch sm_90 -o model.so
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(prog="icd compile", description=__doc__, examples=EXAMPLES)
    add = result.add_argument
    add("model", help=HELP["model"])
    add("--shape", action="append", default=[], help=HELP["shape"])
    add("--seq", type=int, help=HELP["seq"])
    add("--sparsity", default="none", help=HELP["sparsity"])
    add("--quant", default="none", help=HELP["quant"])
    add("--kv", default="none", help=HELP["kv"])
    add("--mode", choices=("iterative", "linear"), default="iterative", help=HELP["mode"])
    add("--target", default="host", help=HELP["target"])
    add("--arch", help=HELP["arch"])
    add("--precision", choices=("float16", "bfloat16"), help=HELP["precision"])
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=HELP["cuda_graph"],
    )
    add("--threads", type=int, help=HELP["threads"])
    add("--repeats", type=int, default=200, help=HELP["repeats"])
    add("--time-budget", type=float, default=30.0, help=HELP["time_budget"])
    add("--seed", type=int, default=0, help=HELP["seed"])
    add("--peer", help=HELP["peer"])
    add_device(result)
    add("--out", type=Path, help=HELP["out"])
    add("-o", "--library", type=Path, help=HELP["library"])
    add("--no-measure", action="store_true", help=HELP["no_measure"])
    add("--no-tune", action="store_true", help=HELP["no_tune"])
    add("--explain", action="store_true", help=HELP["explain"])
    add("--quality", help=HELP["quality"])
    add("--quality-budget", type=float, metavar="POINTS", help=HELP["quality_budget"])
    add("--agreement-floor", type=float, default=0.99, help=HELP["agreement_floor"])
    add("--opaque-state", action="append", default=[], metavar="IN=OUT", help=HELP["opaque_state"])
    result.add_common("print the metrics record instead of a table")
    return result


def options_from(arguments: argparse.Namespace) -> CompileOptions:
    """Turn parsed arguments into checked options."""
    return CompileOptions(
        model=arguments.model,
        shapes=dict(parse_shape(text) for text in arguments.shape),
        seq=arguments.seq,
        sparsity=arguments.sparsity,
        quant=arguments.quant,
        kv=arguments.kv,
        mode=arguments.mode,
        target=_target(arguments),
        threads=arguments.threads,
        repeats=arguments.repeats,
        time_budget_s=arguments.time_budget,
        seed=arguments.seed,
        peer=arguments.peer,
        out=arguments.out,
        library=arguments.library,
        measure=not arguments.no_measure,
        tune=not arguments.no_tune,
        explain=arguments.explain,
        quality=arguments.quality,
        quality_budget=arguments.quality_budget,
        agreement_floor=arguments.agreement_floor,
        rpc=arguments.rpc,
        rpc_key=arguments.rpc_key,
        cuda_graph=arguments.cuda_graph,
        opaque_states=tuple(parse_state(text) for text in arguments.opaque_state),
    )


def _target(arguments: argparse.Namespace) -> str:
    """Return ``cuda:ARCH`` for ``--target cuda --arch ARCH``, else the target as it is."""
    more = [arguments.arch, arguments.precision]
    if arguments.target != "cuda" and any(more):
        raise ConfigError("--arch and --precision are for --target cuda", "leave them out")
    return ":".join([arguments.target, *filter(None, more)])


def run(arguments: argparse.Namespace) -> None:
    """Compile, and print what was measured and decided."""
    options = options_from(arguments)
    set_threads(options.threads)
    from icd_tvm.runtime.compile_model import compile_model, summary
    from icd_tvm.runtime.progress import Progress

    result = compile_model(options, Progress(arguments.quiet or arguments.json))
    print(json.dumps(result.record, default=str) if arguments.json else summary(result.record))
