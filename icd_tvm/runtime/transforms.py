"""The transforms that a configuration asks for: one line each in :data:`KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.config import Config
from icd_tvm.errors import ConfigError
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity, calibration_requests
from icd_tvm.relax_passes.collect_activation_stats import Statistic


@dataclass(frozen=True)
class Transform:
    """One of S, Q and K.

    Attributes
    ----------
    name : str
        Key of the configuration and of the metadata.
    text : str
        The specification in full.
    requests : Callable
        Module -> statistics of matmul inputs that the pass wants.
    make : Callable
        (statistics, seed) -> pass; after it ran, its ``meta`` says what it did.
    """

    name: str
    text: str
    requests: Callable[[Any], Mapping[str, Statistic]]
    make: Callable[[Mapping[str, Any], int], Any]


def _sparsity(text: str, config: Config) -> Transform:
    spec = parse_sparsity(text)
    return Transform(
        "sparsity",
        str(spec),
        lambda mod: calibration_requests(mod, spec),
        lambda statistics, seed: ApplySparsity(spec, statistics, seed=seed),
    )


# In the order in which they are applied: key of ``transform`` -> (its text, all keys) -> Transform.
KINDS: dict[str, Callable[[str, Config], Transform]] = {"sparsity": _sparsity}
NONE = "none"


def find_transforms(config: Config) -> list[Transform]:
    """Return what is to be applied, in order.

    Raises
    ------
    ConfigError
        If a specification is malformed, or nothing here implements it.
    """
    keys = config.transform.model_dump()
    asked = {name: text for name, text in keys.items() if text.strip() != NONE}
    for name, text in asked.items():
        if name not in KINDS:
            raise ConfigError(
                f"transform.{name}: {text!r} cannot be compiled by this version",
                f"available: {', '.join(KINDS)}; set transform.{name} to none",
            )
    return [KINDS[name](asked[name], config) for name in KINDS if name in asked]
