"""Lines of TVM's log that tell a user nothing."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

# TVM 0.27 logs one for every library it saves and loads, whatever its log level.
_SCOPE = re.compile(rb"Warning: Scope (Saving|Loaded):")


@contextlib.contextmanager
def without_scope_lines() -> Iterator[None]:
    """Drop them from the body's standard error; the rest of it appears when the body ends.

    C++ writes to the descriptor, so that is what is exchanged.
    """
    try:
        shown = os.dup(2)
    except OSError:
        yield
        return
    with os.fdopen(os.memfd_create("stderr"), "w+b") as taken:
        sys.stderr.flush()
        os.dup2(taken.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(shown, 2)
            os.close(shown)
            taken.seek(0)
            rest = b"".join(line for line in taken if not _SCOPE.search(line))
            with contextlib.suppress(OSError):
                os.write(2, rest)
