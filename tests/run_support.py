"""What the tests of ``icd run`` share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icd_tvm.config_file import merged
from icd_tvm.runtime.events import read_events
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.run import RunArtifacts, run


def settings(model: Path, **sections: Any) -> dict[str, Any]:
    """Return the keys of a run that takes seconds."""
    base = {
        "model": {"path": str(model)},
        "pipeline": {"repeats": 30, "warmup_iter": 3},
        "transform": {"sparsity": "unit:0.5; min-size=0"},
        "cache": {"enabled": False},
        "threads": 1,
    }
    return merged(base, sections)


def quietly(config: Mapping[str, Any], out: Path, **options: Any) -> RunArtifacts:
    return run(config, out=out, progress=Progress(quiet=True), **options)


def states(folder: Path) -> list[str]:
    return [event["stage"] for event in read_events(folder / "events.jsonl") if event["ok"]]


def not_to_be_called(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("an order was decided twice")


def orders_of(folder: Path) -> Any:
    content = json.loads((folder / "perm.json").read_text())["orders"]
    return {when: [(d["group"], d["perm"]) for d in items] for when, items in content.items()}
