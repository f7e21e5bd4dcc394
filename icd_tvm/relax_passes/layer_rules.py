"""Which weights a transform changes, and how: rules by ONNX name, then role and size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, Literal, TypeVar

from icd_tvm.errors import ConfigError

Spec = TypeVar("Spec")
Role = Literal["inner", "embedding", "head"]

# Elements below which a weight's bytes and time are lost in the noise of the model's.
MIN_SIZE = 4096
# Final projections that are not the last operation of their model carry these names.
HEADS = ("*lm_head*", "*classifier*", "*score.weight", "*embed_out*")
EMBEDDINGS = ("*embeddings*", "*embed_tokens*", "*embedding.weight")
_LEAVE = "none"
_MIN_SIZE = "min-size="


@dataclass(frozen=True)
class Layer:
    """What a rule may look at.

    Parameters
    ----------
    name : str
        ONNX name of the weight; empty if it has none.
    node : str
        Binding of the operation that reads it.
    shape : tuple of int
    role : {"inner", "embedding", "head"}
        ``embedding``: a table read by index; ``head``: the last product before an output.
    """

    name: str
    node: str
    shape: tuple[int, ...]
    role: Role = "inner"

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    def matches(self, pattern: str) -> bool:
        """Tell whether a shell pattern fits the weight's name or that of its operation."""
        return any(fnmatchcase(text, pattern) for text in (self.name, self.node) if text)


@dataclass(frozen=True)
class LayerRule(Generic[Spec]):
    """Settings of the weights that fit a pattern.

    Parameters
    ----------
    pattern : str
        Shell pattern (``*``, ``?``, ``[...]``), case-sensitive.
    spec : Spec or None
        None leaves the weight as it is.
    """

    pattern: str
    spec: Spec | None


@dataclass(frozen=True)
class Choice(Generic[Spec]):
    """What happens to one weight: ``spec`` is None where it stays; ``why`` then says the reason."""

    spec: Spec | None
    why: str = ""


@dataclass(frozen=True)
class LayerRules(Generic[Spec]):
    """The settings of every weight of a model.

    Parameters
    ----------
    default : Spec
        For weights that no rule names and that are not left out.
    rules : tuple of LayerRule
        The first that fits wins, also over what is left out by default.
    min_size : int
        Weights with fewer elements are left out.
    """

    default: Spec
    rules: tuple[LayerRule[Spec], ...] = ()
    min_size: int = MIN_SIZE

    def choose(self, layer: Layer) -> Choice[Spec]:
        """Return the settings of a weight, or why it is left as it is."""
        for rule in self.rules:
            if layer.matches(rule.pattern):
                left = f"rule {rule.pattern!r} leaves it" if rule.spec is None else ""
                return Choice(rule.spec, left)
        why = self._left_out(layer)
        return Choice(None if why else self.default, why)

    def unmatched(self, layers: Iterable[Layer]) -> list[str]:
        """Return the patterns that fit none of the layers: most likely misspelt."""
        known = list(layers)
        return [
            rule.pattern
            for rule in self.rules
            if not any(layer.matches(rule.pattern) for layer in known)
        ]

    def _left_out(self, layer: Layer) -> str:
        for role, patterns in (("embedding", EMBEDDINGS), ("head", HEADS)):
            if layer.role == role or any(layer.matches(pattern) for pattern in patterns):
                return f"{role}: left out unless a rule names it"
        if layer.size < self.min_size:
            return f"{layer.size} elements are below the least size of {self.min_size}"
        return ""


def as_rules(spec: Spec | LayerRules[Spec]) -> LayerRules[Spec]:
    """Return one request for every weight as rules without exceptions."""
    return spec if isinstance(spec, LayerRules) else LayerRules(spec)


def parse_request(text: str, parse: Callable[[str], Spec]) -> LayerRules[Spec]:
    """Read a default and its rules from one text: ``DEFAULT; PATTERN=REQUEST; min-size=N``.

    Parameters
    ----------
    text : str
        For example ``unit:0.5; *attention*=unit:0.25; min-size=0``; all but the default may be
        left out.
    parse : callable
        Reads a request; raises ConfigError for one it does not know.

    Raises
    ------
    ConfigError
        As :func:`parse_layer_rules`, or a least size that is no number.
    """
    default, *parts = (part.strip() for part in text.split(";"))
    sizes = [part for part in parts if part.replace(" ", "").startswith(_MIN_SIZE)]
    rules = [part for part in parts if part and part not in sizes]
    least = MIN_SIZE
    for part in sizes:
        number = part.partition("=")[2].strip()
        if not number.isdecimal():
            raise ConfigError(f"{part!r} is no least size", "e.g. min-size=0")
        least = int(number)
    return parse_layer_rules(rules, parse(default), parse, min_size=least)


def parse_layer_rules(
    texts: Iterable[str],
    default: Spec,
    parse: Callable[[str], Spec],
    *,
    min_size: int = MIN_SIZE,
) -> LayerRules[Spec]:
    """Read rules written as ``PATTERN=REQUEST``.

    Parameters
    ----------
    texts : iterable of str
        For example ``*.output.dense.weight=int4:group128`` or ``*query*=none``.
    default : Spec
        For weights without a rule.
    parse : callable
        Reads a request; raises ConfigError for one it does not know.
    min_size : int
        Least number of elements of a weight without a rule, at least 0.

    Returns
    -------
    LayerRules

    Raises
    ------
    ConfigError
        A rule without a pattern or request, one given twice, or a size below 0.
    """
    if min_size < 0:
        raise ConfigError(f"least size {min_size} of a weight is below 0", "0 leaves none out")
    rules: list[LayerRule[Spec]] = []
    for text in texts:
        pattern, _, request = (part.strip() for part in text.rpartition("="))
        if not pattern or not request:
            raise ConfigError(
                f"layer rule {text!r} is not PATTERN=REQUEST", "e.g. '*.query.weight=none'"
            )
        if any(rule.pattern == pattern for rule in rules):
            raise ConfigError(f"two layer rules for {pattern!r}", "the second would never apply")
        rules.append(LayerRule(pattern, None if request.lower() == _LEAVE else parse(request)))
    return LayerRules(default, tuple(rules), min_size)
