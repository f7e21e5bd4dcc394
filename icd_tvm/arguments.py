"""The argument parser of every command: a bad argument is a :class:`ConfigError`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from icd_tvm.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that one place prints errors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message."""
        raise ConfigError(message, "see --help")
