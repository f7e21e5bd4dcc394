"""``icd explain``: print every axis group of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from icd_tvm.arguments import Parser
from icd_tvm.config import ModelKeys, model_source
from icd_tvm.files import write_atomically
from icd_tvm.runtime.options import parse_shape, parse_state

EXAMPLES = """  icd explain model.onnx --shape input_ids=1x128
  icd explain minilm --dot groups.dot
"""


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd explain", description="Print every axis group of a model.", examples=EXAMPLES
    )
    result.add_argument("model", help="ONNX file, or the name of a built-in model")
    result.add_argument("--shape", action="append", default=[], help="name=1x128; may repeat")
    result.add_argument(
        "--opaque-state",
        action="append",
        default=[],
        metavar="INPUT=OUTPUT",
        help="a state that the same module feeds back to itself; may repeat",
    )
    result.add_argument("--dot", type=Path, metavar="FILE", help="write a Graphviz picture")
    result.add_common()
    return result


def run(arguments: argparse.Namespace) -> None:
    """Print the groups, and write the picture."""
    from icd_tvm.models.importer import import_onnx
    from icd_tvm.relax_passes.axis_groups import find_axis_groups
    from icd_tvm.relax_passes.explain import explain_dot, explain_json, explain_text
    from icd_tvm.runtime.stages.load import load_model
    from icd_tvm.runtime.state_names import expand_states

    shapes = dict(parse_shape(text) for text in arguments.shape)
    named = dict(parse_state(text) for text in arguments.opaque_state)
    model = load_model(ModelKeys.model_validate(model_source(arguments.model)))
    imported = import_onnx(model, shapes or None)
    states = expand_states(named, [spec.name for spec in imported.inputs])
    groups = find_axis_groups(imported.mod["main"], opaque_states=states)
    print(explain_json(groups) if arguments.json else explain_text(groups))
    if arguments.dot:
        write_atomically(arguments.dot, lambda path: path.write_text(explain_dot(groups), "utf-8"))
