"""The training library of the recipes, on the CPU, or one error that says how to get it."""

from __future__ import annotations

from icd_tvm.errors import MissingDependencyError

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise MissingDependencyError(
        "training a recipe needs jax", "pip install 'icd-tvm[recipes]'"
    ) from error

# A recipe's figures are a CPU's, also on a machine whose jax would take a GPU.
jax.config.update("jax_platforms", "cpu")

__all__ = ["jax", "jnp"]
