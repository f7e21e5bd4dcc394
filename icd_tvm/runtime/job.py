"""One run in progress: what it was asked, what it has, and where it leaves its results."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from icd_tvm.config import Config
from icd_tvm.errors import IcdError
from icd_tvm.runtime.compilation import Compilation
from icd_tvm.runtime.events import EventLog
from icd_tvm.runtime.order_file import Orders
from icd_tvm.runtime.progress import Progress
from icd_tvm.runtime.run_folder import RunFolder
from icd_tvm.runtime.states import State
from icd_tvm.runtime.transforms import Transform
from icd_tvm.tir_schedules.target import (
    cuda_arch,
    cuda_precision,
    cuda_target,
    parse_target,
    runs_here,
)


@dataclass(frozen=True)
class Flag:
    """Something that did not go as asked, and did not stop the run."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Failure:
    """What stopped a run."""

    stage: str
    code: str
    message: str
    trace: str
    error: Exception

    @classmethod
    def of(cls, state: State, error: Exception) -> Failure:
        """Record an exception that is being handled."""
        known = isinstance(error, IcdError)
        code = error.code if known else IcdError.code  # type: ignore[attr-defined]
        text = str(error) if known else f"{type(error).__name__}: {error}"
        message = text.splitlines()[0] if text else type(error).__name__
        return cls(state.value, code, message, traceback.format_exc(), error)


@dataclass
class Job:
    """The state that the stages of a run share.

    Attributes
    ----------
    config : Config
    target : tvm.target.Target
        Of the machine that decides and verifies; that of the library is `target_text`, and whose
        kernels orders are decided for is `order_target`.
    transforms : list of Transform
        S, Q and K in the order they are applied.
    progress : Progress
    log : EventLog
    folder : RunFolder or None
        None keeps nothing but `metrics` and `library`.
    metrics, library : Path or None
        Where the record and the compiled library of the kept arm go.
    explain : bool
        Print every axis group once the model is loaded.
    resumed : bool
        The folder held a run of this configuration.
    reuse : Path or None
        File of orders to take instead of solving.
    model_hash : str
        Of the imported model.
    orders : dict
        Orders that are known without solving.
    continued : bool
        They are those of this run directory.
    decided : dict
        Orders that this run has taken, from wherever.
    graphs : dict
        ``before`` and ``after`` -> access graphs, where they were built.
    perms : dict of str to (dict of str to int32[n]) or None
        ``before`` and ``after`` -> what is applied; None where no order was decided.
    budget : dict or None
        What the search under a quality budget found, see
        :mod:`icd_tvm.runtime.budget_search`.
    flags : list of Flag
    failure : Failure or None
    """

    config: Config
    target: Any
    transforms: list[Transform]
    progress: Progress
    log: EventLog = field(default_factory=lambda: EventLog(None))
    folder: RunFolder | None = None
    metrics: Path | None = None
    library: Path | None = None
    explain: bool = False
    resumed: bool = False
    reuse: Path | None = None
    model_hash: str = ""
    orders: Orders = field(default_factory=dict)
    continued: bool = False
    decided: Orders = field(default_factory=dict)
    graphs: dict[str, Any] = field(default_factory=dict)
    perms: dict[str, Mapping[str, np.ndarray] | None] = field(default_factory=dict)
    compilation: Compilation | None = None
    budget: dict[str, Any] | None = None
    flags: list[Flag] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def result(self) -> Compilation:
        """What has been made; only after the model was loaded."""
        if self.compilation is None:
            raise RuntimeError("no model is loaded")
        return self.compilation

    @property
    def cuda(self) -> str | None:
        """Architecture of the CUDA device that the library is for; None for a CPU."""
        return cuda_arch(self.config.target)

    @property
    def order_target(self) -> Any:
        """Whose kernels the orders are decided for: a device's where its kernels are ours.

        Without a precision they are TVM's, which read whole weights in any order.
        """
        if self.cuda is None or cuda_precision(self.config.target) is None:
            return self.target
        return cuda_target(self.cuda)

    @property
    def foreign(self) -> Any | None:
        """The target of the library, if that is a CPU whose code this machine cannot run."""
        if self.cuda is not None or self.config.measure.rpc is not None:
            return None
        target = parse_target(self.config.target, self.config.threads)
        return None if runs_here(target) else target

    @property
    def target_text(self) -> str:
        """What the library is compiled for."""
        if (foreign := self.foreign) is not None:
            return str(foreign)
        return str(self.target) if self.cuda is None else str(cuda_target(self.cuda))

    @property
    def iterative(self) -> bool:
        """Whether a second order is asked for."""
        keys = self.config.pipeline
        return keys.mode == "iterative" and keys.post_transform_repermute != "never"

    def warn(self, stage: str, reason: str) -> None:
        """Flag the run, and say so at once."""
        self.flags.append(Flag(stage, reason))
        self.progress.warn(f"{stage}: {reason}")
