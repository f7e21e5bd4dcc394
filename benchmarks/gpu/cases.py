"""The whole models that the suite measures; what is said here is read on both machines."""

from __future__ import annotations

from dataclasses import dataclass, replace

ARMS = ("dense", "identity", "random", "linear", "iterative")
UNIT, VECTORS = "unit:0.5", "vectors 64x16:0.5"
# Where the device's memory is too small for the whole: a sixteenth, layers and rows of the head
# alike, so that shares of time are those of the whole.
MAMBA_PART = 16
MAMBA, PART = "mamba-2.8b", f"mamba-2.8b/{MAMBA_PART}"
# Layers and words.
MAMBA_SIZES = {MAMBA: (64, 50280), PART: (4, 3144)}
# Files of the folder beside the libraries, and input sets that cold calls take in turn.
INDEX, POOL, SETS = "models.json", "arrays.npz", 4


@dataclass(frozen=True)
class Case:
    """One model, input shape and transform, in all arms.

    Attributes
    ----------
    model : str
        ``bert-base``, ``mamba-2.8b`` or its part.
    batch, seq : int
        A decode step has one token.
    sparsity : str
        :data:`UNIT` or :data:`VECTORS`; with ``+ heads`` attention heads go as well.
    dtype : str
        Of the products' operands; ``int8``: of a Mamba's weights, beside float16 vectors.
    """

    model: str
    batch: int
    seq: int
    sparsity: str
    dtype: str = "float16"

    @property
    def name(self) -> str:
        """Unique, and short enough for a file."""
        shape = f"{self.batch}x{self.seq}" if self.model not in MAMBA_SIZES else "step"
        return f"{self.model} {shape} {self.sparsity} {self.dtype}"

    @property
    def stem(self) -> str:
        """The name as the stem of a file."""
        return "".join(c if c.isalnum() or c in ".-" else "-" for c in self.name)

    @property
    def tokens(self) -> int:
        """Tokens of one call."""
        return self.batch * self.seq

    @property
    def stands_for(self) -> str:
        """The case that this one is measured in place of, where that cannot be; or empty."""
        return replace(self, model=MAMBA).name if self.model == PART else ""


RESIDENT = Case("bert-base", 1, 128, f"{UNIT} + heads", "int8")
# Most important first: a slot may end at any of them.
CASES = (
    Case("bert-base", 8, 128, UNIT),
    Case(MAMBA, 1, 1, UNIT),
    Case("bert-base", 8, 128, VECTORS),
    Case(MAMBA, 1, 1, VECTORS),
    Case(PART, 1, 1, UNIT),
    Case(PART, 1, 1, VECTORS),
    RESIDENT,
    Case(MAMBA, 1, 1, UNIT, "int8"),
    Case(MAMBA, 1, 1, VECTORS, "int8"),
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
    MAMBA: "a decode step of all 64 layers and 50,280 words; what is pruned, its order and the "
    "drawn numbers are those of three layers: the first, one that stands for all between, the "
    "last; every layer's weights lie in memory of their own; int8: the projections, not the head",
    PART: "4 of 64 layers, 3,144 of 50,280 words: measured where the whole is refused",
    "bert-base": "the whole encoder",
    VECTORS: "feed-forward (Mamba: in and out) projections; groups of 64 hidden units, scattered "
    "over their axis, share which 16-row blocks live",
}
