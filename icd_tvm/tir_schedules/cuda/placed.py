"""Kernels for arrays as a module holds them: parts of others, model shapes, states in place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from icd_tvm.tir_schedules.cuda.source_kernel import WIDTHS, Argument, SourceKernel

_BYTES = {**WIDTHS, "int32": 4.0, "int64": 8.0, "uint8": 1.0, "uint32": 4.0}


def placed(
    kernel: SourceKernel,
    shapes: Mapping[str, tuple[int, ...]],
    offsets: Mapping[str, int],
) -> SourceKernel:
    """Return the kernel for arrays of other shapes, some of them read from an element on.

    Parameters
    ----------
    kernel : SourceKernel
    shapes : mapping of str to tuple of int
        Argument -> the shape of the whole array that is passed; kernels see memory only.
    offsets : mapping of str to int
        Argument -> element of that array where the kernel's own begins.
    """
    call, arguments = kernel.call, []
    for argument in kernel.arguments:
        start = int(offsets.get(argument.name, 0) * _BYTES[argument.dtype])
        if start:
            part = f"(const void*)((const char*){argument.name} + {start})"
            call = _renamed(call, argument.name, part)
        arguments.append(replace(argument, shape=shapes.get(argument.name, argument.shape)))
    return replace(kernel, call=call, arguments=tuple(arguments))


def in_place(kernel: SourceKernel, states: Mapping[str, str]) -> SourceKernel:
    """Return the kernel that writes new states where it read the old ones.

    Parameters
    ----------
    kernel : SourceKernel
        Each thread reads what it writes before it writes it.
    states : mapping of str to str
        Output -> input; the outputs leave the arguments. One that is an input already stays.
    """
    call, kept = kernel.call, list[Argument]()
    for argument in kernel.arguments:
        if states.get(argument.name, argument.name) != argument.name:
            call = _renamed(call, argument.name, states[argument.name])
        else:
            kept.append(argument)
    outputs = kernel.outputs - (len(kernel.arguments) - len(kept))
    return replace(kernel, call=call, arguments=tuple(kept), outputs=outputs)


def _renamed(call: str, name: str, new: str) -> str:
    # Names of arguments are no names of functions or types.
    return re.sub(rf"(?<![\w:]){name}\b(?!\()", new, call)
