"""Files of installed packages, found without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from icd_tvm.errors import MissingDependencyError


def package_file(package: str, name: str, hint: str) -> Path:
    """Return the path of a package's file.

    Parameters
    ----------
    package : str
        It is not imported: some packages pull a framework in.
    name : str
        Path inside it.
    hint : str
        How to install it.

    Raises
    ------
    MissingDependencyError
        The package or the file is absent.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder) / name
        if path.is_file():
            return path
    what = f"its file {name} is missing" if spec else "it is not installed"
    raise MissingDependencyError(f"the model needs the package {package}: {what}", hint)
