"""Evaluation data: where it lies, and that it is what the figures were measured on."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError, MissingDependencyError, ModelFileError
from icd_tvm.measure.quality import DATA_HINT, data_dir

# File below the data folder -> sha256. A figure on other data is another figure.
CHECKSUMS = {
    "stsb/stsb-en-dev.csv": "d29586e96558c4eb52cf5ea5d14e9c24d3bf0e44f111b017caba43a5adc33226",
    "stsb/stsb-en-train.csv": "e1e84fec60bbb598735552f54a35f4949904a484750fd2cb11e2720e49f63da6",
    "sst2/stsa.binary.dev": "02fedc82855dbdcabe82c65ed1af6c6570788eaac51073cdb35ee8c7784426d1",
    "sst2/stsa.binary.train": "71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338",
    "wikitext2/valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "pygments/windows_T512.npz": "f959e81df81686207bd4401edb17af2fd5d3e30584e2f379a259e7654f3bfce9",
}


def dataset_file(name: str) -> Path:
    """Return the path of a data file whose content is the known one.

    Parameters
    ----------
    name : str
        A key of :data:`CHECKSUMS`.

    Raises
    ------
    MissingDependencyError
        The data folder or the file is absent.
    ModelFileError
        The file was changed.
    """
    folder = data_dir()
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        raise MissingDependencyError(f"evaluation data {name} not found", DATA_HINT)
    status = path.stat()
    found = _sha256(path, status.st_size, status.st_mtime_ns)
    if found != CHECKSUMS[name]:
        raise ModelFileError(
            f"{name} is not the file that figures refer to: sha256 {found[:12]}, "
            f"not {CHECKSUMS[name][:12]}",
            "restore the file; figures on other data do not compare",
        )
    return path


def sst2_sentences(split: str, limit: int | None = None) -> list[tuple[str, int]]:
    """Return SST-2 sentences with their label, 0 (negative) or 1; the first ``limit``.

    Raises
    ------
    MissingDependencyError, ModelFileError
        See :func:`dataset_file`; or a line that is not a label and a text.

    Notes
    -----
    Socher et al., "Recursive deep models for semantic compositionality", 2013.
    """
    lines = dataset_file(f"sst2/stsa.binary.{split}").read_text("utf-8").splitlines()[:limit]
    parts = [line.partition(" ") for line in lines]
    if any(label not in ("0", "1") or not text for label, _, text in parts):
        raise ModelFileError(f"SST-2 {split} holds a line that is not a label and a text")
    return [(text, int(label)) for label, _, text in parts]


def byte_windows() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return windows of source code, int64 [windows, bytes], and the class of each."""
    with np.load(dataset_file("pygments/windows_T512.npz")) as stored:
        return stored["ids"].astype(np.int64), stored["labels"].astype(np.int64)


def token_windows(tokenizer: Any, count: int, length: int) -> NDArray[np.int64]:
    """Return the first windows of WikiText-2 (validation), int64 [count, length].

    Parameters
    ----------
    tokenizer : object
        With ``encode(text)`` -> token numbers.
    count, length : int
        Windows, tokens of each.

    Raises
    ------
    ConfigError
        The text is too short.
    """
    text = dataset_file("wikitext2/valid.txt").read_text("utf-8")[: 8 * count * length]
    tokens = np.asarray(tokenizer.encode(text), np.int64)
    if len(tokens) < count * length:
        raise ConfigError(f"WikiText-2 has no {count} windows of {length} tokens")
    return tokens[: count * length].reshape(count, length)


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
