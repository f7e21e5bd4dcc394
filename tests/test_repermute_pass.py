"""RepermutePass among stock TVM passes, and its refusals."""

from typing import Any

import numpy as np
import pytest
from relax_models import F, constants, example, mlp, mlp_weights, random_mlp, run

import icd_tvm
from icd_tvm._tvm import relax, tvm
from icd_tvm.models.registry import build
from icd_tvm.relax_passes import repermute_pass
from icd_tvm.relax_passes.verify_layout import Difference, VerifyLayout, difference

T = relax.transform


def _scattered_groups() -> Any:
    """Return an MLP whose w1 has four scattered groups of 16 columns with disjoint rows."""
    w1, b1, w2 = mlp_weights()
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(4), F // 4))
    rows = np.arange(w1.shape[0]) % 4
    w1[rows[:, None] != label[None, :]] = 0
    return mlp(w1, b1, w2), label


def test_planted_groups_become_contiguous() -> None:
    mod, label = _scattered_groups()
    pass_ = icd_tvm.RepermutePass()
    rewritten = tvm.transform.Sequential([pass_])(mod)
    order = pass_.decisions[0].perm
    assert all(len(set(label[tile])) == 1 for tile in order.reshape(-1, 16))
    assert pass_.decisions[0].stats["U"] == pass_.decisions[0].stats["U_bound"]
    np.testing.assert_array_equal(
        constants(rewritten)["w1"], constants(mod)["w1"][:, pass_.decisions[0].perm]
    )
    np.testing.assert_allclose(run(rewritten, example()), run(mod, example()), rtol=1e-5, atol=1e-6)


def test_stands_between_stock_passes() -> None:
    mod, _ = _scattered_groups()
    pipeline = tvm.transform.Sequential(
        [
            T.CanonicalizeBindings(),
            icd_tvm.RepermutePass(),
            T.LegalizeOps(),
            T.AnnotateTIROpPattern(),
            T.FoldConstant(),
            T.FuseOps(),
            T.FuseTIR(),
        ]
    )
    np.testing.assert_allclose(
        run(pipeline(mod), example()), run(mod, example()), rtol=1e-5, atol=1e-6
    )


def test_stock_onnx_import_is_accepted() -> None:
    from tvm.relax.frontend.onnx import from_onnx

    proto = build("bert-mini-random", seq=16)
    mod = from_onnx(proto)
    pass_ = icd_tvm.RepermutePass()
    pass_(mod)
    assert [len(d.perm) for d in pass_.decisions] == [256, 256]
    assert pass_.reason.startswith("no opportunity")


def test_the_incoming_module_is_untouched() -> None:
    mod, _ = _scattered_groups()
    before = tvm.ir.save_json(mod)
    icd_tvm.RepermutePass()(mod)
    assert tvm.ir.save_json(mod) == before


def test_dense_says_no_opportunity() -> None:
    mod = random_mlp()
    pass_ = icd_tvm.RepermutePass()
    tvm.ir.assert_structural_equal(pass_(mod)["main"], mod["main"])
    assert pass_.reason.startswith("no opportunity")


def test_unbound_weights_are_named_as_the_reason() -> None:
    w = relax.Var("w", relax.TensorType((8, 8), "float32"))
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.matmul(x, w))
        builder.emit_func_output(out)
    pass_ = icd_tvm.RepermutePass()
    pass_(builder.get())
    assert "BindParams" in pass_.reason


def test_a_wrong_rewrite_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:

    w1, b1, w2 = mlp_weights()
    mod, _ = _scattered_groups()

    @tvm.transform.module_pass(opt_level=0, name="Broken")
    class Breaks:
        def __init__(self, **_: Any) -> None:
            self.removed: dict[str, int] = {}

        def transform_module(self, mod: Any, ctx: Any) -> Any:
            return mlp(w1, b1, -w2)

    monkeypatch.setattr(repermute_pass, "RewriteLayout", Breaks)
    pass_ = icd_tvm.RepermutePass()
    tvm.ir.assert_structural_equal(pass_(mod), mod)
    assert "outputs differ" in pass_.reason


def test_verify_layout_accepts_an_equal_module() -> None:
    verify = VerifyLayout(random_mlp())
    verify(random_mlp())
    assert verify.result.max_rel == 0.0


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ([1.0, 2.0], Difference(0.0, 0.0)),
        ([1.0, 2.5], Difference(0.5, 0.25)),
        ([1.0, np.nan], Difference(np.inf, np.inf)),
    ],
)
def test_difference(candidate: list[float], expected: Difference) -> None:
    assert difference([np.array([1.0, 2.0])], [np.array(candidate)]) == expected


def test_difference_of_shapes_is_infinite() -> None:
    assert difference([np.zeros(2)], [np.zeros(3)]).max_rel == np.inf
