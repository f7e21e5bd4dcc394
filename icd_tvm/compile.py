"""``python -m icd_tvm.compile model.onnx`` is ``icd compile model.onnx``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from icd_tvm import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a refused input)."""
    return cli.main(["compile", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
