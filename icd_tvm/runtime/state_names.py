"""Opaque states that are named by a pattern: ``past_*=present_*``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from icd_tvm.errors import ConfigError


def expand_states(states: Mapping[str, str], inputs: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return (input, output) of every state; one ``*`` stands for the same text in both names.

    Raises
    ------
    ConfigError
        A pattern that fits no input, or not one ``*`` on each side.
    """
    names = list(inputs)
    return tuple(pair for item in states.items() for pair in _expanded(*item, names))


def _expanded(source: str, target: str, names: list[str]) -> list[tuple[str, str]]:
    if "*" not in source + target:
        return [(source, target)]
    if source.count("*") != 1 or target.count("*") != 1:
        raise ConfigError(f"state {source}={target} has not one * on each side", "past_*=present_*")
    head, _, tail = source.partition("*")
    found = [
        (name, target.replace("*", name[len(head) : len(name) - len(tail)]))
        for name in names
        if len(name) >= len(head) + len(tail) and name.startswith(head) and name.endswith(tail)
    ]
    if not found:
        raise ConfigError(f"state {source!r} fits no input", f"inputs: {', '.join(names[:8])}")
    return found
