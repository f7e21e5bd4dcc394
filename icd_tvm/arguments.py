"""What every command shares: its argument parser, and how a refusal is shown."""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from icd_tvm.errors import ConfigError, IcdError


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that one place prints errors; has the common flags.

    Parameters
    ----------
    examples : str
        Lines shown below the help, each a command.
    **keywords
        Those of argparse.
    """

    def __init__(self, *, examples: str = "", **keywords: Any) -> None:
        if examples:
            keywords["epilog"] = f"examples:\n{examples}"
            keywords["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**keywords)

    def add_common(self, json_help: str = "print JSON instead of text") -> None:
        """Add ``--json``, ``--quiet`` and ``--debug``."""
        self.add_argument("--json", action="store_true", help=json_help)
        self.add_argument("--quiet", action="store_true", help="show no progress")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_override(self, text: str) -> None:
        """Add ``--override``, which takes any number of ``KEY=VALUE`` any number of times."""
        self.add_argument(
            "--override", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=text
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message, and the nearest flag for an unknown one."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        known = self._flags() if unknown.startswith("--") else []
        near = difflib.get_close_matches(unknown.partition("=")[0], known, n=1)
        raise ConfigError(message, f"did you mean {near[0]}?" if near else "see --help")

    def _flags(self) -> list[str]:
        """Return the flags of this parser and of its actions, whose unknown ones it reports."""
        actions = (a for a in self._actions if isinstance(a, argparse._SubParsersAction))
        inner = [parser for action in actions for parser in action.choices.values()]
        return [flag for parser in (self, *inner) for flag in parser._option_string_actions]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a device at a TVM RPC tracker."""
    parser.add_argument(
        "--rpc", metavar="TRACKER:PORT", help="time on a device that this TVM RPC tracker lends"
    )
    parser.add_argument("--rpc-key", metavar="KEY", help="key of that device at the tracker")


def refused(error: IcdError, arguments: Sequence[str]) -> int:
    """Print a refusal as one line, after its traceback under ``--debug``; return exit status 2.

    To be called while ``error`` is being handled.
    """
    if "--debug" in arguments:
        traceback.print_exc()
    print(error.line(), file=sys.stderr)
    return 2
