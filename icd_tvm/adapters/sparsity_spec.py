"""The text form of a sparsity request: ``unit:0.5``, ``2:4:obs``, ``vec16+2:4:0.75``, ``none``."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

from icd_tvm.errors import ConfigError

Kind = Literal["none", "unit", "vec", "block", "n:m", "v:n:m", "hds", "unstructured"]

SaliencyName = Literal["", "magnitude", "wanda", "obs"]

# One valid spelling of every type, for error texts.
EXAMPLES = (
    "none",
    "unit:0.5",
    "vec16:0.5",
    "block16x16:0.5",
    "2:4",
    "64:2:8",
    "vec16+2:4:0.75",
    "block16x16+2:4:0.75",
    "unstructured:0.8",
)
SALIENCIES: tuple[SaliencyName, ...] = ("magnitude", "wanda", "obs")
# Rows of a run that V:N:M leaves to its N:M level.
VECTOR_RUN = 4


@dataclass(frozen=True)
class SparsitySpec:
    """A parsed request.

    Parameters
    ----------
    kind : {"none", "unit", "vec", "block", "n:m", "v:n:m", "hds", "unstructured"}
        What is removed together; ``hds`` keeps vectors or blocks first, then N:M inside.
    rate : float
        Share of the elements that is removed, in [0, 1).
    vector : int
        Columns that share a row set (``vec``, ``v:n:m``, ``hds`` of vectors), else 0.
    block : (int, int)
        Rows and columns of a block (``block``, ``hds`` of blocks), else (0, 0).
    n_m : (int, int)
        Kept elements and run length (``n:m``, ``v:n:m``, ``hds``), else (0, 0).
    saliency : {"", "magnitude", "wanda", "obs"}
        What ranks the weights; empty: wanda with calibration, magnitude without.
    """

    kind: Kind
    rate: float = 0.0
    vector: int = 0
    block: tuple[int, int] = (0, 0)
    n_m: tuple[int, int] = (0, 0)
    saliency: SaliencyName = ""

    @property
    def type_name(self) -> str:
        """Type without the rate, as :func:`parse_sparsity` reads it."""
        runs = f"{self.n_m[0]}:{self.n_m[1]}"
        if self.kind == "n:m":
            return runs
        if self.kind == "v:n:m":
            return f"{self.vector}:{runs}"
        if self.kind not in ("vec", "block", "hds"):
            return self.kind
        outer = f"vec{self.vector}" if self.vector else f"block{self.block[0]}x{self.block[1]}"
        return f"{outer}+{runs}" if self.kind == "hds" else outer

    @property
    def outer_rate(self) -> float:
        """Share that the outer level of ``hds`` removes; the whole rate for other kinds."""
        if self.kind != "hds":
            return self.rate
        return max(0.0, 1 - (1 - self.rate) * self.n_m[1] / self.n_m[0])

    def __str__(self) -> str:
        """Canonical text; ``parse_sparsity(str(spec)) == spec``."""
        implied = self.kind in ("none", "n:m", "v:n:m")
        text = self.type_name if implied else f"{self.type_name}:{self.rate!r}"
        return f"{text}:{self.saliency}" if self.saliency else text


def parse_sparsity(text: str) -> SparsitySpec:
    """Read a sparsity request.

    Parameters
    ----------
    text : str
        ``none``, ``unit:R``, ``vecV:R``, ``blockAxB:R``, ``N:M``, ``V:N:M``, ``vecV+N:M:R``,
        ``blockAxB+N:M:R`` or ``unstructured:R``, where R is the share that is removed in all, in
        [0, 1). ``:magnitude``, ``:wanda`` or ``:obs`` behind it names the saliency
        (:func:`icd_tvm.adapters.saliency.weight_saliency`) of all types but ``unit``.

    Returns
    -------
    SparsitySpec

    Raises
    ------
    ConfigError
        Unknown type, missing or unreadable rate, a number out of range, a saliency of ``unit`` or
        ``none``, or strays, which only the adapter takes.

    Examples
    --------
    >>> parse_sparsity("unit:0.5").rate
    0.5
    >>> parse_sparsity("unit:2")
    Traceback (most recent call last):
    icd_tvm.errors.ConfigError: ...
    """
    rest, saliency = split_saliency(text)
    spec = _without_saliency(rest)
    if saliency and spec.kind in ("unit", "none"):
        why = (
            "a unit costs what its readers lose after a refit"
            if spec.kind == "unit"
            else "it removes nothing"
        )
        raise ConfigError(f"sparsity {text!r} has a saliency, but {why}", f"write {spec}")
    return replace(spec, saliency=saliency)


def split_saliency(text: str) -> tuple[str, SaliencyName]:
    """Return a request without its saliency, and the saliency or an empty text."""
    rest, _, last = text.strip().rpartition(":")
    for name in SALIENCIES:
        if rest and last.strip().lower() == name:
            return rest, name
    return text, ""


def _without_saliency(text: str) -> SparsitySpec:
    clean = text.strip().lower()
    if ":strays" in clean:
        raise ConfigError(
            f"sparsity {text!r}: strays stay outside the weight, which no pass can keep",
            "icd_tvm.adapters.sparsity.apply_sparsity(..., strays=0.002) returns them as a list",
        )
    if clean == "none":
        return SparsitySpec("none")
    if re.fullmatch(r"\d+:\d+", clean):
        return _n_m(*(int(part) for part in clean.split(":")))
    if _hierarchical(clean):
        return _two_levels(clean, text, None)
    name, colon, rate_text = clean.partition(":")
    spec = _typed(name, text)
    if not colon:
        raise ConfigError(
            f"sparsity {text!r} has no rate", f"write the removed share, e.g. {name}:0.5"
        )
    return make_spec(spec, _rate(rate_text, text))


def make_spec(
    type_name: str, rate: float | None, n_m: tuple[int, int] | None = None
) -> SparsitySpec:
    """Build a spec from a type and a rate given apart.

    Parameters
    ----------
    type_name : str
        ``none``, ``unit``, ``vecV``, ``blockAxB``, ``N:M``, ``n:m``, ``V:N:M``, ``vecV+N:M``,
        ``blockAxB+N:M`` or ``unstructured``.
    rate : float, optional
        Removed share in [0, 1); may be left out for ``none``, ``N:M`` and ``V:N:M``.
    n_m : (int, int), optional
        Kept elements and run length for type ``n:m``.

    Returns
    -------
    SparsitySpec

    Raises
    ------
    ConfigError
        Unknown type, a number out of range, or a rate that contradicts N:M.
    """
    name = type_name.strip().lower()
    if name == "none":
        return SparsitySpec("none")
    if name == "n:m" or re.fullmatch(r"\d+:\d+", name):
        return _n_m_with_rate(name, rate, n_m)
    if _hierarchical(name):
        return _two_levels(name, type_name, rate)
    base = _typed(name, type_name)
    if rate is None:
        raise ConfigError(f"sparsity type {type_name!r} needs a rate", f"e.g. {name}:0.5")
    if not 0.0 <= rate < 1.0:
        raise ConfigError(
            f"sparsity rate {rate!r} is outside [0, 1)", f"e.g. {name}:0.5 removes one half"
        )
    kind, numbers = _split(base)
    if kind == "vec":
        return SparsitySpec("vec", rate, vector=numbers[0])
    if kind == "block":
        return SparsitySpec("block", rate, block=(numbers[0], numbers[1]))
    return SparsitySpec("unit" if kind == "unit" else "unstructured", rate)


def _typed(name: str, text: str) -> str:
    try:
        kind, numbers = _split(name)
    except ValueError:
        nearest = difflib.get_close_matches(text.lower(), EXAMPLES, n=1, cutoff=0.3)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(
            f"unknown sparsity {text!r}", f"{hint}known: {', '.join(EXAMPLES)}"
        ) from None
    if kind in ("vec", "block") and min(numbers) < 1:
        raise ConfigError(f"sparsity {text!r} has a size below 1", "e.g. vec16:0.5, block16x16:0.5")
    return name


def _split(name: str) -> tuple[str, list[int]]:
    match = re.fullmatch(r"(unit|unstructured|vec(\d+)|block(\d+)x(\d+))", name)
    if match is None:
        raise ValueError(name)
    kind = re.sub(r"\d.*", "", name)
    return kind, [int(part) for part in match.groups()[1:] if part is not None]


def _rate(rate_text: str, text: str) -> float:
    try:
        return float(rate_text)
    except ValueError:
        raise ConfigError(
            f"sparsity {text!r} has no readable rate", "write a number in [0, 1), e.g. unit:0.5"
        ) from None


def _n_m(n: int, m: int) -> SparsitySpec:
    if not 1 <= n < m:
        raise ConfigError(f"{n}:{m} sparsity keeps {n} of {m}", "needs 1 <= N < M, e.g. 2:4")
    return SparsitySpec("n:m", 1 - n / m, n_m=(n, m))


def _n_m_with_rate(name: str, rate: float | None, n_m: tuple[int, int] | None) -> SparsitySpec:
    if name == "n:m":
        if n_m is None:
            raise ConfigError("sparsity type 'n:m' needs n_m", "pass n_m=(2, 4) or type='2:4'")
        n, m = n_m
    else:
        n, m = (int(part) for part in name.split(":"))
        if n_m is not None and tuple(n_m) != (n, m):
            raise ConfigError(f"type {name!r} contradicts n_m = {tuple(n_m)}", "pass one of them")
    spec = _n_m(n, m)
    if rate is not None and abs(rate - spec.rate) > 1e-6:
        raise ConfigError(
            f"rate {rate!r} contradicts {spec}", f"leave the rate out or pass {spec.rate!r}"
        )
    return spec


def _hierarchical(name: str) -> bool:
    return "+" in name or re.fullmatch(r"\d+:\d+:\d+", name) is not None


def _two_levels(name: str, text: str, rate: float | None) -> SparsitySpec:
    if "+" not in name:
        vector, n, m = (int(part) for part in name.split(":"))
        return _v_n_m(vector, n, m, rate)
    match = re.fullmatch(r"([^+]+)\+(\d+):(\d+)(?::(.*))?", name)
    if match is None:
        raise ConfigError(f"unknown sparsity {text!r}", f"known: {', '.join(EXAMPLES)}")
    outer, n_text, m_text, rate_text = match.groups()
    kind, numbers = _split(_typed(outer, outer))
    if kind not in ("vec", "block"):
        raise ConfigError(
            f"sparsity {text!r} has the outer level {outer!r}", "use vecV or blockAxB"
        )
    if rate_text is not None and rate is not None:
        raise ConfigError(f"sparsity {text!r} has a rate, and {rate!r} is another", "pass one")
    share = rate if rate_text is None else _rate(rate_text, text)
    if share is None:
        raise ConfigError(
            f"sparsity {text!r} has no rate", f"write the removed share in all, e.g. {name}:0.75"
        )
    inner = _n_m(int(n_text), int(m_text))
    if not inner.rate <= share < 1.0:
        raise ConfigError(
            f"sparsity rate {share!r} of {text!r} is outside [{inner.rate!r}, 1)",
            f"{inner} alone removes {inner.rate!r}",
        )
    vector = numbers[0] if kind == "vec" else 0
    block = (numbers[0], numbers[1]) if kind == "block" else (0, 0)
    return SparsitySpec("hds", share, vector, block, inner.n_m)


def _v_n_m(vector: int, n: int, m: int, rate: float | None) -> SparsitySpec:
    if vector < 1 or not 1 <= n < VECTOR_RUN <= m:
        raise ConfigError(
            f"{vector}:{n}:{m} sparsity keeps {n} of {VECTOR_RUN} of {m} rows",
            f"needs V >= 1 and 1 <= N < {VECTOR_RUN} <= M, e.g. 64:2:8",
        )
    spec = SparsitySpec("v:n:m", 1 - n / m, vector, n_m=(n, m))
    if rate is not None and abs(rate - spec.rate) > 1e-6:
        raise ConfigError(
            f"rate {rate!r} contradicts {spec}", f"leave the rate out or pass {spec.rate!r}"
        )
    return spec
