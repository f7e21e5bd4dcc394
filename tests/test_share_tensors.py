"""ShareTensors: one tensor for each place in planned memory, however many layers use it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.script import ir as I
from tvm.script import relax as R

from icd_tvm._tvm import relax, tvm
from icd_tvm.models.decoder import DECODER_MINI, build_decoder_step, cache_states
from icd_tvm.models.decoder import random_decoder_weights as random_weights
from icd_tvm.models.importer import import_onnx
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags
from icd_tvm.relax_passes.lower_cpu import build_cpu
from icd_tvm.relax_passes.share_tensors import ShareTensors
from icd_tvm.tir_schedules.target import host_target

SLOTS = 9


@I.ir_module
class Before:
    @R.function(pure=False)
    def main(x: R.Tensor((2, 3), "float32")) -> R.Tensor((6,), "float32"):
        place: R.Any = R.memory.alloc_storage(R.shape([24]), 0, R.str("global"), R.dtype("float32"))
        a: R.Tensor((2, 3), "float32") = R.memory.alloc_tensor(
            place, 0, R.shape([2, 3]), R.dtype("float32"), 0
        )
        R.call_packed("step", x, a, ty_args=R.Tuple)
        first: R.Tensor((2, 3), "float32") = a
        flat: R.Tensor((6,), "float32") = R.reshape(first, R.shape([6]))
        b: R.Tensor((2, 3), "float32") = R.memory.alloc_tensor(
            place, 0, R.shape([2, 3]), R.dtype("float32"), 0
        )
        R.call_packed("step", flat, b, ty_args=R.Tuple)
        other: R.Tensor((3, 2), "float32") = R.memory.alloc_tensor(
            place, 0, R.shape([3, 2]), R.dtype("float32"), 0
        )
        R.call_packed("step", b, other, ty_args=R.Tuple)
        again: R.Tensor((6,), "float32") = R.reshape(b, R.shape([6]))
        return again


@I.ir_module
class Expected:
    @R.function(pure=False)
    def main(x: R.Tensor((2, 3), "float32")) -> R.Tensor((6,), "float32"):
        place: R.Any = R.memory.alloc_storage(R.shape([24]), 0, R.str("global"), R.dtype("float32"))
        a: R.Tensor((2, 3), "float32") = R.memory.alloc_tensor(
            place, 0, R.shape([2, 3]), R.dtype("float32"), 0
        )
        R.call_packed("step", x, a, ty_args=R.Tuple)
        flat: R.Tensor((6,), "float32") = R.reshape(a, R.shape([6]))
        R.call_packed("step", flat, a, ty_args=R.Tuple)
        other: R.Tensor((3, 2), "float32") = R.memory.alloc_tensor(
            place, 0, R.shape([3, 2]), R.dtype("float32"), 0
        )
        R.call_packed("step", a, other, ty_args=R.Tuple)
        return flat


def test_one_tensor_a_place_and_one_view_a_shape() -> None:
    share = ShareTensors()
    before = Before.clone()
    tvm.ir.assert_structural_equal(share(Before), Expected)
    assert share.shared == 2
    tvm.ir.assert_structural_equal(Before, before)


def allocations(layers: int) -> Counter[str]:
    """Return how often a decoding step asks the virtual machine for memory."""
    config = replace(DECODER_MINI, layers=layers)
    model = build_decoder_step(config, random_weights(config), SLOTS)
    mod = AttachLayoutTags(cache_states(config))(import_onnx(model).mod)
    machine = relax.VirtualMachine(build_cpu(mod, host_target(1)), tvm.cpu())
    seen: Counter[str] = Counter()

    def note(_: Any, name: str, before: bool, *__: Any) -> Any:
        seen[name] += before
        return relax.VMInstrumentReturnKind.NO_OP

    state = np.zeros((1, config.kv_heads, SLOTS, config.depth), np.float32)
    numbers = [np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64), np.array([3])]
    arguments = [tvm.runtime.tensor(a) for a in (*numbers, *[state] * 2 * layers)]
    machine["main"](*arguments)
    machine.set_instrument(note)
    machine["main"](*arguments)
    return seen


def test_more_layers_ask_for_no_more_memory() -> None:
    # The plan repeats itself from the fourth layer on.
    few, more = allocations(4), allocations(6)
    kernels = {name for name in few if "builtin" not in name}
    assert sum(more[name] for name in kernels) > sum(few[name] for name in kernels)
    for name in ("alloc_storage", "alloc_tensor"):
        assert few[f"vm.builtin.{name}"] == more[f"vm.builtin.{name}"], name
    assert few["vm.builtin.alloc_storage"] > 0
