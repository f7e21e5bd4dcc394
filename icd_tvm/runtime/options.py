"""What one compilation is asked to do, checked once and early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icd_tvm.config import Config, Mode, model_source
from icd_tvm.config_file import make_config
from icd_tvm.errors import ConfigError


@dataclass(frozen=True)
class CompileOptions:
    """Options of :func:`icd_tvm.runtime.compile_model.compile_model`.

    Parameters
    ----------
    model : str
        Path of an ONNX file, or the name of a built-in model.
    shapes : Mapping[str, tuple[int, ...]]
        Sizes of symbolic inputs.
    seq : int or None
        Tokens of a built-in model, or slots of its cache.
    sparsity : str
        ``none`` (use what the model already has), ``unit:RATE`` or ``vecV:RATE``.
    quant, kv : str
        What is done to the weights' type and to the KV cache; ``none`` by default.
    mode : {"iterative", "linear"}
        ``linear`` keeps the order that was decided before the transform.
    target : str
        ``host``, another CPU as `parse_target` names it, or a CUDA device (``cuda:sm_80``,
        ``cuda:sm_90``, ``cuda:sm_90a``). Where this machine cannot run the code, nothing is timed.
    cuda_graph : bool
        Whether a library for a CUDA device captures its step as a graph.
    threads : int or None
        Worker threads; None uses every core.
    repeats : int
        Timed calls per arm, at least 30.
    time_budget_s : float
        Seconds the solver may spend over all groups.
    peer : str or None
        Peers to measure beside our arms, with commas between the names.
    rpc, rpc_key : str or None
        ``HOST:PORT`` of a TVM RPC tracker and the key of the device there that is timed.
    out : Path or None
        Folder for ``metrics.json``.
    library : Path or None
        File for the compiled library of the accepted arm.
    measure : bool
        False skips timing; then nothing is accepted on speed and the report says so.
    tune : bool
        False predicts the kernel of each matmul by the model, instead of timing the candidates.
    quality_budget : float or None
        Points that the sparsity may cost; its rates are searched.
    agreement_floor : float
        Least mean cosine with the dense outputs in that search.
    opaque_states : tuple[tuple[str, str], ...]
        Pairs (input name, output name) that only this module reads: their order is its own.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    model: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sparsity: str = "none"
    quant: str = "none"
    kv: str = "none"
    mode: Mode = "iterative"
    target: str = "host"
    threads: int | None = None
    repeats: int = 200
    time_budget_s: float = 30.0
    seed: int = 0
    peer: str | None = None
    out: Path | None = None
    library: Path | None = None
    measure: bool = True
    explain: bool = False
    quality: str | None = None
    quality_budget: float | None = None
    agreement_floor: float = 0.99
    opaque_states: tuple[tuple[str, str], ...] = ()
    rpc: str | None = None
    rpc_key: str | None = None
    tune: bool = True
    seq: int | None = None
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.to_config()

    def to_config(self) -> Config:
        """Return the configuration that asks for the same; its keys name what is refused."""
        repeats = self.repeats if isinstance(self.repeats, int) else 0
        return make_config(
            {
                "model": {
                    **model_source(str(self.model)),
                    "seq": self.seq,
                    "shapes": {name: list(shape) for name, shape in self.shapes.items()},
                    "opaque_states": dict(self.opaque_states),
                },
                "pipeline": {
                    "mode": self.mode,
                    "repeats": self.repeats,
                    "tune": self.tune,
                    "warmup_iter": max(3, min(50, repeats // 4)),
                },
                "solver": {"time_budget_s": self.time_budget_s, "k_blocks": None},
                "transform": {"sparsity": self.sparsity, "quant": self.quant, "kv": self.kv},
                "measure": {
                    "enabled": self.measure,
                    "peer": self.peer,
                    "energy": False,
                    "kernel_times": False,
                    "roofline": False,
                    "rpc": self.rpc,
                    "rpc_key": self.rpc_key,
                },
                "quality": {
                    "metric": self.quality,
                    "budget": self.quality_budget,
                    "agreement_floor": self.agreement_floor,
                },
                "target": self.target,
                "cuda_graph": self.cuda_graph,
                "threads": self.threads,
                "seed": self.seed,
            },
            label="options",
        )


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Parse ``name=1x128`` into ``("name", (1, 128))``.

    Raises
    ------
    ConfigError
        If the text has another form or a size below 1.
    """
    name, _, sizes = text.partition("=")
    parts = sizes.split("x")
    _require(
        bool(name) and all(p.isdigit() and int(p) > 0 for p in parts),
        f"--shape {text}",
        "write --shape name=1x128",
    )
    return name, tuple(int(p) for p in parts)


def parse_state(text: str) -> tuple[str, str]:
    """Parse ``past=present`` into ``("past", "present")``.

    Raises
    ------
    ConfigError
        If one of the names is missing.
    """
    name, _, output = text.partition("=")
    _require(bool(name and output), f"--opaque-state {text}", "write --opaque-state past=present")
    return name, output


def _require(condition: bool, what: str, hint: str) -> None:
    if not condition:
        raise ConfigError(f"bad value: {what}", hint)
