"""Opaque states through every pass: several steps with the state fed back equal the original's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from axis_models import MODELS, TARGET

from icd_tvm._tvm import apply_pass, tvm
from icd_tvm.arguments import refused
from icd_tvm.commands.compile import options_from, parser
from icd_tvm.errors import (
    ConfigError,
    PermutationError,
    ShapeError,
    TransformError,
    VerificationError,
)
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build as build_model
from icd_tvm.relax_passes.attach_layout_tags import AttachLayoutTags, tagged_groups
from icd_tvm.relax_passes.compact_groups import compact_groups
from icd_tvm.relax_passes.permute_constants import permute_groups
from icd_tvm.relax_passes.repermute_pass import RepermutePass
from icd_tvm.relax_passes.state_order import STATE_ORDER, StateOrder
from icd_tvm.relax_passes.verify_layout import VerifyLayout, difference
from icd_tvm.runtime.build import Built, build
from icd_tvm.runtime.compile_model import compile_model
from icd_tvm.runtime.options import CompileOptions

# Hidden units of each group that leave with unit:0.5; 16 lanes stay whole.
REMOVED = {"mamba-mini-random": 16, "decoder-mini-step-random": 32}
STEPS = {"mamba-mini-random": 4, "decoder-mini-step-random": 3}


def states_of(inputs: Any, outputs: Any) -> tuple[tuple[str, str], ...]:
    pairs = [(s.name, s.name.replace("past", "present", 1)) for s in inputs]
    pairs += [(s.name, f"{s.name}_new") for s in inputs]
    return tuple((a, b) for a, b in pairs if a != b and b in outputs)


def recurrent(seed: int = 0) -> tuple[Any, Any]:
    """Return a tagged module with a state h and the same, its hidden axis permuted."""
    mini = MODELS["recurrent_state"]()
    mod = apply_pass(AttachLayoutTags(mini.opaque_states), mini.mod)
    groups = tagged_groups(mod)
    perm = np.random.default_rng(seed).permutation(16)
    return mod, permute_groups(mod, groups, {groups.free[0].id: perm})


def run_steps(built: Built, imported: Any, pairs: Any, steps: int) -> list[np.ndarray]:
    """Feed the states back and return what every step shows of the other outputs."""
    rng = np.random.default_rng(3)
    feeds = {s.name: np.zeros(s.shape, s.dtype) for s in imported.inputs}
    fed = dict(pairs)
    shown: list[np.ndarray] = []
    for _ in range(steps):
        for spec in imported.inputs:
            if spec.name not in fed and spec.name in ("input_ids", "ids"):
                feeds[spec.name] = rng.integers(0, 90, spec.shape).astype(spec.dtype)
        outputs = dict(zip(imported.outputs, built.run_all(feeds), strict=True))
        feeds |= {name: outputs[target] for name, target in fed.items()}
        shown += [array for name, array in outputs.items() if name not in fed.values()]
    return shown


@pytest.mark.parametrize("name", STEPS)
def test_a_decode_step_compiles_with_its_states_and_keeps_every_step(name: str) -> None:
    imported = import_onnx(build_model(name))
    pairs = states_of(imported.inputs, imported.outputs)
    assert pairs
    options = CompileOptions(
        name,
        sparsity="unit:0.5; min-size=0",
        measure=False,
        repeats=30,
        opaque_states=pairs,
        seed=1,
    )
    result = compile_model(options)
    moved = StateOrder.read(result.arms["random"].mod)
    assert {own.name for own in moved.axes} == {pair[0] for pair in pairs}
    assert result.equivalence.within(1e-4)
    assert set(result.arms["iterative"].removed.values()) == {REMOVED[name]}
    expected = run_steps(result.built["identity"], imported, pairs, STEPS[name])
    for arm in set(result.built) - {"dense", "identity"}:
        found = run_steps(result.built[arm], imported, pairs, STEPS[name])
        assert difference(expected, found).within(1e-4)


def test_without_states_the_same_groups_are_pinned() -> None:
    imported = import_onnx(build_model("mamba-mini-random"))
    pairs = states_of(imported.inputs, imported.outputs)
    tagged = apply_pass(AttachLayoutTags(pairs), imported.mod)
    assert len(tagged_groups(imported.mod).free) < len(tagged_groups(tagged).free)
    kept = apply_pass(AttachLayoutTags(), tagged)
    assert tagged_groups(kept).opaque_states == pairs
    dropped = apply_pass(AttachLayoutTags([]), tagged)
    assert tagged_groups(dropped).opaque_states == ()


def test_channels_with_an_undeclared_state_cannot_leave() -> None:
    imported = import_onnx(build_model("mamba-mini-random"))
    groups = tagged_groups(imported.mod)
    group = next(g for g in groups.pinned if g.size == 48)
    with pytest.raises(
        PermutationError, match=r"cannot lose indices: graph input (conv|ssm)_0 axis 1"
    ):
        compact_groups(imported.mod, groups, {group.id: np.arange(32)})


def test_the_order_of_a_state_is_recorded_composes_and_survives_saving() -> None:
    mod, once = recurrent()
    groups = tagged_groups(once)
    twice = permute_groups(once, groups, {groups.free[0].id: np.roll(np.arange(16), 5)})
    loaded = tvm.ir.load_json(tvm.ir.save_json(twice))
    first, second = StateOrder.read(once).axes[0], StateOrder.read(loaded).axes[0]
    assert (second.name, second.output, second.axis, second.size) == ("h", 1, 1, 16)
    np.testing.assert_array_equal(second.order, np.roll(first.order, 5))
    assert STATE_ORDER not in (mod.attrs or {})
    assert StateOrder.read(mod) == StateOrder()


def test_a_saved_state_is_converted_there_and_back() -> None:
    _, other = recurrent()
    order = StateOrder.read(other)
    feeds = {"x": np.ones((1, 8)), "h": np.arange(16.0)[None]}
    own = order.inputs_to_own(feeds)
    np.testing.assert_array_equal(own["h"][0], order.axes[0].order)
    np.testing.assert_array_equal(own["x"], feeds["x"])
    np.testing.assert_array_equal(order.inputs_to_original(own)["h"], feeds["h"])
    with pytest.raises(ShapeError, match=r"state 'h' has shape \(1, 15\), expected 16 on axis 1"):
        order.inputs_to_own({"h": np.ones((1, 15))})


def test_a_build_takes_and_returns_states_in_the_original_order() -> None:
    mod, other = recurrent()
    mini = MODELS["recurrent_state"]()
    feeds = dict(zip(("x", "h"), mini.inputs, strict=True))
    expected, found = (build(m, TARGET).run_all(feeds) for m in (mod, other))
    assert difference(expected, found).within(1e-5)


def test_verification_reads_the_state_order() -> None:
    mod, other = recurrent()
    VerifyLayout(mod)(other)
    VerifyLayout(other)(mod)
    wrong = other.without_attr(STATE_ORDER)
    with pytest.raises(VerificationError, match="outputs differ"):
        VerifyLayout(mod)(wrong)


def test_a_shortened_state_stands_for_the_whole_one() -> None:
    mini = MODELS["recurrent_state"]()
    mod = apply_pass(AttachLayoutTags(mini.opaque_states), mini.mod)
    groups = tagged_groups(mod)
    kept = np.array([9, 2, 5])
    smaller = compact_groups(mod, groups, {groups.free[0].id: kept})
    order = StateOrder.read(smaller)
    np.testing.assert_array_equal(order.axes[0].order, kept)
    back = order.inputs_to_original(order.inputs_to_own({"h": np.arange(16.0)[None]}))["h"]
    np.testing.assert_array_equal(np.flatnonzero(back), np.sort(kept))


def test_the_pass_takes_states() -> None:
    mini = MODELS["recurrent_state"]()
    plain, known = RepermutePass(), RepermutePass(opaque_states=mini.opaque_states)
    plain(mini.mod)
    known(mini.mod)
    assert not plain.decisions
    assert [decision.perm.size for decision in known.decisions] == [16]


def test_the_command_line_takes_states(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["m.onnx", "--opaque-state", "a=b", "--opaque-state", "c=d"]
    options = options_from(parser().parse_args(arguments))
    assert options.opaque_states == (("a", "b"), ("c", "d"))
    with pytest.raises(ConfigError, match="--opaque-state a="):
        options_from(parser().parse_args(["m.onnx", "--opaque-state", "a="]))
    with pytest.raises(TransformError, match="no input named 'nothing'") as caught:
        compile_model(
            CompileOptions("mamba-mini-random", measure=False, opaque_states=(("nothing", "x"),))
        )
    assert refused(caught.value, []) == 2
    assert "ICD-E402" in capsys.readouterr().err
