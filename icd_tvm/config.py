"""The configuration of a run: every documented key, its default, its range and its meaning.

Reading files and overrides is :mod:`icd_tvm.config_file`; nothing here imports TVM.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from icd_tvm.measure.peer_worker import PEERS

Mode = Literal["linear", "iterative"]
Source = Literal["tir", "trace", "mock"]
Repermute = Literal["auto", "never", "delta", "always"]

# llama.cpp reads another file than the ONNX model of a run.
ONNX_PEERS = tuple(name for name in PEERS if name != "llamacpp")
# The specification's name of this counter exists on no GPU.
L2_HIT_RATE = "lts__t_sector_hit_rate.pct"
ALIASES = {"l2_tex__t_sector_hit_rate.pct": L2_HIT_RATE}


def _file_name(text: str) -> str:
    # The system calls behind Path raise other errors than OSError for it.
    if "\0" in text:
        raise ValueError("a path holds no NUL")
    return text


File = Annotated[str, AfterValidator(_file_name)]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, no value is converted between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelKeys(Section):
    """Which model: exactly one of ``path`` and ``name``."""

    path: File | None = Field(default=None, description="ONNX file, seen from the current folder")
    name: str | None = Field(
        default=None, description="built-in model: python -m icd_tvm.models --list"
    )
    seq: int | None = Field(
        default=None, ge=1, description="tokens of a built-in model, or slots of its cache"
    )
    shapes: dict[str, list[int]] = Field(
        default={}, description="size of each symbolic input by name"
    )
    opaque_states: dict[str, str] = Field(
        default={},
        description="input: output, a state that only the same module reads; past_*: present_*",
    )
    task: str = Field(
        default="", description="label of the work; part of the version tag of the order"
    )

    @field_validator("shapes")
    @classmethod
    def _positive(cls, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
        for name, shape in shapes.items():
            # The largest tensor that numpy can index.
            if any(size < 1 for size in shape) or math.prod(shape) > 1 << 62:
                raise ValueError(f"sizes of {name} are positive")
        return shapes

    @model_validator(mode="after")
    def _one_source(self) -> ModelKeys:
        if (self.path is None) == (self.name is None):
            raise ValueError("give exactly one of model.path and model.name")
        if self.seq is not None and self.name is None:
            raise ValueError("model.seq is for built-in models; a file has model.shapes")
        return self


class PipelineKeys(Section):
    """What the loop does and how often it is timed."""

    mode: Mode = Field(
        default="iterative", description="iterative decides the order again after the transform"
    )
    repeats: int = Field(default=1000, ge=30, le=10**7, description="timed calls of each arm")
    warmup_iter: int = Field(
        default=50, ge=0, le=10**6, description="calls before the timing starts"
    )
    fixed_clock: bool = Field(
        default=False, description="flag the run where the clock is not known to be fixed"
    )
    post_transform_repermute: Repermute = Field(
        default="auto",
        description="when the second order is decided: delta, where a transform says that it "
        "changed the layout; auto, also where it changed which weights are zero",
    )
    tune: bool = Field(
        default=True,
        description="time the kernels that a matmul may use, once a machine; false predicts",
    )


class MockKeys(Section):
    """The planted graph of ``graph.source: mock``."""

    blocks: int = Field(default=4, ge=1, le=4096, description="planted communities of each axis")
    noise: float = Field(default=0.1, ge=0, le=1, description="share of edges that ignore them")
    seed: int = Field(default=0, ge=0, le=2**31, description="of the graph")


class GraphKeys(Section):
    """Where the co-access graph W comes from."""

    source: Source = Field(
        default="tir", description="tir: the scheduled kernels; trace: a file; mock: planted"
    )
    mock: MockKeys = MockKeys()
    trace: File | None = Field(
        default=None, description=".npz with int arrays AXIS/windows and AXIS/indices for each axis"
    )
    on_broken_trace: Literal["mock", "stop"] = Field(
        default="mock", description="what an unusable trace leads to"
    )
    save: bool = Field(
        default=True, description="keep W.npz; false lets a cached order do without building W"
    )

    @model_validator(mode="after")
    def _has_trace(self) -> GraphKeys:
        if self.source == "trace" and self.trace is None:
            raise ValueError("graph.source: trace needs graph.trace, a file")
        return self


class SolverKeys(Section):
    """How long the order is searched."""

    time_budget_s: float = Field(
        default=300.0, gt=0, le=86400, description="seconds for both orders of a run together"
    )
    refine_steps: int = Field(default=2000, ge=0, le=10**7, description="steps of the local search")
    k_blocks: int | None = Field(
        default=4, ge=1, le=4096, description="blocks of the modularity Q; null: one for each tile"
    )
    rng_seed: int | None = Field(default=None, ge=0, le=2**31, description="null: the run's seed")
    memory_mb: int | None = Field(
        default=None,
        ge=1,
        le=10**8,
        description="MiB that the solver's process may take; null: what there is. Without enough "
        "the order stays as it was",
    )


class TransformKeys(Section):
    """What is done to the model between the two orders; see ``icd compile --help``."""

    sparsity: str = Field(
        default="none", description="unit:0.5, vec16:0.5, 2:4, ...; or {type, rate}"
    )
    quant: str = Field(default="none", description="quantisation of the weights")
    kv: str = Field(
        default="none",
        description="KV cache of a decoder step: drop=0.3,block=128,dtype=int8 (or bf16, fp16); "
        "tokens of an encoder: tokens=0.2,layer=1",
    )

    @field_validator("sparsity", mode="before")
    @classmethod
    def _one_text(cls, value: Any) -> Any:
        if value is None:
            return "none"
        if isinstance(value, dict) and set(value) <= {"type", "rate"} and "type" in value:
            rate = value.get("rate")
            return f"{value['type']}" + ("" if rate is None else f":{rate}")
        return value

    @field_validator("quant", "kv", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return "none" if value is None else value


class MeasureKeys(Section):
    """What is measured beside the latency."""

    enabled: bool = Field(
        default=True, description="false times nothing, so no new order is accepted"
    )
    peer: list[str] = Field(
        default=[],
        description="other runtimes on the same model, each in a process of its own: a name, "
        "names with commas or a list of " + ", ".join(ONNX_PEERS),
    )
    cold_cache: bool = Field(
        default=False, description="empty the caches before every call; not beside a peer"
    )
    stop_half_width: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="stop once iterative/linear is known to this share of it; not beside a peer",
    )
    pin_threads: bool = Field(
        default=True, description="keep the calling thread on one CPU while it is timed"
    )
    energy: bool = Field(
        default=True, description="count energy where the machine has a counter (RAPL); a minute"
    )
    cache_model: bool = Field(
        default=False,
        description="model the first two caches, kernel by kernel; some seconds an arm",
    )
    kernel_times: bool = Field(
        default=True, description="time every kernel in a run of its own; a second an arm"
    )
    roofline: bool = Field(default=True, description="measure what the machine reaches; a second")
    ncu: bool = Field(
        default=True, description="count with Nsight Compute where the target is a GPU"
    )
    rpc: str | None = Field(
        default=None,
        pattern=r"^([^\s:\[\]]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}$",
        description="HOST:PORT of a TVM RPC tracker; times on a device it lends, not here",
    )
    rpc_key: str | None = Field(
        default=None, min_length=1, description="key of the device at the tracker"
    )
    ncu_metrics: list[str] = Field(
        default=[L2_HIT_RATE], description="GPU counters; unused on a CPU"
    )
    power_sample_hz: float = Field(default=10.0, gt=0, le=1000, description="samples of GPU power")

    @field_validator("peer", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",")]
        return value or []

    @field_validator("peer")
    @classmethod
    def _known_peers(cls, names: list[str]) -> list[str]:
        unknown = [name for name in names if name not in ONNX_PEERS]
        if unknown:
            raise ValueError(f"unknown peer {unknown[0]!r} (known: {', '.join(ONNX_PEERS)})")
        return list(dict.fromkeys(names))

    @model_validator(mode="after")
    def _alone(self) -> MeasureKeys:
        if self.peer and (self.cold_cache or self.stop_half_width is not None):
            raise ValueError("measure.cold_cache and measure.stop_half_width exclude measure.peer")
        return self

    @field_validator("ncu_metrics")
    @classmethod
    def _known_names(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys(ALIASES.get(name, name) for name in names))

    @model_validator(mode="after")
    def _device_has_key(self) -> MeasureKeys:
        if (self.rpc is None) != (self.rpc_key is None):
            raise ValueError("give both measure.rpc and measure.rpc_key, or neither")
        return self


class QualityKeys(Section):
    """Task quality of the arms."""

    metric: str | None = Field(
        default=None,
        description="stsb, sst2, bytes or wikitext; NAME:N takes N samples",
    )
    budget: float | None = Field(
        default=None,
        ge=0,
        description="largest change in points that the sparsity may make: a rate for each layer is "
        "searched on quality.metric (null: stsb), transform.sparsity gives the strongest",
    )
    agreement_floor: float = Field(
        default=0.99,
        ge=-1,
        le=1,
        description="least agreement with the dense outputs that the search allows: mean cosine, "
        "of logits the share of equal decisions",
    )


class GateKeys(Section):
    """What the report calls a pass; see :func:`icd_tvm.measure.gates.evaluate_gates`."""

    latency_gain_pct: float = Field(
        default=20.0, description="least reduction of the median latency, %"
    )
    l2_gain_points: float = Field(default=10.0, description="least rise of the L2 hit rate, points")
    energy_gain_pct: float = Field(default=15.0, description="least reduction of J per token, %")
    quality_loss_points: float = Field(
        default=0.1, ge=0, description="largest change of quality, points"
    )
    quality_agreement: float = Field(
        default=0.995, ge=0, le=1, description="least agreement with the outputs before the change"
    )


class ReportKeys(Section):
    """Where results go."""

    html: bool = Field(default=True, description="write report.html")
    out_dir: File | None = Field(default=None, description="the run directory; --out replaces it")


class CacheKeys(Section):
    """The store of decided orders that runs share."""

    enabled: bool = Field(default=True, description="look orders up before solving, and keep them")
    dir: File | None = Field(default=None, description="folder; null: the user's cache folder")
    max_mb: int = Field(default=256, ge=0, le=10**6, description="size; the least used go first")


class Config(Section):
    """Everything one run is asked to do."""

    model: ModelKeys
    pipeline: PipelineKeys = PipelineKeys()
    graph: GraphKeys = GraphKeys()
    solver: SolverKeys = SolverKeys()
    transform: TransformKeys = TransformKeys()
    measure: MeasureKeys = MeasureKeys()
    quality: QualityKeys = QualityKeys()
    gates: GateKeys = GateKeys()
    report: ReportKeys = ReportKeys()
    cache: CacheKeys = CacheKeys()
    target: str = Field(
        default="host",
        description="host, x86-64-v3, x86-64-v4, aarch64, another CPU by LLVM's name, cuda:sm_80, "
        "cuda:sm_90 or cuda:sm_90a; with :float16 or :bfloat16 behind it, products on tensor cores",
    )
    cuda_graph: bool = Field(
        default=True,
        description="a CUDA library captures its step as a graph, where all shapes are known",
    )
    threads: int | None = Field(default=None, ge=1, le=4096, description="null: every core")
    seed: int = Field(
        default=0, ge=0, le=2**31, description="of the inputs, the solver and the arms"
    )

    @model_validator(mode="after")
    def _something_to_search(self) -> Config:
        if self.quality.budget is not None and self.transform.sparsity.strip() == "none":
            raise ValueError("quality.budget needs transform.sparsity, e.g. unit:0.5")
        return self

    @property
    def solver_seed(self) -> int:
        """Seed of the solver."""
        return self.seed if self.solver.rng_seed is None else self.solver.rng_seed

    @property
    def source(self) -> str:
        """Path or name of the model."""
        return self.model.path or self.model.name or ""


def model_source(text: str) -> dict[str, str]:
    """Return the key of a file, or of a built-in model where no file has that name."""
    from icd_tvm.models.registry import MODELS

    return {"name" if text in MODELS and not Path(text).exists() else "path": text}
