"""Names in published checkpoints -> the names that the builders use."""

from __future__ import annotations

# TensorFlow's names, which early checkpoints of BERT have.
_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def bert_name(name: str) -> str:
    """Return a BERT weight's name without its head's prefix and in today's spelling."""
    name = name.removeprefix("bert.")
    for old, new in _OLD_NORMS.items():
        name = name.replace(old, new)
    return name


def mamba_name(name: str) -> str:
    """Return a Mamba weight's name as state-spaces has it; transformers says ``embeddings``."""
    return name.replace("backbone.embeddings.", "backbone.embedding.")
