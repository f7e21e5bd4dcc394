"""Turn text into the inputs of MiniLM and other BERT-uncased encoders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icd_tvm.errors import ConfigError, MissingDependencyError
from icd_tvm.models.minilm import model_file

VOCAB = 30522


@lru_cache(maxsize=4)
def _tokenizer(seq: int) -> Any:
    path = model_file("tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(
            "encoding text needs tokenizers", "pip install tokenizers"
        ) from error
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(max_length=seq)
    tokenizer.enable_padding(length=seq)
    return tokenizer


def encode(texts: Sequence[str], seq: int) -> dict[str, NDArray[np.int64]]:
    """Tokenize texts, cut and padded to one length.

    Parameters
    ----------
    texts : sequence of str
    seq : int
        Tokens per text, at least 3: two of them are [CLS] and [SEP].

    Returns
    -------
    dict of str to ndarray of int64
        ``input_ids``, ``attention_mask`` and ``token_type_ids``, each ``[len(texts), seq]``.

    Raises
    ------
    MissingDependencyError
        The tokenizers library or the package with the vocabulary is absent.
    ConfigError
        seq is below 3.
    """
    if seq < 3:
        raise ConfigError(f"seq {seq} leaves no room for text", "use at least 3")
    encodings = _tokenizer(seq).encode_batch(list(texts))
    shape = (len(encodings), seq)
    rows = {
        "input_ids": [e.ids for e in encodings],
        "attention_mask": [e.attention_mask for e in encodings],
        "token_type_ids": [e.type_ids for e in encodings],
    }
    return {name: np.asarray(row, dtype=np.int64).reshape(shape) for name, row in rows.items()}
