"""Spare a recurrence what every state of a channel would repeat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from icd_tvm.tir_schedules.cpu.scan_program import Operand, ScanProgram, Term
from icd_tvm.tir_schedules.cpu.vector_math import LOG2_E

# Leaf that `spare_states` makes: an operand times ``number``, multiplied before the first step.
SCALED = "scaled"
# Operator that `spare_states` makes: 2 to the power of its argument.
POWER = "Exp2"


def spare_states(program: ScanProgram) -> ScanProgram:
    """Return a recurrence of the same value with less work for every state.

    Of a product, the factors that are the same for all states of a channel come first: code that
    is unrolled over the states multiplies them once. ``exp(x * a)`` with an ``a`` that stays for
    all steps becomes ``2 ** (x * (a * log2(e)))``, whose inner product is made once. Both round
    otherwise than the original, by as much.

    Parameters
    ----------
    program : ScanProgram

    Returns
    -------
    ScanProgram
        With terms of `SCALED` and `POWER` besides ONNX operators.
    """

    def spared(term: Term) -> Term:
        return _spared(term, program)

    return replace(
        program,
        update=spared(program.update),
        early=[spared(term) for term in program.early],
        late=[spared(term) for term in program.late],
        outputs=[(spared(term), shape, own) for term, shape, own in program.outputs],
    )


def terms(program: ScanProgram) -> Iterator[Term]:
    """Yield every term of a program, parts before the whole."""
    outputs = [term for term, _, _ in program.outputs]
    for term in (program.update, *program.early, *program.late, *outputs):
        yield from _parts(term)


def is_held(operand: Operand) -> bool:
    """Tell whether an operand stays for all steps and runs along the channels."""
    return not isinstance(operand.source, int) and operand.axes[-2]


def _parts(term: Term) -> Iterator[Term]:
    for arg in term.args:
        yield from _parts(arg)
    yield term


def _spared(term: Term, program: ScanProgram) -> Term:
    term = replace(term, args=tuple(_spared(arg, program) for arg in term.args))
    if term.op == "Exp":
        return _power(term, program)
    if term.op != "Mul":
        return term
    return _product(sorted(_factors(term), key=lambda factor: by_state(factor, program)))


def _power(term: Term, program: ScanProgram) -> Term:
    """Return the exponential as a power of two if a factor of its argument stays for all steps."""
    factors = _factors(term.args[0])
    for i, factor in enumerate(factors):
        if factor.op == "operand" and is_held(program.operands[factor.place]):
            factors[i] = Term(SCALED, place=factor.place, number=LOG2_E)
            return Term(POWER, (_product(factors),))
    return term


def _factors(term: Term) -> list[Term]:
    if term.op != "Mul":
        return [term]
    return [factor for arg in term.args for factor in _factors(arg)]


def _product(factors: list[Term]) -> Term:
    first, *rest = factors
    for factor in rest:
        first = Term("Mul", (first, factor))
    return first


def by_state(term: Term, program: ScanProgram) -> bool:
    """Tell whether a term differs between the states of a channel."""
    leaves = [part for part in _parts(term) if not part.args]
    return any(
        leaf.op in ("old", "new")
        or (leaf.op in ("operand", SCALED) and program.operands[leaf.place].axes[-1])
        for leaf in leaves
    )
