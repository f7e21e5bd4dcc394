"""What every command shares: its argument parser, and how a refusal is shown."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from icd_tvm.errors import ConfigError, IcdError


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that one place prints errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message."""
        raise ConfigError(message, "see --help")


def refused(error: IcdError, arguments: Sequence[str]) -> int:
    """Print a refusal as one line, after its traceback under ``--debug``; return exit status 2.

    To be called while ``error`` is being handled.
    """
    if "--debug" in arguments:
        traceback.print_exc()
    print(error.line(), file=sys.stderr)
    return 2
