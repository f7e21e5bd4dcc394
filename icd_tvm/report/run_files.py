"""Read what a run left in its folder; what is absent or damaged is named, not guessed."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from icd_tvm.core.access_graph import load_w
from icd_tvm.core.cost import Csr
from icd_tvm.core.permutation import Perm, as_permutation, identity
from icd_tvm.errors import IcdError, MeasurementError
from icd_tvm.measure.metrics import validate_metrics
from icd_tvm.report.values import as_list, as_mapping, dig

METRICS, EVENTS, PERM, POWER, NCU, TILES = (
    "metrics.json",
    "events.jsonl",
    "perm.json",
    "power.csv",
    "ncu.json",
    "tiles.npz",
)
# File of W, and the state whose event says which rows belong to which axis.
GRAPHS = (("W_after.npz", "REPERMUTED"), ("W.npz", "W_BUILT"))
# numpy raises EOFError for an empty archive and BadZipFile for a torn one.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError, EOFError, BadZipFile)
_ORDERS = (("before", "first order"), ("after", "re-permuted"))


@dataclass(frozen=True)
class AxisGraph:
    """W of one axis, and the orders to show it in.

    Attributes
    ----------
    axis : str
    w : csr_matrix [n, n]
        In the order the model came in.
    orders : dict of str to int32[n]
        Title -> permutation, ``new[i] = old[perm[i]]``.
    source : str
        ``tir``, ``trace`` or ``mock``.
    """

    axis: str
    w: Csr
    orders: dict[str, Perm]
    source: str


@dataclass(frozen=True)
class TilePicture:
    """Tiles of one weight in one order: the share that holds something, and the numbers.

    Raises
    ------
    ValueError
        If that is no picture.
    """

    image: NDArray[np.float64]
    held: int
    total: int

    def __post_init__(self) -> None:
        if self.image.ndim != 2 or not self.image.size or not np.isfinite(self.image).all():
            raise ValueError(f"tiles of shape {self.image.shape} are no picture")


@dataclass
class RunFiles:
    """A run folder, read; ``problems`` maps a file to why nothing of it is shown."""

    record: Mapping[str, Any]
    events: list[Mapping[str, Any]] = field(default_factory=list)
    graphs: list[AxisGraph] = field(default_factory=list)
    power: list[dict[str, float]] = field(default_factory=list)
    ncu: Mapping[str, Any] = field(default_factory=dict)
    tiles: dict[str, dict[str, TilePicture]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def read_record(path: Path) -> Mapping[str, Any]:
    """Read ``metrics.json``, given as the file or its folder.

    Raises
    ------
    MeasurementError
        If it is missing, damaged or no valid record.
    """
    file = path / METRICS if path.is_dir() else path
    try:
        record = json.loads(file.read_text("utf-8"))
    except OSError as error:
        inside = sorted(p.parent for p in path.glob(f"*/{METRICS}"))
        hint = f"there is one in {', '.join(map(str, inside))}" if inside else "run icd run first"
        raise MeasurementError(f"cannot read {file}: {error.strerror or error}", hint) from error
    except (ValueError, RecursionError) as error:
        raise MeasurementError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise MeasurementError(f"{file} is no metrics record", "expected an object")
    validate_metrics(record)
    return record


def read_run(folder: Path) -> RunFiles:
    """Read a run folder; only ``metrics.json`` must be there. See :func:`read_record`."""
    found = RunFiles(read_record(folder))
    readers = {EVENTS: _events, "W": _graphs, POWER: _power, NCU: _ncu, TILES: _tiles}
    for name, read in readers.items():
        try:
            read(folder, found)
        except FileNotFoundError as error:
            missing = Path(str(error.filename)).name
            found.problems[name] = f"{missing} is not in the run folder"
        except (*_UNREADABLE, IcdError) as error:
            found.problems[name] = f"it cannot be read: {error}"
    return found


def _events(folder: Path, found: RunFiles) -> None:
    for line in (folder / EVENTS).read_text("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            # A process that was killed leaves its last line unfinished.
            continue
        if isinstance(event, dict) and isinstance(event.get("stage"), str):
            found.events.append(event)


def _graphs(folder: Path, found: RunFiles) -> None:
    permutations = json.loads((folder / PERM).read_text("utf-8"))
    orders: dict[str, dict[str, Perm]] = {}
    for when, title in _ORDERS:
        for item in as_list(dig(permutations, "orders", when)):
            orders.setdefault(str(item["group"]), {})[title] = as_permutation(item["perm"])
    file, state = next((pair for pair in GRAPHS if (folder / pair[0]).exists()), GRAPHS[-1])
    if not (folder / file).exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / file))
    whole, meta = load_w(folder / file)
    rows = _rows_by_axis(found.events, state) or _only_axis(orders, whole)
    if not rows:
        raise ValueError(f"no event says which rows of {file} belong to which axis")
    for axis, (start, stop) in rows.items():
        w = whole[start:stop, start:stop]
        known = {t: p for t, p in orders.get(axis, {}).items() if _moves(p, w.shape[0])}
        if w.nnz and known:
            shown = {"as it comes": identity(w.shape[0]), **known}
            found.graphs.append(AxisGraph(axis, w, shown, str(meta["source"])))
    if not found.graphs:
        raise ValueError("no axis has both a W that is not uniform and an order that moves it")


def _rows_by_axis(events: list[Mapping[str, Any]], state: str) -> dict[str, tuple[int, int]]:
    """Return the rows that the last event of a state names."""
    for event in reversed(events):
        rows = as_mapping(dig(event, "meta", "rows"))
        if event["stage"] == state and rows:
            return {str(axis): (int(span[0]), int(span[1])) for axis, span in rows.items()}
    return {}


def _only_axis(orders: Mapping[str, Any], whole: Csr) -> dict[str, tuple[int, int]]:
    sizes = {axis: next(iter(found.values())).size for axis, found in orders.items()}
    if list(sizes.values()) != [whole.shape[0]]:
        return {}
    return {axis: (0, size) for axis, size in sizes.items()}


def _moves(perm: Perm, n: int) -> bool:
    return perm.size == n and not np.array_equal(perm, identity(n))


def _power(folder: Path, found: RunFiles) -> None:
    with (folder / POWER).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    found.power = [{"t": float(row["t"]), "watts": float(row["watts"])} for row in rows]


def _ncu(folder: Path, found: RunFiles) -> None:
    found.ncu = as_mapping(json.loads((folder / NCU).read_text("utf-8")))


def _tiles(folder: Path, found: RunFiles) -> None:
    # A run without a weight that has zeros keeps none: nothing is lacking.
    if not (folder / TILES).exists():
        return
    with np.load(folder / TILES) as stored:
        for key in stored.files:
            place, _, part = key.rpartition("|")
            weight, _, arm = place.rpartition("|")
            if part == "picture":
                held, total = (int(number) for number in stored[f"{place}|tiles"])
                image = np.asarray(stored[key], dtype=np.float64)
                found.tiles.setdefault(weight, {})[arm] = TilePicture(image, held, total)
