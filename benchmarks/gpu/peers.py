"""Peers through torch: cuBLAS, 2:4 by cuSPARSELt, eager and compiled models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.gpu.cases import MAMBA_SIZES, Case
from benchmarks.gpu.ratios import summary_of
from icd_tvm.errors import MeasurementError
from icd_tvm.measure.cuda_timing import MAX_SETS, REPEATS, Clock
from icd_tvm.tir_schedules.cuda.catalogue import LAYERS, PROJECTIONS, ROWS

NO_TIME = "not measured: no time is left"
# Bytes that the buffers of cold calls exceed together: three times the L2 of an H200.
COLD_BYTES = 200e6
SPARSE_ROWS = 4096


def find_torch() -> Any:
    """Return torch.

    Raises
    ------
    MeasurementError
        If it is not installed, or finds no GPU.
    """
    try:
        import torch
    except ImportError as error:
        raise MeasurementError("torch is not installed") from error
    if not torch.cuda.is_available():
        raise MeasurementError("torch finds no GPU")
    return torch


def products(clock: Clock) -> dict[str, Any]:
    """Time products by cuBLAS, and by cuSPARSELt on weights with two of four elements."""
    torch = find_torch()
    jobs: dict[str, Callable[[], Any]] = {}
    for m in sorted(ROWS, key=lambda rows: rows < 1024):
        for layer, (n, k) in LAYERS.items():
            jobs[f"bert {layer} {m} rows fp16"] = _job(torch, m, n, k)
    for layer, (n, k) in PROJECTIONS.items():
        jobs[f"mamba {layer} fp16"] = _job(torch, 1, n, k)
    for layer, (n, k) in LAYERS.items():
        jobs[f"bert {layer} {SPARSE_ROWS} rows fp16, 2:4 cuSPARSELt"] = _job(
            torch, SPARSE_ROWS, n, k, sparse=True
        )
    return {"torch": torch.__version__, **_each(jobs, clock, "peers")}


def _each(jobs: Mapping[str, Callable[[], Any]], clock: Clock, part: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        if clock.over(part):
            found[name] = NO_TIME
            continue
        try:
            found[name] = job()
        except Exception as error:
            found[name] = f"not measured: {type(error).__name__}: {str(error)[:200]}"
    return found


def _job(torch: Any, m: int, n: int, k: int, sparse: bool = False) -> Callable[[], Any]:
    return lambda: _product(torch, m, n, k, sparse)


def _product(torch: Any, m: int, n: int, k: int, sparse: bool) -> dict[str, float]:
    count = int(np.clip(COLD_BYTES // (2 * (m * k + n * k + m * n)) + 1, 2, MAX_SETS))
    x, w = (torch.randn(size, dtype=torch.half, device="cuda") for size in ((m, k), (n, k)))
    if sparse:
        kept = torch.tensor([1, 1, 0, 0], dtype=torch.bool, device="cuda").tile((n, k // 4))
        w = w * kept
    pairs = [(x.clone(), w.clone()) for _ in range(count)]
    if sparse:
        pairs = [(a, torch.sparse.to_sparse_semi_structured(b)) for a, b in pairs]
    return torch_us(torch, [lambda p=p: torch.nn.functional.linear(*p) for p in pairs])


def torch_us(torch: Any, calls: list[Callable[[], Any]]) -> dict[str, float]:
    """Return microseconds of one of ``calls``, started together as one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = [_event_ms(torch, graph.replay) * 1e3 / len(calls) for _ in range(REPEATS)]
    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"us": middle, "q25": low, "q75": high}


def _event_ms(torch: Any, work: Callable[[], Any]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))


def model_peers(cases: Mapping[str, Mapping[str, Any]], clock: Clock) -> dict[str, Any]:
    """Time the dense models by torch, eager first, then compiled; fp16, one set of inputs."""
    torch = find_torch()
    known = [Case(**about["case"]) for about in cases.values() if "case" in about]
    shapes = {(case.model, case.batch, case.seq): case for case in known}
    jobs: dict[str, Callable[[], Any]] = {}
    for how in ("eager", "compile"):
        for (model, batch, seq), case in shapes.items():
            jobs[f"{model} {batch}x{seq}, torch {how}"] = _model_job(torch, case, how)
    return {"torch": torch.__version__, **_each(jobs, clock, "model_peers")}


def _model_job(torch: Any, case: Case, how: str) -> Callable[[], Any]:
    def job() -> dict[str, Any]:
        make = _bert if case.model.startswith("bert") else _mamba
        with torch.inference_mode():
            ready = make(torch, case, torch.compile if how == "compile" else _as_it_is)
            for _ in range(5):
                ready()
            torch.cuda.synchronize()
            times = [_event_ms(torch, ready) / 1e3 for _ in range(REPEATS)]
        return {"stream": summary_of(times)}

    return job


def _as_it_is(call: Any) -> Any:
    return call


def _bert(torch: Any, case: Case, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    nn = torch.nn
    layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 12).half().cuda().eval()
    x = torch.randn((case.batch, case.seq, 768), dtype=torch.half, device="cuda")
    return wrap(lambda: encoder(x))  # type: ignore[no-any-return]


def _mamba(torch: Any, case: Case, wrap: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return a decode step of Mamba-2.8B or its part, each layer wrapped alone."""
    hidden, inner, state, rank = 2560, 5120, 16, 160
    layers, vocab = MAMBA_SIZES[case.model]
    linear, norm, silu = (getattr(torch.nn.functional, n) for n in ("linear", "rms_norm", "silu"))

    def random(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.half, device="cuda") * shape[-1] ** -0.5

    shapes = [(2 * inner, hidden), (rank + 2 * state, inner), (inner, rank), (hidden, inner)]
    weights = [[random(*shape) for shape in shapes] for _ in range(layers)]
    kernel, decay, head = (
        random(inner, 4),
        -torch.rand_like(random(inner, state)),
        random(vocab, hidden),
    )
    windows = [random(inner, 4) for _ in range(layers)]
    states = [random(inner, state) for _ in range(layers)]

    def layer(x: Any, w_in: Any, w_x: Any, w_dt: Any, w_out: Any, window: Any, h: Any) -> Any:
        value, gate = linear(norm(x, (hidden,)), w_in).chunk(2)
        moved = torch.cat([window[:, 1:], value[:, None]], dim=1)
        value = silu((moved * kernel).sum(1))
        dt, key, query = linear(value, w_x).split([rank, state, state])
        dt = torch.nn.functional.softplus(linear(dt, w_dt))[:, None]
        h = h * torch.exp(dt * decay) + dt * value[:, None] * key
        return x + linear((h @ query + value) * silu(gate), w_out)

    ready = wrap(layer)

    def step() -> Any:
        x = random_input
        for own, window, h in zip(weights, windows, states, strict=True):
            x = ready(x, *own, window, h)
        return linear(norm(x, (hidden,)), head)

    random_input = random(hidden)
    return step
