"""SmolLM2's compiled decode step on a compacted KV cache: is it right, and what does it gain?

"verify" compacts the real cache of a text, feeds the next tokens to the compiled module for the
smaller cache and compares the logits with numpy attention over the kept tokens alone. "time" runs
steps of every cache size interleaved, ONNX Runtime on the whole cache in a process of its own;
the cached values do not matter there and are random. "copied" is the step on the whole cache that
writes all of it anew, as the model says; every other arm appends in place. "kv ms" are the kernels
that read or write the cache.

Run: python benchmarks/kv_step.py [--slots 1024 4096 8192] [--drops 0.3 0.5] [--blocks 6]
     [--skip verify|time] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from icd_tvm._tvm import relax
from icd_tvm.adapters.kv_quant import dequantize_rows, quantize_rows
from icd_tvm.adapters.kv_spec import KVSpec
from icd_tvm.measure.datasets import token_windows
from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.peers import Peer, compare_with_peer
from icd_tvm.measure.statistics import ratio, summarise
from icd_tvm.models.decoder import SMOLLM2, build_decoder_step, cache_states
from icd_tvm.models.decoder_reference import DecoderRun, run_decoder
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.smollm2 import (
    build_smollm2_step,
    decoder_weights,
    smollm2_file,
    smollm2_tokenizer,
)
from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags, opaque_states
from icd_tvm.runtime.build import Built, build
from icd_tvm.tir_schedules.target import host_target

STATES = cache_states(SMOLLM2)
DROPS = (0.3, 0.5)
CHECKED = (*((drop, None) for drop in DROPS), (0.0, "int8"), (0.3, "int8"))
CACHE_KERNELS = ("decode_attention", "where", "append_row", "round_cast", "tir_abs_max")


# -- verify


def stored_rows(rows: np.ndarray) -> np.ndarray:
    """Return rows as the int8 step reads them."""
    return dequantize_rows(*quantize_rows(rows))


def cache_inputs(run: DecoderRun, slots: int) -> dict[str, np.ndarray]:
    cache = {}
    for layer in range(SMOLLM2.layers):
        for part, rows in (("key", run.keys), ("value", run.values)):
            array = np.zeros((1, SMOLLM2.kv_heads, slots, SMOLLM2.depth), np.float32)
            array[0, :, : rows.shape[2]] = rows[layer]
            cache[f"past_{part}_{layer}"] = array
    return cache


def run_steps(
    built: Built,
    states: list[str],
    ids: np.ndarray,
    cache: dict[str, np.ndarray],
    slot: int,
    start: int,
) -> np.ndarray:
    """Feed tokens one by one, the cache fed back; return their logits."""
    logits = []
    for offset, token in enumerate(ids):
        feeds = {
            "input_ids": np.array([[token]]),
            "position_ids": np.array([[start + offset]]),
            "cache_length": np.array([slot + offset]),
            **cache,
        }
        out, *new = built.run_all(feeds)
        cache = dict(zip(states, new, strict=True))
        logits.append(out[0, 0])
    return np.stack(logits)


def verify(context: int, tokens: int, block: int) -> Iterator[dict[str, Any]]:
    weights = decoder_weights(smollm2_file(), SMOLLM2)
    ids = token_windows(smollm2_tokenizer(), 1, context + tokens)[0]
    whole = run_decoder(SMOLLM2, weights, ids[:context], with_attention=True)
    best = run_decoder(
        SMOLLM2, weights, ids[context:], past=(whole.keys, whole.values), start=context
    ).logits.argmax(-1)
    slots = context + tokens
    mass = whole.attention.sum(axis=2)
    mod = import_onnx(build_decoder_step(SMOLLM2, weights, slots, trained=True)).mod
    for drop, dtype in CHECKED:
        spec = KVSpec(drop, block=block, score="attention_mass", dtype=dtype)
        passed = ApplyKVCompress(
            spec, cache_inputs(whole, slots), length=context, attention=mass, opaque_states=STATES
        )
        after = passed(mod)
        built = build(after, host_target(1))
        small = passed.compacted
        assert small is not None
        names = [past for past, _ in (opaque_states(after) or STATES)]
        got = run_steps(built, names, ids[context:], small.arrays, small.length, context)
        index = small.positions[..., None]
        past = tuple(np.take_along_axis(rows, index, 2) for rows in (whole.keys, whole.values))
        stored = {"stored": stored_rows} if dtype else {}
        past = tuple(map(stored_rows, past)) if dtype else past
        want = run_decoder(
            SMOLLM2, weights, ids[context:], past=past, start=context, **stored
        ).logits
        yield {
            "drop": drop,
            "dtype": dtype,
            "context": context,
            "tokens": tokens,
            "block": block,
            "kept": small.length,
            "slots": passed.meta["slots"],
            "bytes_before": passed.meta["bytes_before"],
            "bytes_after": passed.meta["bytes_after"],
            "dropped_minus_freed_slots": context - small.length - (slots - passed.plan.slots),
            "max_abs_error": float(np.abs(got - want).max()),
            "max_abs_logit": float(np.abs(want).max()),
            "same_token_as_reference": float((got.argmax(-1) == want.argmax(-1)).mean()),
            "same_token_as_whole_cache": float((got.argmax(-1) == best).mean()),
        }


# -- time


def feeds(slots: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (1, SMOLLM2.kv_heads, slots, SMOLLM2.depth)
    return {
        "input_ids": np.array([[100]]),
        "position_ids": np.array([[slots - 1]]),
        "cache_length": np.array([slots - 1]),
        **{past: rng.standard_normal(shape, dtype=np.float32) for past, _ in STATES},
    }


def arms(
    model: onnx.ModelProto, slots: int, drops: list[float], block: int
) -> dict[str, tuple[Built, int]]:
    """Return the compiled step and its slots, on the whole cache and for every request."""
    mod = import_onnx(model).mod
    found = {"copied": (build(mod, host_target(1)), slots)}
    mod = AttachLayoutTags(STATES)(mod)
    found["whole"] = (build(mod, host_target(1)), slots)
    requests = [KVSpec(drop, block, dtype=dtype) for dtype in (None, "int8") for drop in drops]
    for spec in [*requests, KVSpec(0.0, block, dtype="int8")]:
        passed = ApplyKVCompress(spec)
        name = f"drop {spec.drop}" if spec.drop else ""
        name = f"{name} {spec.dtype or ''}".strip()
        found[name] = (build(passed(mod), host_target(1)), passed.plan.slots)
    return found


@contextmanager
def kernel_times(built: Built) -> Iterator[dict[str, float]]:
    """Sum the seconds of every kernel while inside."""
    spent: dict[str, float] = {}

    def note(_: Any, name: str, before: bool, *__: Any) -> Any:
        spent[name] = spent.get(name, 0.0) + (-1 if before else 1) * time.perf_counter()
        return relax.VMInstrumentReturnKind.NO_OP

    built.vm.set_instrument(note)
    yield spent
    built.vm.set_instrument(lambda *_: relax.VMInstrumentReturnKind.NO_OP)


def cache_ms(built: Built, call: Callable[[], Any], calls: int = 25) -> float:
    """Return the time of a step's kernels that read or write the cache, each at its least."""
    least: dict[str, float] = {}
    with kernel_times(built) as spent:
        for _ in range(calls):
            spent.clear()
            call()
            least = {name: min(s, least.get(name, s)) for name, s in spent.items()}
    return 1e3 * sum(s for name, s in least.items() if any(k in name for k in CACHE_KERNELS))


def timing(slots: int, drops: list[float], blocks: int, repeats: int, block: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        model = build_smollm2_step(slots)
        onnx.save(model, path)
        found = arms(model, slots, drops, block)
        del model
        # Every arm drops and quantises the whole cache by itself.
        calls = {name: built.caller(feeds(slots)) for name, (built, _) in found.items()}
        with Peer("onnxruntime", path, feeds(slots), 1) as peer:
            got = built_logits(found["whole"][0], feeds(slots))
            error = float(np.abs(got - peer.outputs["logits"]).max())
            samples = compare_with_peer(
                calls, {"onnxruntime": peer}, blocks=blocks, block_repeats=repeats, warmup=2
            )
    record: dict[str, Any] = {
        "slots": {name: size for name, (_, size) in found.items()},
        "rounds": len(samples["whole"]),
        "logits_max_abs_difference_from_onnxruntime": error,
        "step_ms": {name: summarise(times)["median"] for name, times in samples.items()},
        "step_min_ms": {name: 1e3 * float(times.min()) for name, times in samples.items()},
        "kv_min_ms": {
            name: cache_ms(built, calls[name]) for name, (built, _) in found.items()
        },
        "ratios": {
            f"{name}/{other}": dict(ratio(samples[name], samples[other]))
            for other in ("copied", "whole", "onnxruntime")
            for name in found
            if name != other
        },
    }  # fmt: skip
    return record


def built_logits(built: Built, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return built.run_all(inputs)[0]


def show(record: dict[str, Any]) -> None:
    print(
        f"{record['rounds']} rounds, one thread, logits differ from ONNX Runtime by "
        f"{record['logits_max_abs_difference_from_onnxruntime']:.1e}"
    )
    for name, median in record["step_ms"].items():
        size = record["slots"].get(name, record["slots"]["whole"])
        kv = record["kv_min_ms"].get(name)
        kv_text = "" if kv is None else f"  cache kernels {kv:7.2f} ms"
        vs = record["ratios"].get(f"{name}/whole", {"median": 1.0})["median"]
        if name == "onnxruntime":
            vs = 1 / record["ratios"]["whole/onnxruntime"]["median"]
        print(
            f"  {name:14s} {size:6d} slots  median {median:8.2f} ms  min "
            f"{record['step_min_ms'][name]:8.2f} ms  {vs:6.3f} of whole{kv_text}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--drops", type=float, nargs="*", default=list(DROPS))
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--page", type=int, default=128)
    parser.add_argument("--skip", choices=["verify", "time"])
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "env": fingerprint()}
    if arguments.skip != "verify":
        record["verify"] = list(verify(context=512, tokens=16, block=16))
        for row in record["verify"]:
            print(json.dumps(row))
    if arguments.skip != "time":
        record["time"] = []
        for slots in arguments.slots:
            options = (arguments.blocks, arguments.repeats, arguments.page)
            row = timing(slots, arguments.drops, *options)
            record["time"].append(row)
            show(row)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
