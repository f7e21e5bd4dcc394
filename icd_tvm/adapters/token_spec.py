"""How many tokens an encoder drops, and behind which attention: as text and as a checked record."""

from __future__ import annotations

from dataclasses import dataclass

from icd_tvm.errors import ConfigError

PREFIX = "tokens="
EXAMPLE = "tokens=0.2,layer=1"


@dataclass(frozen=True)
class TokenSpec:
    """A request to drop tokens between the layers of an encoder.

    Parameters
    ----------
    drop : float
        Share of the tokens of a sequence to drop, padding included, in (0, 1).
    layer : int
        The attention, counted from 0, whose weights choose, and behind which tokens are gone.
    keep_first : int
        Leading tokens that always stay (a classifier's [CLS]).

    Raises
    ------
    ConfigError
        A number out of range.
    """

    drop: float
    layer: int = 0
    keep_first: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.drop < 1.0:
            raise ConfigError(f"tokens {self.drop!r} is outside (0, 1)", f"e.g. {EXAMPLE}")
        for name, value in (("layer", self.layer), ("keep_first", self.keep_first)):
            if value < 0:
                raise ConfigError(f"{name} {value!r} is negative", f"e.g. {EXAMPLE}")

    def __str__(self) -> str:
        """Canonical text; ``parse_tokens(str(spec)) == spec``."""
        return f"{PREFIX}{self.drop},layer={self.layer},keep_first={self.keep_first}"


def parse_tokens(text: str) -> TokenSpec:
    """Read a token-drop request: ``tokens=0.2,layer=1,keep_first=1``, the last two optional.

    Raises
    ------
    ConfigError
        Unknown or repeated name, unreadable value, no ``tokens``, or a number out of range.
    """
    values: dict[str, float] = {}
    for part in text.strip().lower().split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("tokens", "layer", "keep_first") or name in values:
            raise ConfigError(
                f"unknown or repeated part {part!r} in kv {text!r}", f"e.g. {EXAMPLE}"
            )
        try:
            values[name] = float(value) if name == "tokens" else int(value)
        except ValueError:
            raise ConfigError(
                f"kv {text!r}: {name} {value!r} is no number", f"e.g. {EXAMPLE}"
            ) from None
    if "tokens" not in values:
        raise ConfigError(f"kv {text!r} has no tokens", f"e.g. {EXAMPLE}")
    drop = values.pop("tokens")
    return TokenSpec(drop, **{name: int(value) for name, value in values.items()})
