"""SmolLM2's compiled decode step on a compacted KV cache: is it right, and what does it gain?

"verify" compacts the real cache of a text, feeds the next tokens to the compiled module for the
smaller cache and compares the logits with numpy attention over the kept tokens alone. "time" runs
steps of every cache interleaved, ONNX Runtime on the whole cache in a process of its own; which
values are cached does not matter there, they are random. For each drop, "linear" keeps the order
of before and masks the dropped slots, "iterative" moves the kept ones together; both compute one
function, which is checked. The mask is one row for all layers and heads, the cheapest there is.
"whole" drops nothing. With --more: the caches in int8, and "copied", the step on the whole cache
that writes all of it anew, as the model says; every other arm appends in place. "kv ms" are the
kernels that read or write the cache.

Run: python benchmarks/kv_step.py [--slots 1024 4096 8192] [--drops 0.3 0.5] [--blocks 6]
     [--more] [--skip verify|time] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from icd_tvm._tvm import relax
from icd_tvm.adapters.kv_quant import STATE_TYPES, stored_rows
from icd_tvm.adapters.kv_spec import KVSpec
from icd_tvm.measure.datasets import token_windows
from icd_tvm.measure.environment import fingerprint
from icd_tvm.measure.peers import Peer, compare_with_peer
from icd_tvm.measure.statistics import ratio, summarise
from icd_tvm.models.decoder import LOWEST, SMOLLM2, build_decoder_step, cache_states
from icd_tvm.models.decoder_reference import DecoderRun, run_decoder
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.onnx_writer import tensor_info
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
DROPPED = "dropped"
DROPS = (0.3, 0.5)
WHOLE = tuple((0.0, dtype) for dtype in STATE_TYPES)
CHECKED = (*((drop, None) for drop in DROPS), *WHOLE, (0.3, "int8"))
CACHE_KERNELS = ("decode_attention", "where", "append_row", "round_cast", "tir_abs_max")


# -- verify


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
        stored = {}
        if dtype:
            # The rows as the step reads them.
            stored = {"stored": partial(stored_rows, dtype=dtype)}
            past = tuple(map(stored["stored"], past))
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


def with_mask(model: onnx.ModelProto, slots: int) -> onnx.ModelProto:
    """Add the input ``dropped`` [slots] to the step's mask, in place."""
    nodes = model.graph.node
    at = next(i for i, node in enumerate(nodes) if node.name == "/cache/Where")
    mask, joined = nodes[at].output[0], "/cache/with_dropped"
    for node in nodes:
        node.input[:] = [joined if name == mask else name for name in node.input]
    nodes.insert(at + 1, helper.make_node("Add", [mask, DROPPED], [joined], name="/cache/Add"))
    model.graph.input.append(tensor_info(DROPPED, (slots,)))
    return model


def both_orders(
    whole: dict[str, np.ndarray], drop: float, slots: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return the inputs of the masked step and of the compacted one, the same tokens dropped."""
    filled = int(whole["cache_length"][0])
    kept = np.arange(filled)
    gone = np.random.default_rng(1).choice(filled, round(drop * filled), replace=False)
    kept = np.delete(kept, gone)
    mask = np.zeros(filled + 1, np.float32)
    mask[gone] = LOWEST
    small = {**whole, "cache_length": np.array([len(kept)])}
    for past, _ in STATES:
        small[past] = np.zeros((1, SMOLLM2.kv_heads, slots, SMOLLM2.depth), np.float32)
        small[past][:, :, : len(kept)] = whole[past][:, :, kept]
    return {"linear": {**whole, DROPPED: mask}, "iterative": small}


@dataclass
class Arm:
    """A compiled step with the cache that it reads."""

    built: Built
    slots: int
    inputs: dict[str, np.ndarray]


def arms(slots: int, options: argparse.Namespace, path: Path) -> dict[str, Arm]:
    """Compile the step on the whole cache and in both orders of every drop; the model to path."""
    model, whole = build_smollm2_step(slots), feeds(slots)
    onnx.save(model, path)
    plain = import_onnx(model).mod
    mod = AttachLayoutTags(STATES)(plain)
    found = {"whole": Arm(build(mod, host_target(1)), slots, whole)}
    if options.more:
        found["copied"] = Arm(build(plain, host_target(1)), slots, whole)
    masked = AttachLayoutTags(STATES)(import_onnx(with_mask(model, slots)).mod)
    del model
    linear = build(masked, host_target(1))
    for drop in options.drops:
        passed = ApplyKVCompress(KVSpec(drop, options.page))
        compacted, left = build(passed(mod), host_target(1)), passed.plan.slots
        inputs = both_orders(whole, drop, left)
        found[f"linear {drop}"] = Arm(linear, slots, inputs["linear"])
        found[f"iterative {drop}"] = Arm(compacted, left, inputs["iterative"])
    for drop in (0.0, *options.drops) if options.more else ():
        passed = ApplyKVCompress(KVSpec(drop, options.page, dtype="int8"))
        built = build(passed(mod), host_target(1))
        found[f"int8 {drop}" if drop else "int8"] = Arm(built, passed.plan.slots, whole)
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


def timing(slots: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        found = arms(slots, options, path)
        calls = {name: arm.built.caller(arm.inputs) for name, arm in found.items()}
        logits = {name: arm.built.run_all(arm.inputs)[0] for name, arm in found.items()}
        with Peer("onnxruntime", path, found["whole"].inputs, 1) as peer:
            error = float(np.abs(logits["whole"] - peer.outputs["logits"]).max())
            samples = compare_with_peer(
                calls, {"onnxruntime": peer},
                blocks=options.blocks, block_repeats=options.repeats, warmup=2,
            )  # fmt: skip
    record: dict[str, Any] = {
        "slots": {name: arm.slots for name, arm in found.items()},
        "rounds": len(samples["whole"]),
        "logits_max_abs_difference_from_onnxruntime": error,
        "step_ms": {name: summarise(times)["median"] for name, times in samples.items()},
        "step_min_ms": {name: 1e3 * float(times.min()) for name, times in samples.items()},
        "kv_min_ms": {name: cache_ms(arm.built, calls[name]) for name, arm in found.items()},
        "ratios": {
            f"{name}/{other}": dict(ratio(samples[name], samples[other]))
            for other in ("whole", "onnxruntime")
            for name in found
            if name != other
        },
    }
    kernels, record["orders"] = record["kv_min_ms"], {}
    for drop in options.drops:
        new, old = f"iterative {drop}", f"linear {drop}"
        record["orders"][f"drop {drop}"] = {
            "slots": found[new].slots,
            "step": dict(ratio(samples[new], samples[old])),
            "kernels": kernels[new] / kernels[old],
            "max_abs_difference": float(np.abs(logits[new] - logits[old]).max()),
            "max_abs_change_by_the_drop": float(np.abs(logits["whole"] - logits[old]).max()),
            "max_abs_logit": float(np.abs(logits[old]).max()),
        }
    return record


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
    for drop, row in record["orders"].items():
        print(
            f"  {drop}: iterative/linear {row['step']['median']:.3f} of the step, "
            f"{row['kernels']:.3f} of the cache's kernels, "
            f"logits differ by {row['max_abs_difference']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="*", default=[1024, 4096, 8192])
    parser.add_argument("--drops", type=float, nargs="*", default=list(DROPS))
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--page", type=int, default=128)
    parser.add_argument("--more", action="store_true", help="int8 caches and the copied one too")
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
            row = timing(slots, arguments)
            record["time"].append(row)
            show(row)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
