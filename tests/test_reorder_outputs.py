"""ReorderOutputs keeps the function and refuses what does not fit."""

import numpy as np
import pytest
from relax_models import D, constants, example, mlp_weights, random_mlp, run

from icd_tvm._tvm import named_const, relax
from icd_tvm.errors import PermutationError
from icd_tvm.relax_passes.emit_quantized import emit_as
from icd_tvm.relax_passes.reorder_outputs import ReorderOutputs


def test_function_is_kept_and_the_weight_is_reordered() -> None:
    mod, x = random_mlp(), example()
    order = np.random.default_rng(3).permutation(D)
    reordered = ReorderOutputs({"fc2": order})(mod)
    np.testing.assert_array_equal(constants(reordered)["w2"], mlp_weights()[2][:, order])
    np.testing.assert_array_equal(constants(mod)["w2"], mlp_weights()[2])
    np.testing.assert_allclose(run(reordered, x), run(mod, x), rtol=1e-5, atol=1e-6)


def test_unknown_matmul_is_refused() -> None:
    with pytest.raises(PermutationError, match="no matmul of that name"):
        ReorderOutputs({"fc9": np.arange(D)})(random_mlp())


def test_wrong_length_is_refused() -> None:
    with pytest.raises(PermutationError, match="length"):
        ReorderOutputs({"fc2": np.arange(3)})(random_mlp())


def test_buffers_of_the_gather_have_names_of_c() -> None:
    x = relax.Var("x", relax.TensorType((1, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            product = emit_as(
                builder, relax.op.matmul(x, named_const(np.eye(8, dtype="f4"), "w")), "/a.0/MatMul"
            )
            out = builder.emit_output(relax.op.negative(product))
        builder.emit_func_output(out)
    mod = ReorderOutputs({"/a.0/MatMul": np.arange(8)[::-1]})(builder.get())
    names = [str(param.name) for param in mod["gather_columns"].params]
    assert names[0] == "_a_0_MatMul_ordered"
    assert all(name.isidentifier() for name in names)
