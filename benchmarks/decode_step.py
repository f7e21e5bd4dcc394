"""A whole decoding step of SmolLM2-135M beside other runtimes; the "step" of cpu_decode.py."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from peer_ratios import to_fastest
from step_prompt import TOKENS, Array, Prompt, arm_logits, compared, peer_logits, read_prompt

BAR = 0.85
QUANT = "int8; *lm_head*=int8"
CACHES = ("int8", "fp16", "bf16")
PEERS = ("onnxruntime-int8", "onnxruntime-int8w", "openvino-int8w", "torch-int8")
LLAMA, REFERENCE = "llamacpp", "onnxruntime"
# Timed calls of each in a turn.
TURN = 5
Line = dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """What is measured.

    Attributes
    ----------
    caches : sequence of str
        Narrow caches of ours, beside the one of floats.
    peers : sequence of str
        They read the ONNX file.
    gguf : Path, optional
        For llama.cpp.
    work : Path, optional
        Folder that keeps the models and the prompt's cache for another run.
    """

    caches: Sequence[str] = CACHES
    peers: Sequence[str] = PEERS
    gguf: Path | None = None
    work: Path | None = None


def step_line(slots: int, threads: int, rounds: int, contest: Contest) -> Line:
    """Measure one size of the cache, all runtimes in turns."""
    with contextlib.ExitStack() as stack:
        folder = contest.work
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="icd-step-")))
        folder.mkdir(parents=True, exist_ok=True)
        prompt, model = read_prompt(slots, folder / "prompt.npz"), folder / f"step-{slots}.onnx"
        if not model.exists():
            save_model(slots, model)
        want, why = reference(model, prompt, threads)
        built = step_arms(model, threads, contest.caches)
        running, missing = started(stack, model, contest, prompt, threads)
        sources = {name: partial(arm_logits, arm, prompt) for name, arm in built.items()}
        sources |= {name: partial(peer_logits, peer, prompt) for name, peer in running.items()}
        logits = compared(sources, want, why)
        line: Line = {"case": f"SmolLM2-135M step, int8 weights, {slots} slots", "threads": threads}
        line |= {"bar": BAR, "missing": missing}
        line |= {"peers": {name: peer.info for name, peer in running.items()}}
        line |= {"logits": {"tokens": TOKENS, "reference": f"{REFERENCE} fp32", "arms": logits}}
        return line | times(built, running, prompt, rounds)


def save_model(slots: int, path: Path) -> None:
    """Write the step's ONNX file."""
    from icd_tvm.models.smollm2 import build_smollm2_step

    onnx.save(build_smollm2_step(slots), path)


def step_arms(model: Path, threads: int, caches: Sequence[str]) -> dict[str, Any]:
    """Build our step: on a cache of floats, and on narrow ones."""
    from icd_tvm._tvm import apply_pass
    from icd_tvm.adapters.kv_spec import parse_kv
    from icd_tvm.models.decoder import SMOLLM2, cache_states
    from icd_tvm.models.importer import import_onnx
    from icd_tvm.relax_passes.apply_kv_compress import ApplyKVCompress
    from icd_tvm.relax_passes.apply_quant import ApplyQuant, parse_quant
    from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
    from icd_tvm.relax_passes.layer_rules import parse_request
    from icd_tvm.runtime.build import build
    from icd_tvm.tir_schedules.target import host_target

    mod = apply_pass(AttachLayoutTags(cache_states(SMOLLM2)), import_onnx(str(model)).mod)
    mod = apply_pass(ApplyQuant(parse_request(QUANT, parse_quant)), mod)
    found = {"ours": build(mod, host_target(threads))}
    for name in caches:
        narrow = apply_pass(ApplyKVCompress(parse_kv(f"dtype={name}")), mod)
        found[f"ours, {name} cache"] = build(narrow, host_target(threads))
    return found


def reference(model: Path, prompt: Prompt, threads: int) -> tuple[Array | None, str]:
    """Return the logits of ONNX Runtime in float32, or None and the reason."""
    from icd_tvm.measure.peers import Peer, PeerError

    try:
        with Peer(REFERENCE, model, prompt.feeds(), threads) as peer:
            return peer_logits(peer, prompt), ""
    except PeerError as error:
        return None, str(error)


def started(
    stack: contextlib.ExitStack, model: Path, contest: Contest, prompt: Prompt, threads: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Start every peer; return those that run, and why the others do not."""
    from icd_tvm.measure.peers import Peer, PeerError

    files = {name: (model, prompt.feeds()) for name in contest.peers}
    if contest.gguf is not None:
        files[LLAMA] = (contest.gguf, prompt.own_cache_feeds())
    running, missing = {}, {}
    for name, (path, feeds) in files.items():
        try:
            running[name] = stack.enter_context(Peer(name, path, feeds, threads))
        except PeerError as error:
            missing[name] = str(error)
    return running, missing


def times(
    built: Mapping[str, Any], running: Mapping[str, Any], prompt: Prompt, rounds: int
) -> Line:
    """Time all in turns; return the times and ratios, or why there are none."""
    from icd_tvm.measure.peers import compare_with_peer
    from icd_tvm.measure.statistics import summarise

    present = [name for name in running if name != LLAMA]
    if not present:
        return {"failed": "no peer runs"}
    calls = {name: arm.caller(prompt.feeds()) for name, arm in built.items()}
    samples = compare_with_peer(calls, running, blocks=-(-rounds // TURN), block_repeats=TURN)
    found = {name: summarise(values) for name, values in samples.items()}
    line: Line = {"ms": {name: [t["median"], t["min"]] for name, t in found.items()}}
    line |= {"rounds": len(samples["ours"]), **to_fastest("ours", found, present)}
    if LLAMA in found:
        other = found[LLAMA]["median"]
        line["to_llamacpp"] = {name: found[name]["median"] / other for name in built}
    return line


def show_logits(line: Line) -> str:
    """Return the line of the Markdown table that has a step's logits."""
    found = line["logits"]
    what = f"same top token of {found['tokens']} as {found['reference']}, max difference"
    parts = []
    for name, one in found["arms"].items():
        if "not_compared" in one:
            parts.append(f"{name} not compared: {one['not_compared']}")
        else:
            parts.append(f"{name} {one['top1']:.0%}, {one['max_abs']:.2g} ({one['max_rel']:.2g})")
    return f"| {line['case']}: {what} | {line['threads']} | {'; '.join(parts)} | | | |"
