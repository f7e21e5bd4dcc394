"""AppendInPlace: the step writes one row of the cache it was given, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from kv_models import DIM, KV, SLOTS, STATES, appending_step, attended, feeds

from icd_tvm._tvm import relax, tvm
from icd_tvm.errors import ShapeError
from icd_tvm.measure.cache_model import model_caches
from icd_tvm.measure.cache_sim import CacheLevel
from icd_tvm.models.decoder import DECODER_MINI, cache_states
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.append_in_place import AppendInPlace
from icd_tvm.relax_passes.attach_layout_tags import LAYOUT_TAG, AttachLayoutTags
from icd_tvm.runtime.build import build
from icd_tvm.tir_schedules.cpu.append_row import append_row
from icd_tvm.tir_schedules.target import host_target


def append_only(in_place: bool) -> Any:
    """Return a step that only appends, as exporters write it or with the kernel."""
    cache = relax.Var("cache", relax.TensorType((1, KV, SLOTS, DIM), "float32"))
    row = relax.Var("row", relax.TensorType((1, KV, 1, DIM), "float32"))
    length = relax.Var("length", relax.TensorType((1,), "int64"))
    builder = relax.BlockBuilder()
    with builder.function("main", [cache, row, length]):
        with builder.dataflow():
            if in_place:
                func = append_row((1, KV, SLOTS, DIM), "float32", (1,), "int64")
                place = builder.add_func(func, "append_row")
                call = relax.op.call_tir_inplace(place, [cache, row, length], 0, cache.ty)
            else:
                mark = builder.emit(relax.op.equal(relax.const(np.arange(SLOTS)), length))
                mark = builder.emit(relax.op.reshape(mark, (SLOTS, 1)))
                call = relax.op.where(mark, row, cache)
            new = builder.emit(call, "new")
            out = builder.emit_output(relax.Tuple([new]))
        builder.emit_func_output(out)
    return builder.get()


def test_a_where_over_a_state_becomes_a_write_of_one_row() -> None:
    mod = append_only(in_place=False)
    passed = AppendInPlace([("cache", "new")])
    after = passed(mod)
    assert (passed.appended, passed.refusals) == (["cache"], {})
    tvm.ir.assert_structural_equal(after, append_only(in_place=True))
    tvm.ir.assert_structural_equal(mod, append_only(in_place=False))


def test_the_states_of_the_tag_are_taken_and_without_any_nothing_happens() -> None:
    mod = append_only(in_place=False)
    tvm.ir.assert_structural_equal(AppendInPlace()(mod), mod)
    after = AppendInPlace()(AttachLayoutTags([("cache", "new")])(mod))
    tvm.ir.assert_structural_equal(after.without_attr(LAYOUT_TAG), append_only(in_place=True))


@pytest.mark.parametrize("length", [0, 5, SLOTS - 1, SLOTS, -1])
def test_the_output_is_the_tensor_that_came_in(length: int) -> None:
    """A length outside the cache stores nothing, as no slot number equals it."""
    built = build(AttachLayoutTags(STATES)(appending_step()), host_target(2))
    given = feeds(length)
    want = {name: given[name].copy() for name in ("keys", "values")}
    if 0 <= length < SLOTS:
        for name, row in (("keys", "k"), ("values", "v")):
            want[name][:, :, length] = given[row][:, :, 0]
    tensors = {name: tvm.runtime.tensor(array) for name, array in given.items()}
    _, *states = built.vm["main"](*(tensors[name] for name in built.input_names))
    for (name, _), state in zip(STATES, states, strict=True):
        np.testing.assert_array_equal(state.numpy(), want[name])
        assert state.data_ptr() == tensors[name].data_ptr()


def test_a_step_may_be_repeated_and_attends_to_the_new_row() -> None:
    built = build(AttachLayoutTags(STATES)(appending_step()), host_target(1))
    given = feeds()
    keys, values = given["keys"].copy(), given["values"].copy()
    keys[:, :, 5], values[:, :, 5] = given["k"][:, :, 0], given["v"][:, :, 0]
    want = attended(given["q"], keys, values, 5)
    call = built.caller(given)
    for _ in range(2):
        np.testing.assert_allclose(call()[0].numpy(), want, atol=1e-5)
    # The caller's numpy arrays are copied on the way in.
    np.testing.assert_array_equal(given["keys"], feeds()["keys"])


def test_steps_with_the_state_fed_back_equal_onnx_runtime() -> None:
    model = build_model("decoder-mini-step-random", seq=SLOTS)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    states = cache_states(DECODER_MINI)
    mod = AttachLayoutTags(states)(import_onnx(model).mod)
    built = build(mod, host_target(1))
    text = str(built.lowered["main"])
    assert (text.count("append_row"), text.count("where")) == (4, 1)  # the mask's
    shape = (1, DECODER_MINI.kv_heads, SLOTS, DECODER_MINI.depth)
    own = {past: tvm.runtime.tensor(np.zeros(shape, np.float32)) for past, _ in states}
    theirs = {past: np.zeros(shape, np.float32) for past, _ in states}
    for step in range(4):
        scalars = {
            "input_ids": np.array([[7 * step + 3]]),
            "position_ids": np.array([[step]]),
            "cache_length": np.array([step]),
        }
        want, *new = session.run(None, {**scalars, **theirs})
        theirs = dict(zip((past for past, _ in states), new, strict=True))
        tensors = {n: tvm.runtime.tensor(a) for n, a in scalars.items()} | own
        got, *_ = built.vm["main"](*(tensors[name] for name in built.input_names))
        np.testing.assert_allclose(got.numpy(), want, atol=2e-5)
    for past, array in theirs.items():
        np.testing.assert_allclose(own[past].numpy(), array, atol=2e-5)


def test_the_cache_model_sees_one_row_written_where_the_cache_lies() -> None:
    built = build(AttachLayoutTags(STATES)(appending_step()), host_target(1))
    # Everything fits, so only cold misses count: 64-byte lines, rows of 32 bytes.
    level = CacheLevel("L", 1 << 20, 16)
    model = model_caches(built.lowered, host_target(1), feeds(), (level,), warm=False)
    kernels = {k.kernel: k for k in model.kernels}
    appended = kernels["append_row"]
    assert appended.reason == ""
    assert appended.levels[0].misses <= 2 * KV
    cache_lines = KV * SLOTS * DIM * 4 // level.line_bytes
    assert model.dram_bytes < 64 * (2 * cache_lines + 40)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("kept elsewhere", "it is not read exactly once"),
        ("not where", "it is not read by a where"),
        ("read twice", "it is not read exactly once"),
        ("other output", "the where that reads it is not what is returned"),
        ("wide row", r"the new row has shape (1, 2, 12, 8), not (1, 2, 1, 8)"),
        ("row mark", "the mark has shape (12, 8), not one value a slot"),
        ("not equal", "the mark is no comparison with a slot number"),
        ("reversed", "the slots are not numbered 0, 1, 2 ..."),
        ("computed", "its slot is computed, not an input"),
    ],
)
def test_what_differs_is_copied_with_a_reason(kind: str, reason: str) -> None:
    mod = appending_step(kind)
    passed = AppendInPlace(STATES)
    after = passed(mod)
    assert passed.appended == ["values"]
    assert passed.refusals == {"keys": reason}
    assert "append_row" in str(after["main"])


def test_a_module_that_shows_other_outputs_is_left_alone() -> None:
    passed = AppendInPlace([("keys", "absent")])
    mod = appending_step()
    tvm.ir.assert_structural_equal(passed(mod), mod)
    assert passed.refusals == {"keys": "no output named 'absent'"}


@pytest.mark.parametrize("sizes", [((2, 3, 4), (1,)), ((1, 2, 3, 4), (2,))])
def test_bad_sizes_are_refused(sizes: Any) -> None:
    with pytest.raises(ShapeError, match="four axes, one length"):
        append_row(sizes[0], "float32", sizes[1], "int64")


def test_a_row_that_a_block_of_threads_cannot_write_is_refused() -> None:
    with pytest.raises(ShapeError, match="1024 threads"):
        append_row((1, 2, 3, 1025), "float32", (1,), "int64", gpu=True)
