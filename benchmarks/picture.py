"""Draw docs/before_after.svg: a pruned weight of trained MiniLM as it lies, before and after.

Nothing is planted: vec16:0.5 prunes the model, the order is the solver's, the numbers in the
picture are counted in the two masks. Run: python benchmarks/picture.py [--out FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from icd_tvm._tvm import GenericConst, apply_pass, const_name, relax
from icd_tvm.adapters.sparsity import parse_sparsity
from icd_tvm.models.importer import import_onnx
from icd_tvm.models.registry import build
from icd_tvm.relax_passes.apply_sparsity import ApplySparsity
from icd_tvm.relax_passes.repermute_pass import RepermutePass

ROWS, COLUMNS, TILE, CELL = 40, 192, 16, 4
GAP, HEAD = 46, 24
OUT = Path(__file__).parents[1] / "docs" / "before_after.svg"


def masks(layer: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Return which weights of an FFN's first matmul are kept, before and after the order."""
    pruned = apply_pass(
        ApplySparsity(parse_sparsity("vec16:0.5")), import_onnx(build("minilm")).mod
    )
    ordered = apply_pass(RepermutePass(compact=False), pruned)
    name = [n for n in sorted(weights(pruned)) if "intermediate" in n][layer]
    return weights(pruned)[name] != 0, weights(ordered)[name] != 0, name


def weights(mod: object) -> dict[str, np.ndarray]:
    """Return the 2-D constants of ``main`` by name."""
    found: dict[str, np.ndarray] = {}

    def visit(expr: object) -> None:
        if isinstance(expr, GenericConst) and const_name(expr) and len(expr.ty.shape) == 2:
            found[const_name(expr)] = expr.value.numpy()

    relax.analysis.post_order_visit(mod["main"], visit)  # type: ignore[index]
    return found


def touched(mask: np.ndarray) -> float:
    """Return the share of pieces of one row and one tile that hold a kept weight."""
    rows, columns = mask.shape
    return float(mask.reshape(rows, columns // TILE, TILE).any(axis=2).mean())


def runs(mask: np.ndarray) -> Iterator[str]:
    """Yield one path segment for each run of kept weights."""
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2):
            yield f"M{start} {y}h{end - start}v1h-{end - start}z"


def panel(mask: np.ndarray, title: str, y: int) -> str:
    """Return one mask with its title and the borders of the tiles."""
    grid = "".join(f"M{x} 0v{ROWS}" for x in range(0, COLUMNS + 1, TILE))
    kept = "".join(runs(mask[:ROWS, :COLUMNS]))
    return (
        f'<text x="0" y="{y + 16}">{title}</text>'
        f'<g transform="translate(0 {y + HEAD}) scale({CELL})">'
        f'<rect width="{COLUMNS}" height="{ROWS}" fill="#fff"/>'
        f'<path d="{kept}" fill="#1f5fa8"/>'
        f'<path d="{grid}" stroke="#b8b8b8" stroke-width=".15" fill="none"/></g>'
    )


def picture(before: np.ndarray, after: np.ndarray, name: str) -> str:
    """Return the SVG text."""
    width, height = COLUMNS * CELL, 2 * (ROWS * CELL + HEAD) + GAP
    first = f"{touched(before):.0%} of the pieces that a kernel loads hold a kept weight"
    second = f"{touched(after):.0%}: the rest is skipped"
    size = f"{before.shape[0]} x {before.shape[1]}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {width + 16} {height}" '
        f'font-family="sans-serif" font-size="14" role="img"><title>{name}, {size}</title>'
        f'<rect x="-8" width="{width + 16}" height="{height}" fill="#fff"/>'
        + panel(before, f"Pruned (vec16:0.5), order untouched: {first}", 0)
        + panel(after, f"The same weights, columns re-permuted: {second}", ROWS * CELL + GAP)
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--layer", type=int, default=2)
    arguments = parser.parse_args()
    before, after, name = masks(arguments.layer)
    if touched(after) > touched(before) or before.sum() != after.sum():
        raise SystemExit("the order did not help, or weights were lost: no picture")
    arguments.out.write_text(picture(before, after, name))
    print(f"{name}: tiles touched {touched(before):.3f} -> {touched(after):.3f}")


if __name__ == "__main__":
    main()
