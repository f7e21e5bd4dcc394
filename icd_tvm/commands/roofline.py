"""``icd roofline``: the least time each CUDA kernel can take, predicted from counts."""

from __future__ import annotations

import argparse
import json

from icd_tvm.arguments import Parser
from icd_tvm.tir_schedules.cuda.archs import CUDA_ARCHS


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd roofline",
        description="Print the predicted time of each CUDA kernel at the shapes of BERT-base and "
        "Mamba-2.8B: counted operations and bytes over data sheet rates. Nothing is measured.",
        examples="  icd roofline\n  icd roofline --arch sm_80 --json\n",
    )
    arches = "A100, H200, or what an H200 has in sm_90a alone: warpgroup products"
    result.add_argument("--arch", choices=tuple(CUDA_ARCHS), default="sm_90", help=arches)
    result.add_common()
    return result


def run(arguments: argparse.Namespace) -> None:
    """Predict and print."""
    from icd_tvm.measure.cuda_roofline import DEVICES, predict
    from icd_tvm.tir_schedules.cuda.catalogue import catalogue

    device, found = DEVICES[arguments.arch], predict(catalogue(arguments.arch), arguments.arch)
    if arguments.json:
        rows = [vars(item) for item in found]
        print(json.dumps({"label": "predicted", "device": vars(device), "kernels": rows}, indent=1))
        return
    print("predicted, not measured: the larger of operations / peak and bytes / bandwidth of the")
    print(f"{device.name} ({device.source})")
    print(f"{'kernel':44s} {'Gop':>9s} {'MB':>9s} {'us':>8s}  bound by    launches  / dense")
    for item in found:
        against = "" if item.against_dense is None else f"{item.against_dense:.2f}"
        print(
            f"{item.name:44s} {item.gflop:9.3f} {item.mbytes:9.2f} {item.microseconds:8.2f}  "
            f"{item.bound:10s}  {item.launches:8d}  {against:>7s}"
        )
