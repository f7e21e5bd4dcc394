"""``icd_tvm.compile(model)``; as a program, ``python -m icd_tvm.compile``, it is ``icd compile``.

One name for both: the module can be called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icd_tvm.runtime.compilation import Compilation


def compile(model: str | os.PathLike[str], *, quiet: bool = False, **options: Any) -> Compilation:
    """Compile a model and keep the re-permuted build only if it is equal and measured faster.

    Parameters
    ----------
    model : path or str
        ONNX file, or the name of a built-in model.
    quiet : bool
        Show no stages on stderr.
    **options
        Fields of :class:`icd_tvm.runtime.options.CompileOptions`, by name.

    Returns
    -------
    Compilation
        See :func:`icd_tvm.runtime.compile_model.compile_model`.

    Raises
    ------
    IcdError
        For every refused input.
    TypeError
        For an option that does not exist.

    Examples
    --------
    >>> import icd_tvm
    >>> icd_tvm.compile(model_file, measure=False, quiet=True).verdict.arm
    'linear'
    """
    # TVM is imported by the first call, so that TVM_NUM_THREADS may still be set before it.
    from icd_tvm.runtime.compile_model import compile_model
    from icd_tvm.runtime.options import CompileOptions
    from icd_tvm.runtime.progress import Progress

    return compile_model(CompileOptions(os.fspath(model), **options), Progress(quiet=quiet))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for a refused input)."""
    from icd_tvm import cli

    return cli.main(["compile", *(sys.argv[1:] if argv is None else argv)])


class _Callable(ModuleType):
    """A module that is the function of its own name when it is called."""

    def __call__(self, model: str | os.PathLike[str], **options: Any) -> Compilation:
        return compile(model, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
