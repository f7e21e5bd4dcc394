"""``icd schema``: every configuration key, as JSON Schema or as a table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from icd_tvm.arguments import Parser
from icd_tvm.config import Config


def parser() -> Parser:
    """Return the argument parser of the command."""
    result = Parser(
        prog="icd schema",
        description="Print every configuration key.",
        examples="  icd schema > icd.schema.json\n  icd schema --markdown\n",
    )
    result.add_argument("--markdown", action="store_true", help="a table instead of JSON Schema")
    result.add_common("the default")
    return result


def run(arguments: argparse.Namespace) -> None:
    """Print the schema."""
    print(markdown() if arguments.markdown else json.dumps(Config.model_json_schema(), indent=1))


def markdown() -> str:
    """Return the keys as a Markdown table: key, values, default, meaning."""
    schema = Config.model_json_schema()
    lines = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for key, item in _leaves(schema, schema):
        default = json.dumps(item["default"], ensure_ascii=False) if "default" in item else ""
        meaning = item.get("description", "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_values(item)} | `{default}` | {meaning} |")
    return "\n".join(lines)


def _leaves(node: Any, root: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in node["properties"].items():
        if "$ref" in item:
            inner = root["$defs"][item["$ref"].rpartition("/")[2]]
            yield from _leaves(inner, root, f"{prefix}{name}.")
        else:
            yield prefix + name, item


def _values(item: Any) -> str:
    """Return the type of a key and its range as a short text."""
    if "anyOf" in item:
        return " or ".join(_values(option) for option in item["anyOf"])
    if "enum" in item:
        return ", ".join(f"`{value}`" for value in item["enum"])
    if "const" in item:
        return f"`{item['const']}`"
    kind = {"string": "text", "array": "list", "object": "map", "boolean": "true, false"}
    text = kind.get(item["type"], item["type"])
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
    return " ".join([text, *(f"{sign} {item[key]:g}" for key, sign in bounds if key in item)])
