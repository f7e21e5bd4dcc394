"""Describe axis groups for people: text, JSON and Graphviz dot."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from icd_tvm.relax_passes.axis_collect import tensor_bytes
from icd_tvm.relax_passes.axis_groups import AxisGroup, AxisGroups, Member, OpUse, Pin

_WIDTH = 100
_MOST_MEMBERS = 12
_MOST_PINS = 4


def explain_text(groups: AxisGroups) -> str:
    """Return one paragraph a group, at most 100 columns wide.

    Free groups come first, then whole axes made of several groups, then pinned axes with the
    op and node that pin them.
    """
    counts = (
        f"{len(groups.free)} free axis groups, {len(groups.composites)} composite axes, "
        f"{len(groups.pinned)} pinned groups"
    )
    paragraphs = [counts]
    paragraphs += [_paragraph(group) for group in groups.free]
    paragraphs += [_composite_paragraph(group) for group in groups.composites if group.factors]
    paragraphs += [_paragraph(group) for group in groups.pinned]
    return "\n\n".join(paragraphs) + "\n"


def explain_json(groups: AxisGroups) -> str:
    """Return the same as JSON (`AxisGroups.to_json`)."""
    return json.dumps(groups.to_json(), indent=1)


def explain_dot(groups: AxisGroups) -> str:
    """Return a Graphviz graph: one node a group, one a stored tensor, an edge an axis."""
    lines = ["graph axis_groups {", "  rankdir=LR;", '  node [fontname="monospace"];']
    tensors: dict[str, None] = {}
    for group in (*groups.free, *groups.pinned):
        shape = "ellipse" if group.free else "octagon"
        label = f"{group.id}\\n{group.size} {group.constraint if group.free else 'pinned'}"
        lines.append(f"  {_quoted('group ' + group.id)} [shape={shape}, label={_quoted(label)}];")
        for member in group.members:
            if member.kind == "value":
                continue
            tensors[member.name] = None
            edge = f"{_quoted('group ' + group.id)} -- {_quoted(member.name)}"
            lines.append(f"  {edge} [label={_quoted(f'axis {member.axis}')}];")
    lines += [f"  {_quoted(name)} [shape=box];" for name in tensors]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _paragraph(group: AxisGroup) -> str:
    title = f"{'free' if group.free else 'PINNED'} {group.id}  size {group.size}"
    title += f"  {group.constraint}" if group.free else ""
    title += f"  ({group.role})" if group.role else ""
    lines = [_wrap(f"{title}  {_bytes(group.bytes_touched)}", "")]
    lines += [_item("pinned by", text) for text in _pin_texts(group.pins)]
    stored = [m for m in group.members if m.kind != "value"]
    lines.append(_item("members", _list(map(_member_text, stored or group.members))))
    lines.append(_item("ops", _op_text(group.ops)))
    if group.gathers and len(group.values) > len(group.gathers):
        lines.append(_item("behind a gather", _gather_text(group)))
    lines += [_item("blocks", text) for text in map(_block_text, group.blocks)]
    if group.free and group.counted:
        lines.append(_item("size fixed by", _list(_pin_texts(group.counted))))
    return "\n".join(lines)


def _composite_paragraph(group: AxisGroup) -> str:
    state = "axis" if group.free else "PINNED axis"
    title = f"{state} {group.id}  size {group.size} = {group.structure.text()}  {group.constraint}"
    stored = {m.name: None for m in group.members if m.kind == "const"}
    parts = [_item("made of", ", ".join(group.factors)), _item("of", _list(stored))]
    return "\n".join([_wrap(title, ""), *parts])


def _item(label: str, text: str) -> str:
    return _wrap(f"{label}: {text}", " " * 4)


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _list(texts: Iterable[str]) -> str:
    items = list(texts)
    shown = ", ".join(items[:_MOST_MEMBERS])
    rest = len(items) - _MOST_MEMBERS
    return f"{shown}, and {rest} more" if rest > 0 else shown


def _member_text(member: Member) -> str:
    size = "x".join("?" if extent < 0 else str(extent) for extent in member.shape)
    inner = "" if member.layout.isdigit() else f" as {member.layout.replace(' ', '')}"
    return f"{member.name}[{size}] axis {member.axis}{inner}"


def _gather_text(group: AxisGroup) -> str:
    places = _list(f"{use.var.name} axis {use.axis}" for use in group.gathers)
    count = sum(tensor_bytes(use.var.ty) for use in group.gathers)
    return f"would be free between run-time gathers of {places} ({_bytes(count)} a run)"


def _block_text(block: int) -> str:
    return (
        f"scales are shared by blocks of {block}; moving whole blocks, and indices inside a block, "
        "keeps them so, any other order needs a scale index for every row"
    )


def _op_text(ops: Sequence[OpUse]) -> str:
    names = Counter(use.op.removeprefix("relax.") for use in ops)
    through = ", ".join(f"{name} x{count}" for name, count in names.items())
    if not ops:
        return "none"
    return f"{through} ({ops[0].node} .. {ops[-1].node})"


def _pin_texts(pins: Sequence[Pin]) -> list[str]:
    """Name the op, the node and the reason; equal reasons of many nodes are put together."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for pin in pins:
        nodes.setdefault((pin.op.removeprefix("relax."), pin.reason), []).append(pin.node)
    texts = []
    for (op, reason), names in nodes.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        texts.append(f"{op} {names[0]}{more}: {reason}")
    hidden = len(texts) - _MOST_PINS
    return texts[:_MOST_PINS] + ([f"and {hidden} more reasons"] if hidden > 0 else [])


def _bytes(count: int) -> str:
    if count < 1 << 20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / (1 << 20):.1f} MiB"
