"""The whole models that the suite measures; what is said here is read on both machines."""

from __future__ import annotations

from dataclasses import dataclass

ARMS = ("dense", "identity", "random", "linear", "iterative")
UNIT, VECTORS = "unit:0.5", "vectors 64x16:0.5"
# A sixteenth of Mamba-2.8B: layers and rows of its head alike, so that shares of time are those of
# the whole. 64 layers would need 11 GB of float32 weights where arms are made.
MAMBA_PART = 16
# Files of the folder beside the libraries, and input sets that cold calls take in turn.
INDEX, POOL, SETS = "models.json", "arrays.npz", 4


@dataclass(frozen=True)
class Case:
    """One model, input shape and transform, in all arms.

    Attributes
    ----------
    model : str
        ``bert-base`` or ``mamba-2.8b``.
    batch, seq : int
        A decode step has one token.
    sparsity : str
        :data:`UNIT` or :data:`VECTORS`; with ``+ heads`` attention heads go as well.
    dtype : str
        Of the products' operands.
    """

    model: str
    batch: int
    seq: int
    sparsity: str
    dtype: str = "float16"

    @property
    def name(self) -> str:
        """Unique, and short enough for a file."""
        shape = f"{self.batch}x{self.seq}" if self.model != "mamba-2.8b" else "step"
        return f"{self.model} {shape} {self.sparsity} {self.dtype}"

    @property
    def stem(self) -> str:
        """The name as the stem of a file."""
        return "".join(c if c.isalnum() or c in ".-" else "-" for c in self.name)

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.batch * self.seq


RESIDENT = Case("bert-base", 1, 128, f"{UNIT} + heads", "int8")
# Most important first: a slot may end at any of them.
CASES = (
    Case("bert-base", 8, 128, UNIT),
    Case("mamba-2.8b", 1, 1, UNIT),
    Case("bert-base", 8, 128, VECTORS),
    Case("mamba-2.8b", 1, 1, VECTORS),
    RESIDENT,
    Case("mamba-2.8b", 1, 1, UNIT, "int8"),
    *(
        Case("bert-base", batch, seq, sparsity)
        for sparsity in (UNIT, VECTORS)
        for seq in (128, 512)
        for batch in (1, 8, 32)
        if (batch, seq) != (8, 128)
    ),
    Case("bert-base", 8, 128, UNIT, "int8"),
)
NOTES = {
    "mamba-2.8b": f"4 of 64 layers, 3,144 of 50,280 words: 1/{MAMBA_PART} of the model",
    "bert-base": "the whole encoder",
    VECTORS: "feed-forward (Mamba: in and out) projections; groups of 64 hidden units, scattered "
    "over their axis, share which 16-row blocks live",
}
