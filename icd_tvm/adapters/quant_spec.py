"""The text form of a quantisation request: ``int8``, ``int4:group128:compensate``, ``none``."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from icd_tvm.errors import ConfigError

Dtype = Literal["none", "int8", "int4", "fp8_e4m3", "fp8_e5m2", "bf16"]
Method = Literal["ptq-minmax", "ptq-kld", "ptq-mse"]
Granularity = Literal["tensor", "channel", "group"]
Activations = Literal["float", "minmax", "kld", "mse", "dynamic"]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
METHODS: tuple[Method, ...] = get_args(Method)
# Text of a request -> how activations are quantised.
ACTIVATIONS: dict[str, Activations] = {
    "w8a8": "minmax",
    "w8a8-kld": "kld",
    "w8a8-mse": "mse",
    "w8a8-dynamic": "dynamic",
}

# One valid spelling of every part, for error texts.
EXAMPLES = (
    "none",
    "int8",
    "int8:tensor",
    "int8:channel:ptq-mse",
    "int8:channel:asym",
    "int4:group128",
    "int4:group128:act-order:compensate",
    "int4:group128:salient0.01",
    "int8:w8a8",
    "int8:w8a8:attention",
    "int8:w8a8-dynamic:smooth0.5",
    "fp8_e4m3",
    "fp8_e5m2",
    "bf16",
    "bf16:attention",
)
PARTS = (
    *("tensor", "channel", "group128"),
    *(*METHODS, "asym", "act-order", "compensate"),
    *ACTIVATIONS,
    "attention",
)
SHARES = ("salient0.01", "smooth0.5")


@dataclass(frozen=True)
class QuantSpec:
    """A parsed request.

    Parameters
    ----------
    dtype : {"none", "int8", "int4", "fp8_e4m3", "fp8_e5m2", "bf16"}
        Number format of the codes. ``bf16`` has no scales, and is that of the inputs too.
    method : {"ptq-minmax", "ptq-kld", "ptq-mse"}
        How the range that the codes span is chosen.
    granularity : {"tensor", "channel", "group"}
        What shares a scale: everything, an output column, or ``group`` input rows of a column.
    group : int
        Rows in a group (``group``), else 0.
    symmetric : bool
        Whether the zero point is 0.
    act_order : bool
        Whether rows are grouped and compensated by falling input energy.
    salient : float
        Share of the input rows kept in floating point, in [0, 1).
    compensate : bool
        Whether rounding errors are compensated on the Gram matrix of the inputs.
    activations : {"float", "minmax", "kld", "mse", "dynamic"}
        How the layer's input is quantised: not; to uint8 by a static scale from calibration,
        chosen as named; or by the range that it has at run time.
    smooth : float
        Share of the input's range that moves into the weights (:func:`migrate_scales`), in
        [0, 1); 0 moves nothing. The input is divided in the norm before where nothing else
        reads that, else at run time.
    attention : bool
        Whether the products of attentions are quantised too: by static scales, or to bf16.
    """

    dtype: Dtype
    method: Method = "ptq-minmax"
    granularity: Granularity = "channel"
    group: int = 0
    symmetric: bool = True
    act_order: bool = False
    salient: float = 0.0
    compensate: bool = False
    activations: Activations = "float"
    smooth: float = 0.0
    attention: bool = False

    @property
    def weights_only(self) -> QuantSpec:
        """The same request with activations in floating point."""
        return replace(self, activations="float", smooth=0.0, attention=False)

    def __str__(self) -> str:
        """Canonical text; ``parse_quant(str(spec)) == spec``."""
        if self.dtype == "none":
            return "none"
        if self.dtype == "bf16":
            return "bf16:attention" if self.attention else "bf16"
        parts = [self.dtype, f"group{self.group}" if self.group else self.granularity]
        parts += [] if self.method == "ptq-minmax" else [self.method]
        flags = {"asym": not self.symmetric, "act-order": self.act_order}
        parts += [name for name, on in flags.items() if on]
        parts += [f"salient{self.salient!r}"] if self.salient else []
        parts += ["compensate"] if self.compensate else []
        parts += [text for text, kind in ACTIVATIONS.items() if kind == self.activations]
        parts += ["attention"] if self.attention else []
        return ":".join([*parts, f"smooth{self.smooth!r}"] if self.smooth else parts)


def parse_quant(text: str) -> QuantSpec:
    """Read a quantisation request.

    Parameters
    ----------
    text : str
        ``none``, or a number format (``int8``, ``int4``, ``fp8_e4m3``, ``fp8_e5m2``, ``bf16``) and,
        in any order after colons: ``tensor``, ``channel`` or ``groupG`` (also ``gG``);
        ``ptq-minmax``, ``ptq-kld`` or ``ptq-mse``; ``asym``; ``act-order``; ``salientR``;
        ``compensate``; ``w8a8``, ``w8a8-kld``, ``w8a8-mse`` (static activations) or
        ``w8a8-dynamic``; ``attention`` (with static activations, or as the only part of
        ``bf16``); ``smoothR``. Without a granularity int4 takes ``group128`` and the others
        ``channel``.

    Returns
    -------
    QuantSpec

    Raises
    ------
    ConfigError
        Unknown format or part, a part given twice, or parts that exclude each other.

    Examples
    --------
    >>> parse_quant("int8:w8a8").dtype
    'int8'
    """
    # "group:128" and "salient:0.01" are how apply_quant's own parameters spell these parts.
    clean = re.sub(r"\b(group|salient|smooth):(?=[\d.])", r"\1", text.strip().lower())
    name, *parts = clean.split(":")
    if name not in DTYPES:
        raise _unknown(text, clean)
    dtype: Dtype = next(known for known in DTYPES if known == name)
    if dtype == "none" and parts:
        raise ConfigError(f"quantisation {text!r} has parts after 'none'", "write just none")
    spec = QuantSpec(dtype)
    if dtype == "int4":
        spec = replace(spec, granularity="group", group=128)
    seen: set[str] = set()
    for part in parts:
        spec, what = _with_part(spec, part, text)
        if what in seen:
            raise ConfigError(f"quantisation {text!r} gives its {what} twice", "give it once")
        seen.add(what)
    if dtype == "bf16" and seen - {"attention"}:
        raise ConfigError(f"quantisation {text!r} has scales", "use bf16 or bf16:attention")
    return checked(spec)


def make_quant_spec(
    dtype: str,
    method: str,
    granularity: str | None,
    symmetric: bool,
    act_order: bool,
    mixed: str | None,
    compensate: bool,
) -> QuantSpec:
    """Build a spec from parameters given apart; see :func:`icd_tvm.adapters.quant.apply_quant`.

    Raises
    ------
    ConfigError
        As :func:`parse_quant`.
    """
    # Defaults say nothing, so that they do not clash with a whole request in dtype.
    flags = {"asym": not symmetric, "act-order": act_order, "compensate": compensate}
    parts = [dtype, *([granularity] if granularity else [])]
    parts += [method] if method != "ptq-minmax" else []
    parts += [mixed] if mixed else []
    return parse_quant(":".join([*parts, *(name for name, on in flags.items() if on)]))


def checked(spec: QuantSpec) -> QuantSpec:
    """Return ``spec`` when its parts fit together.

    Raises
    ------
    ConfigError
        They exclude each other.
    """
    if spec.dtype.startswith("fp8") and not spec.symmetric:
        raise ConfigError(f"{spec} has a zero point", "fp8 codes are symmetric: drop asym")
    if spec.dtype.startswith("fp8") and spec.method == "ptq-kld":
        raise ConfigError(f"{spec} asks for ptq-kld", "it needs even steps: ptq-minmax or ptq-mse")
    if spec.act_order and spec.granularity != "group" and not spec.compensate:
        raise ConfigError(
            f"act-order changes nothing in {spec}", "it orders groups or the compensation"
        )
    return _checked_activations(spec)


def _checked_activations(spec: QuantSpec) -> QuantSpec:
    if spec.dtype == "bf16":
        return spec
    if spec.attention and spec.activations in ("float", "dynamic"):
        raise ConfigError(f"{spec} has no static scales for attention", "add w8a8")
    if spec.activations == "float":
        if spec.smooth:
            raise ConfigError(
                f"smooth changes nothing in {spec}", "it eases the input: add w8a8 or w8a8-dynamic"
            )
        return spec
    if spec.dtype != "int8" or spec.granularity == "group":
        raise ConfigError(
            f"{spec} multiplies by integers", "w8a8 takes int8 weights with one scale a column"
        )
    if spec.salient:
        raise ConfigError(f"{spec} keeps rows in floating point", "drop w8a8 or the salient share")
    if spec.smooth and spec.activations in ("kld", "mse"):
        raise ConfigError(
            f"{spec} needs a histogram of inputs that no calibration has seen",
            "smooth goes with w8a8 or w8a8-dynamic",
        )
    return spec


def _with_part(spec: QuantSpec, part: str, text: str) -> tuple[QuantSpec, str]:
    if part in ("tensor", "channel"):
        whole: Granularity = "tensor" if part == "tensor" else "channel"
        return replace(spec, granularity=whole, group=0), "granularity"
    if re.fullmatch(r"g(roup)?\d+", part):
        return _grouped(spec, int(part.lstrip("group")), text), "granularity"
    for method in METHODS:
        if part == method:
            return replace(spec, method=method), "method"
    if part == "asym":
        return replace(spec, symmetric=False), "symmetry"
    if part == "act-order":
        return replace(spec, act_order=True), "order"
    if part == "compensate":
        return replace(spec, compensate=True), "compensation"
    if part == "attention":
        return replace(spec, attention=True), "attention"
    if part in ACTIVATIONS:
        return replace(spec, activations=ACTIVATIONS[part]), "activations"
    if part.startswith("salient"):
        return replace(spec, salient=_share(part[7:], text)), "salient share"
    if part.startswith("smooth"):
        return replace(spec, smooth=_share(part[6:], text, "smooth")), "smooth share"
    raise _unknown_part(part, text)


def _grouped(spec: QuantSpec, size: int, text: str) -> QuantSpec:
    if size < 1:
        raise ConfigError(f"quantisation {text!r} has a group below 1", "e.g. int4:group128")
    return replace(spec, granularity="group", group=size)


def _share(text: str, whole: str, name: str = "salient") -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 < share < 1.0:
        raise ConfigError(
            f"quantisation {whole!r} has no {name} share in (0, 1)",
            "salient0.01 keeps 1 % of the input rows in floating point; smooth0.5 is the usual",
        )
    return share


def _unknown(text: str, clean: str) -> ConfigError:
    # The format alone is tried first: a long tail would hide a small slip in it.
    name = clean.partition(":")[0]
    near = difflib.get_close_matches(name, DTYPES, n=1, cutoff=0.5)
    near = near or difflib.get_close_matches(clean, EXAMPLES, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"unknown quantisation {text!r}", f"{hint}known: {', '.join(EXAMPLES)}")


def _unknown_part(part: str, text: str) -> ConfigError:
    near = difflib.get_close_matches(part, (*PARTS, *SHARES), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(
        f"unknown part {part!r} in quantisation {text!r}",
        f"{hint}known: {', '.join((*PARTS, *SHARES))}",
    )
