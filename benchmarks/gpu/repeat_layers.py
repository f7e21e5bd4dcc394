"""A lowered model of few layers becomes one of many: those between the first and the last again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from icd_tvm._tvm import Call, const_name, relax, tvm_ffi
from icd_tvm.errors import MeasurementError

_WEIGHT = re.compile(r"(?<=layers\.)\d+(?=\.)")
_STATE = re.compile(r"(?<=_)\d+$")
Item = TypeVar("Item")
Known = Mapping[Any, Any]


@dataclass(frozen=True)
class Repeated:
    """A lowered module, and for each constant of the shorter one which parameters it is now.

    Attributes
    ----------
    mod : IRModule
        With ``num_input``.
    places : tuple of tuple of int
        Counted from the first parameter that is no input.
    """

    mod: Any
    places: tuple[tuple[int, ...], ...]


def repeat_layers(mod: Any, constants: Sequence[Any], layers: int) -> Repeated:
    """Return a module of ``layers`` layers, with states and weights of their own.

    Kernels are shared, so that code does not grow. Layers are known by the numbers in the names of
    states (``conv_1``) and weights (``layers.1.``); what depends on none is before the first, what
    follows the last one belongs to it.

    Parameters
    ----------
    mod : IRModule
        Lifted (`benchmarks.gpu.lift.lift`), of at least three layers.
    constants : sequence of GenericConst
        What its parameters after the inputs were.
    layers : int
        As many more as the middle of the module has, or a multiple.

    Raises
    ------
    MeasurementError
        If the layers do not follow each other, each on the result of the one before.
    """
    base = _Base(mod["main"], constants)
    wide = _Wide(base, _times(base.layers, layers))
    mod = mod.clone()
    mod["main"] = wide.function()
    return Repeated(relax.transform.Normalize()(mod), wide.places())


def _times(base: int, layers: int) -> int:
    if base < 3 or layers < base or (layers - 2) % (base - 2):
        raise MeasurementError(f"{base} layers cannot be repeated to {layers}")
    return (layers - 2) // (base - 2)


class _Base:
    """The layer of every variable of a lifted function: the highest that it depends on.

    A constant without a name belongs where it is read first.
    """

    def __init__(self, func: Any, constants: Sequence[Any]) -> None:
        if len(func.body.blocks) != 1:
            raise MeasurementError(f"{len(func.body.blocks)} blocks are no straight line of layers")
        self.func = func
        self.inputs = list(func.params[: len(func.params) - len(constants)])
        self.weights = list(func.params[len(self.inputs) :])
        names = [_number(_STATE, str(param.name)) for param in self.inputs]
        names += [_number(_WEIGHT, const_name(const)) for const in constants]
        self.layer: dict[Any, int] = dict(zip(func.params, names, strict=True))
        self.bindings, self.outputs, self.joined = _outputs(func)
        users: dict[Any, list[int]] = {}
        for binding in self.bindings:
            read = relax.analysis.free_vars(binding.value)
            self.layer[binding.var] = self.of(read)
            for var in read:
                users.setdefault(var, []).append(self.layer[binding.var])
        for param, const in zip(self.weights, constants, strict=True):
            if not const_name(const):
                self.layer[param] = min(users[param])
        self.layers = 1 + max(self.layer.values(), default=-1)

    def of(self, variables: Iterable[Any]) -> int:
        """Return the highest layer of some variables, -1 for none."""
        return max((self.layer[var] for var in variables), default=-1)

    def between(self, var: Any) -> bool:
        """Tell whether a variable belongs to neither the first nor the last layer."""
        return 0 < self.layer[var] < self.layers - 1

    def cuts(self) -> tuple[list[Any], list[Any]]:
        """Return what the layers between read of the first, and what the last reads of them."""
        inner = [b for b in self.bindings if self.between(b.var)]
        last = [b for b in self.bindings if self.layer[b.var] == self.layers - 1]
        made = {binding.var for binding in self.bindings}
        seen = _read(last)
        into = [v for v in _read(inner) if v in made and self.layer[v] <= 0 and v not in seen]
        out = [v for v in seen if v in made and self.between(v)]
        same = len(into) == len(out) and all(
            tvm_ffi.structural_equal(a.ty, b.ty) for a, b in zip(into, out, strict=True)
        )
        if not same:
            raise MeasurementError(
                f"layers that read {len(into)} values and make {len(out)} do not follow each other"
            )
        return into, out


def _number(pattern: re.Pattern[str], name: str) -> int:
    found = pattern.search(name)
    return int(found[0]) if found else -1


def _outputs(func: Any) -> tuple[list[Any], list[Any], Any]:
    """Return the bindings but that of the returned tuple, the fields of that, and its variable."""
    returned = func.body.body
    bindings = [b for b in func.body.blocks[0].bindings if not b.var.same_as(returned)]
    own = next((b for b in func.body.blocks[0].bindings if b.var.same_as(returned)), None)
    fields = returned if own is None else own.value
    if not isinstance(fields, relax.Tuple):
        raise MeasurementError("a model without states has no layers to repeat")
    return bindings, list(fields.fields), None if own is None else own.var


def _read(bindings: Iterable[Any]) -> list[Any]:
    """Return the variables that bindings read, in order."""
    read = chain.from_iterable(relax.analysis.free_vars(binding.value) for binding in bindings)
    return list(dict.fromkeys(read))


class _Wide:
    """The longer function: copy 0 of the layers between is the original."""

    def __init__(self, base: _Base, times: int) -> None:
        self._base, self._times = base, times
        into, out = base.cuts()
        self._known: list[dict[Any, Any]] = [{} for _ in range(times)]
        self._last = {p: _fresh(p, self._name(p, times - 1)) for p in self._ends()}
        for copy in range(1, times):
            known = self._known[copy]
            for param in filter(base.between, (*base.inputs, *base.weights)):
                known[param] = _fresh(param, self._name(param, copy))
            before = self._known[copy - 1]
            known |= {a: before.get(b, b) for a, b in zip(into, out, strict=True)}
            for binding in filter(lambda b: base.between(b.var), base.bindings):
                known[binding.var] = _fresh(binding.var, str(binding.var.name))
        self._last |= {v: self._known[-1].get(v, v) for v in out}

    def _ends(self) -> list[Any]:
        """Return the states of the last layer, whose names change."""
        return [p for p in self._base.inputs if self._base.layer[p] == self._base.layers - 1]

    def _name(self, param: Any, copy: int) -> str:
        """Return a state's name in a copy of its layer; other names stay."""
        layer = self._base.layer[param] + copy * (self._base.layers - 2)
        name = str(param.name)
        return _STATE.sub(str(layer), name) if param in self._base.inputs else name

    def _spread(
        self, items: Sequence[Item], var: Callable[[Item], Any]
    ) -> Iterator[tuple[Item, Known]]:
        """Yield items, those of the layers between once for each copy, with what is known there."""
        inside = [self._base.between(var(item)) for item in items]
        first = inside.index(True) if any(inside) else len(items)
        count = sum(inside)
        if not all(inside[first : first + count]):
            raise MeasurementError("the parts of the layers between do not lie together")
        for item in items[:first]:
            yield item, self._last
        for known in self._known:
            for item in items[first : first + count]:
                yield item, known
        for item in items[first + count :]:
            yield item, self._last

    def function(self) -> Any:
        """Return the function."""
        base, func = self._base, self._base.func
        inputs = [known.get(p, p) for p, known in self._spread(base.inputs, _itself)]
        weights = [known.get(p, p) for p, known in self._spread(base.weights, _itself)]
        bindings = [
            relax.VarBinding(known.get(b.var, b.var), _replaced(b.value, known))
            for b, known in self._spread(base.bindings, lambda b: b.var)
        ]
        fields = [known.get(f, f) for f, known in self._spread(base.outputs, _itself)]
        kind, result = relax.TupleType([field.ty for field in fields]), relax.Tuple(fields)
        if base.joined is not None:
            var = relax.Var(str(base.joined.name), kind)
            bindings.append(relax.VarBinding(var, result))
            result = var
        body = relax.SeqExpr([relax.DataflowBlock(bindings)], result)
        made = relax.Function([*inputs, *weights], body, kind, func.is_pure, func.attrs)
        return made.with_attr("num_input", len(inputs))

    def places(self) -> tuple[tuple[int, ...], ...]:
        """Return the places of each weight."""
        found: dict[Any, list[int]] = {param: [] for param in self._base.weights}
        for place, (param, _) in enumerate(self._spread(self._base.weights, _itself)):
            found[param].append(place)
        return tuple(map(tuple, found.values()))


def _itself(item: Any) -> Any:
    return item


def _fresh(var: Any, name: str) -> Any:
    kind = relax.DataflowVar if isinstance(var, relax.DataflowVar) else relax.Var
    return kind(name, var.ty)


def _replaced(value: Any, known: Known) -> Any:
    """Return an expression of a lowered function with other variables."""
    if isinstance(value, relax.Var):
        return known.get(value, value)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([_replaced(field, known) for field in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(_replaced(value.tuple_value, known), value.index)
    if isinstance(value, Call):
        args = [_replaced(arg, known) for arg in value.args]
        return Call(value.op, args, value.attrs, value.ty_args, value.span, ret_ty=value.ty)
    return value
