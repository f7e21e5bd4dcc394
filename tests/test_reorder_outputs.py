"""ReorderOutputs keeps the function and refuses what does not fit."""

import numpy as np
import pytest
from relax_models import D, constants, example, mlp_weights, random_mlp, run

from icd_tvm.errors import PermutationError
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
