"""``python -m icd_tvm.models.recipes sst2 --out DIR``: train and prune a model on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from icd_tvm.arguments import Parser, refused
from icd_tvm.errors import ConfigError, IcdError

EXAMPLES = """  python -m icd_tvm.models.recipes sst2 --out runs/sst2
  python -m icd_tvm.models.recipes sst2 --out runs/sst2 --sparsity 0.5,0.75 --minutes 30
"""


def _parser() -> Parser:
    parser = Parser(prog="python -m icd_tvm.models.recipes", description=__doc__, examples=EXAMPLES)
    add = parser.add_argument
    add("recipe", choices=("sst2",), help="MiniLM-L6 on SST-2 sentences")
    add("--out", type=Path, required=True, help="folder for the two ONNX files and the card")
    add("--sparsity", type=_rates, help="rising shares of dropped units, e.g. 0.5,0.75")
    add("--uniform", action="store_true", help="drop the same share of every layer")
    add("--epochs", type=int, default=2, help="of tuning after each pruning")
    add("--dense", type=Path, help="dense.onnx of an earlier run: prune it, do not train it again")
    add("--minutes", type=float, default=60.0, help="begin no rung that would end later than this")
    add("--seed", type=int, default=0, help="of the head and of the order of the sentences")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _rates(text: str) -> tuple[float, ...]:
    """Parse rising shares between 0 and 1."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(a < b for a, b in zip((0.0, *rates), (*rates, 1.0), strict=True)):
        raise ConfigError(f"sparsities {text!r} do not rise between 0 and 1", "write 0.5,0.75")
    return rates


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (2 after an error)."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(given)
        from icd_tvm.models.recipes.ladder import Ladder
        from icd_tvm.models.recipes.recipe import Plan, cook, read_weights
        from icd_tvm.models.recipes.sst2 import sst2_source
        from icd_tvm.models.recipes.training import Training

        rates = options.sparsity or Ladder().sparsities
        tuning = Training(options.epochs, rate=2e-4, seed=options.seed)
        ladder = Ladder(rates, tuning, 60 * options.minutes, options.uniform)
        plan = Plan(Training(seed=options.seed), ladder)
        dense = read_weights(options.dense) if options.dense else None
        card = cook(sst2_source(options.seed), plan, options.out, dense=dense)
    except IcdError as error:
        return refused(error, given)
    chosen = card["chosen"]
    print(f"chosen: {chosen['sparsity']:.3f}" if chosen else "no rung stayed within the tolerance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
